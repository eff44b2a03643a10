"""Tensors of one layout as another has them: under another name, in another shape, transposed, cut or put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, ArrayTensor, Tensor
from weightsmith.dtypes import DType


class Renamed(Tensor):
    """The same elements in the same order: under another name, perhaps in another shape.

    Attributes:
        source: the tensor that is read.
    """

    def __init__(self, source: Tensor, name: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        """Look at a tensor; its own name and shape where none is given."""
        self.source: Tensor = source.source if isinstance(source, Renamed) else source
        self.name = source.name if name is None else name
        self.shape = source.shape if shape is None else shape
        self.dtype = source.dtype

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self.source.read(start, stop)

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """See :meth:`Tensor.read_into`."""
        return self.source.read_into(start, stop, buffer)

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Tensor.prefetch`."""
        return self.source.prefetch(start, stop)

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Tensor.copy_to`."""
        return self.source.copy_to(start, stop, handle, offset)


class Made(Tensor):
    """A tensor that is made whole from others when it is first read; the factors of adapters are small."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, make: Callable[[], Array]) -> None:
        """Name what is to be made.

        Args:
            name: its name.
            shape: its shape.
            dtype: its dtype.
            make: returns an array of that shape and dtype.
        """
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._make = make

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        (whole,) = RECENT.get(self, lambda: (np.ascontiguousarray(self._make()).reshape(-1),))
        return whole[start:stop]


def transposed(source: Tensor) -> Tensor:
    """Return a matrix ``[n, m]`` as ``[m, n]``."""
    return Made(source.name, source.shape[::-1], source.dtype, lambda: source.numpy().T)


def rows(source: Tensor, start: int, stop: int, columns: slice = slice(None)) -> Tensor:
    """Return some rows of a tensor, and of its second axis some columns."""
    whole = columns == slice(None)
    width = source.shape[1:2] if whole else (len(range(*columns.indices(source.shape[1]))),)

    def make() -> Array:
        cut = source.numpy()[start:stop]
        return cut if whole else cut[:, columns]

    return Made(source.name, (stop - start, *width, *source.shape[2:]), source.dtype, make)


def stacked(sources: Sequence[Tensor]) -> Tensor:
    """Return tensors one below the other: ``[n, ...]`` of each, all of one dtype."""
    first = sources[0]
    shape = (sum(source.shape[0] for source in sources), *first.shape[1:])
    return Made(first.name, shape, first.dtype, lambda: np.concatenate([source.numpy() for source in sources]))


def block_diagonal(blocks: Sequence[Tensor | int]) -> Tensor:
    """Return matrices along a diagonal, zeros elsewhere; a number stands for so many rows of zeros.

    Args:
        blocks: ``[out, rank]`` each (a convolution's ``[out, rank, 1, 1]``), all of one dtype; one at least.
    """
    known = [block for block in blocks if isinstance(block, Tensor)]
    dtype, tail = known[0].dtype, known[0].shape[2:]
    height = sum(block.shape[0] if isinstance(block, Tensor) else block for block in blocks)
    width = sum(block.shape[1] for block in known)

    def make() -> Array:
        whole = np.zeros((height, width, *tail), dtype)
        row = column = 0
        for block in blocks:
            if isinstance(block, Tensor):
                whole[row : row + block.shape[0], column : column + block.shape[1]] = block.numpy()
                column += block.shape[1]
                row += block.shape[0]
            else:
                row += block
        return whole

    return Made(known[0].name, (height, width, *tail), dtype, make)


def number(name: str, value: float) -> Tensor:
    """Return a scalar: float32 where that holds the number exactly, else float64."""
    narrow = np.float32(value)
    return ArrayTensor(name, np.array(value, np.float32 if float(narrow) == value else np.float64))
