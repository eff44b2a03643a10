"""Every model to the bit: the differences of bit patterns from the base's, in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from weightsmith.bundle.description import Entry
from weightsmith.bundle.kind import Group, Kind, Made, Stored, Survey, task_name
from weightsmith.bundle.tiles import TILE, tile_starts
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, ArrayTensor, Tensor
from weightsmith.dtypes import DType, is_float

PACKED, WIDTHS, ENDS = "packed", "widths", "ends"
# Elements whose differences have the same number of low bits.
STRETCH = 256
_BYTES = STRETCH // 8
_WIDEST = 4
_UINT8, _INT64 = np.dtype(np.uint8), np.dtype(np.int64)


@dataclass(frozen=True)
class Lossless(Kind):
    """Lossless: every model comes back to the bit.

    A tensor that is the base's is not stored again. Of any other of the base's shape and dtype the differences of bit
    patterns are stored: patterns are read as whole numbers that are ordered as the floats are, so that a small change
    is a small number, whatever the sign. The differences 0, -1, 1, -2, … become 0, 1, 2, 3, …, and these are written in
    Rice's code: of each the k lowest bits, and the rest as so many zeros before a one; every stretch of 256 has the k
    that suits it. What this does not make smaller is stored whole.

    No paper describes this use; the code is Rice and Plaunt's, Adaptive Variable-Length Coding for Efficient
    Compression of Spacecraft Television Data, IEEE Transactions on Communication Technology, 1971.
    """

    name: ClassVar[str] = "lossless"
    summary: ClassVar[str] = "nothing shared; per task the differences of bit patterns, to the bit"
    any_dtype: ClassVar[bool] = True

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`; reads every model once, to know how long its differences are."""
        pieces = [
            (group, task, start)
            for group in groups
            for task, tensor in group.models.items()
            if tensor.dtype == group.base.dtype and _has_order(tensor.dtype)
            for start in tile_starts(group.size)
        ]

        def length(piece: tuple[Group, str, int]) -> int:
            return len(_encoded(*piece)[1])

        def nbytes(piece: tuple[Group, str, int]) -> int:
            group, task, start = piece
            return min(TILE, group.size - start) * group.models[task].dtype.itemsize

        lengths: dict[tuple[str, str], list[int]] = {}
        for (group, task, _), found in zip(pieces, survey.run(length, pieces, nbytes), strict=True):
            lengths.setdefault((group.name, task), []).append(found)
        taken: list[Group] = []
        tensors: list[Tensor] = []
        for group in groups:
            kept = group.without([t for t in group.models if not _pays(group, lengths.get((group.name, t)))])
            if kept.models:
                taken.append(kept)
            for task in kept.models:
                ends = np.cumsum(np.asarray(lengths[group.name, task], np.int64))
                tensors += _Codes(group, task, ends).tensors()
        return Made(taken, tensors)

    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """See :meth:`Kind.restore`."""
        if entry.dtype != base.dtype or not _has_order(base.dtype):
            raise stored.fail(f"it is {entry.dtype}, and the base's is {base.dtype}: differences of bits need the same")
        widths = stored.own(WIDTHS, (-(-base.size // STRETCH),), _UINT8)
        ends = stored.own(ENDS, (len(tile_starts(base.size)),), _INT64)
        return PackedTensor(base, widths, ends, stored.own(PACKED, (None,), _UINT8), stored)


class _Codes:
    """The code of a task's tensor, made tile by tile for the tensors that hold it."""

    def __init__(self, group: Group, task: str, ends: Array) -> None:
        self._group = group
        self._task = task
        self._ends = ends
        # They are wanted when all bytes are written, and are few beside them.
        self._widths: dict[int, Array] = {}

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the bundle that hold it."""
        stretches = -(-self._group.size // STRETCH)
        return [
            _Coded(task_name(self._task, PACKED, self._group.name), int(self._ends[-1]), self.bytes),
            _Coded(task_name(self._task, WIDTHS, self._group.name), stretches, self.widths),
            ArrayTensor(task_name(self._task, ENDS, self._group.name), self._ends),
        ]

    def bytes(self, start: int, stop: int) -> Array:
        """Return bytes ``start`` to ``stop`` of the codes of all tiles, one after the other."""
        found = [np.empty(0, np.uint8)]
        first = int(np.searchsorted(self._ends, start, "right"))
        last = int(np.searchsorted(self._ends, stop, "left"))
        for tile in range(first, min(last + 1, len(self._ends))):
            begin = int(self._ends[tile - 1]) if tile else 0
            (content,) = RECENT.get(self, partial(self._tile, tile), tile)
            found.append(content[max(start - begin, 0) : stop - begin])
            if begin + len(content) <= stop:
                # Most readers go on from here.
                RECENT.keep(self, (), tile)
        return np.concatenate(found)

    def widths(self, start: int, stop: int) -> Array:
        """Return how many low bits the stretches ``start`` to ``stop`` have."""
        found = [np.empty(0, np.uint8)]
        each = TILE // STRETCH
        for tile in range(start // each, -(-stop // each)):
            if tile not in self._widths:
                self._tile(tile)
            found.append(self._widths.pop(tile)[max(start - tile * each, 0) : stop - tile * each])
        return np.concatenate(found)

    def _tile(self, tile: int) -> tuple[Array]:
        self._widths[tile], content = _encoded(self._group, self._task, tile * TILE)
        return (content,)


class _Coded(Tensor):
    """Bytes of a code."""

    def __init__(self, name: str, size: int, compute: Callable[[int, int], Array]) -> None:
        self.name = name
        self.shape = (size,)
        self.dtype = _UINT8
        self._compute = compute

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._compute(start, stop)


class PackedTensor(Tensor):
    """A tensor whose bit patterns are the base's with differences added."""

    def __init__(self, base: Tensor, widths: Tensor, ends: Tensor, packed: Tensor, stored: Stored) -> None:
        self.name = stored.name
        self.shape = base.shape
        self.dtype = base.dtype
        self._base = base
        self._widths = widths
        self._ends = ends
        self._packed = packed
        self._stored = stored

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        found = np.empty(stop - start, self.dtype)
        for tile in range(start // TILE, -(-stop // TILE)):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            differences = self._differences(tile)[first - tile * TILE : last - tile * TILE]
            ordered = _ordered(self._base.read(first, last)) + differences
            found[first - start : last - start] = _unordered(ordered, self.dtype)
        return found

    def _differences(self, tile: int) -> Array:
        """Return the differences of a tile: unsigned numbers, to be added with wrap-around."""
        count = min(TILE, self._base.size - tile * TILE)
        bits = 8 * self.dtype.itemsize
        ends = [0, *self._ends.read(max(tile - 1, 0), tile + 1).tolist()]
        begin, end = ends[-2:]
        if not 0 <= begin <= end <= self._packed.size or end - begin > count * (bits + 1) // 8 + TILE // 8:
            raise self._stored.fail(f"its codes of tile {tile} are said to lie at {begin:,} to {end:,}")
        first = tile * TILE // STRETCH
        widths = self._widths.read(first, first - (-count // STRETCH))
        content = self._packed.read(begin, end)
        low = _BYTES * int(widths.sum(dtype=np.int64))
        if int(widths.max(initial=0)) > bits or low > len(content):
            raise self._stored.fail(f"its widths do not fit its codes, in tile {tile}")
        numbers = _decoded(content[:low], content[low:], widths, count, np.dtype(f"u{self.dtype.itemsize}"))
        if numbers is None:
            raise self._stored.fail(f"its codes of tile {tile} are not those of {count:,} numbers")
        one = numbers.dtype.type(1)
        found: Array = (numbers >> one) ^ (~(numbers & one) + one)
        return found


def _pays(group: Group, lengths: Sequence[int] | None) -> bool:
    if lengths is None:
        return False
    return sum(lengths) + -(-group.size // STRETCH) + 8 * len(lengths) < group.base.nbytes


def _has_order(dtype: DType) -> bool:
    """Whether values are floats or whole numbers, of at most 32 bits: not truths, nor pairs."""
    return dtype.itemsize <= _WIDEST and (is_float(dtype) or dtype.kind in "iu")


def _ordered(values: Array) -> Array:
    """Return patterns as unsigned numbers that are ordered as floats are; whole numbers are what they are."""
    patterns: Array = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    if not is_float(values.dtype):
        return patterns
    # All bits of what is below 0 are turned round, of the rest the highest alone.
    ordered: Array = patterns ^ (_signs(patterns) | _highest(patterns))
    return ordered


def _unordered(numbers: Array, dtype: DType) -> Array:
    """Return the values of :func:`_ordered`'s numbers."""
    if is_float(dtype):
        numbers = numbers ^ (~_signs(numbers) | _highest(numbers))
    return np.ascontiguousarray(numbers).view(dtype)


def _signs(patterns: Array) -> Array:
    """Return all ones where the highest bit is set, else 0."""
    found: Array = patterns.view(f"i{patterns.itemsize}") >> (8 * patterns.itemsize - 1)
    return found.view(patterns.dtype)


def _highest(patterns: Array) -> Any:
    """Return the highest bit."""
    return patterns.dtype.type(1 << (8 * patterns.itemsize - 1))


def _encoded(group: Group, task: str, start: int) -> tuple[Array, Array]:
    """Return the code of a tile's differences.

    Returns:
        The number of low bits of each stretch, ``[stretches]``; and bytes: all low bits, then the rests.
    """
    stop = min(start + TILE, group.size)
    # The difference of unsigned numbers wraps around, and so does what takes it back.
    differences = _ordered(group.models[task].read(start, stop)) - _ordered(group.base.read(start, stop))
    signed = differences.view(f"i{differences.itemsize}")
    zigzag = (signed << 1).view(differences.dtype) ^ _signs(differences)
    numbers = np.zeros((-(-zigzag.size // STRETCH), STRETCH), np.uint32)
    numbers.reshape(-1)[: zigzag.size] = zigzag
    widths = _widths(numbers)
    rests = (numbers >> widths[:, None]).reshape(-1)[: zigzag.size]
    ones = np.cumsum(rests.astype(np.int64) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    return widths, np.concatenate([_planes(numbers, widths), np.packbits(unary, bitorder="little")])


def _widths(numbers: Array) -> Array:
    """Return for each stretch how many low bits make its code about the shortest: uint8 ``[stretches]``."""
    _, exponents = np.frexp(numbers.sum(axis=1, dtype=np.uint64) // STRETCH)
    best = np.zeros(len(numbers), np.uint8)
    shortest = np.full(len(numbers), np.iinfo(np.int64).max)
    # The best k lies a little below the bits of the mean, further where a few numbers are much larger than the rest.
    for below in range(5):
        widths = np.clip(exponents - below, 0, 31).astype(np.uint8)
        length = STRETCH * widths.astype(np.int64) + (numbers >> widths[:, None]).sum(axis=1, dtype=np.int64)
        better = length < shortest
        best[better], shortest[better] = widths[better], length[better]
    return best


def _planes(numbers: Array, widths: Array) -> Array:
    """Return the low bits: of each stretch all lowest ones (32 bytes), then all next ones, as its width says."""
    deepest = int(widths.max(initial=0))
    planes = np.empty((len(numbers), deepest, _BYTES), np.uint8)
    for bit in range(deepest):
        planes[:, bit] = np.packbits((numbers >> np.uint32(bit)).astype(np.uint8) & 1, axis=1, bitorder="little")
    return planes[np.arange(deepest) < widths[:, None]].reshape(-1)


def _decoded(low: Array, unary: Array, widths: Array, count: int, dtype: DType) -> Array | None:
    """Take :func:`_encoded` back: ``[count]`` unsigned numbers, or None if these are no codes of so many."""
    ones = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ones) != count:
        return None
    deepest = int(widths.max(initial=0))
    planes = np.zeros((len(widths), deepest, _BYTES), np.uint8)
    planes[np.arange(deepest) < widths[:, None]] = low.reshape(-1, _BYTES)
    found = np.zeros((len(widths), STRETCH), np.uint64)
    found.reshape(-1)[:count] = np.diff(ones, prepend=-1) - 1
    found <<= widths[:, None]
    for bit in range(deepest):
        plane = np.unpackbits(planes[:, bit], axis=1, bitorder="little")
        found |= plane.astype(np.uint64) << np.uint64(bit)
    return found.reshape(-1)[:count].astype(dtype)
