"""The algebra of linear and convolution layers: one after another, or side by side, as one layer.

Operations take layers and give layers, so that a block of many becomes one without a step being rounded on the way, and
no kernel is held whole but where a product needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.rows import FLOAT64, tile_rows
from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.errors import WeightsmithError
from weightsmith.reparameterized.layer import Layer, Norm


class NotExact(WeightsmithError):
    """No one layer equals these; the message says why. Whoever folds says where."""


def identity(channels: int, width: int, kernel: Sequence[int], dtype: DType) -> Layer:
    """Return the layer that does nothing: channel i of its group in, channel i out.

    Args:
        channels: input channels, which are the output channels.
        width: input channels of a group.
        kernel: the kernel's size, odd: the one stands in its centre.
        dtype: the dtype in which it would be written.
    """
    if channels % width:
        raise NotExact(f"{channels} channels cannot be in groups of {width}")
    _check_odd(kernel)
    centre = tuple(length // 2 for length in kernel)

    def rows(start: int, stop: int) -> Array:
        values = np.zeros((stop - start, width, *kernel))
        places = np.arange(start, stop)
        index: tuple[Any, ...] = (places - start, places % width, *centre)
        values[index] = 1
        return values

    return Layer((channels, width, *kernel), dtype, rows)


def absorb(layer: Layer, norm: Norm) -> Layer:
    """Return a layer and the batch norm behind it as one: each row times its scale."""
    if norm.channels != layer.out:
        raise NotExact(f"a batch norm of {norm.channels} channels cannot follow a layer with {layer.out} outputs")
    scaled = scale(layer, lambda: norm.scale)
    bias = scaled.bias
    return replace(scaled, bias=lambda: norm.shift if bias is None else bias() + norm.shift)


def absorb_transposed(layer: Layer, norm: Norm) -> Layer:
    """Return a transposed convolution ``[in, out / groups, *kernel]`` and the batch norm behind it as one."""
    if norm.channels % layer.width or layer.out % (norm.channels // layer.width):
        raise NotExact(
            f"a batch norm of {norm.channels} channels cannot follow a transposed convolution of {list(layer.shape)}"
        )
    groups = norm.channels // layer.width
    inputs = layer.out // groups

    def rows(start: int, stop: int) -> Array:
        factors = norm.scale.reshape(groups, layer.width)[np.arange(start, stop) // inputs]
        return layer.rows(start, stop) * factors.reshape(*factors.shape, *(1 for _ in layer.kernel))

    bias = layer.bias
    shifted = replace(layer, rows=rows, outputs=norm.channels)
    return replace(shifted, bias=lambda: norm.shift if bias is None else bias() * norm.scale + norm.shift)


def absorb_before(norm: Norm, layer: Layer) -> Layer:
    """Return a batch norm and the linear or 1x1 layer behind it as one: each column times its scale.

    Raises:
        NotExact: if the layer sees more than one place: the zeros beyond the border would have to be shifted as well.
    """
    if not layer.pointwise:
        raise NotExact(
            f"a batch norm before a kernel of {_size(layer.kernel)}: the zeros that it sees beyond the border are not "
            "normalised, so no bias equals the shift there"
        )
    if norm.channels != layer.width:
        raise NotExact(f"a batch norm of {norm.channels} channels cannot come before a layer with {layer.width} inputs")
    ones = tuple(1 for _ in layer.kernel)

    def rows(start: int, stop: int) -> Array:
        return layer.rows(start, stop) * norm.scale.reshape(-1, *ones)

    held = layer.held + layer.width * FLOAT64.itemsize
    return replace(layer, rows=rows, bias=lambda: _product(layer, norm.shift) + _bias(layer), held=held)


def scale(layer: Layer, factors: Callable[[], Array]) -> Layer:
    """Return a layer whose output channels are multiplied: its rows, and its bias.

    Args:
        layer: the layer.
        factors: a number for each, ``[out]``.
    """
    ones = tuple(1 for _ in layer.shape[1:])

    def rows(start: int, stop: int) -> Array:
        return layer.rows(start, stop) * factors()[start:stop].reshape(-1, *ones)

    bias = layer.bias
    return replace(layer, rows=rows, bias=None if bias is None else lambda: bias() * factors())


def pad(layer: Layer, kernel: Sequence[int]) -> Layer:
    """Return the same layer with a larger kernel, zero around the old one, which stays in the centre."""
    if layer.kernel == tuple(kernel):
        return layer
    before = []
    if len(kernel) == len(layer.kernel):
        before = [(new - old) // 2 for new, old in zip(kernel, layer.kernel, strict=True)]
    if not before or any(new < old or (new - old) % 2 for new, old in zip(kernel, layer.kernel, strict=True)):
        raise NotExact(f"a kernel of {_size(layer.kernel)} has no place in the centre of one of {_size(kernel)}")

    def rows(start: int, stop: int) -> Array:
        return np.pad(layer.rows(start, stop), [(0, 0), (0, 0), *((side, side) for side in before)])

    return replace(layer, shape=(*layer.shape[:2], *kernel), rows=rows)


def dilate(layer: Layer, step: int) -> Layer:
    """Return a layer of dilation 1 that does what the given one does with a dilation: zeros between its elements."""
    kernel = tuple((length - 1) * step + 1 for length in layer.kernel)
    places: tuple[slice, ...] = (slice(None), slice(None), *(slice(None, None, step) for _ in kernel))

    def rows(start: int, stop: int) -> Array:
        values = np.zeros((stop - start, layer.width, *kernel))
        values[places] = layer.rows(start, stop)
        return values

    return replace(layer, shape=(*layer.shape[:2], *kernel), rows=rows)


def regroup(layer: Layer, width: int, channels: int) -> Layer:
    """Return the same layer in fewer, wider groups: zero for inputs that are not of its own group.

    Args:
        layer: a layer in groups.
        width: input channels of a group of the result; a multiple of the layer's.
        channels: input channels of the whole layer.
    """
    if layer.width == width:
        return layer
    groups, wide = channels // max(layer.width, 1), channels // max(width, 1)
    if not layer.width or width % layer.width or channels % width or layer.out % groups or layer.out % wide:
        raise NotExact(
            f"a layer of {list(layer.shape)} on {channels} channels cannot be brought to groups of {width} channels"
        )

    def rows(start: int, stop: int) -> Array:
        values = np.zeros((stop - start, width, *layer.kernel))
        places = np.arange(start, stop)
        own = places // (layer.out // groups) * layer.width
        offset = own - places // (layer.out // wide) * width
        values[(places - start)[:, None], offset[:, None] + np.arange(layer.width)] = layer.rows(start, stop)
        return values

    return replace(layer, shape=(layer.out, width, *layer.kernel), rows=rows)


def serial(first: Layer, second: Layer, *, channels: int | None = None, padded: bool = True) -> Layer:
    """Return one layer for two, the second behind the first, with nothing between.

    The second is a linear or 1x1 layer over all outputs of the first; or a depthwise one, whose kernel extends along
    other axes than the first's. (Along the same axis it would see zeros beyond the border where the first, on a longer
    image, has values.)

    Args:
        first: the layer that is applied first.
        second: the other; its stride is 1, or the first's kernel is 1 along the axes of that stride.
        channels: input channels of the first, which its shape does not show: a convolution may be in groups.
        padded: whether the second sees zeros beyond the border.

    Raises:
        NotExact: if no one layer equals them.
    """
    if second.width == 1 and second.out == first.out:
        return _serial_depthwise(first, second, padded=padded)
    if not second.pointwise or second.width != first.out:
        raise NotExact(
            f"layers of {list(first.shape)} and {list(second.shape)} one behind the other; the second must be "
            "depthwise, or a linear or 1x1 layer over all outputs of the first"
        )

    if channels is None and first.kernel:
        raise NotExact(
            f"the first layer, of {list(first.shape)}, may be in groups, which its shape does not show: say how many "
            "input channels it has in all: channels=…"
        )
    whole = regroup(first, first.width if channels is None else channels, channels or first.width)

    def rows(start: int, stop: int) -> Array:
        rest = whole.whole().reshape(whole.out, math.prod(whole.shape[1:]))
        values = second.rows(start, stop).reshape(stop - start, second.width) @ rest
        return values.reshape(stop - start, *whole.shape[1:])

    dtype = dtypes.promote([first.dtype, second.dtype])
    held = first.held + second.held + math.prod(whole.shape) * FLOAT64.itemsize
    return Layer((second.out, *whole.shape[1:]), dtype, rows, _through(first, second), held=held)


def _serial_depthwise(first: Layer, second: Layer, *, padded: bool) -> Layer:
    if len(first.kernel) != len(second.kernel) or any(
        own > 1 and other > 1 for own, other in zip(first.kernel, second.kernel, strict=True)
    ):
        raise NotExact(
            f"kernels of {_size(first.kernel)} and {_size(second.kernel)} one behind the other extend along the same "
            "axis: beyond the border the second sees zeros, where the first has values on a longer image"
        )
    if first.bias is not None and padded and not second.pointwise:
        raise NotExact(
            f"the first layer has a bias, and the second, of {_size(second.kernel)}, sees zeros beyond the border "
            "where that bias would be; if it has no padding, say padding=false"
        )
    kernel = tuple(map(max, first.kernel, second.kernel))

    def rows(start: int, stop: int) -> Array:
        return first.rows(start, stop) * second.rows(start, stop)

    def bias() -> Array:
        # The second adds up the first's bias wherever its kernel lies.
        own = 0 if first.bias is None else first.bias() * second.whole().reshape(second.out, -1).sum(axis=1)
        return own + _bias(second)

    return Layer(
        (first.out, first.width, *kernel),
        dtypes.promote([first.dtype, second.dtype]),
        rows,
        None if first.bias is None and second.bias is None else bias,
        held=first.held + second.held,
    )


def add(*layers: Layer, signs: Sequence[int] | None = None) -> Layer:
    """Return one layer for several side by side whose outputs are added: kernels of one shape, and biases.

    Args:
        *layers: the layers; all see the same inputs.
        signs: 1 or -1 for each: whether its output is added or subtracted.
    """
    shape = layers[0].shape
    for layer in layers:
        if layer.shape != shape:
            raise NotExact(f"kernels of {list(shape)} and {list(layer.shape)} cannot be added")
    factors = signs or [1] * len(layers)
    biases = [(factor, layer.bias) for factor, layer in zip(factors, layers, strict=True) if layer.bias is not None]

    def rows(start: int, stop: int) -> Array:
        values = np.zeros((stop - start, *shape[1:]))
        for factor, layer in zip(factors, layers, strict=True):
            values += factor * layer.rows(start, stop)
        return values

    def bias() -> Array:
        total = np.zeros(shape[0])
        for factor, one in biases:
            total += factor * one()
        return total

    dtype = dtypes.promote([layer.dtype for layer in layers])
    return Layer(shape, dtype, rows, bias if biases else None, held=sum(layer.held for layer in layers))


def take_rows(layer: Layer, start: int, stop: int) -> Layer:
    """Return some output channels of a layer."""
    bias = layer.bias
    return replace(
        layer,
        shape=(stop - start, *layer.shape[1:]),
        rows=lambda first, last: layer.rows(start + first, start + last),
        bias=None if bias is None else lambda: bias()[start:stop],
    )


def take_columns(layer: Layer, start: int, stop: int) -> Layer:
    """Return a layer on some of its input channels, without its bias."""
    return replace(
        layer,
        shape=(layer.out, stop - start, *layer.kernel),
        rows=lambda first, last: layer.rows(first, last)[:, start:stop],
        bias=None,
    )


def reshape(layer: Layer, shape: Sequence[int]) -> Layer:
    """Return a layer whose rows have another shape with as many elements."""
    if shape[0] != layer.out or math.prod(shape) != math.prod(layer.shape):
        raise NotExact(f"a kernel of {list(layer.shape)} cannot have the shape {list(shape)}")
    return replace(
        layer,
        shape=tuple(shape),
        rows=lambda first, last: layer.rows(first, last).reshape(last - first, *shape[1:]),
    )


def largest_kernel(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Return the size that every kernel fits into."""
    lengths = {len(layer.kernel) for layer in layers}
    if len(lengths) > 1:
        raise NotExact("kernels of " + " and ".join(_size(layer.kernel) for layer in layers) + " cannot be added")
    return tuple(max(sizes) for sizes in zip(*(layer.kernel for layer in layers), strict=True))


def _through(first: Layer, second: Layer) -> Callable[[], Array] | None:
    """Return the bias of two layers, the second pointwise."""
    bias = first.bias
    return second.bias if bias is None else lambda: _product(second, bias()) + _bias(second)


def _product(layer: Layer, values: Array) -> Array:
    """Return what a pointwise layer makes of one vector, without its bias: ``[out]``."""
    step = tile_rows(math.prod(layer.shape[1:]))
    product = np.empty(layer.out)
    for start in range(0, layer.out, step):
        stop = min(start + step, layer.out)
        product[start:stop] = layer.rows(start, stop).reshape(stop - start, layer.width) @ values
    return product


def _bias(layer: Layer) -> Array:
    return np.zeros(layer.out) if layer.bias is None else layer.bias()


def _check_odd(kernel: Sequence[int]) -> None:
    if any(length % 2 == 0 for length in kernel):
        raise NotExact(f"a kernel of {_size(kernel)} has no centre: a branch around it cannot be one of its elements")


def _size(kernel: Sequence[int]) -> str:
    return "x".join(map(str, kernel)) or "no size (a linear layer)"
