"""Changes that are no products of factors, in little room: their largest entries, their signs, or a few bits each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from weightsmith.adapters.codes import CODES, PLACES, RANGE, SCALE, SIGNS, VALUES, Quantization, pack_codes
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.bundle.tiles import TILE, bytes_of_bits, pack, rounded, tile_starts
from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.engine.threads import ThreadMapper
from weightsmith.extraction.difference import FLOAT64, Difference
from weightsmith.extraction.parts import Field, Part
from weightsmith.extraction.room import Room
from weightsmith.kernels.convert import widen

_UINT8 = np.dtype(np.uint8)
_INT32 = np.dtype(np.int32)
_INT64 = np.dtype(np.int64)
_FLOAT32 = np.dtype(np.float32)
_BINS = 1 << 16


class Compact(Part):
    """A part that takes the change as one row of entries."""

    @property
    def memory(self) -> int:
        """See :attr:`Part.memory`."""
        return 6 * self.difference.size * self.difference.working.itemsize

    def compute(self, change: Array) -> tuple[tuple[Array, ...], float, float | None]:
        """See :meth:`Part.compute`."""
        arrays, error = self.keep(change)
        return arrays, error, None

    @abstractmethod
    def keep(self, change: Array) -> tuple[tuple[Array, ...], float]:
        """Return the arrays, and the sum of squares of what they leave; see :meth:`Part.compute`."""

    def _field(self, part: str, shape: tuple[int, ...], dtype: DType) -> Field:
        return Field(f"{PREFIX}{self.module}.{part}", shape, dtype)


class Sparse(Compact):
    """The entries of largest magnitude; of equal ones the first."""

    def __init__(self, difference: Difference, room: Room, count: int, dtype: DType) -> None:
        """Keep so many entries.

        Args:
            difference: the matrix.
            room: where it is worked on.
            count: how many entries, at least one.
            dtype: the dtype of their values.
        """
        super().__init__(difference, room)
        self.count = count
        self.dtype = dtype

    def fields(self) -> list[Field]:
        """See :meth:`Part.fields`."""
        places = _INT32 if self.difference.size <= np.iinfo(_INT32).max else _INT64
        return [self._field(PLACES, (self.count,), places), self._field(VALUES, (self.count,), self.dtype)]

    def keep(self, change: Array) -> tuple[tuple[Array, ...], float]:
        """See :meth:`Compact.keep`."""
        places = largest(change, self.count)
        values = rounded(f"values of {self.name}", change[places], self.dtype)
        rest = change.astype(FLOAT64)
        rest[places] -= widen(values, FLOAT64)
        return self._arrays(places, values), float(rest @ rest)

    def _arrays(self, places: Array, values: Array) -> tuple[Array, ...]:
        return places.astype(self.fields()[0].dtype), values


class Shira(Sparse):
    """As many entries as a LoRA of some rank has parameters, in the layout of PEFT's SHiRA.

    Bhardwaj et al., Sparse High Rank Adapters, NeurIPS 2024, arXiv:2406.13175; there a mask is chosen first and its
    values are trained.
    """

    def fields(self) -> list[Field]:
        """See :meth:`Part.fields`: row and column of every entry, and its value."""
        return [
            self._field("shira_indices", (2, self.count), _INT32),
            self._field("shira_weight", (self.count,), self.dtype),
        ]

    def _arrays(self, places: Array, values: Array) -> tuple[Array, ...]:
        rows, columns = np.divmod(places, self.difference.shape[1])
        return np.concatenate([rows, columns]).astype(_INT32), values


class Signs(Compact):
    """The sign of every entry and one scale, the mean magnitude: the first step of BitDelta.

    Liu et al., NeurIPS 2024, arXiv:2402.10193. ``a = mean |d|`` is the scale of least squared error for these signs.
    Zero counts as minus, as the paper defines it. The paper then trains the scales on data.
    """

    def fields(self) -> list[Field]:
        """See :meth:`Part.fields`."""
        size = self.difference.size
        return [self._field(SIGNS, (bytes_of_bits(size),), _UINT8), self._field(SCALE, (1,), _FLOAT32)]

    def keep(self, change: Array) -> tuple[tuple[Array, ...], float]:
        """See :meth:`Compact.keep`."""
        total = math.fsum(float(np.abs(change[start : start + TILE]).sum(dtype=FLOAT64)) for start in _starts(change))
        scale = rounded(f"scale of {self.name}", np.array([total / len(change)]), _FLOAT32)
        signs, errors = [], []
        for start in _starts(change):
            tile = change[start : start + TILE]
            signs.append(pack(tile > 0))
            rest = tile.astype(FLOAT64) - np.where(tile > 0, float(scale[0]), -float(scale[0]))
            errors.append(float(rest @ rest))
        return (np.concatenate(signs), scale), math.fsum(errors)


class Quantized(Compact):
    """A few bits for every entry."""

    def __init__(self, difference: Difference, room: Room, quantization: Quantization) -> None:
        """Quantise a matrix.

        Args:
            difference: the matrix.
            room: where it is worked on.
            quantization: how.
        """
        super().__init__(difference, room)
        self.quantization = quantization

    def fields(self) -> list[Field]:
        """See :meth:`Part.fields`."""
        nbytes = bytes_of_bits(self.difference.size * self.quantization.bits)
        return [self._field(CODES, (nbytes,), _UINT8), self._field(RANGE, (2,), FLOAT64)]

    def keep(self, change: Array) -> tuple[tuple[Array, ...], float]:
        """See :meth:`Compact.keep`."""
        limits = self.quantization.range(change)
        packed, errors = [], []
        for start in _starts(change):
            tile = change[start : start + TILE]
            codes = self.quantization.encode(tile, limits)
            packed.append(pack_codes(codes, self.quantization.bits))
            rest = tile.astype(FLOAT64) - self.quantization.decode(codes, limits)
            errors.append(float(rest @ rest))
        return (np.concatenate(packed), limits), math.fsum(errors)


def largest(change: Array, count: int) -> Array:
    """Return the places of the entries of largest magnitude, rising; of equal ones the first."""
    if count >= len(change):
        return np.arange(len(change))
    magnitude = np.abs(change)
    threshold = np.partition(magnitude, len(change) - count)[len(change) - count]
    above = np.flatnonzero(magnitude > threshold)
    equal = np.flatnonzero(magnitude == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def shares_over_model(differences: Sequence[Difference], count: int, mapper: ThreadMapper) -> list[int]:
    """Return how many of a number of entries lie in each matrix, if the largest of all matrices are taken.

    Magnitudes are ranked as float32, whose bits rise with them: the upper half of the bits is counted first, then the
    lower half of those at the border, then what lies above it. So the matrices are read three times, and the border is
    exact. Of entries at the border those of the first matrices are taken.

    Args:
        differences: the matrices.
        count: how many entries.
        mapper: what works on them.
    """

    def histogram(one: Difference, upper: int | None) -> Array:
        counts = np.zeros(_BINS, _INT64)
        for bits in _bits(one):
            if upper is not None:
                bits = bits[bits >> 16 == upper]
            half = bits >> 16 if upper is None else bits & 0xFFFF
            counts += np.bincount(half, minlength=_BINS)
        return counts

    if count >= sum(one.size for one in differences):
        return [one.size for one in differences]
    upper, left = _border(sum(mapper(lambda one: histogram(one, None), differences)), count)
    lower, left = _border(sum(mapper(lambda one: histogram(one, upper), differences)), left)
    border = (upper << 16) | lower

    def above(one: Difference) -> tuple[int, int]:
        found = [(int((bits > border).sum()), int((bits == border).sum())) for bits in _bits(one)]
        return sum(more for more, _ in found), sum(same for _, same in found)

    shares = []
    for more, same in mapper(above, differences):
        shares.append(more + min(same, left))
        left -= min(same, left)
    return shares


def _border(counts: Array | int, count: int) -> tuple[int, int]:
    """Return the bin in which the ``count``-th largest lies, and how many of that bin are taken."""
    falling = np.cumsum(np.asarray(counts)[::-1])
    place = int(np.searchsorted(falling, count))
    before = int(falling[place - 1]) if place else 0
    return _BINS - 1 - place, count - before


def _bits(one: Difference) -> Iterator[Array]:
    """Yield the bits of the magnitudes of a change, a tile at a time: int64."""
    for _, _, _, change in one.tiles():
        yield np.abs(change.astype(_FLOAT32)).view(np.uint32).astype(_INT64)


def _starts(change: Array) -> range:
    return tile_starts(len(change))
