"""What a fine-tune changed in one tensor, read a tile at a time or whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weightsmith import dtypes
from weightsmith.bundle.tiles import TILE, tile_starts
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError
from weightsmith.kernels.change import finite_change
from weightsmith.kernels.convert import widen

FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True, eq=False)
class Difference:
    """One tensor of a fine-tune and what it was in the base.

    Attributes:
        name: its name in the fine-tune.
        base: the base's tensor.
        tuned: the fine-tune's tensor, of the same shape.
    """

    name: str
    base: Tensor
    tuned: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tuned.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tuned.size

    @cached_property
    def working(self) -> DType:
        """The dtype of the arithmetic: float64 where one of the two is, else float32."""
        return dtypes.working_dtype([self.base.dtype, self.tuned.dtype])

    def read(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return elements ``start`` to ``stop`` of base, fine-tune and change: ``[n]`` each, in ``working``.

        Raises:
            CheckpointError: if there are values that are NaN or infinite, or a change is beyond float32.
        """
        base = widen(self.base.read(start, stop), self.working)
        tuned = widen(self.tuned.read(start, stop), self.working)
        return base, tuned, finite_change(tuned, base, self._refusal)

    def tiles(self) -> Iterator[tuple[int, Array, Array, Array]]:
        """Yield the first element of every tile, and the tile of base, fine-tune and change."""
        for start in tile_starts(self.size):
            yield start, *self.read(start, min(start + TILE, self.size))

    def matrix(self) -> tuple[Array, Sums]:
        """Return the whole change, flat, in the dtype of the arithmetic; and sums over it."""
        change = np.empty(self.size, self.working)
        sums = []
        for start, _, tuned, tile in self.tiles():
            change[start : start + len(tile)] = tile
            sums.append((_squares(tile), _squares(tuned)))
        return change, _total(sums)

    def sums(self) -> Sums:
        """Return sums over the change."""
        return _total([(_squares(change), _squares(tuned)) for _, _, tuned, change in self.tiles()])

    def _refusal(self, by_base: bool, what: str) -> CheckpointError:
        whose = "the base" if by_base else "the fine-tune"
        return CheckpointError(
            f"{self.name} of {whose} has {what}, of which no adapter can be made; mend the model, or leave the tensor "
            f"as it is in the base (--exclude '{self.name}')"
        )


@dataclass(frozen=True)
class Sums:
    """Sums of squares, float64.

    Attributes:
        change: of the change.
        tuned: of the fine-tune's weights.
    """

    change: float
    tuned: float


def weights_of(tensor: Tensor) -> float:
    """Return the sum of squares of a tensor of floats; values that are not finite count as nothing."""
    parts = []
    for start in tile_starts(tensor.size):
        values = widen(tensor.read(start, min(start + TILE, tensor.size)), FLOAT64)
        parts.append(_squares(values[np.isfinite(values)]))
    return math.fsum(parts)


def _squares(values: Array) -> float:
    wide = values.astype(FLOAT64, copy=False)
    return float(wide @ wide)


def _total(sums: list[tuple[float, float]]) -> Sums:
    return Sums(math.fsum(change for change, _ in sums), math.fsum(tuned for _, tuned in sums))
