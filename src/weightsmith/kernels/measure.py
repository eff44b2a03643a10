"""How models differ from their base and from each other, block by block: one pass of the compiled kernel, or NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from weightsmith.dtypes import DType
from weightsmith.kernels.convert import widen
from weightsmith.kernels.native import library

Array = npt.NDArray[Any]

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
# The numbers of dtypes in measure.c.
_KINDS = {np.dtype(ml_dtypes.bfloat16): 0, np.dtype(np.float16): 1, _FLOAT32: 2}
# As in measure.c: beyond it, sums of magnitudes in float32 might overflow.
LARGEST = 2.0**100


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a measurement stand, of so many models beside a base.

    Attributes:
        models: how many there are.
        voters: how many of them, the first ones, elect signs and are compared with each other.
    """

    models: int
    voters: int

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Each two voters, in order."""
        return list(itertools.combinations(range(self.voters), 2))

    @cached_property
    def products(self) -> list[tuple[int, int]]:
        """Each two of the vectors whose products are summed: 0 is the base, k + 1 the task vector of model k."""
        return list(itertools.combinations_with_replacement(range(self.models + 1), 2))

    @cached_property
    def elects(self) -> bool:
        """Whether there are voters to elect a sign."""
        return self.voters > 1

    @cached_property
    def sums(self) -> dict[str, slice]:
        """Name -> where its sums stand.

        ``products``, see :attr:`products`; ``mass``, of each task vector; and where signs are elected ``total``, the
        mass of the sum of all task vectors; ``against``, twice what of each voter lies against the elected signs;
        ``together``, for each pair the mass of the sum of the two.
        """
        sizes = {"products": len(self.products), "mass": self.models}
        if self.elects:
            sizes |= {"total": 1, "against": self.voters, "together": len(self.pairs)}
        return _places(sizes)

    @cached_property
    def counts(self) -> dict[str, slice]:
        """Name -> where its counts stand.

        ``finite``, entries that are finite in base and models; ``nan`` and ``infinite``, of base and every model;
        ``moved``, of each model; and where signs are elected ``several``, entries that at least two voters move;
        ``contested``, those of them that they move in two directions; ``pairs``, for each pair entries that are equal,
        that both move, and that both move in one direction.
        """
        sizes = {"finite": 1, "nan": self.models + 1, "infinite": self.models + 1, "moved": self.models}
        if self.elects:
            sizes |= {"several": 1, "contested": 1, "pairs": 3 * len(self.pairs)}
        return _places(sizes)

    @cached_property
    def size(self) -> tuple[int, int]:
        """How many sums and how many counts there are."""
        return sum(_length(one) for one in self.sums.values()), sum(_length(one) for one in self.counts.values())


@dataclass(frozen=True)
class Measured:
    """What was found of a stretch.

    Attributes:
        sums: ``[sums]`` float64, see :attr:`Layout.sums`.
        counts: ``[counts]`` int64, see :attr:`Layout.counts`.
        peaks: ``[models]`` float32 or float64: largest magnitude of each task vector.
    """

    sums: Array
    counts: Array
    peaks: Array


def readable(dtype: DType) -> bool:
    """Whether the kernel reads this dtype as it lies in files."""
    return dtype in _KINDS


def measure(layout: Layout, arrays: Sequence[Array]) -> Measured:
    """Measure a stretch of a base and of models.

    An entry that is NaN, infinite or beyond 2**100 in one of them takes no part in any of them. Task vectors are formed
    in float32; products of their entries are summed in float64, exactly but for the rounding of the sum, magnitudes in
    float32 for 16 at a time. Where there is a float64 array, or no kernel, NumPy does it.

    Args:
        layout: how many models there are.
        arrays: ``[n]`` each, the base first: float32, float64 or a 16-bit float.
    """
    compiled = library()
    if compiled is None or any(array.dtype not in _KINDS for array in arrays):
        return _by_numpy(layout, arrays)
    count = len(arrays[0])
    if len(arrays) != layout.models + 1 or any(len(array) != count for array in arrays):
        # The kernel goes by addresses: what does not fit must not reach it.
        raise ValueError(f"{len(arrays)} arrays for {layout.models} models and a base, or of several lengths")
    held = [np.ascontiguousarray(array) for array in arrays]
    addresses = np.array([array.ctypes.data for array in held], np.uint64)
    kinds = np.array([_KINDS[array.dtype] for array in held], np.int64)
    sums, counts = np.empty(layout.size[0]), np.empty(layout.size[1], np.int64)
    peaks = np.empty(layout.models, np.float32)
    failed = compiled.measure(
        layout.models,
        layout.voters,
        addresses.ctypes.data,
        kinds.ctypes.data,
        count,
        sums.ctypes.data,
        len(sums),
        counts.ctypes.data,
        len(counts),
        peaks.ctypes.data,
    )
    if failed:
        raise MemoryError(f"no memory to measure {len(arrays)} models")
    return Measured(sums, counts, peaks)


def finite(values: Array) -> Array:
    """Return which values take part in figures: ``[n]`` bool."""
    found: Array = np.abs(values) <= LARGEST
    return found


def row_hashes(array: Array, columns: int) -> tuple[Array, Array]:
    """Return a hash of every row, and whether all its values are zero.

    Rows of the same bits have the same hash; others have the same once in 2**64 by chance. Hashes of the compiled
    kernel and of NumPy differ.

    Args:
        array: ``[rows * columns]``, of any dtype that floats are read in.
        columns: the length of a row.

    Returns:
        uint64 ``[rows]`` and bool ``[rows]``.
    """
    rows, width = len(array) // columns, array.dtype.itemsize
    content = np.ascontiguousarray(array)
    hashes, zero = np.empty(rows, np.uint64), np.empty(rows, np.bool_)
    compiled = library()
    if compiled is not None:
        # Of every eight bytes all but the signs, which lie in the last byte of each value.
        unsigned = int.from_bytes((b"\xff" * (width - 1) + b"\x7f") * (8 // width), "little")
        compiled.rows(content.ctypes.data, rows, columns * width, unsigned, hashes.ctypes.data, zero.ctypes.data)
        return hashes, zero
    view = content.view(np.uint8).reshape(rows, columns * width)
    hashes[:] = [xxhash.xxh3_64_intdigest(row.data) for row in view]
    zero[:] = ~(widen(content, _working(content)) != 0).reshape(rows, columns).any(axis=1)
    return hashes, zero


def _by_numpy(layout: Layout, arrays: Sequence[Array]) -> Measured:
    working = _FLOAT64 if any(array.dtype == _FLOAT64 for array in arrays) else _FLOAT32
    with np.errstate(all="ignore"):
        wide = [widen(array, working) for array in arrays]
        nan = [int(np.count_nonzero(np.isnan(one))) for one in wide]
        infinite = [int(np.count_nonzero(np.isinf(one))) for one in wide]
        kept = np.logical_and.reduce([finite(one) for one in wide])
        if not kept.all():
            wide = [one[kept] for one in wide]
    base, *models = wide
    deltas = [(model - base).astype(np.float64) for model in models]
    vectors = [base.astype(np.float64), *deltas]
    sums = [float(vectors[a] @ vectors[b]) for a, b in layout.products]
    sums += [float(np.abs(delta).sum()) for delta in deltas]
    moved = [delta != 0 for delta in deltas]
    counts = [len(base), *nan, *infinite, *(int(np.count_nonzero(one)) for one in moved)]
    if layout.elects:
        voters = range(layout.voters)
        total = np.sum(deltas[: layout.voters], axis=0)
        sums.append(float(np.abs(total).sum()))
        sums += [float((np.abs(deltas[k]) - deltas[k] * np.sign(total)).sum()) for k in voters]
        sums += [float(np.abs(deltas[a] + deltas[b]).sum()) for a, b in layout.pairs]
        ups, downs = (sum((sign * deltas[k] > 0).astype(np.int64) for k in voters) for sign in (1, -1))
        counts += [int(np.count_nonzero(ups + downs > 1)), int(np.count_nonzero((ups > 0) & (downs > 0)))]
        for a, b in layout.pairs:
            both = moved[a] & moved[b]
            one_way = both & ((deltas[a] > 0) == (deltas[b] > 0))
            counts += [int(np.count_nonzero(one)) for one in (models[a] == models[b], both, one_way)]
    peaks = np.array([np.abs(delta).max(initial=0.0) for delta in deltas], working)
    return Measured(np.array(sums, np.float64), np.array(counts, np.int64), peaks)


def _working(array: Array) -> DType:
    return _FLOAT64 if array.dtype == _FLOAT64 else _FLOAT32


def _places(sizes: dict[str, int]) -> dict[str, slice]:
    stops = list(itertools.accumulate(sizes.values()))
    return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}


def _length(place: slice) -> int:
    return int(place.stop - place.start)
