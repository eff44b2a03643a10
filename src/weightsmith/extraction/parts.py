"""What an adapter holds for one matrix: arrays that are made at once, and how well they give the change again."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.extraction.difference import FLOAT64, Difference, Sums
from weightsmith.extraction.room import Ahead, Maker, Room

# Elements of a stretch of rows that is held in float64 beside a matrix.
_STRETCH = 1 << 18


@dataclass(frozen=True)
class Facts:
    """What is known of a part once it is made.

    Attributes:
        sums: of the change that it stands for.
        error: the sum of squares of what is left of the change, by the arrays as they are written.
        effective_rank: of the change, where all its singular values were computed.
        seconds: how long it took to read and make it, and before that to choose its rank.
    """

    sums: Sums
    error: float
    effective_rank: float | None
    seconds: float


@dataclass(frozen=True)
class Field:
    """One tensor of a part: its name in the adapter, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Part(ABC):
    """What an adapter holds for one matrix.

    Attributes:
        difference: the matrix.
        facts: what is known of it once it is made.
        rank: the rank of the change that it stands for, at most; None where it has none.
    """

    rank: int | None = None

    def __init__(self, difference: Difference, room: Room) -> None:
        """Stand for a matrix.

        Args:
            difference: the matrix.
            room: where it is worked on.
        """
        self.difference = difference
        self.facts: Facts | None = None
        self._room = room
        self._seconds = 0.0

    @property
    def name(self) -> str:
        """The name of the matrix."""
        return self.difference.name

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return self.name.removesuffix(".weight")

    @abstractmethod
    def fields(self) -> list[Field]:
        """Return its tensors, in the order of the arrays."""

    @property
    @abstractmethod
    def memory(self) -> int:
        """Bytes that are held while it is made, at most."""

    @abstractmethod
    def compute(self, change: Array) -> tuple[tuple[Array, ...], float, float | None]:
        """Make the arrays.

        Args:
            change: all elements of the change, ``[n]``, in the dtype of the arithmetic; may be written to.

        Returns:
            The arrays, flat and in the dtypes of the fields; the sum of squares of what they leave of the change; and
            its effective rank, where it is known.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(field.nbytes for field in self.fields())

    def tensors(self, ahead: Ahead) -> list[Tensor]:
        """Return its tensors, lazily."""
        return [Made(field, which, self, ahead) for which, field in enumerate(self.fields())]

    def make(self) -> tuple[Array, ...]:
        """Return the arrays, and note the facts."""
        with self._room.take(self.memory):
            with self._timed():
                change, sums = self.difference.matrix()
                arrays, error, effective = self.compute(change)
            self.facts = Facts(sums, error, effective, self._seconds)
        return arrays

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time that is spent on it."""
        started = time.monotonic()
        yield
        self._seconds += time.monotonic() - started

    def known_facts(self) -> Facts:
        """Return the facts; the part is made where it was not, as after an earlier run that wrote it."""
        if self.facts is None:
            self.make()
        assert self.facts is not None
        return self.facts


class Made(Tensor):
    """One of several arrays that are made at once."""

    def __init__(self, field: Field, which: int, maker: Maker, ahead: Ahead) -> None:
        """Name an array.

        Args:
            field: its name, shape and dtype.
            which: its place among those that are made.
            maker: makes them, flat and in the dtypes of their fields.
            ahead: has them made.
        """
        self.name = field.name
        self.shape = field.shape
        self.dtype = field.dtype
        # Its first read makes all of them, for the others as well.
        self.held = maker.memory if which == 0 else self.nbytes
        self.whole = True
        self._which = which
        self._maker = maker
        self._ahead = ahead

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._ahead.get(self._maker)[self._which][start:stop]


def left_of(matrix: Array, restored: Callable[[int, int], Array]) -> float:
    """Return the sum of squares of what is left of a matrix.

    Args:
        matrix: ``[m, n]``.
        restored: returns rows of what it is held against: ``[stop - start, n]``, float64.
    """
    parts = []
    step = max(_STRETCH // max(matrix.shape[1], 1), 1)
    for start in range(0, len(matrix), step):
        stop = min(start + step, len(matrix))
        rest = (matrix[start:stop].astype(FLOAT64) - restored(start, stop)).reshape(-1)
        parts.append(float(rest @ rest))
    return math.fsum(parts)


def largest_need(parts: Sequence[Part]) -> Part | None:
    """Return the part that takes the most memory."""
    return max(parts, key=lambda part: part.memory, default=None)
