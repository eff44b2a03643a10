"""How a recipe names a model: ``path``, ``path@revision``, ``path+adapter``, ``path@revision+adapter@revision``.

Several adapters stand one after the other, each perhaps with a weight: ``path+adapter+0.5*other``. One of the models of
a bundle is ``path#task``, also after a revision. ``base+path#task`` names its base as well, where the bundle does not
hold it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from weightsmith.checkpoint.storage import is_url
from weightsmith.errors import RecipeError

_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?)\*")


@dataclass(frozen=True)
class OnTop:
    """What is folded into a model: an adapter, or one of a bundle's models that it is the base of.

    Attributes:
        reference: what it is.
        weight: how much of it is taken.
    """

    reference: Reference
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self._factor}{self.reference}"

    @property
    def short_name(self) -> str:
        """See :attr:`Reference.short_name`."""
        return f"{self._factor}{self.reference.short_name}"

    @property
    def _factor(self) -> str:
        return "" if self.weight == 1 else f"{repr(self.weight).removesuffix('.0')}*"


@dataclass(frozen=True)
class Reference:
    """A model, perhaps at a revision, perhaps one of a bundle's, perhaps with adapters on it.

    Attributes:
        path: a folder, a file, a hub id or a URL.
        revision: a branch, tag or commit of a hub id, or None.
        adapters: what is folded into it.
        task: which model of a bundle, or None.
    """

    path: str
    revision: str | None = None
    adapters: tuple[OnTop, ...] = ()
    task: str | None = None

    def __str__(self) -> str:
        text = self.path if self.revision is None else f"{self.path}@{self.revision}"
        text = text if self.task is None else f"{text}#{self.task}"
        return "+".join([text, *map(str, self.adapters)])

    @property
    def short_name(self) -> str:
        """The last part of the path, with the adapters': a name that does not change with the folder it is in."""
        path = self.path.rstrip("/") or self.path
        name = path.replace("\\", "/").rsplit("/", 1)[-1]
        if name in ("", ".", ".."):
            name = os.path.basename(os.path.realpath(path)) or path
        name = name if self.revision is None else f"{name}@{self.revision}"
        name = name if self.task is None else f"{name}#{self.task}"
        return "+".join([name, *(one.short_name for one in self.adapters)])


class ShortNames:
    """Short names of models, each other than all before."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def of(self, reference: str | os.PathLike[str]) -> str:
        """Return the short name of a model, with a number where another has it.

        Raises:
            RecipeError: if the reference is none.
        """
        name = parse_reference(reference).short_name
        self._used[name] = self._used.get(name, 0) + 1
        if self._used[name] > 1:
            # One of a bundle's models may be named so already.
            numbers = (f"{name}#{number}" for number in count(self._used[name]))
            name = next(one for one in numbers if one not in self._used)
            self._used[name] = 1
        return name


def parse_reference(text: str | os.PathLike[str]) -> Reference:
    """Read a model reference.

    A path that exists here is taken as it stands, also where it holds ``+``, ``@``, ``#`` or ``*``.

    Raises:
        RecipeError: if it is empty or names more than one revision or task.
    """
    text = os.fspath(text)
    if not text.strip():
        raise RecipeError("a model reference is empty")
    model, *adapters = _split(text)
    if not model or not all(adapters):
        raise RecipeError(f"{text!r}: both sides of '+' must name something")
    return replace(_one(model), adapters=tuple(map(_on_top, adapters)))


def with_adapters(model: str, adapters: Sequence[tuple[str, float]]) -> str:
    """Return the reference of a model with adapters on it, each with its weight.

    Raises:
        RecipeError: if it would be read as something else, for the characters in a path.
    """
    on_top = tuple(OnTop(_one(path), float(weight)) for path, weight in adapters)
    reference = replace(_one(model), adapters=on_top)
    if parse_reference(str(reference)) != reference:
        raise RecipeError(
            f"{reference} would be read as {' and '.join(_split(str(reference)))}: give paths without '+' and '*'"
        )
    return str(reference)


def _split(text: str) -> list[str]:
    """Cut a reference at its ``+``; a path may hold some, so a cut behind what exists goes first."""
    path, _, task = text.rpartition("#")
    if os.path.exists(_path(text)) or (task and "+" not in task and os.path.exists(path)):
        return [text]
    places = [place for place, letter in enumerate(text) if letter == "+"]
    if not places:
        return [text]
    place = next((place for place in places if _begins(text[:place])), places[0])
    return [text[:place], *_split(text[place + 1 :])]


def _begins(part: str) -> bool:
    """Whether what stands before a ``+`` is there."""
    part = _path(part)
    return any(map(os.path.exists, (part, part.split("@")[0], part.rpartition("#")[0])))


def _path(part: str) -> str:
    """Return what is behind a weight, unless there is a file whose name begins like one."""
    return part if os.path.exists(part) else _WEIGHT.sub("", part, count=1) if _WEIGHT.match(part) else part


def _on_top(text: str) -> OnTop:
    match = _WEIGHT.match(text)
    if match is None or os.path.exists(text):
        return OnTop(_one(text))
    weight = float(match[1])
    if not math.isfinite(weight) or match.end() == len(text):
        raise RecipeError(f"{text!r}: write an adapter with its weight as 0.5*PATH")
    return OnTop(_one(text[match.end() :]), weight)


def _one(text: str) -> Reference:
    if os.path.exists(text):
        return Reference(text)
    path, sign, task = text.rpartition("#")
    if not sign or "/" in task:
        return _at_revision(text)
    if "#" in path and not os.path.exists(path):
        raise RecipeError(f"{text!r} names more than one task of a bundle")
    if not path or not task:
        raise RecipeError(f"{text!r}: both sides of '#' must name something")
    return replace(_at_revision(path), task=task)


def _at_revision(text: str) -> Reference:
    if os.path.exists(text) or is_url(text) or "@" not in text:
        return Reference(text)
    path, _, revision = text.rpartition("@")
    if "@" in path and not os.path.exists(path):
        raise RecipeError(f"{text!r} names more than one revision")
    if not path or not revision:
        raise RecipeError(f"{text!r}: both sides of '@' must name something")
    return Reference(path, revision)
