"""Linear and convolution layers, and batch norms, as values that are read when they are needed.

A layer's kernel is made some rows (output channels) at a time, in float64. Kernels are PyTorch's:
``[out, in / groups, *kernel]``, a linear layer's ``[out, in]``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import read_wide, tile_rows
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear or convolution layer, or any tensor whose first axis can be taken apart.

    Attributes:
        shape: the kernel's shape: ``[out, in / groups, *kernel]``.
        dtype: the dtype in which it is written.
        rows: the kernel's rows from one to before another: float64, ``[stop - start, *shape[1:]]``.
        bias: the bias: float64, ``[out]``; None for a layer without.
        outputs: the bias's length, where the first axis is not that of the outputs (transposed convolutions).
        held: about how many bytes stay held between two reads, of what its linear algebra needs; 0 where there is none.
    """

    shape: tuple[int, ...]
    dtype: DType
    rows: Callable[[int, int], Array]
    bias: Callable[[], Array] | None = None
    outputs: int | None = None
    held: int = 0

    @property
    def out(self) -> int:
        """Number of output channels."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Number of input channels that an output channel sees."""
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's size; empty for a linear layer."""
        return self.shape[2:]

    @property
    def pointwise(self) -> bool:
        """Whether it sees one place at a time: a linear layer, or a kernel of size 1."""
        return all(length == 1 for length in self.kernel)

    def whole(self) -> Array:
        """The whole kernel, float64; kept while it is needed again and again."""
        return RECENT.get(self, lambda: (self.rows(0, self.out),))[0]


class Once:
    """A small array that is computed when it is asked for first, by one thread."""

    def __init__(self, make: Callable[[], Array]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Array | None = None

    def __call__(self) -> Array:
        """Return it."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm in evaluation mode: ``y = scale * x + shift`` for each channel.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale`` (Ioffe and Szegedy, 2015,
    arXiv:1502.03167).

    Attributes:
        mean: the running mean, ``[channels]``.
        variance: the running variance, ``[channels]``.
        weight: gamma, ``[channels]``, or None for ones.
        bias: beta, ``[channels]``, or None for zeros.
        eps: what is added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.mean.size

    @cached_property
    def scale(self) -> Array:
        """The factor of each channel, float64.

        Raises:
            CheckpointError: if a variance is negative.
        """
        variance = vector(self.variance) + self.eps
        if not (variance > 0).all():
            raise CheckpointError(
                f"{self.variance.name} holds values that are negative, zero (with eps {self.eps:g}) or NaN; a variance "
                "is none of these"
            )
        scale: Array = 1 / np.sqrt(variance)
        return scale if self.weight is None else vector(self.weight) * scale

    @cached_property
    def shift(self) -> Array:
        """What is added to each channel, float64."""
        shift: Array = -vector(self.mean) * self.scale
        return shift if self.bias is None else vector(self.bias) + shift


def vector(tensor: Tensor) -> Array:
    """Read a small tensor whole: float64, flat."""
    return read_wide(tensor, 0, tensor.size)


def tiles(layer: Layer) -> Iterator[Array]:
    """Yield the rows of a kernel, some at a time, in order."""
    step = tile_rows(math.prod(layer.shape[1:]))
    for start in range(0, layer.out, step):
        yield layer.rows(start, min(start + step, layer.out))


def stored(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """Return the layer of a checkpoint's tensors.

    Args:
        weight: ``[out, …]``, of at least one axis.
        bias: ``[out]`` or None.
    """
    shape = weight.shape
    width = math.prod(shape[1:])

    def rows(start: int, stop: int) -> Array:
        return read_wide(weight, start * width, stop * width).reshape(stop - start, *shape[1:])

    return Layer(shape, weight.dtype, rows, None if bias is None else lambda: vector(bias), held=weight.held)
