"""A tensor with more or fewer rows than it has: vocabularies of different length, brought to one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor


class ResizedTensor(Tensor):
    """The first rows of a tensor, or all of them and rows of zeros behind; a row is a slice along the first axis.

    Nothing is held: what the tensor has is read through, the rest is made where it is asked for.

    Attributes:
        tensor: the tensor, of at least one axis.
    """

    def __init__(self, tensor: Tensor, rows: int) -> None:
        self.name = tensor.name
        self.shape = (rows, *tensor.shape[1:])
        self.size = math.prod(self.shape)
        self.dtype = tensor.dtype
        self.tensor = tensor

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._completed(self.tensor.read, start, stop)

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """See :meth:`Tensor.read_into`."""
        own = self._own(start, stop)
        if own == stop - start:
            return self.tensor.read_into(start, stop, buffer)
        whole = buffer.view(self.dtype)
        if own:
            # It may have been read to a place of its own.
            whole[:own] = self.tensor.read_into(start, start + own, buffer[: own * self.dtype.itemsize])
        whole[own:] = 0
        return whole

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Tensor.prefetch`."""
        own = self._own(start, stop)
        return own > 0 and self.tensor.prefetch(start, start + own)

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Tensor.copy_to`."""
        return self._own(start, stop) == stop - start and self.tensor.copy_to(start, stop, handle, offset)

    def _own(self, start: int, stop: int) -> int:
        """Return how many elements of a stretch, its first ones, are the tensor's; those behind them are zero."""
        return min(max(self.tensor.size - start, 0), stop - start)

    def _completed(self, read: Callable[[int, int], Array], start: int, stop: int) -> Array:
        own = self._own(start, stop)
        if own == stop - start:
            return read(start, stop)
        values = read(start, start + own) if own else np.zeros(0, self.dtype)
        return np.concatenate([values, np.zeros(stop - start - own, values.dtype)])


class ResizedWide(ResizedTensor):
    """The same of a tensor that is made by arithmetic: its values are not rounded on the way (``read_wide``)."""

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in this tensor's dtype: ``[n]``, float32 or float64."""
        wide: Callable[[int, int], Array] = self.tensor.read_wide  # type: ignore[attr-defined]
        return self._completed(lambda begin, end: np.asarray(wide(begin, end)), start, stop)


def resized(tensor: Tensor, rows: int) -> ResizedTensor:
    """Return a tensor with so many rows: its first ones, or all and zeros behind them.

    Args:
        tensor: a tensor of at least one axis.
        rows: the length of the first axis.
    """
    return (ResizedWide if hasattr(tensor, "read_wide") else ResizedTensor)(tensor, rows)
