"""Angles and lengths of what lies between vectors, on circles where they can be told by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays


def at(degrees: float, length: float = 1.0) -> np.ndarray:
    """A vector in the plane of two fixed directions of a larger space, in float64."""
    plane = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 2)))[0]
    angle = math.radians(degrees)
    return length * (plane @ np.array([math.cos(angle), math.sin(angle)]))


def polar(vector: np.ndarray) -> tuple[float, float]:
    """Degrees and length of a vector of that plane."""
    x, y = vector @ at(0), vector @ at(90)
    return math.degrees(math.atan2(y, x)), float(np.linalg.norm(vector))


@pytest.mark.parametrize(("t", "degrees"), [(0.0, 0.0), (0.25, 20.0), (0.5, 40.0), (1.0, 80.0), (1.5, 120.0)])
def test_slerp_turns_by_its_share_of_the_angle(t, degrees):
    assert polar(merge_arrays("slerp", [at(80, 2)], at(0, 2), parameters={"t": t})) == pytest.approx((degrees, 2))


def test_slerp_of_nearly_parallel_vectors_is_the_straight_line():
    base, model = at(0, 2), at(1.8, 3)
    merged = merge_arrays("slerp", [model], base, parameters={"t": 0.3})
    np.testing.assert_allclose(merged, 0.7 * base + 0.3 * model, rtol=1e-14)


def test_slerp_with_a_vector_of_zero_leaves_the_other_its_sine():
    merged = merge_arrays("slerp", [at(30, 2)], at(0, 0), parameters={"t": 0.5})
    assert polar(merged) == pytest.approx((30, 2 * math.sqrt(0.5)))


@pytest.mark.parametrize("degrees", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_nuslerp_keeps_the_digits_of_small_angles(degrees):
    models = [at(0), at(degrees)]
    merged = merge_arrays("nuslerp", models, parameters={"weight": [0.75, 0.25]})
    np.testing.assert_allclose(merged, at(degrees / 4), rtol=0, atol=1e-15 + 1e-9 * degrees)


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_of_opposed_vectors_is_the_straight_line(flatten):
    # In float32 these are opposed but for rounding, and their lengths differ.
    one = at(0).astype(np.float32)
    merged = merge_arrays("nuslerp", [one, -3 * one], parameters={"weight": 1.0, "nuslerp_flatten": flatten})
    np.testing.assert_allclose(merged, -one, rtol=1e-5, atol=1e-7)


def test_nuslerp_goes_by_the_ratio_of_weights_alone():
    def degrees(*weight: float) -> float:
        return polar(merge_arrays("nuslerp", [at(0), at(60)], parameters={"weight": weight}))[0]

    assert degrees(1, 3) == pytest.approx(45)
    assert degrees(10, 30) == pytest.approx(45)
    assert degrees(1, -1) == pytest.approx(30)
    assert degrees(3, -1) == pytest.approx(-30)


# Two models 90 degrees apart: SLERP is at 18 degrees for a share of a fifth, the mean direction at 14.04.
@pytest.mark.parametrize(("tangent", "degrees"), [("log", 18.0), ("projection", math.degrees(math.atan(0.25)))])
def test_multislerp_of_two_is_slerp_by_the_logarithm_and_the_mean_direction_by_projection(tangent, degrees):
    given = {"weight": [0.8, 0.2], "tangent": tangent}
    assert polar(merge_arrays("multislerp", [at(0), at(90)], parameters=given)) == pytest.approx((degrees, 1))


def test_multislerp_has_the_weighted_mean_length():
    given = {"weight": [2.0, 1.0, 1.0]}
    merged = merge_arrays("multislerp", [at(0, 1), at(40, 2), at(40, 6)], parameters=given)
    assert polar(merged) == pytest.approx((20, 2.5))
    doubled = merge_arrays(
        "multislerp", [at(0, 1), at(40, 2), at(40, 6)], parameters={**given, "normalize_weights": False}
    )
    assert np.linalg.norm(doubled) == pytest.approx(10)


@pytest.mark.parametrize("count", [2, 3])
def test_multislerp_leaves_a_tensor_that_no_model_changed(count):
    base = at(10, 3)
    merged = merge_arrays("multislerp", [base.copy() for _ in range(count)], base, parameters={"weight": 1.0})
    assert np.array_equal(merged, base)


@pytest.mark.parametrize(
    ("method", "weight", "scales"),
    [("multislerp", {"weight": 1.0}, (1, -3)), ("multislerp", {"weight": 1.0}, (1, -3, 0)), ("karcher", {}, (1, -3))],
)
def test_directions_that_cancel_are_averaged_straight(method, weight, scales):
    merged = merge_arrays(method, [scale * at(10) for scale in scales], parameters=weight)
    np.testing.assert_allclose(merged, np.mean(scales) * at(10), rtol=1e-12)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_but_for_rounding_are_averaged_straight(method):
    # Of some of these vectors the rounded directions add up to more than 1e-8.
    for one in np.random.default_rng(0).standard_normal((40, 40)):
        merged = merge_arrays(method, [one, -29 * one], parameters={"weight": 1.0} if method == "multislerp" else {})
        np.testing.assert_allclose(merged, -14 * one, rtol=1e-12)


def test_karcher_of_two_is_halfway_and_has_the_mean_length():
    assert polar(merge_arrays("karcher", [at(10, 1), at(80, 3)])) == pytest.approx((45, 2))


def test_karcher_is_the_mean_angle_not_the_mean_direction():
    models = [at(0), at(0), at(100)]
    assert polar(merge_arrays("karcher", models))[0] == pytest.approx(100 / 3, abs=1e-3)
    assert abs(polar(sum(models))[0] - 100 / 3) > 2


def test_karcher_keeps_angles_that_bfloat16_inner_products_lose():
    # cos of a hundredth of a degree is 1 in bfloat16; the mean must still lie between, not at the first.
    models = [at(0), at(0), at(0.03)]
    assert polar(merge_arrays("karcher", models, parameters={"tol": 1e-12}))[0] == pytest.approx(0.01, rel=1e-6)


def test_karcher_counts_a_vector_of_zero_in_the_length_alone():
    assert polar(merge_arrays("karcher", [at(0, 0), at(20, 3), at(40, 3)])) == pytest.approx((30, 2))


def test_karcher_weighs_angles_and_lengths():
    given = {"weight": [3.0, 1.0]}
    assert polar(merge_arrays("karcher", [at(10, 1), at(90, 5)], parameters=given)) == pytest.approx((30, 2))
    # In one plane it is the weighted mean of the angles, of however many.
    given = {"weight": [1.0, 2.0, 5.0], "tol": 1e-12, "max_iter": 100}
    merged = merge_arrays("karcher", [at(0), at(40), at(80)], parameters=given)
    assert polar(merged) == pytest.approx((60, 1))
    # A vector of zero weighs in the length alone.
    given = {"weight": [2.0, 1.0, 1.0]}
    assert polar(merge_arrays("karcher", [at(0, 0), at(20, 4), at(40, 4)], parameters=given)) == pytest.approx((30, 2))


def test_karcher_by_filter_is_that_of_every_row_by_itself():
    rng = np.random.default_rng(0)
    rows = [[at(10, 1), at(0, 0), at(5), at(30), at(70, 2)], [at(80, 3), at(30, 2), -29 * at(5), at(30), at(30, 3)]]
    rows += [[at(20, 2), at(50, 1), at(5), at(30), rng.standard_normal(40)]]
    for given in ({}, {"weight": [1.0, 2.0, 4.0]}, {"max_iter": 1}, {"weight": [1.0, 0.0, 3.0], "tol": 0.0}):
        merged = merge_arrays("karcher", [np.stack(row) for row in rows], parameters={**given, "filter_wise": True})
        for i, row in enumerate(merged):
            alone = merge_arrays("karcher", [model[i] for model in rows], parameters=given)
            np.testing.assert_allclose(row, alone, rtol=0, atol=1e-12 * np.abs(alone).max())


@pytest.mark.parametrize("given", [{}, {"filter_wise": True}, {"weight": [3.0, 3.0, 1.0]}])
def test_a_direction_that_is_opposed_to_the_mean_turns_it_nowhere(given):
    # By rounding alone it would seem to lie in some direction, and half a turn away.
    for one in np.random.default_rng(0).standard_normal((20, 40)):
        merged = merge_arrays("karcher", [one, one, -29 * one], parameters=given)
        length = (3 + 3 + 29) / 7 if "weight" in given else (1 + 1 + 29) / 3
        np.testing.assert_allclose(merged, length * one, rtol=1e-12)


@pytest.mark.parametrize("length", [1e30, 1e-25])
def test_lengths_whose_squares_do_not_fit_float32_are_no_trouble(length):
    models = [at(0, length).astype(np.float32), at(60, length).astype(np.float32)]
    merged = merge_arrays("nuslerp", models, parameters={"weight": 1.0})
    assert polar(merged.astype(np.float64)) == pytest.approx((30, length), rel=1e-6)


# N = 2: cos -0.4 gives t = -1.33 by the formula; the base is where a bound of 0 leads.
@pytest.mark.parametrize(("clamp", "t"), [(True, 0.0), (False, 2 * -0.4 / (1 - 0.4))])
def test_model_stock_of_opposing_changes_is_the_base_unless_unclamped(clamp, t):
    base, opposing = at(77, 5), math.degrees(math.acos(-0.4))
    models = [base + at(0, 0.1), base + at(opposing, 0.1)]
    merged = merge_arrays("model_stock", models, base, parameters={"clamp": clamp})
    np.testing.assert_allclose(merged, base + t * (sum(models) / 2 - base), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("degrees", "t"), [(0, 1.0), (60, 2 * 0.5 / 1.5), (90, 0.0)])
def test_model_stock_trusts_the_mean_by_the_angle(degrees, t):
    base = at(77, 5)
    models = [base + at(0, 0.1), base + at(degrees, 0.2)]
    merged = merge_arrays("model_stock", models, base)
    np.testing.assert_allclose(merged, base + t * (sum(models) / 2 - base), rtol=0, atol=1e-13)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_does_not_follow_one_model_alone(filter_wise):
    base = at(77, 5)
    merged = merge_arrays("model_stock", [base + at(0), base], base, parameters={"filter_wise": filter_wise})
    assert np.array_equal(merged, base)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_cancelling_pairs_is_the_base(filter_wise):
    # N = 3 and a mean cosine of -1/2: the formula's denominator is zero.
    base = at(77, 5)
    models = [base + at(degrees) for degrees in (0, 120, 240)]
    given = {"filter_wise": filter_wise, "clamp": False}
    np.testing.assert_allclose(merge_arrays("model_stock", models, base, parameters=given), base, atol=1e-12)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_tiny_changes_is_that_of_large_ones(filter_wise):
    base = np.zeros((2, 40))
    models = [np.stack([at(0), at(0)]), np.stack([at(60), at(60)])]
    tiny = [1e-6 * model for model in models]
    given = {"filter_wise": filter_wise}
    large = merge_arrays("model_stock", models, base, parameters=given)
    np.testing.assert_allclose(merge_arrays("model_stock", tiny, base, parameters=given), 1e-6 * large, rtol=1e-12)
    # mergekit's floor on the product of norms leaves them at the base.
    floored = merge_arrays("model_stock", tiny, base, parameters={**given, "norm_floor": 1e-6})
    assert np.abs(floored).max() < 1e-3 * np.abs(1e-6 * large).max()
