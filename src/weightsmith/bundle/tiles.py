"""Tensors of a bundle that are made from the same inputs, a tile at a time.

A kind makes several tensors from one: a vector and a mask for every task, say, each of which needs every model. What
is made for one of them is kept for the others while there is room, so that the inputs are read and worked on about
once. Tiles are cut in the same places whatever is asked for, so no result depends on the size of blocks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import OutputError
from weightsmith.kernels.convert import largest_finite, narrow

# Elements of a tile, a multiple of 8: bits of it fill whole bytes.
TILE = 1 << 18
_TAKEN = np.empty(0, np.uint8)


def tile_starts(size: int) -> range:
    """Return the first element of every tile of a tensor."""
    return range(0, size, TILE)


class Together:
    """Several arrays over the elements of one tensor, made a tile at a time.

    Safe to use from several threads.
    """

    def __init__(
        self,
        size: int,
        units: Sequence[int],
        make: Callable[[int, int], tuple[Sequence[Array], Sequence[float]]],
    ) -> None:
        """Say how tiles are made.

        Args:
            size: elements of the tensor that all are over.
            units: for each array, how many elements of the tensor one of its items stands for: 1, or 8 for packed bits.
            make: from the first element of a tile and the one after its last, each array's items; and numbers, as many
                for every tile, that are summed over the tensor.
        """
        self._size = size
        self._units = units
        self._make = make
        self._sums: dict[int, Sequence[float]] = {}
        self._lock = threading.Lock()

    def read(self, which: int, start: int, stop: int) -> Array:
        """Return items ``start`` to ``stop`` of one of the arrays."""
        unit = self._units[which]
        items = TILE // unit
        found = []
        for tile in range(start // items, -(-stop // items)):
            first = tile * items
            last = min(first + items, -(-self._size // unit))
            whole = start <= first and last <= stop
            array = self._take(tile, which, whole=whole)
            found.append(array if whole else array[max(start - first, 0) : stop - first])
        return found[0] if len(found) == 1 else np.concatenate(found or [_TAKEN])

    def sums(self) -> list[float]:
        """Return the sums over the tensor, exactly rounded; tiles that were not made yet are made."""
        for start in tile_starts(self._size):
            if start // TILE not in self._sums:
                self._made(start // TILE)
        rows = [self._sums[start // TILE] for start in tile_starts(self._size)]
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def _take(self, tile: int, which: int, *, whole: bool) -> Array:
        while True:
            made = RECENT.get(self, lambda: self._made(tile), tile)
            found = made[which]
            if found is not _TAKEN:
                break
            # It was taken before, and is wanted again.
            RECENT.keep(self, (), tile)
        if whole:
            with self._lock:
                made = RECENT.get(self, lambda: made, tile)
                left = tuple(_TAKEN if i == which else array for i, array in enumerate(made))
                RECENT.keep(self, () if all(array is _TAKEN for array in left) else left, tile)
        return found

    def _made(self, tile: int) -> tuple[Array, ...]:
        start = tile * TILE
        arrays, self._sums[tile] = self._make(start, min(start + TILE, self._size))
        return tuple(arrays)


class Values(Tensor):
    """Floats of a bundle, rounded to the dtype that it keeps them in."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, compute: Callable[[int, int], Array]) -> None:
        """Name a tensor.

        Args:
            name: its name in the bundle.
            shape: its shape.
            dtype: the dtype to round to.
            compute: from the first element and the one after the last, float32 or float64 ``[n]``.
        """
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._compute = compute

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return rounded(self.name, self._compute(start, stop), self.dtype)


def rounded(name: str, values: Array, dtype: DType) -> Array:
    """Round float32 or float64 values to the dtype that a bundle keeps them in.

    Raises:
        OutputError: if one is beyond its range, or no number.
    """
    if values.size and not float(np.abs(values).max()) <= largest_finite(dtype):
        raise OutputError(
            f"{name}: a value of {float(np.abs(values).max()):g} is beyond {dtypes.name_of(dtype)}; "
            "keep the changes in a wider dtype (--dtype float32)"
        )
    return narrow(values, dtype)


class Bits(Tensor):
    """Bits of a bundle, eight to a byte: element i is bit ``i % 8`` of byte ``i // 8``."""

    def __init__(self, name: str, size: int, compute: Callable[[int, int], Array]) -> None:
        """Name a tensor.

        Args:
            name: its name in the bundle.
            size: how many bits.
            compute: from the first byte and the one after the last, uint8 ``[n]``.
        """
        self.name = name
        self.shape = (bytes_of_bits(size),)
        self.dtype = np.dtype(np.uint8)
        self._compute = compute

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._compute(start, stop)


def bytes_of_bits(size: int) -> int:
    """Return how many bytes so many bits take."""
    return -(-size // 8)


def pack(mask: Array) -> Array:
    """Return a mask as bits, eight to a byte."""
    return np.packbits(mask, bitorder="little")


def unpack(bits: Tensor, start: int, stop: int) -> Array:
    """Return elements ``start`` to ``stop`` of a packed mask: bool ``[n]``."""
    first = start // 8
    found = np.unpackbits(bits.read(first, bytes_of_bits(stop)), bitorder="little")
    return found[start - first * 8 : stop - first * 8].view(np.bool_)
