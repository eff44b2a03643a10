"""The value that a setting has for one tensor."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from weightsmith.recipe.schema import Condition, Scalar, Scope, Selection, Setting


class Place(NamedTuple):
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


@dataclass(frozen=True)
class Rule:
    """A value for the tensors that a condition lets through.

    Attributes:
        condition: the condition, or None where the value is for all tensors.
        value: the value, or the values that are spread over the layers.
    """

    condition: Condition | None
    value: Scalar | tuple[Scalar, ...]


def rules(levels: Sequence[Mapping[str, Setting]], parameter: str) -> tuple[Rule, ...]:
    """Return what levels of settings say of a parameter, for any tensor: of the rules, the first that holds counts.

    Args:
        levels: settings by parameter, the nearest level first: model, slice, module, merge.
        parameter: the parameter's name.
    """
    found: list[Rule] = []
    for level in levels:
        for rule in _rules(level.get(parameter)):
            found.append(rule)
            if rule.condition is None:
                # What comes after it never counts.
                return tuple(found)
    return tuple(found)


def _rules(setting: Setting | None) -> Iterator[Rule]:
    if setting is None:
        return
    if isinstance(setting, tuple) and any(isinstance(entry, Condition) for entry in setting):
        for entry in setting:
            yield from _rules(entry)
        return
    value = setting.value if isinstance(setting, Condition) else setting
    if value != ():
        # What is left are values: a tuple with conditions among them was dealt with above.
        yield Rule(_condition(setting), cast("Scalar | tuple[Scalar, ...]", value))


def _condition(setting: Setting) -> Condition | None:
    """Return the condition of a setting, or None where all tensors fulfil it."""
    if not isinstance(setting, Condition) or (setting.filter in (None, "*") and setting.scope is None):
        return None
    return setting


def value_at(candidates: Sequence[Rule], where: Place) -> Scalar | None:
    """Return the value that rules give a tensor, or None if none of them holds.

    A list of values is a schedule: its entries are spread evenly over the layers, from the first to the last.
    Numbers are interpolated linearly between them; other values hold until the next entry's place. As in
    mergekit, tensors outside layers take the first entry, and the layer of a stack of one the last.

    Args:
        candidates: the rules, as :func:`rules` gives them.
        where: the tensor.
    """
    for rule in candidates:
        if rule.condition is None or holds(rule.condition, where):
            value = rule.value
            return _interpolate(value, where.position or 0.0) if isinstance(value, tuple) else value
    return None


def constant(candidates: Sequence[Rule]) -> bool:
    """Whether rules give every tensor the same value."""
    return not candidates or (candidates[0].condition is None and not isinstance(candidates[0].value, tuple))


def _interpolate(values: Sequence[Scalar], position: float) -> Scalar:
    place = position * (len(values) - 1)
    before = math.floor(place)
    after = min(before + 1, len(values) - 1)
    left, right = values[before], values[after]
    if isinstance(left, bool | str) or isinstance(right, bool | str) or before == after:
        return left
    return left + (place - before) * (right - left)


def holds(selection: Selection, where: Place) -> bool:
    """Whether a filter and a scope let a tensor through."""
    if selection.filter is not None and selection.filter != "*" and selection.filter not in where.name:
        return False
    return selection.scope is None or _in_scope(selection.scope, where)


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
