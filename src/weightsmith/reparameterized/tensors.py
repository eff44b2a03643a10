"""The tensors of a layer that is made of others: its kernel and its bias, computed as they are read."""

from __future__ import annotations

import math

from weightsmith import dtypes
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import tiled
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.kernels.convert import narrow
from weightsmith.reparameterized.layer import Layer


class MadeTensor(Tensor):
    """A tensor of a layer that is made of others.

    Attributes:
        layer: the layer.
    """

    def __init__(self, name: str, shape: tuple[int, ...], layer: Layer) -> None:
        self.name = name
        self.shape = shape
        self.dtype = layer.dtype
        self.layer = layer
        self.held = layer.held

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to this tensor's dtype."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in this tensor's dtype: ``[n]``, float32 (float64 if it is)."""
        return narrow(self.exact(start, stop), dtypes.working_dtype([self.dtype]))

    def exact(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop`` as they are computed: ``[n]``, float64."""
        raise NotImplementedError


class KernelTensor(MadeTensor):
    """The kernel of a layer, made in tiles of rows that its shape alone decides."""

    def __init__(self, name: str, layer: Layer, shape: tuple[int, ...] | None = None) -> None:
        super().__init__(name, layer.shape if shape is None else shape, layer)

    def exact(self, start: int, stop: int) -> Array:
        """See :meth:`MadeTensor.exact`."""
        layer = self.layer
        width = max(math.prod(layer.shape[1:]), 1)

        def make(first: int, last: int) -> Array:
            if start <= first * width and last * width <= stop:
                return layer.rows(first, last)
            # A tile that is not wanted whole is wanted again, for the block before or behind this one.
            return RECENT.get(self, lambda: (layer.rows(first, last),), first)[0]

        return tiled(start, stop, width, layer.out, make)


class BiasTensor(MadeTensor):
    """The bias of a layer that has one."""

    def __init__(self, name: str, layer: Layer) -> None:
        super().__init__(name, (layer.outputs or layer.out,), layer)

    def exact(self, start: int, stop: int) -> Array:
        """See :meth:`MadeTensor.exact`."""
        bias = self.layer.bias
        assert bias is not None, "only a layer's own bias is a tensor"
        return RECENT.get(self, lambda: (bias(),))[0][start:stop]
