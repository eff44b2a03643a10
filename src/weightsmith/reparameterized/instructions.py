"""What a person says of a model that its tensors' names do not: ``kind:names,setting=value``, or the same in YAML."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.errors import RecipeError, did_you_mean, shown
from weightsmith.recipe.yaml_text import LARGEST, parse, parse_value
from weightsmith.reparameterized.weights import STABLE


@dataclass(frozen=True)
class Setting:
    """A setting of a kind of instruction.

    Attributes:
        about: what it says.
        check: returns a value as it is used, or raises ValueError with what it must be.
        default: its value where none is given.
        required: whether one must be given.
    """

    about: str
    check: Callable[[Any], Any]
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Instruction:
    """One thing that a person says.

    Attributes:
        kind: what is said; a key of :data:`SETTINGS`.
        names: the tensors or modules it is said of: a name, or a pattern with ``*`` and ``?``.
        settings: the settings that were given.
    """

    kind: str
    names: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, name: str) -> bool:
        """Whether it is said of a tensor or module."""
        return fnmatch.fnmatchcase(name, self.names)

    def __getitem__(self, setting: str) -> Any:
        return self.settings.get(setting, SETTINGS[self.kind][setting].default)

    def __str__(self) -> str:
        return ",".join([f"{self.kind}:{self.names}", *(f"{key}={value}" for key, value in self.settings.items())])

    def to_json(self) -> dict[str, Any]:
        """Return it as a file of instructions has it."""
        return {"kind": self.kind, "names": self.names, **self.settings}


Given = Instruction | str | Mapping[str, Any]


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # The first of a Sequential is named 0, which YAML takes for a number.
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError("a name")
    return value


def _texts(value: Any) -> str:
    names = _text(value)
    if not all(names.split("+")):
        raise ValueError("names with '+' between them")
    return names


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number")
    return value


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError("a number above 0")
    return float(value)


def _number_or_name(value: Any) -> float | str:
    if isinstance(value, str):
        return _text(value)
    if _number(value) == 0:
        raise ValueError("a number that is not 0, or the name of a tensor beside the weight")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError("a share from 0 to 1")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("a whole number from 0")
    return value


def _yes(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _sizes(value: Any) -> str:
    text = str(value)
    if not all(part.isdigit() and 0 < int(part) < 10_000 for part in text.split("x")) or len(text) > 40:
        raise ValueError("a kernel's size, such as 16 or 16x16")
    return text


def _function(value: Any) -> str:
    if value not in STABLE:
        raise ValueError("one of " + ", ".join(STABLE))
    return str(value)


_OUT = Setting("what the folded layer is called in the module; by default the module itself", _text)

SETTINGS: dict[str, dict[str, Setting]] = {
    "keep": {},
    "eps": {"value": Setting("what these batch norms add to the variance", _positive, required=True)},
    "sigma_reparam": {"kernel": Setting("the kernel's size of a convolution, whose weight is stored flat", _sizes)},
    "compander": {
        "a": Setting("a, or the name of a tensor beside the weight that holds it", _number_or_name, required=True),
        "b": Setting("b, or the name of a tensor beside the weight that holds it", _number_or_name, required=True),
    },
    "conditioned": {},
    "stable_ssm": {
        "function": Setting("f: " + ", ".join(STABLE), _function, required=True),
        "a": Setting("a of the functions best and best_discrete", _number, 1.0),
        "b": Setting("b of the functions best and best_discrete", _number, 0.5),
    },
    "conv_bn": {
        "conv": Setting("the convolution or linear layer, in the module", _text, required=True),
        "norm": Setting("the batch norm behind it", _text, required=True),
        "out": Setting("what the folded layer is called; by default as the convolution is", _text),
        "transposed": Setting("whether the convolution is a transposed one", _yes, False),
    },
    "bn_linear": {
        "norm": Setting("the batch norm, in the module", _text, required=True),
        "linear": Setting("the linear or 1x1 layer behind it", _text, required=True),
        "out": Setting("what the folded layer is called; by default as the linear layer is", _text),
    },
    "branches": {
        "conv": Setting("the layers side by side, with '+' between them", _texts, required=True),
        "skip": Setting("a batch norm of the input beside them", _text),
        "residual": Setting("whether the input itself is added", _yes, False),
        "norm": Setting("a batch norm of the sum", _text),
        "scale": Setting("a tensor that multiplies the sum, before the input is added: a layer scale", _text),
        "channels": Setting("input channels, where groups differ and nothing shows how many there are", _count),
        "out": _OUT,
    },
    "serial": {
        "first": Setting("the layer that is applied first, in the module", _text, required=True),
        "second": Setting("the one behind it", _text, required=True),
        "channels": Setting("input channels of the first, where it is a convolution", _count),
        "padding": Setting("whether the second sees zeros beyond the border", _yes, True),
        "out": _OUT,
    },
    "repavit": {
        "idle": Setting("the share of hidden channels without an activation", _share),
        "active": Setting("how many hidden channels, the first ones, have an activation", _count),
    },
}


def read_instructions(given: Sequence[Given], path: str | os.PathLike[str] | None = None) -> tuple[Instruction, ...]:
    """Read instructions, and those of a file behind them.

    Args:
        given: each as a text (``kind:names,setting=value``), as a mapping, or read already.
        path: a YAML or JSON file with a list of mappings under ``rules``.

    Raises:
        RecipeError: if one is not understood, or the file cannot be read.
    """
    found = [_read(one, f"rule {shown(one)}") for one in given]
    if path is not None:
        found += [_read(one, f"{os.fspath(path)}: rules[{i}]") for i, one in enumerate(_entries(Path(path)))]
    return tuple(found)


def _entries(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise RecipeError(f"{path} has more than {LARGEST:,} bytes; rules are a few lines")
    try:
        documents = parse(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8") from error
    if len(documents) != 1 or list(documents[0]) != ["rules"] or not isinstance(documents[0]["rules"], list):
        raise RecipeError(f"{path} must hold one key, rules, with a list of rules: {{kind: …, names: …}}")
    entries: list[Any] = documents[0]["rules"]
    return entries


def _read(given: Any, place: str) -> Instruction:
    if isinstance(given, Instruction):
        return given
    content = _of_text(given, place) if isinstance(given, str) else given
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{place}: write kind:names,setting=value, or a mapping with kind and names")
    kind, names = content.get("kind"), content.get("names")
    if not isinstance(kind, str) or kind not in SETTINGS:
        hint = did_you_mean(kind, SETTINGS) if isinstance(kind, str) else ""
        raise RecipeError(f"{place}: there is no kind {shown(kind)}{hint}; kinds are {', '.join(SETTINGS)}")
    if not isinstance(names, str) or not names:
        raise RecipeError(f"{place}: names is {shown(names)}; it must be a name, or a pattern with * and ?")
    known = SETTINGS[kind]
    settings = {}
    for key, value in content.items():
        if key in ("kind", "names"):
            continue
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise RecipeError(f"{place}: {kind} has no setting {shown(key)}{did_you_mean(key, known)}; {takes}")
        try:
            settings[key] = known[key].check(value)
        except ValueError as error:
            raise RecipeError(f"{place}: {key} is {shown(value)}; it must be {error}") from None
    for key, setting in known.items():
        if setting.required and key not in settings:
            raise RecipeError(f"{place}: {kind} needs {key}: {setting.about}")
    return Instruction(kind, names, settings)


def _of_text(text: str, place: str) -> dict[str, Any]:
    kind, colon, rest = text.partition(":")
    names, *pairs = rest.split(",")
    content: dict[str, Any] = {"kind": kind, "names": names}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key or key in content:
            raise RecipeError(f"{place}: {shown(pair)} is not setting=value, or is given twice")
        try:
            content[key] = parse_value(value)
        except ValueError as error:
            raise RecipeError(f"{place}: the value of {key} is not YAML") from error
    if not colon:
        raise RecipeError(f"{place}: write kind:names, such as keep:*head* or eps:*,value=0.001")
    return content
