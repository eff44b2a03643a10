"""Averages: cases by hand, laws that they follow, numbers of others' code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError
from weightsmith.methods.registry import get_method

# What rng = default_rng(0) draws after seven models [2, 3]: three [4, 3] of different spread.
_RNG = np.random.default_rng(0)
_RNG.standard_normal((7, 2, 3))
SPREAD = [_RNG.standard_normal((4, 3)) * scale for scale in (1.0, 0.5, 2.0)]


# -- weights by a metric ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({"metric": [1.0, 2.0]}, (2 / 3, 1 / 3)),
        ({"metric": [1.0, 2.0], "p": 2}, (4 / 5, 1 / 5)),
        ({"metric": [1.0, 2.0], "p": 0}, (1 / 2, 1 / 2)),
        ({"metric": [-1.0, 0.0], "kind": "exp_loss"}, (math.e / (1 + math.e), 1 / (1 + math.e))),
        ({"metric": [300, 100], "kind": "score"}, (3 / 4, 1 / 4)),
        ({"metric": [300, 100], "kind": "score", "p": 2}, (9 / 10, 1 / 10)),
        ({"metric": [0.0, 0.5], "kind": "score"}, (0.0, 1.0)),
        ({"metric": [0.0, 0.0], "kind": "score", "p": 0}, (1 / 2, 1 / 2)),
        ({"metric": [1e-300, 1.0], "p": 100}, (1.0, 0.0)),
        ({"metric": [-1e300, 1e300], "kind": "exp_loss", "p": 1e5}, (1.0, 0.0)),
        ({"metric": [700.0, 701.0], "kind": "exp_loss", "p": 2}, (1 / (1 + math.e**-2), 1 / (1 + math.e**2))),
    ],
)
def test_shares_follow_the_metric(given, shares):
    merged = merge_arrays("metric_weighted", [np.array([1.0, 0.0]), np.array([0.0, 1.0])], parameters=given)
    assert merged == pytest.approx(shares, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": [0.5, 0.0]}, "the metric of model 2 is 0; with kind: loss it must be above 0"),
        ({"metric": [-0.5, 1.0], "kind": "score"}, "model 1 is -0.5; with kind: score it must be 0 or above"),
        ({"metric": [1.0, math.inf], "kind": "exp_loss"}, "model 2 is inf"),
        ({"metric": [0.0, 0.0], "kind": "score"}, "none has a weight"),
        ({}, "needs 'metric' for every model"),
    ],
)
def test_a_metric_without_such_a_power_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_arrays("metric_weighted", SPREAD[:2], parameters=given)


# -- variance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("self_share", "expected"),
    [
        (0.0, [1.7479655319, 1.6227980714, 0.6811993075, -2.3941413854, 0.2911545827, 1.3097789622,
               1.6085979571, -0.450479263, 2.2517828028, -2.2555351173, -0.780887447, 1.0084823171]),
        (1.0, [1.2088542823, 1.1332587027, 0.5645749244, -1.2927940865, 0.3290052568, 0.9442090814,
               1.1246824651, -0.1189086038, 1.513137508, -1.2090820647, -0.3184604529, 0.7622393071]),
        (0.3, [1.6114094841, 1.4987985045, 0.6516585312, -2.1151718136, 0.3007421001, 1.2171806753,
               1.4860229095, -0.3664929265, 2.0646850891, -1.9904701735, -0.6637554028, 0.9461093426]),
    ],
)  # fmt: skip
def test_variance_corrected_means_are_those_of_the_public_simulator(self_share, expected):
    # scale_tensor_to_variance of the simulator's VarianceCorrector, on the mean of SPREAD, with its targets
    # FollowOthers, FollowSelfVariance (the first model's) and FollowConservative (0.3).
    merged = merge_arrays("variance_corrected", SPREAD, parameters={"self_share": self_share})
    assert merged == pytest.approx(np.reshape(expected, (4, 3)), abs=1e-9)


def test_the_mean_of_unrelated_models_gets_their_variance_back():
    rng = np.random.default_rng(0)
    models = [(0.02 * rng.standard_normal((300, 200)) + 0.5).astype(np.float32) for _ in range(9)]
    assert np.mean(models, axis=0).var() == pytest.approx(0.02**2 / 9, rel=0.05)
    merged = merge_arrays("variance_corrected", models, parameters={"eps": 0.0})
    assert merged.var() == pytest.approx(0.02**2, rel=0.01)
    assert merged.mean() == pytest.approx(np.mean(models), rel=1e-5)
    capped = merge_arrays("variance_corrected", models, parameters={"eps": 0.0, "max_gain": 2.0})
    assert capped.var() == pytest.approx(4 * 0.02**2 / 9, rel=0.05)
    # eps is in the weights' own unit, and of the size of their variance.
    assert merge_arrays("variance_corrected", models).var() < 0.02**2 / 2


@pytest.mark.parametrize("shape", [(50,), (1,), (), (1, 1)])
def test_vectors_and_single_values_are_averaged_only(shape):
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]
    np.testing.assert_allclose(merge_arrays("variance_corrected", models), np.mean(models, axis=0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (300, 700)])
def test_constant_tensors_stay_constant(shape):
    # By rounding alone they have variances, and these any ratio.
    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(3)
        models = [np.full(shape, value, np.float32) for value in values]
        merged = merge_arrays("variance_corrected", models, parameters={"eps": 0.0})
        np.testing.assert_allclose(merged, np.mean(models), rtol=0, atol=1e-6)


# -- geometric and harmonic mean --------------------------------------------------------------------------------------

MEANS = ("geometric", "harmonic")


@pytest.mark.parametrize("method", MEANS)
def test_means_of_signs_and_zeros_by_hand(method):
    one = np.array([1.0, -1.0, 0.0, 0.0, 0.0, -0.0, 1.0, -4.0])
    other = np.array([4.0, -4.0, 4.0, -4.0, 0.0, 0.0, -4.0, 1.0])
    same = {"geometric": 2.0, "harmonic": 1.6}[method]
    expected = {"mean": [-1.5, -1.5], "zero": [0, 0], "sign": [-same, -same]}
    for mixed, last in expected.items():
        merged = merge_arrays(method, [one, other], parameters={"mixed": mixed})
        assert merged == pytest.approx([same, -same, 0, 0, 0, 0, *last])


def test_the_three_means_are_ordered():
    rng = np.random.default_rng(0)
    models = [rng.exponential(size=500) for _ in range(4)]
    given = {"weight": [1.0, 2.0, 0.5, 3.0]}
    least, middle, most = (merge_arrays(name, models, parameters=given) for name in ("harmonic", "geometric", "linear"))
    assert (least < middle).all()
    assert (middle < most).all()


@pytest.mark.parametrize("mixed", ["mean", "zero", "sign"])
@pytest.mark.parametrize("method", MEANS)
def test_means_follow_scale_and_sign(method, mixed):
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(500) for _ in range(3)]
    merged = merge_arrays(method, models, parameters={"mixed": mixed})
    for factor in (-1.0, 1e-30, 1e30, -7.0):
        scaled = merge_arrays(method, [factor * model for model in models], parameters={"mixed": mixed})
        np.testing.assert_allclose(scaled, factor * merged, rtol=1e-10)


@pytest.mark.parametrize("method", [*MEANS, "median"])
def test_a_model_of_weight_zero_has_no_say_but_shows_that_it_is_broken(method):
    models = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 3.0]), np.array([-9.0, 0.0, np.nan])]
    merged = merge_arrays(method, models, parameters={"weight": [1.0, 1.0, 0.0]})
    assert merged[:2] == pytest.approx(merge_arrays(method, models[:2])[:2])
    assert np.isnan(merged[2])


@pytest.mark.parametrize("method", [*MEANS, "median", "geometric_median", "variance_corrected", "karcher"])
def test_weights_that_are_all_zero_or_negative_are_refused(method):
    with pytest.raises(MethodError, match="sum to zero.*give at least one model a weight"):
        merge_arrays(method, SPREAD[:2], parameters={"weight": 0.0})
    with pytest.raises(MethodError, match="weight is -1; it must be in >= 0"):
        merge_arrays(method, SPREAD[:2], parameters={"weight": [2.0, -1.0]})


@pytest.mark.parametrize(
    ("other", "name"),
    [("uniform_soup", "linear"), ("model_soup", "linear"), ("fedavg", "linear"), ("mwa", "metric_weighted")],
)
def test_methods_are_found_by_the_names_they_are_published_under(other, name):
    assert get_method(other) is get_method(name)
