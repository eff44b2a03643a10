"""What an adapter's config says, checked: it comes from a stranger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.adapters.patterns import Patterns
from weightsmith.errors import CheckpointError, did_you_mean, shown

Value = float | int | bool | str | tuple[str, ...] | tuple[int, ...] | None
# Characters of a name or a pattern of modules.
_LONGEST = 1_000
_KINDS = {
    "number": "number",
    "whole": "whole number",
    "wholes": "list of whole numbers",
    "flag": "true or false",
    "text": "text",
    "word": "true, false or text",
    "set": "setting",
    "modules": "list of modules, or a pattern of them",
}


@dataclass(frozen=True)
class Setting:
    """One key of ``adapter_config.json`` that bears on the weights.

    Attributes:
        name: the key.
        kind: what its value is. ``word`` is text, where true and false are words as well; ``set`` says whether it is
            set at all, to whatever; ``modules`` names modules by their ends, or by a pattern.
        default: the value where the config has none.
        about: what it means.
        patterns: another key, whose patterns give values to modules of their own.
        choices: the texts that are understood, where they are few.
    """

    name: str
    kind: Literal["number", "whole", "wholes", "flag", "text", "word", "set", "modules"]
    default: Value
    about: str
    patterns: str | None = None
    choices: tuple[str, ...] = ()

    def check(self, owner: str, value: Any, key: str | None = None) -> Value:
        """Return a value of this setting, or refuse it.

        Raises:
            CheckpointError: if it is of another kind.
        """
        if self.kind == "set":
            return bool(value)
        if value is None and (self.default is None or self.kind in ("flag", "word")):
            return self.default
        if self.kind == "word" and isinstance(value, bool):
            value = str(value).lower()
        if self.kind == "modules":
            return _modules(owner, self.name, value)
        if self.kind == "flag":
            good = isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1))
        elif self.kind in ("text", "word"):
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


def _modules(owner: str, key: str, value: Any) -> Value:
    """Return modules' names as a list, or a pattern as text."""
    if isinstance(value, str) and len(value) < _LONGEST:
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) and len(name) < _LONGEST for name in value):
        return tuple(value)
    raise CheckpointError(
        f"{owner}: adapter_config.json gives {key} as {shown(value)}, which is neither a list of modules nor a pattern"
    )


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
            value = self._values[setting.name]
            if setting.kind == "modules" and isinstance(value, str):
                # PEFT matches the whole name: nothing but the pattern from its start on.
                self._patterns[setting.name] = _compiled(owner, setting.name, {f"^(?:{value})$": 1})

    def value(self, name: str, module: str) -> Value:
        """Return a setting's value for a module."""
        value = self._values[name]
        if name in self._patterns and isinstance(value, int | float):
            return self._patterns[name].value(module, value)
        return value

    def among(self, name: str, module: str) -> bool:
        """Whether a module is one of those that a setting of the kind ``modules`` names."""
        value = self._values[name]
        if isinstance(value, tuple):
            return any(module.endswith(str(ending)) for ending in value)
        return value is not None and self._patterns[name].value(module, 0) == 1


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
    return _compiled(owner, key, given)


def _compiled(owner: str, key: str, given: Mapping[str, float]) -> Patterns:
    try:
        return Patterns(given)
    except CheckpointError as error:
        raise CheckpointError(f"{owner}: {key} in adapter_config.json: {error}") from error
