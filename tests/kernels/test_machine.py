"""What the machine computes by itself: sums, exp and log, random numbers, ranks, selections."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import each_level, elementwise, hard_numbers, in_lanes, run, same, stored

from weightsmith.kernels import native, philox, select
from weightsmith.kernels.program import LONGEST_ROW, Collect, Histogram
from weightsmith.methods.block import rank_in_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LENGTHS = [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000]


def total(library: native.Library, function: Any, *arrays: Any) -> Any:
    """Return the number that ``function(xp, *arrays)`` asks for."""
    found, _ = run(library, lambda xp, _, *loads: function(xp, *loads), arrays)
    return found.values[0]


def wide_sum(xp: Any, x: Any, y: Any = None) -> Any:
    x = xp.astype(x, xp.float64)
    return xp.sum(x if y is None else x * xp.astype(y, xp.float64))


# -- sums ---------------------------------------------------------------------------------------------------------


@each_level
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float64, np.float64)], ids=["f32", "f64"])
def test_sums_are_exact_but_for_rounding_and_added_in_sixteen_lanes(library, count, dtypes):
    rng = np.random.default_rng(count)
    one, other = ((rng.standard_normal(count) * 10.0 ** rng.uniform(-9, 9, count)).astype(d) for d in dtypes)
    for found, terms in (
        (total(library, wide_sum, one), one.astype(np.float64)),
        # The product of two float32 is exact in float64.
        (total(library, wide_sum, one, other), one.astype(np.float64) * other),
    ):
        assert found == in_lanes(terms)
        assert abs(found - math.fsum(terms)) <= 1e-15 * math.fsum(abs(terms))


@each_level
def test_the_products_of_float32_are_exact(library):
    values = np.float32([1 + 2**-23, -1])
    assert total(library, wide_sum, values, values[::-1].copy()) == 2 * -(1 + 2**-23)
    assert Fraction(total(library, wide_sum, values[:1], values[:1])) == Fraction(float(values[0])) ** 2


@each_level
@pytest.mark.parametrize("values", [[np.inf, 1.0], [np.inf, -np.inf], [np.nan, 1.0], [1.7e308, 1.7e308]], ids=str)
def test_a_sum_that_is_not_finite_is_what_ieee_has(library, values):
    array = np.zeros(40)
    array[[0, 16]] = values
    with np.errstate(all="ignore"):
        assert same(total(library, wide_sum, array), np.float64(values[0]) + np.float64(values[1]))


@each_level
def test_counts_are_of_what_is_neither_zero_nor_false(library):
    values = hard_numbers(np.random.default_rng(0), 3001, np.float64)
    assert total(library, lambda xp, x: xp.count_nonzero(x), values) == np.count_nonzero(values)
    assert total(library, lambda xp, x: xp.count_nonzero(x > 0), values) == np.count_nonzero(values > 0)


@each_level
@pytest.mark.parametrize("columns", [64, 65, 1003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_greatest_of_a_row_is_nan_where_there_is_one(library, columns, dtype):
    values = np.random.default_rng(0).standard_normal((40, columns)).astype(dtype)
    values[range(5, 40), np.random.default_rng(1).integers(0, columns, 35)] = np.repeat([np.nan, np.inf, -np.inf], 12)[
        :35
    ]
    values[4] = -np.inf
    got = elementwise(library, lambda xp, x: x * 0.0 + xp.max(x, axis=-1, keepdims=True), values, columns=columns)
    with np.errstate(invalid="ignore"):
        assert same(got, (values * 0.0 + values.max(axis=-1, keepdims=True)).reshape(-1)).all()


# -- exp and log --------------------------------------------------------------------------------------------------


def in_units(got: float, exact: Decimal) -> float:
    """Return how many units in the last place of the exact result a float is off."""
    largest = Decimal(float(np.finfo(np.float64).max))
    unit = Decimal(math.ulp(min(float(min(abs(exact), largest)), float(largest))))
    return float(abs(Decimal(got) - exact) / unit)


def worst(function: Any, values: Any, got: Any) -> float:
    with localcontext() as context:
        context.prec = 50
        return max(in_units(float(g), function(Decimal(float(v)))) for g, v in zip(got, values, strict=True))


@each_level
def test_exp_is_within_one_unit_in_the_last_place(library):
    rng = np.random.default_rng(0)
    # Also around multiples of half of ln 2, where one polynomial hands over to the next.
    edges = (rng.integers(-1070, 1022, 150) + 0.5) * math.log(2)
    ranges = [(-745.13, 709.78), (-1, 1), (-1e-3, 1e-3), (-745.13, -708), (709, 709.78), (-30, 30)]
    values = np.concatenate([*(rng.uniform(*bounds, 250) for bounds in ranges), edges, edges * (1 + 1e-16)])
    got = elementwise(library, lambda xp, x: xp.exp(x), values)
    assert worst(Decimal.exp, values, got) < 1


@each_level
def test_log_is_within_one_unit_in_the_last_place(library):
    rng = np.random.default_rng(0)
    anything = rng.integers(1, 0x7FF0000000000000, 800).view(np.float64)
    tiny = rng.integers(1, 1 << 52, 100).view(np.float64)
    # The result is small there, and its units are.
    near_one = 1 + np.concatenate([rng.uniform(-1e-3, 1e-3, 300), 2.0 ** -rng.uniform(1, 52, 200)])
    edges = np.sqrt(0.5) * 2.0 ** rng.integers(-1000, 1000, 200) * (1 + rng.integers(-2, 3, 200) * 2**-52)
    # Where log m and k ln 2 are of opposite signs, and log m is largest.
    longest = np.concatenate([rng.uniform(0.69, math.sqrt(0.5), 1000), rng.uniform(math.sqrt(2), 1.45, 1000)])
    values = np.concatenate([anything, tiny, near_one, edges, longest, rng.uniform(0, 3, 400)])
    values = values[values != 1]
    got = elementwise(library, lambda xp, x: xp.log(x), values)
    assert worst(Decimal.ln, values, got) < 1


@each_level
def test_exp_and_log_at_their_ends_are_those_of_the_c_library(library):
    overflow, vanishing = 709.782712893384, -745.1332191019412
    values = np.array(
        [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            overflow,
            np.nextafter(overflow, 800),
            709.79,
            710,
            1e300,
            vanishing,
            np.nextafter(vanishing, -800),
            -745.14,
            -745.2,
            -746,
            -1e300,
            5e-324,
            -5e-324,
            1e-20,
            -708.4,
            -708.3,
        ]
    )
    with np.errstate(all="ignore"):
        assert same(elementwise(library, lambda xp, x: xp.exp(x), values), np.exp(values)).all()
        ends = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, -5e-324, -1e300, 1.0])
        assert same(elementwise(library, lambda xp, x: xp.log(x), ends), np.log(ends)).all()


def test_exp_and_log_are_the_same_on_every_level():
    rng = np.random.default_rng(0)
    values = np.concatenate([hard_numbers(rng, 4000, np.float64), rng.uniform(-750, 720, 20_000)])
    for function in ("exp", "log"):
        results = [elementwise(one, lambda xp, x, f=function: getattr(xp, f)(x), values) for one in native.levels()]
        assert all(same(result, results[0]).all() for result in results)


# -- random numbers ------------------------------------------------------------------------------------------------


def drawn(library: native.Library, key: tuple[int, int], start: int, count: int, columns: int | None = None) -> Any:
    _, (got,) = run(
        library,
        lambda xp, _, x: stored(xp.record("uniform", (), kind="f32", single=False, numbers=key)),
        [np.zeros(count, np.float32)],
        columns=columns,
        index=start,
    )
    return got


@each_level
@pytest.mark.parametrize("start", [*range(9), 4095, 2**34 - 3, 2**34, 2**40 + 1])
def test_random_numbers_are_those_of_the_generator(library, start):
    key = philox.key_of(3, "tensor", "model")
    for count in (0, 1, 3, 63, 64, 65, 1023, 1024, 1025, 4099):
        assert np.array_equal(drawn(library, key, start, count), philox.uniform(key, start, start + count))
    for columns in (64, 65, 131):
        got = drawn(library, key, start, 7 * columns, columns)
        assert np.array_equal(got, philox.uniform(key, start, start + 7 * columns))


@each_level
def test_every_bit_of_the_key_counts(library):
    for key in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 1)):
        assert np.array_equal(drawn(library, key, 0, 100), philox.uniform(key, 0, 100))


# -- ranks ---------------------------------------------------------------------------------------------------------


def ranked(library: native.Library, values: Any) -> Any:
    return elementwise(library, lambda xp, x: rank_in_rows(xp, x), values, columns=values.shape[-1]).reshape(
        values.shape
    )


@each_level
@pytest.mark.parametrize("columns", [64, 65, 2049, 70_000, LONGEST_ROW])
def test_ranks_are_those_of_a_stable_sort(library, columns):
    rng = np.random.default_rng(columns)
    rows = [
        np.abs(rng.standard_normal(columns)),
        np.abs(hard_numbers(rng, columns, np.float32)),
        rng.choice([0.0, -0.0, 1.0, 2.0, np.inf, np.nan, -np.nan], columns),
        np.zeros(columns),
        hard_numbers(rng, columns, np.float32),
        np.arange(columns)[::-1],
    ]
    values = np.array(rows, np.float32)
    # NaNs of other patterns are NaNs, equal to each other.
    values[2].view(np.uint32)[np.isnan(values[2])] ^= rng.integers(0, 2, np.isnan(values[2]).sum(), np.uint32)
    assert np.array_equal(ranked(library, values), rank_in_rows(np, values))


# -- selections ----------------------------------------------------------------------------------------------------


def bits(values: Any) -> Any:
    return select.patterns(values)


def magnitudes(seed: int, count: int, dtype: Any) -> Any:
    rng = np.random.default_rng(seed)
    values = np.abs(hard_numbers(rng, count, dtype))
    # Runs without any value of a narrow range are passed over; ties are many.
    values[: count // 2] = rng.choice(np.array([0.25, 0.5, 0.5, 0.75], dtype), count // 2)
    return values


@each_level
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([0, 1, 15, 16, 17, 1024, 1041, 2500]), data=st.data())
def test_patterns_in_a_range_are_found_and_those_above_counted(library, dtype, seed, count, data):
    values = magnitudes(seed, count, dtype)
    most = (1 << 8 * np.dtype(dtype).itemsize) - 1
    known = st.sampled_from([0, most, *bits(np.array([0.25, 0.5, 0.75, 1.0, np.inf, np.nan], dtype)).tolist()])
    end = (
        known
        | st.integers(0, most)
        | known.map(lambda bound: max(bound - 1, 0))
        | known.map(lambda b: min(b + 1, most))
    )
    low, high = data.draw(end), data.draw(end)
    found, _ = run(library, lambda xp, _, x: Collect(x, low, high), [values])
    above, inside = found.values[0]
    expected_above, expected = select.within(bits(values), low, high)
    assert above == expected_above
    assert np.array_equal(inside, expected)
    assert inside.dtype == expected.dtype


@each_level
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_histograms_are_those_of_the_selection(library, dtype):
    width = 8 * np.dtype(dtype).itemsize
    values = magnitudes(0, 5000, dtype)
    leading = int(bits(np.array([0.5], dtype))[0]) >> (width - 16)
    for shift in range(width - 16, -1, -16):
        for low in (0, leading << (width - 16), int(bits(values)[7]) >> shift + 16 << shift + 16, (1 << width) - 1):
            found, _ = run(library, lambda xp, _, x, low=low, shift=shift: Histogram(x, low, shift), [values])
            assert np.array_equal(found.values[0], select.histogram(bits(values), low, shift)), (low, shift)


@each_level
def test_several_selections_and_sums_do_not_meet(library):
    one, other = magnitudes(0, 3000, np.float32), magnitudes(1, 3000, np.float32)
    half = int(bits(np.float32([0.5]))[0])
    found, written = run(
        library,
        lambda xp, _, x, y: [
            Collect(x, half, half),
            xp.count_nonzero(x > y),
            Collect(y, 0, half),
            wide_sum(xp, xp.where(xp.isfinite(x), x, 0.0)),
            Histogram(x, 0, 16),
            stored(x + y),
            Collect(x, 0, 2**32 - 1),
        ],
        [one, other],
    )
    values = found.values
    assert values[0][0] == select.within(bits(one), half, half)[0]
    assert np.array_equal(values[0][1], select.within(bits(one), half, half)[1])
    assert values[1] == np.count_nonzero(one > other)
    assert np.array_equal(values[2][1], select.within(bits(other), 0, half)[1])
    assert values[3] == in_lanes(np.where(np.isfinite(one), one, 0).astype(np.float64))
    assert np.array_equal(values[4], select.histogram(bits(one), 0, 16))
    assert same(written[0], one + other).all()
    assert np.array_equal(values[6][1], bits(one))
    assert found.counts[:2].tolist() == [np.count_nonzero(~np.isfinite(array)) for array in (one, other)]
