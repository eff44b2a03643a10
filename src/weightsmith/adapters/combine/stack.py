"""What several adapters hold for one layer, as a method sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.factors import total


@dataclass(frozen=True)
class Stack:
    """What several adapters hold for one layer.

    Attributes:
        module: the layer's name.
        parts: each adapter's change as a product of two factors, its scale in the left one; of rank 0 where it does
            not change the layer. The weight is a matrix ``[out, everything else]``, an embedding's ``[rows, width]``.
        weights: one for each adapter.
        labels: a stable name for each adapter: random numbers depend on it.
        seed: of random methods.
    """

    module: str
    parts: tuple[LowRank, ...]
    weights: tuple[float, ...]
    labels: tuple[str, ...]
    seed: int = 0

    def sum(self) -> LowRank:
        """Return the weighted sum of the changes, exactly: factors side by side."""
        return total(self.parts, self.weights)

    def taking_part(self) -> Iterator[tuple[int, LowRank, float]]:
        """Yield number, change and weight of every adapter that changes the layer and has a weight."""
        for number, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            if part.rank and weight:
                yield number, part, weight
