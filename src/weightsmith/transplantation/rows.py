"""Rows of a matrix on disk by their numbers: of an embedding, the tokens'."""

from __future__ import annotations

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.tensor import Array, ArrayTensor, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import narrow, widen

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# Elements that are read at once, and rows that are read though nobody asked, rather than reading twice.
_SPAN, _GAP = 1 << 22, 4


class Rows:
    """Rows of a matrix, read when asked for.

    Attributes:
        shape: the matrix's ``(V, d)``.
    """

    def __init__(self, tensor: Tensor | Array, centre: Array | None = None) -> None:
        """Stand for a matrix.

        Args:
            tensor: ``[V, d]`` of any floating dtype; or an array, for what was made in Python.
            centre: ``[d]``: what is subtracted from every row.

        Raises:
            CheckpointError: if it has not two axes, or holds no floating-point numbers.
        """
        self._centre = centre
        self._tensor = tensor if isinstance(tensor, Tensor) else ArrayTensor("an array", tensor)
        if len(self._tensor.shape) != 2:
            raise CheckpointError(f"{self._tensor.name}: expected rows of tokens, [V, d]; found {self._tensor.shape}")
        if not dtypes.is_float(self._tensor.dtype):
            found = dtypes.name_of(self._tensor.dtype)
            raise CheckpointError(
                f"{self._tensor.name}: expected rows of floating-point numbers, found {found}; give a quantised "
                "embedding in the dtype that its model computes in"
            )
        self.shape: tuple[int, int] = (self._tensor.shape[0], self._tensor.shape[1])

    def take(self, numbers: Array, *, check: bool = True) -> Array:
        """Read rows: ``[n, d]``, float32, C-contiguous.

        Args:
            numbers: ``[n]`` integers in any order, with or without repetitions.
            check: whether what is infinite or no number is refused.

        Raises:
            CheckpointError: if there is no row of a number, or an element of one is infinite or no number.
        """
        count, width = self.shape
        numbers = np.asarray(numbers, np.int64)
        result = np.empty((len(numbers), width), _FLOAT32)
        if not len(numbers):
            return result
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if ordered[0] < 0 or ordered[-1] >= count:
            bad = ordered[0] if ordered[0] < 0 else ordered[-1]
            raise CheckpointError(f"{self._tensor.name}: has {count:,} rows; there is no row {bad:,}")
        most = max(_SPAN // max(width, 1), 1)
        start = 0
        while start < len(ordered):
            stop = self._run(ordered, start, most)
            first, last = int(ordered[start]), int(ordered[stop - 1]) + 1
            values = widened(self._tensor.read(first * width, last * width)).reshape(last - first, width)
            found = values[ordered[start:stop] - first]
            finite = np.isfinite(found).all(1)
            if check and not finite.all():
                row = int(ordered[start + int(np.argmin(finite))])
                raise CheckpointError(
                    f"{self._tensor.name}: row {row:,} holds values that are infinite or no numbers; nothing can be "
                    "computed from it. Repair the checkpoint, or leave this token out"
                )
            result[order[start:stop]] = found if self._centre is None else found - self._centre
            start = stop
        return result

    @staticmethod
    def _run(ordered: Array, start: int, most: int) -> int:
        """Return where a stretch of numbers ends that is read at once."""
        near = ordered[start : start + most]
        apart = np.flatnonzero((np.diff(near) > _GAP) | (near[1:] - near[0] >= most))
        return start + (int(apart[0]) + 1 if len(apart) else len(near))


def widened(values: Array) -> Array:
    """Return values of any floating dtype as float32."""
    return narrow(widen(values, _FLOAT64), _FLOAT32) if values.dtype == _FLOAT64 else widen(values, _FLOAT32)
