"""Selection by bit patterns, held against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightsmith.kernels.select import add, bucket, histograms, look_up, rank_table, value_of

DTYPES = (np.float32, np.float64)


def kth_largest(parts: list[np.ndarray], k: int) -> float:
    """Narrow the k-th largest down, 16 bits at a time, over the parts of an array."""
    prefix, wanted, level, bits = 0, k, 0, 16
    while level * 16 < bits:
        bits, (histogram,) = histograms([parts[0]], [prefix], level)
        for part in parts[1:]:
            bits, (histogram,) = add((bits, [histogram]), histograms([part], [prefix], level))
        digit, wanted, _ = bucket(histogram, wanted)
        prefix = (prefix << 16) | digit
        level += 1
    return value_of(prefix, bits)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(data=st.data())
def test_the_kth_largest_is_that_of_a_sort(dtype, data):
    bits = 8 * np.dtype(dtype).itemsize
    numbers = st.floats(0, np.finfo(dtype).max.item(), width=bits) | st.sampled_from([0.0, 1.0, np.inf])
    values = data.draw(hnp.arrays(dtype, st.integers(1, 40), elements=numbers))
    k = data.draw(st.integers(1, values.size))
    cut = data.draw(st.integers(0, values.size))
    assert kth_largest([values[:cut], values[cut:]], k) == np.sort(values)[::-1][k - 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_with_strides_are_counted_like_their_copies(dtype):
    values = np.random.default_rng(0).random((30, 40)).astype(dtype)[::2, ::3]
    (strided,), (copied,) = (histograms([array], [0], 0)[1] for array in (values, values.copy()))
    assert np.array_equal(strided, copied)
    assert strided.sum() == values.size


def test_nan_counts_above_infinity():
    values = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    assert np.isnan(kth_largest([values], 1))
    assert kth_largest([values], 2) == np.inf


def test_several_arrays_are_counted_by_prefixes_of_their_own():
    values = np.array([1.0, 2.0, 2.0001], np.float32)
    ones, twos = (int(np.float32(x).view(np.uint32) >> 16) for x in (1, 2))
    _, (first, second) = histograms([values, values], [ones, twos], 1)
    assert (first.sum(), second.sum()) == (1, 2)


@pytest.mark.parametrize(
    ("values", "ranks"), [([3.0], [0.5]), ([1.0, 4.0, 2.0], [0, 1, 0.5]), ([1.0, 1.0], [0.5, 0.5])]
)
def test_ranks_go_from_zero_to_one_and_their_mean_is_a_half(values, ranks):
    array = np.array(values, np.float32)
    (histogram,) = histograms([array], [0], 0)[1]
    assert look_up(array, rank_table(histogram)).tolist() == ranks
