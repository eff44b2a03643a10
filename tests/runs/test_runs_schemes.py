"""Weight schemes: numbers against what they stand for, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import CheckpointError, MethodError, RecipeError
from weightsmith.runs import Saved, schemes
from weightsmith.runs.weights import weighting

EVEN = [100 * i for i in range(1, 9)]
UNEVEN = [100, 150, 400, 500, 900]


def by_text(text, steps=EVEN, metrics=None):
    """Return the weights that a text gives for steps, and for what was logged at each."""
    return weighting(text).of([Saved(f"run/{s}", s, (metrics or {}).get(s, {})) for s in steps])


@pytest.mark.parametrize("steps", [EVEN, UNEVEN, [7]], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "uniform",
        "sma",
        "lawa",
        "wma",
        "ema:0.9",
        "ema:0.99:50",
        "linear-decay",
        "1-sqrt",
        "cosine",
        "wsm:square",
        "wsm:exponential",
        "wsm:cosine:300",
        "by-metric:step:3",
        "by-metric:step:0",
    ],
)
def test_weights_are_float64_not_negative_and_sum_to_one(text, steps):
    weights = by_text(text, steps)
    assert len(weights) == len(steps)
    assert all(type(weight) is float and weight >= 0 for weight in weights)
    assert math.isclose(math.fsum(weights), 1, abs_tol=1e-12)


# -- WSM: the theorem -------------------------------------------------------------------------------------------------


def trained(rates, save_every, seed=0):
    """Run SGD on a linear loss whose gradients change from step to step; return the checkpoints and the end."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(50)
    saved = [weights.copy()]
    for step, rate in enumerate(rates, 1):
        weights = weights - rate * rng.standard_normal(50)
        if step % save_every == 0:
            saved.append(weights.copy())
    return np.array(saved), weights


@pytest.mark.parametrize("name", sorted(schemes.DECAYS))
def test_weighted_checkpoints_of_a_constant_rate_are_the_end_of_the_decayed_run(name):
    """A gradient that does not depend on the weights makes the theorem exact; the rates are set apart from it here."""
    intervals, every, rate = 12, 25, 0.03
    saved, _ = trained([rate] * intervals * every, every)
    # On the way to checkpoint i of k: the schedule at i / (k + 1), held over the interval.
    factors = [schemes.DECAYS[name](i / (intervals + 1)) for i in range(1, intervals + 1)]
    _, end = trained([rate * factor for factor in factors for _ in range(every)], every)
    weights = schemes.decayed(range(0, every * (intervals + 1), every), schemes.DECAYS[name])
    np.testing.assert_allclose(np.array(weights) @ saved, end, rtol=0, atol=1e-12)
    listed = schemes.decayed(range(intervals + 1), factors)
    np.testing.assert_allclose(listed, weights, atol=1e-15)


def test_theorem_holds_to_first_order_where_gradients_follow_the_weights():
    """On a quadratic loss what is missed falls with the square of the learning rate, and what decay does with it."""

    def run(rates):
        curvature, weights, saved = np.linspace(0.1, 2, 20), np.ones(20), [np.ones(20)]
        for rate in rates:
            weights = weights - rate * curvature * weights
            saved.append(weights)
        return np.array(saved)

    count = 10
    factors = [1 - i / (count + 1) for i in range(1, count + 1)]
    missed, moved = [], []
    for rate in (1e-2, 1e-3):
        constant, lowered = run([rate] * count), run([rate * factor for factor in factors])[-1]
        average = np.array(schemes.decayed(range(count + 1), schemes.DECAYS["linear"])) @ constant
        missed.append(np.abs(average - lowered).max())
        moved.append(np.abs(constant[-1] - lowered).max())
    assert missed[0] / missed[1] == pytest.approx(100, rel=0.15)
    assert moved[0] / moved[1] == pytest.approx(10, rel=0.15)


def test_linear_decay_is_the_uniform_mean():
    np.testing.assert_allclose(by_text("linear-decay"), by_text("uniform"), atol=1e-15)


def test_weights_of_a_decay_are_those_of_the_card():
    # c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k.
    np.testing.assert_allclose(schemes.decayed([0, 1, 2, 3], [0.9, 0.5, 0.2]), [0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(by_text("wsm:0.9,0.5,0.2", [0, 1, 2, 3]), [0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(by_text("wsm:0.25", [0, 1]), [0.75, 0.25])
    root = [1 - math.sqrt(i / 4) for i in range(1, 4)]
    np.testing.assert_allclose(by_text("1-sqrt", [0, 1, 2, 3]), [1 - root[0], *-np.diff(root), root[-1]])


def test_decay_goes_by_steps_not_by_places():
    # s = 0, 1, 4, with a mean interval of 2: w = 1 - s / 6.
    np.testing.assert_allclose(by_text("linear-decay", [0, 1, 4]), [1 / 6, 1 / 2, 1 / 3])


def test_window_leaves_out_what_lies_before():
    weights = by_text("wsm:cosine:300")
    assert weights[:4] == [0] * 4
    np.testing.assert_allclose(weights[4:], by_text("cosine", EVEN[4:]))
    assert by_text("wsm:cosine:299")[4] == 0


@pytest.mark.parametrize(
    ("factors", "message"),
    [([0.5], "1 factors for 3 checkpoints"), ([0.5, 0.6], "never up"), ([1.1, 0.5], "never up"), ([0.5, -0.1], "up")],
)
def test_what_is_no_decay_is_refused(factors, message):
    with pytest.raises(MethodError, match=message):
        schemes.decayed([0, 1, 2], factors)


# -- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parameters"), [("ema:0.8", {"momentum": 0.8}), ("ema:0.97:5", {"momentum": 0.97, "interval": 5})]
)
def test_moving_average_is_the_method_of_that_name(text, parameters):
    models = np.random.default_rng(0).standard_normal((8, 100))
    np.testing.assert_allclose(np.array(by_text(text)) @ models, merge_arrays("ema", models, parameters=parameters))


def test_weighted_moving_average_grows_by_place():
    np.testing.assert_allclose(by_text("wma", [5, 7, 9]), [1 / 6, 2 / 6, 3 / 6])


def test_endpoints_are_the_start_and_the_end():
    assert by_text("endpoints:0.7", [1, 2, 3, 4]) == pytest.approx([0.3, 0, 0, 0.7])
    with pytest.raises(MethodError, match="only one checkpoint"):
        by_text("endpoints:0.7", [1])


def test_metric_decides_as_its_method_does():
    losses = {s: {"loss": 1 + s / 1000, "eval_accuracy": s / 1000} for s in EVEN}
    np.testing.assert_allclose(by_text("by-metric loss:0", metrics=losses), by_text("uniform"))
    expected = np.array([(1 + s / 1000) ** -2 for s in EVEN])
    np.testing.assert_allclose(by_text("by-metric:loss:2", metrics=losses), expected / expected.sum())
    expected = np.array([float(s) ** 3 for s in EVEN])
    np.testing.assert_allclose(by_text("by-metric:eval_accuracy:3", metrics=losses), expected / expected.sum())
    expected = np.exp([-4 * s / 1000 for s in EVEN])
    np.testing.assert_allclose(by_text("by-metric:loss:4:exp_loss", metrics=losses), expected / expected.sum())


def test_metric_that_cannot_decide_is_refused():
    with pytest.raises(CheckpointError, match=r"run/100: no 'los' was logged .*did you mean 'loss'.*loss, epoch"):
        by_text("by-metric:los:2", metrics={s: {"loss": 1.0, "epoch": 2.0} for s in EVEN})
    with pytest.raises(MethodError, match="loss of 200 is nan"):
        by_text("by-metric:loss:2", metrics={s: {"loss": math.nan if s == 200 else 1.0} for s in EVEN})
    with pytest.raises(MethodError, match="above 0"):
        by_text("by-metric:loss:2", metrics={s: {"loss": -1.0} for s in EVEN})


def test_coefficients_from_a_file(tmp_path: Path):
    def of(weights, steps=(10, 20, 30)):
        file = tmp_path / "w.json"
        file.write_text(json.dumps({"weights": weights}))
        return by_text(str(file), list(steps))

    assert of([0.5, -0.5, 1.0]) == [0.5, -0.5, 1.0]
    # LCSC: W_1 + sum a_i (W_i - W_1).
    assert of([6.0, -2.0]) == [-3.0, 6.0, -2.0]
    assert of({"10": 0.25, "30": 0.75}) == [0.25, 0, 0.75]
    for weights, message in [
        ([0.5, 0.1, 0.1], "sum to 1; their sum is 0.7"),
        ([1.0], "1 weights for 3"),
        ({"40": 1.0}, "steps 40, of which no checkpoint is chosen"),
        ("x", "holds no weights"),
        ({"a": 1}, "whole numbers"),
        ([True, 0, 0], "holds no weights"),
    ]:
        with pytest.raises((MethodError, CheckpointError), match=message):
            of(weights)


def test_scheme_of_ones_own_must_give_weights_that_sum_to_one():
    saved = [Saved(str(s), s) for s in EVEN]
    assert weighting(lambda steps: [0.0] * (len(steps) - 1) + [1.0]).of(saved)[-1] == 1
    assert weighting([0.125] * 8).of(saved) == [0.125] * 8
    with pytest.raises(MethodError, match="it must give one for each"):
        weighting(lambda steps: [1.0]).of(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrm", "did you mean 'uniform'"),
        ("ema", "none of the schemes"),
        ("ema:x", "'x' is no number"),
        ("ema:0.5:1.5", "whole number of updates"),
        ("ema:2", "decay from 0 to 1"),
        ("wsm:liner", "did you mean 'linear'"),
        ("wsm:linear:0", "above 0"),
        ("endpoints:inf", "not finite"),
        ("by-metric:loss:-1", "from 0"),
        ("by-metric:loss:2:up", "none of loss"),
    ],
)
def test_text_that_is_no_scheme_is_refused(text, message):
    with pytest.raises((RecipeError, MethodError), match=message):
        by_text(text)
