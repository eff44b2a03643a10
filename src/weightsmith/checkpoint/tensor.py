"""A tensor that has not been read yet."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.dtypes import DType

Array = npt.NDArray[Any]


class Tensor(ABC):
    """A lazy tensor: its name, shape and dtype are known, its elements are read when asked for.

    Attributes:
        name: the name under which its checkpoint holds it.
        shape: the lengths of its axes; ``()`` for a scalar.
        dtype: the dtype of the elements.
        held: about how many bytes stay held between two reads, of what elements are computed from by linear algebra.
        whole: whether the first read computes all elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    held: int = 0
    whole: bool = False

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Read elements ``start`` to ``stop`` in row-major order.

        Args:
            start: flat index of the first element, ``0 <= start <= stop <= size``.
            stop: flat index after the last element.

        Returns:
            An array ``[stop - start]`` of this tensor's dtype. It may be a read-only view; do not write to it.

        Raises:
            CheckpointError: if the file cannot be read, or ends before the tensor does.
        """

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """Read elements as :meth:`read` does, into memory that is there already where that saves a copy.

        Args:
            start: flat index of the first element.
            stop: flat index after the last.
            buffer: uint8 of the elements' length in bytes.

        Returns:
            A contiguous array ``[stop - start]`` of this tensor's dtype; valid until the buffer is used again.
        """
        return np.ascontiguousarray(self.read(start, stop))

    def read_parts(self, starts: Sequence[int], out: Array) -> None:
        """Read several stretches of one length, as many calls of :meth:`read` do.

        Args:
            starts: flat index of the first element of each.
            out: where they go: ``[stretches, length]``, of this tensor's dtype, contiguous.
        """
        for place, start in enumerate(starts):
            out[place] = self.read(start, start + out.shape[1])

    def prefetch(self, start: int, stop: int) -> bool:
        """Have elements brought into memory without waiting for them; return whether the storage can do so."""
        return False

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """Copy the bytes of elements into an open file without passing them through this process.

        Args:
            start: flat index of the first element.
            stop: flat index after the last.
            handle: descriptor of the file to write to.
            offset: where to write in it, in bytes.

        Returns:
            Whether they were copied; if not, read and write them.
        """
        return False

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes that the elements take."""
        return self.size * self.dtype.itemsize

    def numpy(self) -> Array:
        """Read the whole tensor: an array of this tensor's shape and dtype."""
        return self.read(0, self.size).reshape(self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}, dtype={self.dtype})"


class ArrayTensor(Tensor):
    """A tensor that lies in memory, for weights made in Python."""

    def __init__(self, name: str, array: Array) -> None:
        self.name = name
        self.shape = array.shape
        self.dtype = array.dtype
        self._flat = np.ascontiguousarray(array).reshape(-1)

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._flat[start:stop]
