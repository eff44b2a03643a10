"""SCE and RAM, on entries few enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays


def merged(method: str, *deltas: list[float], **parameters: Any) -> Any:
    """Merge task vectors on a base of zero."""
    models = [np.array(delta, np.float64) for delta in deltas]
    return pytest.approx(merge_arrays(method, models, np.zeros(len(deltas[0])), parameters=parameters).tolist())


def test_sce_weighs_models_by_their_mean_squared_changes():
    # Sums of squares 30 and 10, shares 3/4 and 1/4; in the last two entries the first model's sign is the sum's.
    assert merged("sce", [4, 2, 3, 1], [1, 2, -2, -1]) == [(3 * 4 + 1) / 4, 2, 3, 1]


def test_sce_selects_among_the_entries_that_vary():
    # Three of four entries vary; half of them, rounded down, is one: the first.
    assert merged("sce", [9, 5, 2, 1], [1, 5, 1, 2], select_topk=0.5) == [(81 * 9 + 1) / 82, 0, 0, 0]


def test_sce_of_tiny_changes_is_that_of_large_ones():
    large, small = [4e-4, 2e-4], [1e-4, 1e-4]
    assert merged("sce", large, small) == [(20 * 4 + 2) / 22 * 1e-4, (20 * 2 + 2) / 22 * 1e-4]
    # mergekit's absolute bound gives both the same weight.
    assert merged("sce", large, small, uniform_below=1e-6) == [2.5e-4, 1.5e-4]


def test_sce_of_one_model_is_that_model_and_of_none_selected_the_base():
    assert merged("sce", [1, -2]) == [1, -2]
    assert merged("sce", [1, -2], [3, 1], select_topk=0.0) == [0, 0]


def test_ram_takes_lone_changes_in_full_and_averages_shared_ones():
    assert merged("ram", [1, 3, 0, 1e-6], [0, 1, 0, 0]) == [1, 2, 0, 0]


def test_ramplus_enlarges_lone_changes_by_the_overlap():
    # The first model shares one entry and has two alone; the second shares one and has none.
    given = {"r": 0.5, "alpha": 0.9}
    assert merged("ramplus_tl", [1, 3, 2], [0, 1, 0], **given) == [1.25, 2, 2.5]
    assert merged("ramplus_tl", [1, 3, 2], [0, 1, 0], r=0.5, alpha=0.2) == [1.1, 2, 2.2]
