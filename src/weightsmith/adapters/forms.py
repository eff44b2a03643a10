"""The shapes that an adapter's tensors must have to fit one another and the weight that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One way in which a kind of adapter is laid out, as shapes with names for lengths.

    A shape is text: ``"out in"``, ``"out r 1 1"``. Equal names stand for equal lengths; a number stands for itself, and
    ``k*b`` for a product of lengths that have their names elsewhere. ``...`` as the last part of a shape stands for all
    axes that are left, the same ones wherever it appears. A part whose name ends in ``.*`` may be there any number of
    times, numbered from 0: ``blocks.*`` are ``blocks.0``, ``blocks.1``.

    Attributes:
        weight: the shape of the weight.
        parts: part -> its shape, of the parts that must be there.
        optional: part -> its shape, of those that may be there.
        shared: part -> its shape, of those that all layers share.
        when: the key of the config without which it is not tried; None for a form that always is.
    """

    weight: str
    parts: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    when: str | None = None

    @property
    def names(self) -> set[str]:
        """All parts that it may have."""
        return {*self.parts, *self.optional}

    def fit(
        self, weight: Shape | None, shapes: Mapping[str, Shape], shared: Mapping[str, Shape]
    ) -> dict[str, Shape] | None:
        """Return the lengths by their names, or None if these shapes are not of this form.

        Args:
            weight: the weight's shape; None if there is no base.
            shapes: the shapes of all parts that are there.
            shared: the shapes of what all layers share.

        Returns:
            Name -> lengths: one, or any number for ``...``.
        """
        if not self.holds(shapes):
            return None
        lengths: dict[str, Shape] = {}
        products: list[tuple[str, int]] = []
        texts = {**self.parts, **self.optional}
        pairs = [(self.weight, weight)] if weight is not None else []
        pairs += [(texts[declared(part)], shape) for part, shape in shapes.items()]
        pairs += [(text, shared[part]) for part, text in self.shared.items()]
        for text, shape in pairs:
            if not _bind(text.split(), shape, lengths, products):
                return None
        return lengths if all(_length(word, lengths) == length for word, length in products) else None

    def holds(self, parts: Iterable[str]) -> bool:
        """Whether these are parts of this form, and all that it needs."""
        return set(self.parts) <= {declared(part) for part in parts} <= self.names

    def axes(self, weight: Shape) -> bool:
        """Whether it is of weights of as many axes."""
        words = self.weight.split()
        return len(words) == len(weight) or (words[-1:] == ["..."] and len(words) - 1 <= len(weight))

    def weight_shape(self, lengths: Mapping[str, Shape]) -> Shape | None:
        """Return the weight's shape by the lengths that were found, or None if they do not tell."""
        shape: Shape = ()
        for word in self.weight.split():
            if word == "...":
                known: Shape | None = lengths.get(word)
            else:
                length = _length(word, lengths)
                known = None if length is None else (length,)
            if known is None:
                return None
            shape += known
        return shape

    def __str__(self) -> str:
        """Return it as one line, for errors and pages."""
        parts = [f"{name} [{', '.join(text.split())}]" for name, text in self.parts.items()]
        parts += [f"perhaps {name} [{', '.join(text.split())}]" for name, text in self.optional.items()]
        parts += [f"shared {name} [{', '.join(text.split())}]" for name, text in self.shared.items()]
        return f"a weight [{', '.join(self.weight.split())}] with " + ", ".join(parts)


def form(
    weight: str,
    *,
    optional: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    when: str | None = None,
    **parts: str,
) -> Form:
    """Return a form: ``form("out in", lora_A="r in", lora_B="out r")``."""
    return Form(weight, parts, optional or {}, shared or {}, when)


def declared(part: str) -> str:
    """Return the name by which forms speak of a part: of ``blocks.3`` that is ``blocks.*``."""
    return re.sub(r"\.[0-9]+$", ".*", part)


def _length(word: str, lengths: Mapping[str, Shape]) -> int | None:
    """Return a length by its name, a number or a product; None if a name is not known."""
    factors = [(int(name),) if name.isdigit() else lengths.get(name) for name in word.split("*")]
    return None if None in factors else math.prod(factor[0] for factor in factors if factor is not None)


def _bind(words: list[str], shape: Shape, lengths: dict[str, Shape], products: list[tuple[str, int]]) -> bool:
    if words[-1:] == ["..."]:
        words, rest = words[:-1], shape[len(words) - 1 :]
        if len(shape) < len(words) or lengths.setdefault("...", rest) != rest:
            return False
        shape = shape[: len(words)]
    if len(words) != len(shape):
        return False
    for word, length in zip(words, shape, strict=True):
        if word.isdigit():
            if int(word) != length:
                return False
        elif "*" in word:
            products.append((word, length))
        elif lengths.setdefault(word, (length,)) != (length,):
            return False
    return True
