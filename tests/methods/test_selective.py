"""Nearswap and Arcee fusion: whose entry is taken."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError

RNG = np.random.default_rng(0)
BASE, MODEL = (RNG.standard_normal((16, 32)).astype(np.float32) for _ in range(2))


def test_nearswap_takes_close_entries_as_they_are_and_moves_the_others_by_t():
    merged = merge_arrays("nearswap", [MODEL], BASE, parameters={"t": 0.5})
    close = np.abs(MODEL - BASE) <= 0.5
    assert 0 < close.sum() < close.size
    assert np.array_equal(merged[close], MODEL[close])
    moved = (merged.astype(np.float64) - BASE)[~close]
    np.testing.assert_allclose(moved, np.sign(MODEL - BASE)[~close] * 0.5, rtol=1e-6)


@pytest.mark.parametrize(("t", "expected"), [(0.0, BASE), (100.0, MODEL)])
def test_nearswap_goes_from_the_base_to_the_model(t, expected):
    assert np.array_equal(merge_arrays("nearswap", [MODEL], BASE, parameters={"t": t}), expected)


def test_nearswap_takes_no_negative_t():
    with pytest.raises(MethodError, match="t is -1; it must be in >= 0"):
        merge_arrays("nearswap", [MODEL], BASE, parameters={"t": -1.0})


def test_arcee_fusion_takes_the_rows_that_turn_and_leaves_the_rest():
    model = BASE + np.float32(1e-3) * RNG.standard_normal(BASE.shape).astype(np.float32)
    model[3] = BASE[3][::-1]
    merged = merge_arrays("arcee_fusion", [model], BASE)
    taken = merged != BASE
    assert np.array_equal(merged[taken], model[taken])
    # Of the turned row, what has moved further than the other entries' noise.
    assert taken[3].mean() > 0.9
    assert taken.mean() < 0.25


def test_arcee_fusion_copies_every_change_where_most_entries_have_none():
    model = BASE.copy()
    model[:3] += 1
    model[:3, ::2] += 1
    merged = merge_arrays("arcee_fusion", [model], BASE)
    assert np.array_equal(merged, model)


def test_arcee_fusion_takes_a_nan_and_nothing_else_of_its_row():
    model = MODEL.copy()
    model[2, 5] = np.nan
    assert np.argwhere(np.isnan(merge_arrays("arcee_fusion", [model], BASE))).tolist() == [[2, 5]]
