"""The twins on PyTorch's tensors, held against NumPy's kernels bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devices import DEVICES
from weightsmith import dtypes
from weightsmith.kernels import convert, philox, select
from weightsmith.kernels.torch import convert as torch_convert
from weightsmith.kernels.torch import philox as torch_philox
from weightsmith.kernels.torch import select as torch_select

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = [dtypes.float_from_name(name) for name in dtypes.FLOAT_NAMES]
WORKING = (np.float32, np.float64)


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 4), (1, 4099), (2**34 - 5, 2**34 + 6), (2**40 + 3, 2**40 + 5)])
def test_random_numbers_are_the_same_bits(device, start, stop):
    key = philox.key_of(7, "tensor", "model")
    found = torch_philox.uniform(key, start, stop, device).cpu().numpy()
    assert found.tobytes() == philox.uniform(key, start, stop).tobytes()


def numbers(dtype: np.dtype, working: type) -> np.ndarray:
    """Values everywhere, and those at and beside the boundaries of rounding to a dtype."""
    rng = np.random.default_rng(0)
    width = UNSIGNED[np.dtype(working).itemsize]
    anywhere = rng.integers(0, 2**64, 200_000, np.uint64).astype(width).view(working)
    usual = rng.standard_normal(200_000) * 10.0 ** rng.uniform(-9, 6, 200_000)
    if dtype.itemsize > 2:
        near = np.zeros(0)
    else:
        with np.errstate(invalid="ignore"):
            exact = np.arange(256**dtype.itemsize).astype(UNSIGNED[dtype.itemsize]).view(dtype).astype(np.float64)
        exact = np.unique(exact[np.isfinite(exact)])
        halfway = (exact[1:] + exact[:-1]) / 2
        beyond = np.array([exact[-1] + (exact[-1] - exact[-2]) * share for share in (0.49, 0.5, 0.51, 1, 2)])
        near = np.concatenate([exact, halfway, beyond, -beyond])
    with np.errstate(over="ignore"):
        near = near.astype(working)
    sides = [np.nextafter(near, working(side)) for side in (-np.inf, np.inf)]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], working)
    return np.concatenate([anywhere, usual.astype(working), near, *sides, special])


def bits(array: np.ndarray) -> np.ndarray:
    """Bit patterns, one for all NaNs."""
    with np.errstate(invalid="ignore"):
        nan = np.isnan(array.astype(np.float64))
    return np.where(nan, 0, array.view(UNSIGNED[array.dtype.itemsize])), nan


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_is_the_same(device, dtype, working):
    values = numbers(dtype, working)
    expected = convert.narrow(values, dtype)
    narrowed = torch_convert.narrow(torch.from_numpy(values).to(device), dtype)
    found = narrowed.view(torch.uint8).cpu().numpy().view(dtype)
    for one, other in zip(bits(found), bits(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(torch_convert.count_nonfinite(narrowed, dtype)) == np.count_nonzero(~np.isfinite(expected))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pattern_is_widened_exactly(device, dtype):
    count = 256 ** min(dtype.itemsize, 2)
    values = np.arange(count).astype(UNSIGNED[min(dtype.itemsize, 2)])
    values = values.view(dtype) if dtype.itemsize <= 2 else values.astype(dtype) / 7
    for working in WORKING:
        if dtype.itemsize > np.dtype(working).itemsize:
            continue
        data = torch.from_numpy(values.view(np.uint8)).to(device)
        found = torch_convert.widen(data, dtype, getattr(torch, np.dtype(working).name)).cpu().numpy()
        np.testing.assert_array_equal(found, convert.widen(values, np.dtype(working)))


@pytest.fixture(params=WORKING)
def magnitudes(request):
    """Many equal values, infinities, and a NaN with the sign that processors give to those they make."""
    rng = np.random.default_rng(1)
    values = np.abs(np.round(rng.standard_normal(5000), 2)).astype(request.param)
    values[:3], values[3:6] = np.inf, -np.float64("nan")
    values[6] = np.float64("nan")
    return values


def test_selection_finds_the_same(device, magnitudes):
    tensor = torch.from_numpy(magnitudes).to(device)
    assert select.selector(magnitudes) is select
    assert select.selector(tensor) is torch_select
    ours, theirs = torch_select.patterns(tensor), select.patterns(np.abs(magnitudes))
    np.testing.assert_array_equal(torch_select.gather(ours), theirs)
    assert torch_select.gather(ours).dtype == theirs.dtype
    width = 8 * theirs.dtype.itemsize
    low, high = (int(np.array(bound, magnitudes.dtype).view(theirs.dtype)) for bound in (0.5, 0.75))
    for bounds in ((0, 2**64 - 1), (low, high), (low, 2**width - 1), (high, low)):
        above, inside = torch_select.within(ours, *bounds)
        expected = select.within(theirs, *(min(bound, 2**width - 1) for bound in bounds))
        assert above == expected[0]
        np.testing.assert_array_equal(inside, expected[1])
    for shift in range(width - 16, -1, -16):
        start = low >> (shift + 16) << (shift + 16)
        expected = select.histogram(theirs, start, shift)
        np.testing.assert_array_equal(torch_select.histogram(ours, start, shift), expected)
    np.testing.assert_array_equal(torch_select.equal(ours, low), select.equal(theirs, low))
    table = select.rank_table(select.histogram(theirs, 0, width - 16))
    found = torch_select.look_up(tensor.reshape(50, 100), table).cpu().numpy()
    np.testing.assert_array_equal(found, select.look_up(np.abs(magnitudes).reshape(50, 100), table))
