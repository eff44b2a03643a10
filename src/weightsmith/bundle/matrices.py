"""Task vectors of matrices, taken apart: one at a time where they are large, several at once where memory allows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.bundle.description import Entry
from weightsmith.bundle.kind import Group
from weightsmith.bundle.tiles import TILE, rounded, tile_starts
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import tiled
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType, working_dtype
from weightsmith.kernels.convert import narrow, widen
from weightsmith.methods.matrices import Decomposition, leading_work

# Most bytes that matrices may take which are worked on at the same time.
_ROOM = 3_000_000_000
# Matrices of more elements are taken apart for one tensor of the model at a time, by several threads.
_LARGE = 1 << 20
_LARGE_ONES = threading.Lock()
_FLOAT64 = np.dtype(np.float64)


def is_matrix(group: Group) -> bool:
    """Whether a tensor is a matrix with rows and columns to speak of."""
    return len(group.shape) == 2 and min(group.shape) > 1


def dense_change(group: Group, task: str) -> Array:
    """Return a task vector as a matrix ``[m, n]``, in the dtype of the arithmetic."""
    change = np.empty(group.size, group.working)
    for start in tile_starts(group.size):
        stop = min(start + TILE, group.size)
        change[start:stop] = group.change(task, start, stop)
    return change.reshape(group.shape)


def for_each_task(
    group: Group, rank: int, how: Decomposition, threads: int, apart: Callable[[str], tuple[Array, ...]]
) -> Mapping[str, tuple[Array, ...]]:
    """Take the task vector of every model of a group apart.

    Args:
        group: a group of matrices.
        rank: how many singular triples are wanted, which says how much memory it takes.
        how: by which decomposition.
        threads: how many threads to use, at most.
        apart: does it for one task.
    """
    if group.size <= _LARGE:
        # The executor has one such tensor in each of its threads already.
        return {task: apart(task) for task in group.models}
    item = group.working.itemsize
    needed = (group.size + leading_work(group.shape[0], group.shape[1], rank, how, item).elements) * item
    count = max(min(_ROOM // needed, threads, len(group.models)), 1)
    with _LARGE_ONES, ThreadPoolExecutor(count) as pool:
        return dict(zip(group.models, pool.map(apart, group.models), strict=True))


class Piece(Tensor):
    """One of several arrays that are made at once, rounded to the dtype that the bundle keeps it in."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: DType,
        maker: Maker,
        pick: Callable[[tuple[Array, ...]], Array],
    ) -> None:
        """Name an array.

        Args:
            name: its name in the bundle.
            shape: its shape.
            dtype: the dtype to round to.
            maker: makes all of them, which are kept while they are needed.
            pick: returns this one of them.
        """
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._maker = maker
        self._pick = pick

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return rounded(
            self.name, self._pick(RECENT.get(self._maker, self._maker.make)).reshape(-1)[start:stop], self.dtype
        )


class Maker(Protocol):
    """Makes several arrays at once."""

    def make(self) -> tuple[Array, ...]:
        """Make them."""
        ...


class FactoredTensor(Tensor):
    """A base's matrix with a product of factors added, formed as those of folded adapters are."""

    def __init__(self, name: str, entry: Entry, base: Tensor, make: Callable[[], tuple[Array, Array]]) -> None:
        """Combine a matrix with factors.

        Args:
            name: its name.
            entry: its dtype and shape.
            base: the base's matrix.
            make: reads the factors: ``[rows, rank]`` and ``[rank, columns]``, float64.
        """
        self.name = name
        self.shape = entry.shape
        self.dtype = entry.dtype
        self.base = base
        self._make = make

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to the dtype of the arithmetic, and then to that of the tensor."""
        (product,) = RECENT.get(self, lambda: (LowRank(*self._make()),))
        change = tiled(start, stop, self.shape[1], self.shape[0], product.delta)
        total = widen(self.base.read(start, stop), _FLOAT64) + change
        return narrow(narrow(total, working_dtype([self.dtype])), self.dtype)


def wide(tensor: Tensor) -> Array:
    """Read a whole tensor of floats as float64, in its shape."""
    return widen(tensor.read(0, tensor.size), _FLOAT64).reshape(tensor.shape)
