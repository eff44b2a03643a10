"""The shapes that an adapter's tensors must have to fit one another and the weight that they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One way in which a kind of adapter is laid out, as shapes with names for lengths.

    A shape is text: ``"out in"``, ``"out r 1 1"``. Equal names stand for equal lengths; a number stands for itself.
    ``...`` as the last part of a shape stands for all axes that are left, the same ones wherever it appears.

    Attributes:
        weight: the shape of the weight.
        parts: part -> its shape, of the parts that must be there.
        optional: part -> its shape, of those that may be there.
        when: the key of the config without which it is not tried; None for a form that always is.
    """

    weight: str
    parts: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    when: str | None = None

    @property
    def names(self) -> set[str]:
        """All parts that it may have."""
        return {*self.parts, *self.optional}

    def fit(self, weight: Shape | None, shapes: Mapping[str, Shape]) -> dict[str, Shape] | None:
        """Return the lengths by their names, or None if these shapes are not of this form.

        Args:
            weight: the weight's shape; None if there is no base.
            shapes: the shapes of all parts that are there.

        Returns:
            Name -> lengths: one, or any number for ``...``.
        """
        if not set(self.parts) <= set(shapes) <= self.names:
            return None
        lengths: dict[str, Shape] = {}
        pairs = [(self.weight, weight)] if weight is not None else []
        pairs += [
            (text, shapes[part]) for part, text in (*self.parts.items(), *self.optional.items()) if part in shapes
        ]
        for text, shape in pairs:
            if not _bind(text.split(), shape, lengths):
                return None
        return lengths

    def axes(self, weight: Shape) -> bool:
        """Whether it is of weights of as many axes."""
        words = self.weight.split()
        return len(words) == len(weight) or (words[-1:] == ["..."] and len(words) - 1 <= len(weight))

    def weight_shape(self, lengths: Mapping[str, Shape]) -> Shape | None:
        """Return the weight's shape by the lengths that were found, or None if they do not tell."""
        shape: Shape = ()
        for word in self.weight.split():
            if word not in lengths and not word.isdigit():
                return None
            shape += (int(word),) if word.isdigit() else lengths[word]
        return shape

    def __str__(self) -> str:
        """Return it as one line, for errors and pages."""
        parts = [f"{name} [{', '.join(text.split())}]" for name, text in self.parts.items()]
        parts += [f"perhaps {name} [{', '.join(text.split())}]" for name, text in self.optional.items()]
        return f"a weight [{', '.join(self.weight.split())}] with " + ", ".join(parts)


def form(weight: str, *, optional: Mapping[str, str] | None = None, when: str | None = None, **parts: str) -> Form:
    """Return a form: ``form("out in", lora_A="r in", lora_B="out r")``."""
    return Form(weight, parts, optional or {}, when)


def _bind(words: list[str], shape: Shape, lengths: dict[str, Shape]) -> bool:
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
        elif lengths.setdefault(word, (length,)) != (length,):
            return False
    return True
