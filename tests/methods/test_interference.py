"""Methods that decide entry by entry: the authors' numbers, cases worked out by hand, and what follows from the formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError
from weightsmith.methods import statistics
from weightsmith.methods.interference import _tanh, unified_vector
from weightsmith.methods.registry import get_method

AUTHORS = json.loads((Path(__file__).parent / "authors_interference.json").read_text())


def merged(method: str, *deltas: list[float], **parameters: Any) -> list[float]:
    """Merge task vectors on a base of zero."""
    models = [np.array(delta, np.float64) for delta in deltas]
    base = None if method == "random_select" else np.zeros(models[0].shape)
    return merge_arrays(method, models, base, parameters=parameters).tolist()


def task_vectors(size: int, count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    base = rng.standard_normal(size).astype(np.float32)
    models = [base + np.float32(0.1) * rng.standard_normal(size).astype(np.float32) for _ in range(count)]
    return [model - base for model in models]


# -- beside the authors' code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: f"{case['method']} {case['parameters']}")
def test_the_authors_code_gives_these_numbers(case):
    """On the vectors above, in float32, by the functions that the file names: 24 entries, and sums over 30,000."""
    in_rows = "trim_scope" in case["parameters"]

    def merge(size: int, shape: tuple[int, ...]) -> np.ndarray:
        deltas = [delta.reshape(shape if in_rows else -1) for delta in task_vectors(size)]
        base = np.zeros_like(deltas[0])
        given = {
            name: [value] * 3 if name in ("density", "weight", "gamma") and not isinstance(value, list) else value
            for name, value in case["parameters"].items()
        }
        return merge_arrays(case["method"], deltas, base, parameters=given).ravel().astype(np.float64)

    np.testing.assert_allclose(merge(24, (2, 12)), case["entries"], rtol=0, atol=1e-7)
    large = merge(30_000, (30, 1000))
    assert large.sum() == pytest.approx(case["sum"], abs=1e-5 * case["l1"])
    assert np.abs(large).sum() == pytest.approx(case["l1"], rel=1e-6)
    assert np.count_nonzero(large) == pytest.approx(case["nonzero"], abs=1)


# -- one task vector's entry for all -------------------------------------------------------------------------------


def test_emr_takes_the_largest_entry_of_the_elected_sign():
    assert merged("emr", [2, -1, 3], [3, -2, -1], [-4, 2, -1]) == [3, -2, 3]
    assert merged("emr", [2.0], [3.0], [-4.0], **{"lambda": 0.5}) == [1.5]


def test_emr_counts_a_sum_of_zero_as_minus():
    assert merged("emr", [1, 0, 4], [-1, 0, -2], [0, 0, -2]) == [-1, 0, -2]


def test_the_unified_vector_is_a_function_of_arrays_alone():
    deltas = [np.array([1.0, np.nan, -3.0]), np.array([2.0, 5.0, 1.0])]
    np.testing.assert_array_equal(unified_vector(np, deltas), [2.0, np.nan, -3.0])
    np.testing.assert_array_equal(unified_vector(np, deltas[:1]), deltas[0])


def test_magmax_takes_the_largest_entry_and_of_opposite_ones_the_positive():
    assert merged("magmax", [1, -5, 2, 0], [-3, 4, -2, 0]) == [-3, -5, 2, 0]
    assert merged("magmax", [1, -5], [-3, 4], weight=[4.0, 0.5], **{"lambda": 0.5}) == [2, -10]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_magmax_takes_models_one_at_a_time_to_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(10_000).astype(dtype)
    models = [(base.astype(float) + 0.01 * rng.standard_normal(base.size)).astype(dtype) for _ in range(4)]
    so_far = models[0]
    for model in models[1:]:
        so_far = merge_arrays("magmax", [so_far, model], base).astype(dtype)
    assert so_far.tobytes() == merge_arrays("magmax", models, base).astype(dtype).tobytes()
    assert all(np.any(so_far == model) for model in models)


def test_magmax_is_gone_on_with_whatever_its_weights_and_lambda():
    one, two, three = (delta.astype(np.float64) for delta in task_vectors(1000))
    base, given = np.random.default_rng(1).standard_normal(1000), {"lambda": 0.5}
    first = merge_arrays("magmax", [base + one, base + two], base, parameters={"weight": [2.0, -1.0], **given})
    found = get_method("magmax").continues
    assert found is not None
    state = found.state(None, {"weight": (2.0, -1.0), **given}, 2)
    assert state is not None
    assert tuple(state) == found.parameters
    second = merge_arrays("magmax", [first, base + three], base, parameters={"weight": [state["weight"], 1.5], **given})
    models = [base + delta for delta in (one, two, three)]
    together = merge_arrays("magmax", models, base, parameters={"weight": [2.0, -1.0, 1.5], **given})
    np.testing.assert_allclose(second, together, rtol=0, atol=1e-14)
    assert found.state(None, {"weight": (1.0,), "lambda": 0.0}, 1) is None


# -- entries that several task vectors share -----------------------------------------------------------------------


def test_consensus_of_no_model_is_task_arithmetic():
    deltas, given = [d.tolist() for d in task_vectors(50)], {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}
    assert merged("consensus", *deltas, k=0, **given) == merged("task_arithmetic", *deltas, **given)


@pytest.mark.parametrize("multi_task", ["sum", "ties"])
def test_consensus_of_more_models_than_there_are_is_the_base(multi_task):
    deltas = [d.tolist() for d in task_vectors(50)]
    assert not any(merged("consensus", *deltas, k=4, multi_task=multi_task))


def test_consensus_keeps_what_at_least_k_models_use():
    # Sums 5, 1, 5, 0. Uses 4 > .4 |1| and 1 > .4 |4| fails; 3 > .4 |-2| and -2 > .4 |3|; 5 > 0 and 0 > 2 fails; 2 > .4 |-2| twice.
    deltas = ([4, 3, 5, 2], [1, -2, 0, -2])
    assert merged("consensus", *deltas, k=1) == [5, 1, 5, 0]
    assert merged("consensus", *deltas, k=2) == [0, 1, 0, 0]
    assert merged("consensus", *deltas, k=2, mask_lambda=[0.4, 0.2]) == [5, 1, 0, 0]
    assert merged("consensus", *deltas, k=2, mask_lambda=[0.4, 0.8]) == [0, 0, 0, 0]


def test_a_model_of_weight_0_uses_nothing():
    assert merged("consensus", [1.0], [1.0], k=2) == [2]
    assert merged("consensus", [1.0], [1.0], k=2, weight=[1.0, 0.0]) == [0]


def test_consensus_of_ties_trims_to_a_fifth_unless_told_otherwise():
    deltas = ([5, 1, 1, 1, 1], [5, 1, 1, 1, -4])
    assert merged("consensus", *deltas, multi_task="ties") == [10, 0, 0, 0, 0]
    # What is trimmed away votes all the same: 4 > 0.4 |0 - 4|.
    assert merged("consensus", *deltas, multi_task="ties", density=0.4, k=1) == [10, 1, 0, 0, -4]
    assert merged("consensus", *deltas, density=0.2, k=0) == [10, 0, 0, 0, 0]


def test_localized_entries_are_averaged_over_the_models_that_hold_them():
    deltas = ([4, 3, 0, 1], [-2, 1, 5, 1])
    assert merged("localize_and_stitch", *deltas, density=0.5) == [1, 3, 5, 0]
    assert merged("localize_and_stitch", *deltas, density=0.5, weight=[3.0, 1.0]) == [2.5, 3, 5, 0]
    assert merged("localize_and_stitch", *deltas, density=[0.5, 0.0]) == [4, 3, 0, 0]


def test_an_entry_of_zero_is_never_held():
    assert merged("localize_and_stitch", [4, 0], [2, 6], density=1.0) == [3, 6]


def test_localize_and_stitch_is_ties_where_no_signs_conflict():
    deltas = [np.abs(d).tolist() for d in task_vectors(200)]
    given = {"density": 0.3, "weight": [1.0, 2.0, 0.5]}
    assert merged("localize_and_stitch", *deltas, **given) == merged("ties", *deltas, **given)


# -- parameter competition balancing -------------------------------------------------------------------------------


def test_pcb_by_hand():
    # Magnitudes are clipped to 1 ... 4, the largest but one: a is 1, 1, 0, 0 and 0, 0, 1, 1.
    one, other = [4, 8, 1, 1], [-1, 1, 4, 4]
    found = merged("pcb", one, other, density=0.75)
    e = math.exp(2.0)
    scores = [[e * math.tanh(12), e * math.tanh(72), math.tanh(5), math.tanh(5)]]
    scores += [[math.tanh(-3), math.tanh(9), e * math.tanh(20), e * math.tanh(20)]]
    # Three of four are kept: scores from the third largest place up, which is the second smallest score.
    scale = [[(max(s, cut) - cut) / (max(row) - cut) for s in row] for row in scores for cut in [sorted(row)[1]]]
    clipped = [[4, 4, 1, 1], [-1, 1, 4, 4]]
    expected = [(a * s + b * t) / max(s + t, 1e-12) for a, b, s, t in zip(*clipped, *scale, strict=True)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx([4, 4, 4, 4], rel=1e-3)


def test_entries_that_compete_to_a_draw_cancel():
    assert merged("pcb", [1, -2, 3], [-1, 2, -3], density=0.5) == [0, 0, 0]


def test_pcb_of_nothing_is_the_base():
    assert merged("pcb", [1, -2, 3], [1, 2, -3], density=0.0) == [0, 0, 0]
    assert merged("pcb", [0, 0, 0], [0, 0, 0]) == [0, 0, 0]


def test_weights_of_pcb_leave_the_competition_alone():
    """They stand in the numerator alone: a mean with weights 2 is twice the mean."""
    deltas = [d.tolist() for d in task_vectors(300)]
    plain = merged("pcb", *deltas, density=0.4)
    assert merged("pcb", *deltas, density=0.4, weight=2.0) == pytest.approx([2 * x for x in plain], rel=1e-15)
    assert merged("pcb", *deltas, density=0.4, **{"lambda": 2.0}) == pytest.approx([2 * x for x in plain], rel=1e-15)


@pytest.mark.parametrize("way", ["sampled", "by digits"])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_pcb_selects_the_same_whichever_way_it_goes(way, density, monkeypatch):
    deltas = [d * (np.arange(d.size) % 3 > 0) for d in task_vectors(20_000)]
    base = np.zeros_like(deltas[0])
    given = {"density": density, "clip": 0.01}
    expected = merge_arrays("pcb", deltas, base, parameters=given)
    monkeypatch.setattr(statistics, "_SMALL_SCOPE", 0)
    if way == "by digits":
        monkeypatch.setattr(statistics, "MOST_GATHERED", 0)
    assert merge_arrays("pcb", deltas, base, parameters=given).tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["pcb", "sign_only", "consensus", "localize_and_stitch"])
def test_what_is_not_finite_changes_no_entry_far_away(method, value):
    """Clipped, dropped or without a magnitude, a broken entry moves others by no more than its rank."""
    deltas = task_vectors(30_000)
    base = np.zeros_like(deltas[0])
    whole = merge_arrays(method, deltas, base)
    deltas[0][5] = value
    broken = merge_arrays(method, deltas, base)
    others = np.arange(base.size) != 5
    assert np.isfinite(broken[others]).all()
    assert np.mean(np.abs(broken - whole)[others] > 1e-3) < 1e-3


def test_tanh_is_that_of_the_library_to_a_few_digits_of_the_last_place():
    x = np.concatenate([sign * 10.0 ** np.linspace(-300, 3, 2001) for sign in (1, -1)] + [np.array([0.0, 0.05, -0.05])])
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_allclose(_tanh(np, x), np.tanh(x), rtol=1e-14, atol=0)


# -- baselines -----------------------------------------------------------------------------------------------------


def test_sign_only_gives_every_entry_the_mean_magnitude():
    assert merged("sign_only", [1, -2, 3], [2, 3, -3]) == pytest.approx([14 / 6, 14 / 6, 0])
    # Magnitudes 2 and 8/3 by weights 3 and 1; sums 1, -9, 12.
    assert merged("sign_only", [1, -2, 3], [2, 3, -3], weight=[3.0, -1.0]) == pytest.approx(
        [(3 * 2 + 8 / 3) / 4 * sign for sign in (1, -1, 1)]
    )
    assert merged("sign_only", [1, -2, 3], weight=0.0) == [0, 0, 0]


def test_random_select_takes_entries_from_models_by_their_chances():
    size, weights = 200_000, [0.5, 0.0, 1.5, 2.0]
    found = merge_arrays(
        "random_select", [np.full(size, i, np.float32) for i in range(4)], parameters={"weight": weights}
    )
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(np.mean(found == i) - share) <= 5 * math.sqrt(share * (1 - share) / size)


def test_a_further_model_changes_only_the_entries_it_is_chosen_for():
    models = [np.full(10_000, i, np.float32) for i in range(3)]
    two = merge_arrays("random_select", models[:2], labels=["a", "b"])
    three = merge_arrays("random_select", models, labels=["a", "b", "c"])
    assert np.array_equal(two[three != 2], three[three != 2])
    assert abs(np.mean(three == 2) - 1 / 3) < 0.03


def test_random_select_needs_a_model_that_can_be_chosen():
    with pytest.raises(MethodError, match="no model can be chosen"):
        merged("random_select", [1.0], [2.0], weight=0.0)
    with pytest.raises(MethodError, match="weight is -1"):
        merged("random_select", [1.0], [2.0], weight=[2.0, -1.0])
