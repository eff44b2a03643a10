"""The tensors of a running average with one more checkpoint, and of samples from it, made as they are read."""

from __future__ import annotations

import numpy as np

from weightsmith.checkpoint.rows import FLOAT64, read_wide
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, shown
from weightsmith.kernels import philox
from weightsmith.kernels.convert import narrow, widen
from weightsmith.runs.accumulation import begun, moved, spread, variance


class MovedMean(Tensor):
    """The mean with one more checkpoint."""

    def __init__(self, before: Tensor | None, values: Tensor, share: float, dtype: DType, where: str) -> None:
        self.name = values.name
        self.shape = values.shape
        self.dtype = dtype
        self.before = before
        self.values = values
        self.where = where
        self._share = share

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return narrow(self.parts(start, stop)[2], self.dtype)

    def parts(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return the checkpoint's elements, the mean before and the mean after, before it is rounded: float64."""
        values = read_wide(self.values, start, stop)
        if self.before is None:
            before, after = values, begun(values)
        else:
            before = widen(self.before.read(start, stop), FLOAT64)
            after = moved(before, values, self._share)
        if after is None:
            raise CheckpointError(
                f"{self.where}: {shown(self.name)} has values that are NaN or infinite: with them the average would "
                "never be finite again; leave this checkpoint out"
            )
        return values, before, after


class MovedSquares(Tensor):
    """The sum of squared deviations with one more checkpoint."""

    def __init__(self, before: Tensor | None, mean: MovedMean) -> None:
        self.name = mean.name
        self.shape = mean.shape
        self.dtype = mean.dtype
        self._before = before
        self._mean = mean

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        if self._before is None:
            return np.zeros(stop - start, self.dtype)
        values, mean, after = self._mean.parts(start, stop)
        before = widen(self._before.read(start, stop), FLOAT64)
        return narrow(spread(before, mean, after, values), self.dtype)


class SampleTensor(Tensor):
    """A tensor of a sample: each element depends on seed, name and position alone."""

    def __init__(self, name: str, mean: Tensor, squares: Tensor, count: int, dtype: DType, seed: int) -> None:
        # The checkpoint's name for it: within a pipeline two tensors may have one name in their files.
        self.name = name
        self.shape = mean.shape
        self.dtype = dtype
        self._mean = mean
        self._squares = squares
        self._count = count
        self._key = philox.key_of("swag", seed, name)

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        mean, squares = (widen(one.read(start, stop), FLOAT64) for one in (self._mean, self._squares))
        noise = philox.normal(self._key, start, stop)
        return narrow(mean + np.sqrt(variance(squares, self._count)) * noise, self.dtype)
