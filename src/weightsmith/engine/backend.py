"""Where arrays lie and who computes on them: what the evaluator leaves to a backend.

Methods are written against the array API and run on whatever arrays a block has. A backend makes these arrays from
the bytes of files, draws random numbers, and brings results back as bytes. NumPy's is here; PyTorch's is imported when
it is asked for, and not before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.scratch import Scratch
from weightsmith.errors import DeviceError, did_you_mean
from weightsmith.kernels import philox
from weightsmith.kernels.convert import largest_finite, narrow, widen

# Elements computed at a time on a CPU: with a few inputs and temporaries this fits a core's own cache.
BLOCK = 1 << 18
# Elements in the blocks of a sweep. Sums of floats depend on it, so it is part of what a result is.
SWEEP = 1 << 18

# Of how many inputs blocks of full length are read at a time.
_INPUTS = 8
_LEAST_BLOCK = 1 << 12

BACKENDS = ("numpy", "torch")

# An array of the backend's own kind; Array is NumPy's.
Values = Any


def block_of(inputs: int, block: int = BLOCK) -> int:
    """Return how many elements to compute at a time, so that memory does not grow with the number of inputs.

    Args:
        inputs: how many tensors are read for a block.
        block: the length for few.
    """
    return block if inputs <= _INPUTS else max(block * _INPUTS // inputs, min(_LEAST_BLOCK, block))


class Backend(ABC):
    """Makes arrays of one kind. Safe to use from several threads; what a method returns is its thread's.

    Attributes:
        name: what computes, as a person would say it. Runs under different names may differ in a last digit.
        block: elements to compute at a time; results do not depend on it.
        sweep: elements in the blocks of a sweep; sums depend on it in their last digits.
        fuses: whether methods may run as fused loops instead.
        scratch: each thread's memory for what is read and written.
    """

    name: str
    block: int
    sweep: int
    fuses: bool
    scratch: Scratch

    @abstractmethod
    def computing(self) -> AbstractContextManager[Any]:
        """Return a context for all work on a block, which is done when the context ends. It may be nested."""

    @abstractmethod
    def load(self, tensor: Tensor, start: int, stop: int, working: DType) -> Values:
        """Read elements of a stored tensor, exactly: ``[stop - start]`` of float32 or float64.

        Raises:
            CheckpointError: if the file cannot be read.
        """

    @abstractmethod
    def empty(self, size: int, working: DType) -> Values:
        """Return ``[size]`` of float32 or float64 whose values are to be written."""

    @abstractmethod
    def rounded(self, values: Values, dtype: DType, working: DType) -> Values:
        """Round values to a floating dtype, and return them in the dtype of the arithmetic."""

    @abstractmethod
    def flat(self, values: Values, working: DType) -> Values:
        """Return what a method gave as ``[n]`` of the dtype of the arithmetic."""

    @abstractmethod
    def uniform(self, key: tuple[int, int], start: int, stop: int) -> Values:
        """Return the random numbers of :func:`weightsmith.kernels.philox.uniform`: ``[n]`` float32."""

    @abstractmethod
    def nonfinite(self, arrays: Sequence[Values]) -> list[int]:
        """Return for each array how many of its values are NaN or infinite."""

    @abstractmethod
    def store(self, values: Values, dtype: DType, out: Array | None) -> tuple[Array, int]:
        """Round values to a floating dtype and bring them to the CPU.

        Args:
            values: ``[n]``, float32 or float64.
            dtype: the dtype to round to.
            out: memory that may be used: ``[n]`` of the dtype.

        Returns:
            ``[n]`` of the dtype, complete when the context of :meth:`computing` ends, and how many of the values are
            NaN or infinite.
        """


class NumpyBackend(Backend):
    """NumPy on the CPU, and fused loops where a method can be recorded."""

    name = "numpy on cpu"
    block = BLOCK
    sweep = SWEEP
    fuses = True

    def __init__(self) -> None:
        self.scratch = Scratch()

    def computing(self) -> AbstractContextManager[Any]:
        """See :meth:`Backend.computing`."""
        return np.errstate(all="ignore")

    def load(self, tensor: Tensor, start: int, stop: int, working: DType) -> Array:
        """See :meth:`Backend.load`."""
        wide = getattr(tensor, "read_wide", None)
        if wide is not None:
            return np.asarray(wide(start, stop)).astype(working, copy=False)
        return widen(tensor.read(start, stop), working)

    def empty(self, size: int, working: DType) -> Array:
        """See :meth:`Backend.empty`."""
        return np.empty(size, working)

    def rounded(self, values: Array, dtype: DType, working: DType) -> Array:
        """See :meth:`Backend.rounded`."""
        return widen(narrow(values, dtype), working)

    def flat(self, values: Any, working: DType) -> Array:
        """See :meth:`Backend.flat`."""
        return np.asarray(values).reshape(-1).astype(working, copy=False)

    def uniform(self, key: tuple[int, int], start: int, stop: int) -> Array:
        """See :meth:`Backend.uniform`."""
        return philox.uniform(key, start, stop)

    def nonfinite(self, arrays: Sequence[Array]) -> list[int]:
        """See :meth:`Backend.nonfinite`."""
        # A sum is the cheapest test: it is finite only if no value is NaN or infinite (or it overflowed).
        return [
            0 if np.isfinite(values.sum()) else values.size - int(np.count_nonzero(np.isfinite(values)))
            for values in arrays
        ]

    def store(self, values: Array, dtype: DType, out: Array | None) -> tuple[Array, int]:
        """See :meth:`Backend.store`."""
        narrowed = narrow(values, dtype)
        if values.size == 0 or float(np.max(np.abs(values))) <= largest_finite(dtype):
            return narrowed, 0
        return narrowed, int(np.count_nonzero(~np.isfinite(narrowed)))


NUMPY = NumpyBackend()


def choose_backend(device: str | None = None, backend: str | None = None) -> Backend:
    """Return the backend that a person asked for.

    Args:
        device: ``cpu``, the default, or a GPU: ``cuda``, or ``cuda:1`` for the second one.
        backend: ``numpy`` or ``torch``; by default NumPy on a CPU, PyTorch on a GPU.

    Raises:
        DeviceError: if there is no such device or backend, they do not go together, or PyTorch is not installed.
    """
    device = device or "cpu"
    if backend is None:
        backend = "numpy" if device == "cpu" else "torch"
    if backend not in BACKENDS:
        raise DeviceError(f"there is no backend {backend!r}{did_you_mean(backend, BACKENDS)}; use numpy or torch")
    if backend == "numpy":
        if device != "cpu":
            raise DeviceError(f"the backend numpy computes on the cpu alone; for the device {device!r} use torch")
        return NUMPY
    try:
        from weightsmith.engine.torch_backend import TorchBackend
    except ImportError as error:
        raise DeviceError(
            f"computing with torch on {device!r} needs PyTorch ({error}): pip install 'weightsmith[torch]'"
        ) from error
    return TorchBackend(device)
