"""What an adapter's config says, checked: it comes from a stranger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.adapters.patterns import Patterns
from weightsmith.errors import CheckpointError, did_you_mean, shown

Value = float | int | bool | str | tuple[int, ...] | None
_KINDS = {
    "number": "number",
    "whole": "whole number",
    "wholes": "list of whole numbers",
    "flag": "true or false",
    "text": "text",
}


@dataclass(frozen=True)
class Setting:
    """One key of ``adapter_config.json`` that bears on the weights.

    Attributes:
        name: the key.
        kind: what its value is.
        default: the value where the config has none.
        about: what it means.
        patterns: another key, whose patterns give values to modules of their own.
        choices: the texts that are understood, where they are few.
    """

    name: str
    kind: Literal["number", "whole", "wholes", "flag", "text"]
    default: Value
    about: str
    patterns: str | None = None
    choices: tuple[str, ...] = ()

    def check(self, owner: str, value: Any, key: str | None = None) -> Value:
        """Return a value of this setting, or refuse it.

        Raises:
            CheckpointError: if it is of another kind.
        """
        if value is None and (self.default is None or self.kind == "flag"):
            return self.default
        if self.kind == "flag":
            good = isinstance(value, bool) or value in (0, 1)
        elif self.kind == "text":
            good = isinstance(value, str) and len(value) < 200
        elif self.kind == "wholes":
            good = isinstance(value, list | tuple) and all(_is_number(one) and one == int(one) for one in value)
        else:
            good = _is_number(value) and (self.kind == "number" or value == int(value))
        if not good:
            raise CheckpointError(
                f"{owner}: adapter_config.json gives {key or self.name} as {shown(value)}, which is no "
                f"{_KINDS[self.kind]}"
            )
        if self.choices and value not in self.choices:
            raise CheckpointError(
                f"{owner}: adapter_config.json gives {self.name} as {shown(value)}, of which nothing is known"
                f"{did_you_mean(str(value), self.choices)}; known are {', '.join(self.choices)}"
            )
        if self.kind == "flag":
            return bool(value)
        if self.kind == "wholes":
            return tuple(int(one) for one in value)
        return int(value) if self.kind == "whole" else value


class Settings:
    """The settings of one adapter."""

    def __init__(self, owner: str, config: Mapping[str, Any], known: Sequence[Setting]) -> None:
        """Read and check what is known of a config; the rest of it does not bear on weights.

        Args:
            owner: the adapter's name, for errors.
            config: the parsed ``adapter_config.json``.
            known: the settings of its kind.

        Raises:
            CheckpointError: if a value is none of its kind, or a pattern cannot be matched.
        """
        self._owner = owner
        self._values: dict[str, Value] = {}
        self._patterns: dict[str, Patterns] = {}
        for setting in known:
            self._values[setting.name] = setting.check(owner, config.get(setting.name, setting.default))
            if setting.patterns is not None:
                self._patterns[setting.name] = _patterns(owner, setting, config.get(setting.patterns) or {})

    def value(self, name: str, module: str) -> Value:
        """Return a setting's value for a module."""
        value = self._values[name]
        if name in self._patterns and isinstance(value, int | float):
            return self._patterns[name].value(module, value)
        return value


def _is_number(value: Any) -> bool:
    # Written so, NaN and whole numbers beyond a float's range are refused as well.
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e18


def _patterns(owner: str, setting: Setting, given: Any) -> Patterns:
    key = str(setting.patterns)
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{owner}: adapter_config.json gives {key} as {shown(given)}, which is no map")
    for pattern, value in given.items():
        setting.check(owner, value, f"{key}[{shown(pattern)}]")
        if value is None:
            raise CheckpointError(f"{owner}: adapter_config.json gives {key}[{shown(pattern)}] no value")
    try:
        return Patterns(given)
    except CheckpointError as error:
        raise CheckpointError(f"{owner}: {key} in adapter_config.json: {error}") from error
