"""Trimming, election and division, on entries few enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.methods import deltas as deltas_module


def merged(method: str, *deltas: list[float], **parameters: Any) -> list[float]:
    """Merge task vectors on a base of zero."""
    models = [np.array(delta, np.float64) for delta in deltas]
    return merge_arrays(method, models, np.zeros(len(deltas[0])), parameters=parameters).tolist()


def test_task_arithmetic_adds_and_forgets():
    assert merged("task_arithmetic", [1, 2], [4, 0], weight=[1.0, -0.5]) == [-1, 2]
    assert merged("task_arithmetic", [1, 2], [4, 0], weight=[1.0, 3.0], normalize=True, **{"lambda": 2.0}) == [6.5, 1]


def test_task_arithmetic_does_not_divide_by_weights_that_cancel():
    assert merged("task_arithmetic", [3, 2], [1, 2], weight=[1.0, -1.0], normalize=True) == [2, 0]


def test_ties_keeps_at_least_one_entry_of_a_small_tensor():
    assert merged("ties", [1, -3, 2], weight=1.0, density=0.1) == [0, -3, 0]
    assert merged("ties", [1, -3, 2], weight=1.0, density=0.0) == [0, 0, 0]


def test_ties_keeps_the_earlier_of_equal_magnitudes():
    assert merged("ties", [1, -1, 1, -1], weight=1.0, density=0.5) == [1, -1, 0, 0]


def test_ties_elects_by_weight_and_averages_those_that_agree():
    # Sums: 1 - 3 + 1 < 0; 2 - 1 + 1 > 0.
    assert merged("ties", [1, 2], [-3, -1], [1, 1], weight=1.0) == [-3, 1.5]
    # With weights 4, 1, 1 the first entry's sum is 4 - 3 + 1 > 0: (4 + 1) / 5.
    assert merged("ties", [1, 2], [-3, -1], [1, 1], weight=[4.0, 1.0, 1.0]) == [1, 1.8]
    assert merged("ties", [1, 2], [-3, -1], [1, 1], weight=1.0, normalize=False) == [-3, 3]


def test_ties_elects_plus_where_the_sum_is_zero():
    assert merged("ties", [2], [-2], weight=1.0) == [2]


def test_ties_divides_by_nothing_where_nobody_agrees():
    # Trimmed to nothing in the first entry, and weights that cancel in the second.
    assert merged("ties", [0, 1], [0, 1], weight=1.0) == [0, 1]
    assert merged("ties", [3.0], [-1.0], weight=[1.0, -1.0]) == [4.0]


def test_rescaling_a_trimmed_task_vector_restores_its_sum_of_magnitudes():
    assert merged("ties", [1, -3, 2, -2], weight=1.0, density=0.5, rescale=True) == pytest.approx([0, -4.8, 3.2, 0])
    assert merged("breadcrumbs", [0, 0, 0], weight=1.0, density=0.4, rescale=True) == [0, 0, 0]


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.2, [3, 4, 5, 6, 7]),
        (0.5, 0.0, [5, 6, 7, 8, 9]),
        # No room for two outliers beside nine kept entries: one goes.
        (0.9, 0.2, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1.0, 0.3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        # A hundredth of ten entries is none, and none must not mean all.
        (0.3, 0.01, [7, 8, 9]),
        (0.0, 0.2, []),
    ],
)
def test_breadcrumbs_keeps_the_entries_below_the_outliers(density, gamma, kept):
    values = [float(10 + i) * (-1) ** i for i in range(10)]
    found = merged("breadcrumbs", values, weight=1.0, density=density, gamma=gamma)
    assert found == [value if i in kept else 0 for i, value in enumerate(values)]


def test_breadcrumbs_ties_elects_after_trimming():
    # The outlier -9 is dropped first, so it has no vote.
    found = merged("breadcrumbs_ties", [2, 1, 4], [-9, 1, 2], weight=1.0, density=0.7, gamma=0.34)
    assert found == [2, 2, 2]


def by_row(deltas: Any, density: float, gamma: float, **parameters: Any) -> Any:
    given = {"weight": 1.0, "density": density, "gamma": gamma, "trim_scope": "row", **parameters}
    delta = np.asarray(deltas, np.float64)
    return merge_arrays("breadcrumbs", [delta], np.zeros(delta.shape), parameters=given).tolist()


def test_breadcrumbs_by_row_ranks_each_vector_along_the_last_axis():
    rows = [[1, -2, 3, -4, 5], [50, 40, 30, 20, 10]]
    assert by_row(rows, 0.4, 0.2) == [[0, 0, 3, -4, 0], [0, 40, 30, 0, 0]]
    assert by_row(np.reshape(rows, (2, 1, 5)), 0.4, 0.2) == [[[0, 0, 3, -4, 0]], [[0, 40, 30, 0, 0]]]
    assert by_row(rows[0], 0.4, 0.2) == [0, 0, 3, -4, 0]


def test_breadcrumbs_by_row_drops_outliers_first_and_keeps_what_is_left():
    """Over a tensor there are fewer outliers where both shares do not fit; by row, as in the authors' code, not."""
    assert by_row([1, -2, 3, -4, 5], 1.0, 0.4) == [1, -2, 3, 0, 0]
    assert merged("breadcrumbs", [1, -2, 3, -4, 5], weight=1.0, density=1.0, gamma=0.4) == [1, -2, 3, -4, 5]


def test_breadcrumbs_by_row_drops_rows_that_are_too_short_to_keep_one_entry():
    assert by_row([[1, 2, 3], [4, 5, 6]], 0.3, 0.01) == [[0, 0, 0], [0, 0, 0]]
    assert by_row([[1], [2]], 0.9, 0.01) == [[0], [0]]
    assert by_row([[1], [2]], 1.0, 0.01) == [[1], [2]]


def test_breadcrumbs_by_row_leaves_scalars_as_they_are():
    assert by_row(7.0, 0.1, 0.1) == 7.0
    assert by_row([7.0], 0.1, 0.1) == [0.0]


def test_breadcrumbs_by_row_takes_the_later_of_equal_magnitudes_for_the_larger():
    assert by_row([1, -1, 1, -1], 0.5, 0.25) == [0, -1, 1, 0]


def test_breadcrumbs_by_row_restores_the_sum_over_the_tensor():
    found = by_row([[1, -3], [2, -2]], 0.5, 0.0, rescale=True)
    np.testing.assert_allclose(found, [[0, -4.8], [0, -3.2]])


def test_long_rows_are_ranked_beyond_what_float32_counts(monkeypatch):
    rng = np.random.default_rng(0)
    delta, base = rng.standard_normal((4, 300)).astype(np.float32), np.zeros((4, 300), np.float32)
    given = {"weight": 1.0, "density": 0.3, "gamma": 0.1, "trim_scope": "row"}
    expected = merge_arrays("breadcrumbs", [delta], base, parameters=given)
    monkeypatch.setattr(deltas_module, "_COUNTABLE", 256)
    assert np.array_equal(merge_arrays("breadcrumbs", [delta], base, parameters=given), expected)
