"""Means, and weights that have none."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError

MODELS = [np.array([1.0, 2.0]), np.array([3.0, 6.0]), np.array([5.0, 1.0])]


def test_a_mean_may_have_negative_weights():
    merged = merge_arrays("linear", MODELS, parameters={"weight": [1.0, 2.0, -1.0]})
    assert merged.tolist() == [1.0, 6.5]


@pytest.mark.parametrize("method", ["linear", "multislerp"])
@pytest.mark.parametrize("weight", [[0.0, 0.0, 0.0], [1.0, 1.0, -2.0], [0.1, 0.2, -0.3]])
def test_weights_that_sum_to_zero_but_for_rounding_are_refused(method, weight):
    with pytest.raises(MethodError, match="sum to zero"):
        merge_arrays(method, MODELS, parameters={"weight": weight})
    given = {"weight": weight, "normalize_weights" if method == "multislerp" else "normalize": False}
    assert np.isfinite(merge_arrays(method, MODELS, parameters=given)).all()


def test_passthrough_gives_the_very_bytes():
    model = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert merge_arrays("passthrough", [model]).tobytes() == model.tobytes()
    assert np.array_equal(merge_arrays("passthrough", [model], parameters={"scale": -2.0}), -2 * model)
