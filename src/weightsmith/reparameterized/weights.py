"""Weights that are stored as something else, and what they stand for: each a layer of the tensors behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from weightsmith.checkpoint.rows import FLOAT64, tile_rows
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.reparameterized.algebra import scale
from weightsmith.reparameterized.layer import Layer, Once, tiles, vector


def weight_norm(direction: Layer, gain: Tensor, axis: int | None) -> Layer:
    """Return ``w = g v / ||v||``: Salimans and Kingma, Weight Normalization, 2016, arXiv:1602.07868.

    Where v is zero, w is zero: what unfolding gives for a row of zeros comes back.

    Args:
        direction: v, of any shape.
        gain: g: a number for each index of the axis, or one.
        axis: the axis that has a norm for each index, over all other axes; None for one norm of the whole tensor.
    """
    if axis == 0:
        gains = Once(lambda: vector(gain))
        ones = tuple(1 for _ in direction.shape[1:])

        def rows(start: int, stop: int) -> Array:
            values = direction.rows(start, stop)
            return values * _ratio(gains()[start:stop], row_norms(values)).reshape(-1, *ones)

        return replace(direction, rows=rows)
    factors = Once(lambda: _ratio(vector(gain), norms(direction, axis)))
    shape = [1] * len(direction.shape)
    if axis is not None:
        shape[axis] = direction.shape[axis]
    return replace(direction, rows=lambda start, stop: direction.rows(start, stop) * factors().reshape(shape))


def norms(layer: Layer, axis: int | None) -> Array:
    """Return the norms of a tensor over all axes but one: ``[shape[axis]]``; or its one norm, ``[1]``. float64."""
    others = tuple(i for i in range(len(layer.shape)) if i != axis)
    if axis == 0:
        return np.concatenate([np.zeros(0), *(row_norms(values) for values in tiles(layer))])
    total = np.zeros(1 if axis is None else layer.shape[axis])
    for values in tiles(layer):
        total += np.square(values).sum(axis=others)
    return np.sqrt(total)


def row_norms(values: Array) -> Array:
    """Return the norm of each row, whatever its shape: ``[rows]``."""
    found: Array = np.sqrt(np.square(values).reshape(len(values), -1).sum(axis=1))
    return found


def sigma_reparam(weight: Layer, sigma: Tensor, right: Tensor) -> Layer:
    """Return ``gamma W / sigma(W)``: Zhai et al., Stabilizing Transformer Training, 2023, arXiv:2303.06296.

    In evaluation mode ``sigma(W)`` is ``v^T W u'`` after one power iteration from the stored u: ``v = W u``,
    ``u' = W^T v``, both normalised, so it is ``||W^T v||`` (apple/ml-sigma-reparam, ``SpectralNormedWeight``).

    Args:
        weight: W, ``[out, in]``.
        sigma: gamma, one number.
        right: the stored u, ``[in]``.
    """

    def factor() -> Array:
        direction = vector(right)
        left = np.concatenate([values @ direction for values in tiles(weight)])
        length = np.sqrt(np.square(left).sum())
        back = np.zeros(weight.width)
        if length > 0:
            step = tile_rows(math.prod(weight.shape[1:]))
            for i, values in enumerate(tiles(weight)):
                back += (left[i * step : i * step + len(values)] / length) @ values
        return _reciprocal(np.sqrt(np.square(back).sum()), right.name) * vector(sigma)

    return _scaled(weight, factor)


def spectral_norm(weight: Layer, left: Tensor, right: Tensor, axis: int) -> Layer:
    """Return ``W / (u^T W v)``: Miyato et al., Spectral Normalization, 2018, arXiv:1802.05957.

    In evaluation mode PyTorch takes u and v as they are stored.

    Args:
        weight: W, of any shape.
        left: u, ``[shape[axis]]``.
        right: v, a number for each index of the other axes together.
        axis: the axis that comes first when W is made a matrix.
    """

    def factor() -> Array:
        u, v = vector(left), vector(right)
        others = [length for i, length in enumerate(weight.shape) if i != axis]
        form = [1 if i == axis else length for i, length in enumerate(weight.shape)]
        along = v.reshape(others).reshape(form)
        total, start = 0.0, 0
        for values in tiles(weight):
            if axis == 0:
                total += float((u[start : start + len(values)] @ values.reshape(len(values), -1)) @ v)
            else:
                part = (values * along[start : start + len(values)]).sum(
                    axis=tuple(i for i in range(values.ndim) if i != axis)
                )
                total += float(part @ u)
            start += len(values)
        return np.atleast_1d(_reciprocal(total, left.name))

    return _scaled(weight, factor)


def conditioned(weight: Layer) -> Layer:
    """Return W with each row divided by its norm: weight conditioning by row equilibration. Inferred.

    A row is what makes one output: all axes but the first. A row of zeros stays zero.
    """
    ones = tuple(1 for _ in weight.shape[1:])

    def rows(start: int, stop: int) -> Array:
        values = weight.rows(start, stop)
        found = row_norms(values)
        return values * _ratio(np.ones(len(values)), found).reshape(-1, *ones)

    return replace(weight, rows=rows)


def companded(weight: Layer, a: Callable[[], float], b: Callable[[], float]) -> Layer:
    """Return ``w = a arctan(v / b)``, element by element: Weight Compander. Inferred: the abstract names no function.

    Args:
        weight: v, of any shape.
        a: two over pi times the largest weight there can be.
        b: the scale of v; not 0.
    """
    return mapped(weight, lambda values: a() * np.arctan(values / b()))


def mapped(weight: Layer, function: Callable[[Array], Array]) -> Layer:
    """Return a tensor with a function applied to every element."""
    return replace(weight, rows=lambda start, stop: function(weight.rows(start, stop)))


# The recurrent eigenvalue for a stored w: Wang and Li, StableSSM, 2023, arXiv:2311.14495. "best" and "best_discrete"
# are those whose gradient over weight stays bounded.
STABLE: dict[str, Callable[[Array, float, float], Array]] = {
    "exp": lambda w, a, b: -np.exp(w),
    "softplus": lambda w, a, b: -np.logaddexp(0, w),
    "best": lambda w, a, b: -1 / (a * np.square(w) + b),
    "best_discrete": lambda w, a, b: 1 - 1 / (a * np.square(w) + b),
}


def _scaled(layer: Layer, factor: Callable[[], Array]) -> Layer:
    """Return a layer times one number; its bias is left as it is."""
    once = Once(factor)
    # Vectors that the matrix is multiplied with.
    held = layer.held + math.prod(layer.shape) // min(layer.shape) * FLOAT64.itemsize
    return replace(scale(layer, lambda: np.broadcast_to(once(), (layer.out,))), bias=layer.bias, held=held)


def _ratio(gain: Array, length: Array) -> Array:
    result: Array = np.divide(gain, length, out=np.zeros(np.broadcast(gain, length).shape), where=length != 0)
    return result


def _reciprocal(value: float, name: str) -> float:
    if value == 0 or not math.isfinite(value):
        raise CheckpointError(f"{name}: its weight has the spectral norm {value:g}, which nothing can be divided by")
    return float(1 / value)
