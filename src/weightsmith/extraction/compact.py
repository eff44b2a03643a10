"""Changes that are no products of factors, kept in little room: their largest entries, their signs, or a few bits each.

The layouts are ours, where PEFT has none, and described in docs/guide/extract.md:

- ``WEIGHTSMITH_SPARSE``: ``M.weightsmith_places`` int32 or int64 ``[n]``, flat positions in the weight, rising; and
  ``M.weightsmith_values`` ``[n]``.
- ``WEIGHTSMITH_SIGNS``: ``M.weightsmith_signs`` uint8, a bit per entry, set for plus: entry i is bit ``i % 8`` of byte
  ``i // 8``; and ``M.weightsmith_scale`` float32 ``[1]``.
- ``WEIGHTSMITH_QUANTIZED``: ``M.weightsmith_codes`` uint8, ``bits`` bits per entry, the lowest first, one entry behind
  the other; and ``M.weightsmith_range`` float64 ``[2]``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.bundle.tiles import TILE, bytes_of_bits, pack, rounded, tile_starts
from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.engine.threads import ThreadMapper
from weightsmith.extraction.difference import FLOAT64, Difference
from weightsmith.extraction.parts import PREFIX, Field, Part
from weightsmith.extraction.room import Room
from weightsmith.kernels.convert import widen

Quantizer = Literal["linear", "log2", "tanh"]
QUANTIZERS: tuple[Quantizer, ...] = ("linear", "log2", "tanh")
PLACES, VALUES = "weightsmith_places", "weightsmith_values"
SIGNS, SCALE = "weightsmith_signs", "weightsmith_scale"
CODES, RANGE = "weightsmith_codes", "weightsmith_range"
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


@dataclass(frozen=True)
class Quantization:
    """How entries become codes: levels that lie evenly between the least and the greatest, of the entries or of what a
    function makes of them.

    - ``linear``: the entries themselves, ``2^bits`` levels between their minimum and maximum.
    - ``tanh``: their hyperbolic tangents, ``2^bits`` levels between the largest magnitude and its negative.
    - ``log2``: the sign in the highest bit, and for the magnitude's logarithm ``2^(bits-1) - 1`` levels; the code 0
      stands for entries of a magnitude up to 10^-11, which become zero.

    As in the code of Robust Weight Signatures (Saha et al.), which computes with the numbers that such levels stand
    for, where these are their codes; it leaves those of ``tanh`` as tangents, and we take them back (inferred).

    Attributes:
        name: which of the three.
        bits: of a code, from 1 to 8; for ``log2`` from 3.
    """

    name: Quantizer
    bits: int
    _EPSILON: ClassVar[float] = 1e-11

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return (1 << (self.bits - 1)) - 1 if self.name == "log2" else 1 << self.bits

    def range(self, change: Array) -> Array:
        """Return the lowest and the highest level: float64 ``[2]``."""
        if self.name == "log2":
            least, most = math.inf, 0.0
            for start in _starts(change):
                magnitude = np.abs(change[start : start + TILE].astype(FLOAT64))
                counted = magnitude[magnitude > self._EPSILON]
                if counted.size:
                    least, most = min(least, float(counted.min())), max(most, float(counted.max()))
            return np.array([math.log2(least), math.log2(most)]) if most else np.zeros(2)
        if self.name == "tanh":
            most = math.tanh(float(np.abs(change).max()))
            return np.array([-most, most])
        return np.array([change.min(), change.max()], FLOAT64)

    def encode(self, values: Array, limits: Array) -> Array:
        """Return the codes of entries: uint8 ``[n]``.

        Args:
            values: ``[n]``.
            limits: what :meth:`range` gave.
        """
        wide = values.astype(FLOAT64)
        if self.name == "log2":
            counted = np.abs(wide) > self._EPSILON
            logarithms = np.log2(np.abs(wide), out=np.full(len(wide), limits[0]), where=counted)
            magnitude = np.where(counted, 1 + self._nearest(logarithms, limits), 0)
            with_sign: Array = (magnitude + ((wide < 0) << (self.bits - 1))).astype(_UINT8)
            return with_sign
        codes: Array = self._nearest(np.tanh(wide) if self.name == "tanh" else wide, limits).astype(_UINT8)
        return codes

    def decode(self, codes: Array, limits: Array) -> Array:
        """Return the entries that codes stand for: float64 ``[n]``; see :meth:`encode`."""
        if self.name == "log2":
            magnitude = codes & ((1 << (self.bits - 1)) - 1)
            found = np.where(magnitude > 0, np.exp2(self._level(magnitude.astype(FLOAT64) - 1, limits)), 0.0)
            signed: Array = np.where(codes >> (self.bits - 1), -found, found)
            return signed
        level = self._level(codes.astype(FLOAT64), limits)
        if self.name != "tanh":
            return level
        # The tangent of what is beyond 18 is 1 in float64, of which there is no way back.
        edge = np.nextafter(1.0, 0.0)
        inverse: Array = np.arctanh(np.clip(level, -edge, edge))
        return inverse

    def _nearest(self, values: Array, limits: Array) -> Array:
        low, high = limits
        share = (values - low) / (high - low) if high > low else np.zeros(len(values))
        nearest: Array = np.clip(np.rint(share * (self.levels - 1)), 0, self.levels - 1).astype(_INT64)
        return nearest

    def _level(self, place: Array, limits: Array) -> Array:
        low, high = limits
        level: Array = low + place / max(self.levels - 1, 1) * (high - low)
        return level


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


def pack_codes(codes: Array, bits: int) -> Array:
    """Return codes as a row of bits, the lowest of each first: uint8; eight codes fill ``bits`` bytes."""
    spread = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack_codes(packed: Array, bits: int, count: int) -> Array:
    """Return the codes of a row of bits: uint8 ``[count]``."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little").reshape(-1)


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
    for _, base, tuned in one.tiles():
        yield np.abs((tuned - base).astype(_FLOAT32)).view(np.uint32).astype(_INT64)


def _starts(change: Array) -> range:
    return tile_starts(len(change))
