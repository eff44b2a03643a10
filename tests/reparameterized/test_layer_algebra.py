"""The algebra of layers, each operation against PyTorch's convolutions on random images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import batch_norm, conv2d, linear

from weightsmith.checkpoint.rows import tile_rows
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.reparameterized.algebra import (
    NotExact,
    absorb,
    absorb_before,
    absorb_transposed,
    add,
    dilate,
    identity,
    largest_kernel,
    pad,
    regroup,
    reshape,
    scale,
    serial,
    take_columns,
    take_rows,
)
from weightsmith.reparameterized.layer import Layer, Norm, stored, tiles
from weightsmith.reparameterized.tensors import BiasTensor, KernelTensor

FLOAT64 = np.dtype(np.float64)
RNG = np.random.default_rng(0)


def layer(*shape: int, bias: bool = True) -> Layer:
    own = ArrayTensor("b", RNG.standard_normal(shape[0])) if bias else None
    return stored(ArrayTensor("w", RNG.standard_normal(shape)), own)


def norm(channels: int, eps: float = 1e-5) -> Norm:
    mean, weight, bias = (ArrayTensor(name, RNG.standard_normal(channels)) for name in "mwb")
    return Norm(mean, ArrayTensor("v", RNG.uniform(0.1, 2, channels)), weight, bias, eps)


def image(channels: int, height: int = 9, width: int = 8) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal((2, channels, height, width)))


def run(one: Layer, x: torch.Tensor, **options: Any) -> torch.Tensor:
    bias = None if one.bias is None else torch.from_numpy(np.array(one.bias()))
    kernel = torch.from_numpy(one.rows(0, one.out))
    return conv2d(x, kernel, bias, **options) if one.kernel else linear(x, kernel, bias)


def normed(x: torch.Tensor, one: Norm) -> torch.Tensor:
    parts = (one.mean, one.variance, one.weight, one.bias)
    arrays = [None if part is None else torch.from_numpy(part.numpy().copy()) for part in parts]
    return batch_norm(x, *arrays, eps=one.eps)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_batch_norm_behind(bias, eps):
    x, one, behind = image(4), layer(6, 2, 3, 3, bias=bias), norm(6, eps)
    same(run(absorb(one, behind), x, groups=2), normed(run(one, x, groups=2), behind))


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_before_a_1x1(bias):
    x, one, before = image(4), layer(6, 4, 1, 1, bias=bias), norm(4)
    same(run(absorb_before(before, one), x), run(one, normed(x, before)))


def test_batch_norm_without_gain_and_shift():
    plain = Norm(norm(6).mean, norm(6).variance, None, None, 1e-5)
    x, one = image(4), layer(6, 4, 3, 3)
    same(run(absorb(one, plain), x), normed(run(one, x), plain))


@pytest.mark.parametrize(("old", "new"), [((1, 1), (3, 3)), ((3, 1), (5, 7)), ((3, 3), (3, 3)), ((2, 2), (4, 6))])
def test_padding_keeps_the_centre(old, new):
    x, one = image(4, 12, 13), layer(6, 4, *old)
    padding = [(n - o) // 2 for n, o in zip(new, old, strict=True)]
    same(run(pad(one, new), x, padding=padding), run(one, x))


def test_dilation():
    x, one = image(4), layer(6, 4, 2, 3)
    same(run(dilate(one, 2), x), run(one, x, dilation=2))


@pytest.mark.parametrize(("width", "wide"), [(1, 2), (1, 12), (2, 6), (3, 6), (4, 12), (6, 6)])
@pytest.mark.parametrize("out", [12, 24])
def test_regrouping(width, wide, out):
    x, one = image(12), layer(out, width, 3, 3)
    same(run(regroup(one, wide, 12), x, groups=12 // wide), run(one, x, groups=12 // width))


@pytest.mark.parametrize("width", [1, 2, 6])
def test_identity(width):
    x = image(6)
    same(run(identity(6, width, (3, 5), FLOAT64), x, padding=(1, 2), groups=6 // width), x)


def test_scale_multiplies_the_bias_too():
    x, one, factors = image(4), layer(6, 4, 3, 3), RNG.standard_normal(6)
    same(run(scale(one, lambda: factors), x), run(one, x) * torch.from_numpy(factors)[:, None, None])


def test_sums_and_differences():
    x, one, other, plain = image(4), layer(6, 4, 3, 3), layer(6, 4, 3, 3), layer(6, 4, 3, 3, bias=False)
    same(run(add(one, other, plain, signs=(1, -1, 1)), x), run(one, x) - run(other, x) + run(plain, x))
    assert add(plain, plain).bias is None


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_1x1_behind(bias, width):
    x, first, second = image(4), layer(8, width, 3, 3, bias=bias[0]), layer(5, 8, 1, 1, bias=bias[1])
    both = run(second, run(first, x, padding=1, groups=4 // width))
    same(run(serial(first, second, channels=4), x, padding=1), both)


@pytest.mark.parametrize("bias", [True, False])
def test_columns_behind_rows(bias):
    x, first, second = image(6), layer(6, 1, 1, 5, bias=False), layer(6, 1, 3, 1, bias=bias)
    both = run(second, run(first, x, padding=(0, 2), groups=6), padding=(1, 0), groups=6)
    same(run(serial(first, second), x, padding=(1, 2), groups=6), both)


def test_columns_behind_rows_with_strides():
    x, first, second = image(6, 11, 12), layer(6, 1, 1, 3, bias=False), layer(6, 1, 3, 1)
    both = run(second, run(first, x, padding=(0, 1), stride=(1, 2), groups=6), padding=(1, 0), stride=(2, 1), groups=6)
    same(run(serial(first, second), x, padding=1, stride=2, groups=6), both)


def test_a_bias_through_what_is_not_padded():
    x, first, second = image(6), layer(6, 1, 1, 5), layer(6, 1, 3, 1)
    same(run(serial(first, second, padded=False), x, groups=6), run(second, run(first, x, groups=6), groups=6))
    # A 1x1 sees no border, padded or not.
    point = layer(6, 1, 1, 1)
    same(run(serial(first, point), x, groups=6), run(point, run(first, x, groups=6), groups=6))


def test_linear_layers_in_a_row_and_their_parts():
    x, first, second = torch.from_numpy(RNG.standard_normal((3, 7))), layer(9, 7), layer(4, 9)
    same(run(serial(first, second), x), run(second, run(first, x)))
    halves = [serial(take_rows(first, a, b), take_columns(second, a, b)) for a, b in ((0, 4), (4, 9))]
    same(sum(run(half, x) for half in halves), run(second, run(first, x)) - torch.from_numpy(second.bias()))


@pytest.mark.parametrize("length", [1, 5, 64, 10**6])
def test_tensors_are_the_same_in_blocks_of_any_length(length):
    """The kernel has more rows than fit into a tile, and the last tile is not full."""
    first, second = layer(60, 33, 7, 7), layer(131, 60, 1, 1)
    folded = absorb(serial(first, second, channels=33), norm(131))
    assert 1 < tile_rows(33 * 49) < 131
    for tensor in (KernelTensor("w", folded), BiasTensor("b", folded)):
        whole = tensor.exact(0, tensor.size)
        step = length if length > 60 else length * 997
        parts = [tensor.exact(i, min(i + step, tensor.size)) for i in range(0, tensor.size, step)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(
        np.concatenate(list(tiles(folded))), KernelTensor("w", folded).exact(0, 131 * 33 * 49).reshape(folded.shape)
    )


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm of other length": (lambda: absorb(layer(6, 4, 3, 3), norm(5)), "5 channels cannot follow .* 6 outputs"),
    "norm before of other length": (lambda: absorb_before(norm(5), layer(6, 4, 1, 1)), "5 channels .* 4 inputs"),
    "norm before a kernel": (lambda: absorb_before(norm(4), layer(6, 4, 3, 3)), "zeros that it sees beyond the border"),
    "norm behind transposed": (lambda: absorb_transposed(layer(6, 4, 3, 3), norm(7)), "7 channels"),
    "larger into smaller": (lambda: pad(layer(6, 4, 5, 5), (3, 3)), "5x5 has no place in the centre of one of 3x3"),
    "even into odd": (lambda: pad(layer(6, 4, 2, 2), (3, 3)), "2x2 has no place"),
    "two axes into one": (lambda: pad(layer(6, 4, 3), (3, 3)), "no place"),
    "identity without centre": (lambda: identity(4, 1, (2, 2), FLOAT64), "2x2 has no centre"),
    "identity in broken groups": (lambda: identity(4, 3, (3, 3), FLOAT64), "groups of 3"),
    "groups that do not nest": (lambda: regroup(layer(12, 2, 3, 3), 3, 12), "cannot be brought to groups of 3"),
    "channels that do not divide": (lambda: regroup(layer(12, 2, 3, 3), 4, 10), "on 10 channels"),
    "sums of other shapes": (lambda: add(layer(6, 4, 3, 3), layer(6, 4, 1, 1)), "cannot be added"),
    "kernels of one and two axes": (lambda: largest_kernel([layer(6, 4, 3), layer(6, 4, 3, 3)]), "cannot be added"),
    "biased, padded": (lambda: serial(layer(6, 1, 1, 3), layer(6, 1, 3, 1)), "first layer has a bias"),
    "along one axis": (lambda: serial(layer(6, 1, 1, 3, bias=False), layer(6, 1, 1, 3)), "same axis"),
    "kernels behind each other": (lambda: serial(layer(6, 4, 3, 3), layer(5, 6, 3, 3)), "must be depthwise, or"),
    "maybe in groups": (lambda: serial(layer(6, 1, 3, 3), layer(5, 6, 1, 1)), "may be in groups"),
    "other size": (lambda: reshape(layer(6, 8), (6, 3, 3)), "cannot have the shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_one_layer_equals_is_refused_with_the_reason(case):
    make, text = REFUSED[case]
    with pytest.raises(NotExact, match=text):
        make()


def test_a_border_is_why_chains_along_one_axis_are_refused():
    """The product kernel is right inside, and wrong where the second layer sees zeros."""
    x, first, second = image(1), layer(1, 1, 1, 3, bias=False), layer(1, 1, 1, 3, bias=False)
    both = run(second, run(first, x, padding=(0, 1)), padding=(0, 1))
    kernel = torch.from_numpy(np.convolve(first.rows(0, 1).ravel(), second.rows(0, 1).ravel()).reshape(1, 1, 1, 5))
    product = conv2d(x, kernel, padding=(0, 2))
    same(product[..., 2:-2], both[..., 2:-2])
    assert not torch.allclose(product, both)


@settings(max_examples=40)
@given(
    groups=st.sampled_from([1, 2, 4]),
    kernels=st.lists(st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 5)]), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_branches_side_by_side(groups, kernels, data):
    x = image(8)
    expected, branches = torch.zeros(2, 8, 9, 8, dtype=torch.float64), []
    size = tuple(max(k[i] for k in kernels) for i in range(2))
    for kernel in kernels:
        own = groups * data.draw(st.sampled_from([g for g in (1, 2, 4, 8) if groups * g <= 8]))
        one, behind = layer(8, 8 // own, *kernel, bias=data.draw(st.booleans())), norm(8)
        expected += normed(run(one, x, padding=[k // 2 for k in kernel], groups=own), behind)
        branches.append(pad(regroup(absorb(one, behind), 8 // groups, 8), size))
    same(run(add(*branches), x, padding=[k // 2 for k in size], groups=groups), expected)
