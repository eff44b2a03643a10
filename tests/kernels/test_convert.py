"""Conversions are held against ml_dtypes, NumPy and exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from weightsmith.kernels.convert import largest_finite, narrow, widen

NARROW = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def every_value(dtype: np.dtype) -> np.ndarray:
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [*NARROW, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz])
@pytest.mark.parametrize("working", [np.float32, np.float64])
def test_every_value_widens_exactly_and_comes_back(dtype, working):
    values = every_value(np.dtype(dtype))
    wide = widen(values, np.dtype(working))
    np.testing.assert_array_equal(wide, values.astype(working))
    back = narrow(wide, np.dtype(dtype))
    finite = ~np.isnan(wide)
    assert back[finite].tobytes() == values[finite].tobytes()
    assert np.isnan(back[~finite].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_float32_rounds_as_ml_dtypes_rounds(dtype):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(200_000) * 10.0 ** rng.uniform(-44, 38, 200_000)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 3.4e38, 1e-45], np.float32)
    values = np.concatenate([values, special])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    got = narrow(values, np.dtype(dtype))
    same = (got.view(f"u{got.itemsize}") == expected.view(f"u{got.itemsize}")) | np.isnan(values)
    assert same.all()
    assert np.isnan(got.astype(np.float32))[np.isnan(values)].all()


@pytest.mark.parametrize("dtype", NARROW)
def test_float64_is_rounded_once(dtype):
    """The value lies just off a tie: rounding to float32 first would land on the tie and go the wrong way."""
    grid = every_value(np.dtype(dtype)).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    middle = (grid[:-1] + grid[1:]) / 2
    values = np.concatenate([np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), middle])
    got = narrow(values, np.dtype(dtype)).astype(np.float64)
    sample = np.random.default_rng(1).choice(len(values), 500)
    for value, rounded in zip(values[sample], got[sample], strict=True):
        near = grid[np.searchsorted(grid, value) - 1 : np.searchsorted(grid, value) + 1]
        best = min(abs(Fraction(v) - Fraction(value)) for v in near)
        assert abs(Fraction(rounded) - Fraction(value)) == best


def test_largest_finite_values_are_those_of_the_formats():
    assert largest_finite(np.dtype(np.float16)) == 65504
    assert largest_finite(np.dtype(ml_dtypes.float8_e4m3fn)) == 448
