"""From a recipe back to YAML."""

from __future__ import annotations

from typing import Any

import yaml

from weightsmith.recipe.schema import Merge


class _Dumper(yaml.SafeDumper):
    """Block style for structure, flow style for short lists of plain values."""


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    plain = all(isinstance(entry, bool | int | float | str) for entry in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def to_yaml(recipe: Merge) -> str:
    """Return a recipe as YAML: steps first, defaults left out. Reading it back gives an equal recipe."""
    values = _plain(recipe.model_dump(exclude_defaults=True, exclude_none=True))
    steps = values.pop("steps", None)
    ordered = {"steps": steps, **values} if steps else values
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
