"""Parameters of methods: declared by annotations, described and checked here."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from weightsmith.errors import MethodError, did_you_mean

T = TypeVar("T")


class _PerModel:
    """Marks a parameter that has one value for each model."""


PerModel = Annotated[tuple[T, ...], _PerModel()]
"""``PerModel[float]``: one value for each model, passed to the method as a tuple."""


@dataclass(frozen=True)
class Param:
    """What a parameter means and which values it takes; used inside ``Annotated``.

    Attributes:
        description: one sentence for people.
        minimum: the least value, or None.
        maximum: the greatest value, or None.
        exclusive: whether minimum and maximum themselves are excluded.
    """

    description: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as read from its signature."""

    name: str
    kind: type
    choices: tuple[str, ...]
    per_model: bool
    required: bool
    default: Any
    about: Param
    optional: bool = False

    @property
    def range_text(self) -> str:
        """The values it takes, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is bool:
            return "true, false"
        low, high = self.about.minimum, self.about.maximum
        if low is not None and high is not None:
            left, right = ("(", ")") if self.about.exclusive else ("[", "]")
            return f"{left}{low:g}, {high:g}{right}"
        if low is not None:
            return f"{'>' if self.about.exclusive else '>='} {low:g}"
        if high is not None:
            return f"{'<' if self.about.exclusive else '<='} {high:g}"
        return "any number" if self.kind in (float, int) else "any text"

    def check(self, value: Any) -> Any:
        """Return the value in this parameter's type.

        Raises:
            MethodError: if the value is of another type or out of range. The message begins with the name.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            if value not in self.choices:
                hint = did_you_mean(str(value), self.choices)
                raise MethodError(f"{self.name} is {value!r}{hint}; it takes one of {self.range_text}")
            return value
        if self.kind is bool:
            if not isinstance(value, bool):
                raise MethodError(f"{self.name} is {value!r}; it takes true or false")
            return value
        if self.kind is str:
            if not isinstance(value, str):
                raise MethodError(f"{self.name} is {value!r}; it takes a text")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise MethodError(f"{self.name} is {value!r}; it takes a number")
        if self.kind is int:
            if value != int(value):
                raise MethodError(f"{self.name} is {value!r}; it takes a whole number")
            value = int(value)
        else:
            value = float(value)
        low, high = self.about.minimum, self.about.maximum
        outside = (low is not None and (value <= low if self.about.exclusive else value < low)) or (
            high is not None and (value >= high if self.about.exclusive else value > high)
        )
        if outside:
            raise MethodError(f"{self.name} is {value:g}; it must be in {self.range_text}")
        return value


def read_parameters(function: Callable[..., Any], method_name: str) -> dict[str, Parameter]:
    """Read a method's parameters from its signature: those that are keyword-only.

    Raises:
        MethodError: if one has no annotation, or one that is not understood.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if p.name not in hints:
            raise MethodError(f"parameter {p.name!r} of method {method_name!r} has no type annotation")
        found[p.name.rstrip("_")] = _parameter(p.name.rstrip("_"), hints[p.name], p.default, method_name)
    return found


def _parameter(name: str, hint: Any, default: Any, method_name: str) -> Parameter:
    about, per_model = Param(""), False
    if typing.get_origin(hint) is Annotated:
        for note in hint.__metadata__:
            about = note if isinstance(note, Param) else about
            per_model = per_model or isinstance(note, _PerModel)
        hint = hint.__origin__
    if per_model:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Annotated:
        about = next((note for note in hint.__metadata__ if isinstance(note, Param)), about)
        hint = hint.__origin__
    parts = typing.get_args(hint)
    optional = type(None) in parts
    if optional:
        hint = next(part for part in parts if part is not type(None))
    choices = tuple(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()
    kind = str if choices else hint
    if kind not in (float, int, bool, str):
        raise MethodError(
            f"parameter {name!r} of method {method_name!r} is annotated {hint!r}; "
            "use float, int, bool, str, a Literal of texts, or PerModel of one of these"
        )
    required = default is inspect.Parameter.empty
    if per_model and isinstance(default, tuple) and len(default) == 1:
        # Written as a tuple of one, so that the annotation is true; it is the default of every model.
        default = default[0]
    return Parameter(
        name=name,
        kind=kind,
        choices=choices,
        per_model=per_model,
        required=required,
        default=None if required else default,
        about=about,
        optional=optional,
    )
