"""Selection by bit patterns, held against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightsmith.kernels.select import (
    Gathered,
    bracket,
    bucket,
    find,
    histogram,
    look_up,
    patterns,
    place_of,
    rank_table,
    value_of,
    within,
)

DTYPES = (np.float32, np.float64)


def kth_largest(parts: list[np.ndarray], k: int) -> float:
    """Narrow the k-th largest down, 16 bits at a time, over the parts of an array."""
    width = 8 * parts[0].dtype.itemsize
    low, wanted = 0, k
    for shift in range(width - 16, -1, -16):
        counts = sum(histogram(patterns(part), low, shift) for part in parts)
        digit, wanted, _ = bucket(counts, wanted)
        low += digit << shift
    return value_of(low, width)


def gather(parts: list[np.ndarray], low: int, high: int, limit: int = 10**9) -> Gathered:
    found = Gathered(0, [], 0)
    for part in parts:
        found = found.add(Gathered.of_block(*within(patterns(part), low, high)), limit)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_kth_largest_is_that_of_a_sort(dtype, data):
    bits = 8 * np.dtype(dtype).itemsize
    numbers = st.floats(0, np.finfo(dtype).max.item(), width=bits) | st.sampled_from([0.0, 1.0, np.inf])
    values = data.draw(hnp.arrays(dtype, st.integers(1, 40), elements=numbers))
    k = data.draw(st.integers(1, values.size))
    cut = data.draw(st.integers(0, values.size))
    assert kth_largest([values[:cut], values[cut:]], k) == np.sort(values)[::-1][k - 1]


@given(
    values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, 0.5, 1.0, 1.5, np.inf, np.nan])),
    data=st.data(),
)
def test_the_kth_largest_of_what_was_gathered_is_that_of_a_stable_sort(values, data):
    k = data.draw(st.integers(1, values.size))
    cut = data.draw(st.integers(0, values.size))
    parts = [values[:cut], values[cut:]]
    found = find(gather(parts, 0, 2**32 - 1), k)
    order = np.argsort(~patterns(values), kind="stable")
    last = order[k - 1]
    assert found.pattern == patterns(values)[last]
    equal = np.flatnonzero(patterns(values) == found.pattern)
    if found.block is None:
        assert last == equal[-1]
    else:
        block, place = found.block
        assert last == np.flatnonzero(patterns(parts[block]) == found.pattern)[place - 1] + block * cut


def test_a_range_that_misses_is_noticed():
    values = np.arange(1, 101, dtype=np.float32)
    low, high = (int(patterns(np.float32([x]))[0]) for x in (40, 60))
    assert find(gather([values], low, high), 40) is None  # 61 lies above
    assert find(gather([values], low, high), 62) is None  # 39 lies below
    assert value_of(find(gather([values], low, high), 41).pattern, 32) == 60
    assert value_of(find(gather([values], low, high), 61).pattern, 32) == 40


def test_more_than_may_be_kept_is_let_go():
    values = np.ones(10, np.float32)
    gathered = gather([values, values], 0, 2**32 - 1, limit=60)
    assert gathered.blocks is None
    assert gathered.count == 20
    assert find(gathered, 3) is None


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_a_sample_brackets_the_rank(share):
    rng = np.random.default_rng(0)
    # Stretches of different scale, as the rows of an embedding have.
    values = np.abs(rng.standard_normal(1 << 20)).astype(np.float32) * np.repeat(rng.uniform(0.5, 2, 256), 4096)
    values = values.astype(np.float32)
    runs = [patterns(values[start : start + 512]) for start in range(0, values.size, 8192)]
    k = int(share * values.size)
    low, high = bracket(runs, k, values.size)
    gathered = gather([values], low, high)
    assert value_of(find(gathered, k).pattern, 32) == np.sort(values)[-k]
    assert gathered.count < 0.3 * values.size


@pytest.mark.parametrize("k", [1, 1000])
def test_a_bracket_reaches_the_ends(k):
    runs = [patterns(np.linspace(1, 2, 10, dtype=np.float32))] * 3
    low, high = bracket(runs, k, 1000)
    assert low == 0 if k == 1000 else high == 2**32 - 1


def test_places_count_from_one():
    assert place_of([2, 0, 3], 2) == (0, 2)
    assert place_of([2, 0, 3], 3) == (2, 1)


def test_nan_counts_above_infinity():
    values = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    assert np.isnan(kth_largest([values], 1))
    assert kth_largest([values], 2) == np.inf


def test_a_prefix_is_all_that_is_counted():
    values = np.array([1.0, 2.0, 2.0001], np.float32)
    one, two = ((int(np.float32(x).view(np.uint32)) >> 16) << 16 for x in (1, 2))
    assert (histogram(patterns(values), one, 0).sum(), histogram(patterns(values), two, 0).sum()) == (1, 2)


@pytest.mark.parametrize(
    ("values", "ranks"), [([3.0], [0.5]), ([1.0, 4.0, 2.0], [0, 1, 0.5]), ([1.0, 1.0], [0.5, 0.5])]
)
def test_ranks_go_from_zero_to_one_and_their_mean_is_a_half(values, ranks):
    array = np.array(values, np.float32)
    assert look_up(array, rank_table(histogram(patterns(array), 0, 16))).tolist() == ranks
