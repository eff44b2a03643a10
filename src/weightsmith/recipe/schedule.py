"""The value that a setting has for one tensor."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsmith.recipe.schema import Condition, Scalar, Scope, Setting


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the output.

    Attributes:
        name: its name.
        layer: its layer, counted from 0 in its stack; None outside layers.
        position: where its layer lies in the slice, from 0 (first) to 1 (last, and only); None outside layers.
        module: the module it belongs to, where the recipe has modules.
    """

    name: str
    layer: int | None = None
    position: float | None = None
    module: str | None = None


def resolve(levels: Sequence[Mapping[str, Setting]], parameter: str, where: Place) -> Scalar | None:
    """Return the value that the nearest level gives a parameter for a tensor, or None if none gives one.

    Args:
        levels: settings by parameter, the nearest level first: model, slice, module, merge.
        parameter: the parameter's name.
        where: the tensor.
    """
    for level in levels:
        setting = level.get(parameter)
        if setting is not None:
            value = evaluate(setting, where)
            if value is not None:
                return value
    return None


def evaluate(setting: Setting, where: Place) -> Scalar | None:
    """Return a setting's value for a tensor, or None if it is a list of conditions of which none holds.

    A list of values is a schedule: its entries are spread evenly over the layers, from the first to the last.
    Numbers are interpolated linearly between them; other values hold until the next entry's place. As in
    mergekit, tensors outside layers take the first entry, and the layer of a stack of one the last.

    Args:
        setting: a value, a schedule, a condition, or a list of conditions, of which the first that holds
            counts.
        where: the tensor.
    """
    if isinstance(setting, Condition):
        return evaluate(setting.value, where) if _holds(setting, where) else None
    if not isinstance(setting, tuple):
        return setting
    if any(isinstance(entry, Condition) for entry in setting):
        for entry in setting:
            value = evaluate(entry, where)
            if value is not None:
                return value
        return None
    return _interpolate([entry for entry in setting if not isinstance(entry, Condition)], where.position or 0.0)


def _interpolate(values: Sequence[Scalar], position: float) -> Scalar | None:
    if not values:
        return None
    place = position * (len(values) - 1)
    before = math.floor(place)
    after = min(before + 1, len(values) - 1)
    left, right = values[before], values[after]
    if isinstance(left, bool | str) or isinstance(right, bool | str) or before == after:
        return left
    return left + (place - before) * (right - left)


def _holds(condition: Condition, where: Place) -> bool:
    if condition.filter not in (None, "*") and str(condition.filter) not in where.name:
        return False
    return condition.scope is None or _in_scope(condition.scope, where)


def _in_scope(scope: Scope, where: Place) -> bool:
    if scope.layers is not None:
        first, end = scope.layers
        if where.layer is None or not first <= where.layer < end:
            return False
    if scope.names is not None and not any(fnmatch.fnmatchcase(where.name, p) for p in _listed(scope.names)):
        return False
    if scope.regex is not None and re.search(scope.regex, where.name) is None:
        return False
    return scope.modules is None or where.module in _listed(scope.modules)


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
