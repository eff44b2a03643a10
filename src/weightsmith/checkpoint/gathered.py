"""A tensor whose rows are rows of other tensors, zeros, or means of rows: vocabularies brought to one order.

A row is what belongs to one token: a slice along the first axis; of a tensor ``[1, n]``, such as BART's bias, one
element.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from weightsmith import dtypes
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import FLOAT64, TILE, read_wide, tile_rows
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.kernels.convert import narrow, widen

Numbers = npt.NDArray[np.int64]

# What stands in place of a tensor's number.
ZERO = -1
MEAN = -2
AVERAGE = -3

# To read this many bytes and drop them takes less time than to begin another read.
_GAP = 1 << 14
# The same of elements that arithmetic makes in tiles.
_GAP_MADE = TILE
# Most bytes that are read at once of a tensor whose rows are picked.
_SPAN = 1 << 22
# More stretches than these are not asked for ahead: asking takes as long as reading.
_AHEAD = 16

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Origins:
    """Where every row of a tensor comes from.

    Attributes:
        source: per row the number of the tensor that it is a row of: ``[n]``, int64. Or ``ZERO``, for zeros;
            ``MEAN``, for the mean of some rows; ``AVERAGE``, for the mean of all rows of a tensor.
        row: the row's number in that tensor; for ``MEAN`` the number of the group of rows; for ``AVERAGE`` the
            tensor's number; for ``ZERO`` anything: ``[n]``, int64.
        starts: where the members of every group begin, and the end of the last: ``[groups + 1]``, int64. No group is
            empty.
        member_source: the members' tensors, group after group: ``[members]``, int64.
        member_row: their rows in these: ``[members]``, int64.
    """

    source: Numbers
    row: Numbers
    starts: Numbers = field(default_factory=lambda: np.zeros(1, np.int64))
    member_source: Numbers = field(default_factory=lambda: _NONE)
    member_row: Numbers = field(default_factory=lambda: _NONE)

    @classmethod
    def first(cls, rows: int, known: int, rest: int = ZERO) -> Origins:
        """Return the origins of the first rows of one tensor.

        Args:
            rows: how many rows the result has.
            known: how many the tensor has.
            rest: what those behind them are: ``ZERO``, or ``AVERAGE`` for the mean of all that the tensor has.
        """
        row = np.arange(rows, dtype=np.int64)
        source = np.where(row < known, 0, rest)
        return cls(source, np.where(row < known, row, 0))

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def digest(self) -> bytes:
        """A hash of all of it."""
        found = hashlib.blake2b(digest_size=16)
        for numbers in (self.source, self.row, self.starts, self.member_source, self.member_row):
            found.update(len(numbers).to_bytes(8, "little") + np.ascontiguousarray(numbers, "<i8").tobytes())
        return found.digest()

    @cached_property
    def breaks(self) -> Numbers:
        """The rows that do not continue the row before them, the first among them, and the end: ``[runs + 1]``."""
        if not len(self):
            return np.zeros(1, np.int64)
        steps = np.diff(self.row)
        # Zeros go on with zeros, and one average with the same; groups never do.
        same = np.where(self.source[1:] == AVERAGE, 0, 1)
        continues = (steps == same) & (self.source[1:] != MEAN) | (self.source[1:] == ZERO)
        continues &= self.source[1:] == self.source[:-1]
        return np.concatenate([[0], np.flatnonzero(~continues) + 1, [len(self)]])


class GatheredRows(Tensor):
    """A tensor that is put together from rows of others as it is read.

    Neighbours are read together, and rows that lie close together with what is between them. Nothing is held but
    averages, one row each. Means are made in float64, and rounded once to this tensor's dtype.

    Attributes:
        tensors: the tensors that rows are taken of; all have rows of this tensor's length.
        origins: where every row comes from.
    """

    def __init__(self, name: str, tensors: Sequence[Tensor], origins: Origins, shape: tuple[int, ...], dtype: DType):
        """Collect what the rows are made of.

        Args:
            name: the tensor's name.
            tensors: the tensors that rows are taken of.
            origins: where every row comes from.
            shape: the tensor's shape: ``[n, …]``, or ``[1, n]`` where rows are single elements.
            dtype: its dtype. Rows of a tensor of this dtype are taken as they are, others are rounded.
        """
        self.name = name
        self.shape = shape
        self.size = math.prod(shape)
        self.dtype = dtype
        self.tensors = tuple(tensors)
        self.origins = origins
        self.held = sum(tensor.held for tensor in self.tensors)
        self.whole = any(tensor.whole for tensor in self.tensors)
        self._width = max(self.size // max(len(origins), 1), 1)

    @property
    def digest(self) -> bytes:
        """A hash of where every row comes from."""
        inner = [tensor.digest for tensor in self.tensors if isinstance(tensor, GatheredRows)]
        return b"".join([self.origins.digest, *inner])

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        run = self._run(start, stop)
        if run is not None and run[0].dtype == self.dtype:
            return run[0].read(run[1], run[1] + stop - start)
        return self._rows(start, stop, np.empty(0, self.dtype))

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """See :meth:`Tensor.read_into`."""
        run = self._run(start, stop)
        if run is not None and run[0].dtype == self.dtype:
            return run[0].read_into(run[1], run[1] + stop - start, buffer)
        return self._rows(start, stop, buffer.view(self.dtype))

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Tensor.prefetch`."""
        stretches = list(self._stretches(start, stop))
        if len(stretches) > _AHEAD:
            return False
        asked = [tensor.prefetch(begin, end) for tensor, begin, end in stretches]
        return bool(asked) and all(asked)

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Tensor.copy_to`."""
        run = self._run(start, stop)
        if run is None or run[0].dtype != self.dtype:
            return False
        return run[0].copy_to(run[1], run[1] + stop - start, handle, offset)

    def _runs(self, first: int, last: int) -> tuple[int, int]:
        """Return the numbers of the run in which row ``first`` lies, and of the one after that of the row before
        ``last``.
        """
        breaks = self.origins.breaks
        begin = int(np.searchsorted(breaks, first, "right")) - 1
        return begin, max(int(np.searchsorted(breaks, last, "left")), begin)

    def _run(self, start: int, stop: int) -> tuple[Tensor, int] | None:
        """Return the tensor, and the place in it, that a stretch of elements is a stretch of; None if of several."""
        if start == stop:
            return None
        first = start // self._width
        begin, end = self._runs(first, -(-stop // self._width))
        source = int(self.origins.source[first])
        if end - begin != 1 or source < 0:
            return None
        return self.tensors[source], start + (int(self.origins.row[first]) - first) * self._width

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield what a stretch of elements has of the tensors, as far as no mean is in between."""
        if start == stop:
            return
        width, breaks = self._width, self.origins.breaks
        for run in range(*self._runs(start // width, -(-stop // width))):
            first = int(breaks[run])
            source = int(self.origins.source[first])
            if source >= 0:
                shift = (int(self.origins.row[first]) - first) * width
                begin, end = max(start, first * width), min(stop, int(breaks[run + 1]) * width)
                yield self.tensors[source], begin + shift, end + shift

    def _rows(self, start: int, stop: int, room: Array, *, wide: bool = False) -> Array:
        """Return elements of several runs: ``[stop - start]``.

        Args:
            start: flat index of the first element.
            stop: flat index after the last.
            room: memory that is used where it is as long as the rows; the result has its dtype.
            wide: whether what is made by arithmetic is taken as it is before it is rounded.
        """
        width = self._width
        first, last = start // width, -(-stop // width)
        count = (last - first) * width
        whole = room if len(room) == count else np.empty(count, room.dtype)
        rows = whole.reshape(last - first, width)
        source, row = self.origins.source[first:last], self.origins.row[first:last]
        for number in np.unique(source).tolist():
            places = np.flatnonzero(source == number)
            if number >= 0:
                self._pick(number, row[places], places, rows, wide=wide)
            elif number == ZERO:
                rows[places] = 0
            elif number == AVERAGE:
                for tensor in np.unique(row[places]).tolist():
                    rows[places[row[places] == tensor]] = _rounded(self._average(tensor), rows.dtype)
            else:
                rows[places] = _rounded(self._means(row[places]), rows.dtype)
        return whole[start - first * width : stop - first * width]

    def _pick(self, number: int, wanted: Numbers, places: Numbers, rows: Array, *, wide: bool) -> None:
        """Read rows of one tensor to their places, in the dtype of these.

        Args:
            number: the tensor's.
            wanted: the rows' numbers in it: ``[k]``.
            places: where each belongs: ``[k]``.
            rows: what they are written to: ``[n, width]``.
            wide: whether what is made by arithmetic is taken as it is before it is rounded.
        """
        tensor = self.tensors[number]
        if tensor.dtype == rows.dtype and not (wide and hasattr(tensor, "read_wide")):
            _spread(tensor, wanted, places, rows, wide=False)
            return
        made = hasattr(tensor, "read_wide")
        own = np.empty((len(wanted), self._width), FLOAT64 if made else tensor.dtype)
        _spread(tensor, wanted, np.arange(len(wanted)), own, wide=made)
        rows[places] = _rounded(widen(own.reshape(-1), FLOAT64).reshape(own.shape), rows.dtype)

    def _means(self, groups: Numbers) -> Array:
        """Return the means of groups of rows: ``[k, width]``, float64."""
        starts = self.origins.starts
        counts = starts[groups + 1] - starts[groups]
        ends = np.cumsum(counts)
        # The numbers of the members of all these groups, one group after the other.
        members = np.arange(ends[-1]) + np.repeat(starts[groups] - (ends - counts), counts)
        source, row = self.origins.member_source[members], self.origins.member_row[members]
        values = np.empty((len(members), self._width))
        for number in np.unique(source).tolist():
            places = np.flatnonzero(source == number)
            self._pick(number, row[places], places, values, wide=True)
        # Rows are added one after the other, whichever groups are asked for together.
        begins = ends - counts
        sums = values[begins]
        for place in range(1, int(counts.max())):
            longer = np.flatnonzero(counts > place)
            sums[longer] += values[begins[longer] + place]
        means: Array = sums / counts[:, None]
        return means

    def _average(self, number: int) -> Array:
        """Return the mean of all rows of a tensor: ``[width]``, float64."""
        tensor, width = self.tensors[number], self._width

        def make() -> tuple[Array]:
            total, step = np.zeros(width), tile_rows(width) * width
            for start in range(0, tensor.size, step):
                total += read_wide(tensor, start, min(start + step, tensor.size)).reshape(-1, width).sum(0)
            return (total / max(tensor.size // width, 1),)

        return RECENT.get(self, make, number)[0]


class GatheredWide(GatheredRows):
    """The same of tensors that are made by arithmetic: their values are not rounded on the way (``read_wide``)."""

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in this tensor's dtype: ``[n]``, float32 or float64."""
        run = self._run(start, stop)
        wide = getattr(run[0], "read_wide", None) if run is not None else None
        if run is not None and wide is not None:
            return np.asarray(wide(run[1], run[1] + stop - start))
        return self._rows(start, stop, np.empty(0, FLOAT64), wide=True)


def gathered(
    name: str, tensors: Sequence[Tensor], origins: Origins, shape: tuple[int, ...], dtype: DType | None = None
) -> GatheredRows:
    """Return a tensor that is put together from rows of others.

    Args:
        name: the tensor's name.
        tensors: the tensors that rows are taken of, at least one.
        origins: where every row comes from.
        shape: the tensor's shape: ``[n, …]``, or ``[1, n]`` where rows are single elements.
        dtype: its dtype; by default the one that holds the values of all tensors that are used.
    """
    if dtype is None:
        used = np.unique(np.concatenate([origins.source, origins.member_source]))
        found = [tensors[number].dtype for number in used.tolist() if number >= 0] or [tensors[0].dtype]
        dtype = found[0] if len(set(found)) == 1 else dtypes.promote(found)
    wide = any(hasattr(tensor, "read_wide") for tensor in tensors)
    return (GatheredWide if wide else GatheredRows)(name, tensors, origins, shape, dtype)


def resized(tensor: Tensor, rows: int) -> GatheredRows:
    """Return a tensor with so many rows: its first ones, or all and zeros behind them.

    Args:
        tensor: a tensor of at least one axis.
        rows: the length of the first axis.
    """
    origins = Origins.first(rows, tensor.shape[0])
    return gathered(tensor.name, [tensor], origins, (rows, *tensor.shape[1:]), tensor.dtype)


def _spread(tensor: Tensor, wanted: Numbers, places: Numbers, rows: Array, *, wide: bool) -> None:
    """Read rows of a tensor to their places: neighbours, and those that lie close together, at once.

    Args:
        tensor: the tensor.
        wanted: the rows' numbers in it: ``[k]``.
        places: where each belongs: ``[k]``.
        rows: what they are written to: ``[n, width]``.
        wide: whether they are not to be rounded to the tensor's dtype (``read_wide``).
    """
    width = rows.shape[1]
    if (np.diff(wanted) < 0).any():
        order = np.argsort(wanted, kind="stable")
        wanted, places = wanted[order], places[order]
    most = max(_SPAN // (width * rows.dtype.itemsize), 1)
    made = hasattr(tensor, "read_wide")
    gap = _GAP_MADE if made else _GAP // rows.dtype.itemsize
    # A stretch ends where a gap is too wide, or where it grows too long.
    ends = np.diff(wanted) > gap // width + 1
    ends |= np.diff(wanted // most) > 0
    bounds = np.concatenate([[0], np.flatnonzero(ends) + 1, [len(wanted)]])
    alone = np.diff(bounds) == 1
    if not wide and alone.any():
        single = bounds[:-1][alone]
        own = np.empty((len(single), width), rows.dtype)
        tensor.read_parts((wanted[single] * width).tolist(), own)
        rows[places[single]] = own
    read: Callable[[int, int], Array] = tensor.read_wide if wide else tensor.read  # type: ignore[attr-defined]
    left = np.ones(len(alone), np.bool_) if wide else ~alone
    for begin, end in zip(bounds[:-1][left].tolist(), bounds[1:][left].tolist(), strict=True):
        low, high = int(wanted[begin]), int(wanted[end - 1]) + 1
        rows[places[begin:end]] = read(low * width, high * width).reshape(-1, width)[wanted[begin:end] - low]


def _rounded(values: Array, dtype: DType) -> Array:
    return narrow(values.reshape(-1), dtype).reshape(values.shape)
