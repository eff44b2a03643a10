import itertools
import math

import numpy as np
import pytest

from tests.report.families import mixed, permuted, trained, tuned
from tests.report.plain import measured
from weightsmith.report.base_test import CHANCE, base_tests, better_base, nearness


def _verdicts(report):
    return {one.model: one.shares for one in base_tests(report)}


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0.001},
        {"size": 0.05},
        {"size": 0.6},
        {"size": 0.05, "rank": 2},
        {"size": 0.05, "decay": 0.2},
        {"size": 0.3, "only": "q_proj"},
    ],
)
def test_fine_tunes_share_the_base(change):
    base = trained(0)
    (found,) = base_tests(measured(base, {"tuned": tuned(base, 1, **change)}))
    assert found.shares is True
    assert found.p < 1e-9


def test_models_trained_apart_do_not():
    found = base_tests(measured(trained(0), {str(seed): trained(seed) for seed in (1, 2, 3)}))
    assert [one.shares for one in found] == [False, False, False]
    assert all(one.p > CHANCE for one in found)


def test_a_scaled_model_shares_the_base():
    base = trained(0)
    other = {name: 3.0 * array for name, array in tuned(base, 1).items()}
    assert _verdicts(measured(base, {"scaled": other})) == {"scaled": True}


def test_norms_embeddings_and_heads_of_the_base_do_not_make_a_fine_tune():
    base, other = trained(0), trained(1)
    for name in base:
        if "norm" in name or "embed" in name or "head" in name:
            other[name] = base[name]
    assert _verdicts(measured(base, {"other": other})) == {"other": False}


def test_one_stranger_among_fine_tunes_is_the_one_that_is_found():
    base = trained(0)
    models = {"a": tuned(base, 1), "stranger": trained(5), "b": tuned(base, 2)}
    assert _verdicts(measured(base, models)) == {"a": True, "stranger": False, "b": True}


def test_a_model_half_of_another_is_neither():
    base, other = trained(0), trained(1)
    half = {name: (other if ".mlp." in name else base)[name] for name in base}
    report = measured(base, {"half": half})
    assert _verdicts(report) == {"half": None}
    assert all(".mlp." in name for name in nearness(report)["half"].strangers)


def test_a_model_very_far_from_the_base_is_neither():
    base = trained(0)
    assert _verdicts(measured(base, {"far": tuned(base, 1, size=3.0)})) == {"far": None}


def test_units_in_another_order_are_recognised():
    base = trained(0)
    found = nearness(measured(base, {"permuted": permuted(tuned(base, 1, size=0.02), 0), "other": trained(3)}))
    assert found["permuted"].permuted
    assert found["permuted"].shares is None
    assert not found["other"].permuted


def test_small_matrices_and_vectors_are_not_tested():
    draw = np.random.default_rng(0)
    base = {"model.layers.0.mlp.up_proj.weight": draw.standard_normal((8, 100)), "bias": draw.standard_normal(50)}
    (found,) = base_tests(measured(base, {"a": base}))
    assert (found.shares, found.p, found.figures) == (None, None, ())


def test_experts_in_one_tensor_are_tested_whatever_their_number():
    draw = np.random.default_rng(0)
    base = {"model.layers.0.mlp.experts.up_proj": draw.standard_normal((4, 24, 40))}
    near = {name: array + 0.1 * draw.standard_normal(array.shape) for name, array in base.items()}
    apart = {name: draw.standard_normal(array.shape) for name, array in base.items()}
    report = measured(base, {"near": near, "apart": apart})
    assert _verdicts(report) == {"near": True, "apart": False}
    assert nearness(report)["near"].z == pytest.approx(24**0.5 * nearness(report)["near"].cosine)


@pytest.mark.parametrize("strong", [False, True])
def test_chance_is_not_underestimated(strong):
    # Rows that all lie in one direction, the same in both models, are the worst case: the bound 1/m is then reached.
    draw = np.random.default_rng(3)
    one = draw.standard_normal((1, 40))

    def matrix():
        return draw.standard_normal((24, 1)) * one if strong else draw.standard_normal((24, 40))

    values = []
    for _ in range(300):
        base, model = ({f"model.layers.{i}.mlp.up_proj.weight": matrix() for i in range(3)} for _ in range(2))
        values.append(nearness(measured(base, {"a": model}))["a"].z)
    deviation = float(np.std(values))
    assert deviation <= 1.12  # three standard errors of a deviation of 300 values
    assert abs(np.mean(values)) <= 0.2
    if strong:
        assert deviation >= 0.88


def test_networks_trained_by_gradient_descent_are_told_apart():
    base, other = _network(0), _network(1)
    tuned_on = _network(0, start=base, task=9)
    assert _verdicts(measured(base, {"tuned": tuned_on, "apart": other})) == {"tuned": True, "apart": False}


def _network(seed, start=None, task=0, steps=150):
    """Return a small regression network, trained from random weights or from another one."""
    draw, data = np.random.default_rng(seed), np.random.default_rng(100 + task)
    sizes = (32, 64, 64, 16)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    weights = [draw.standard_normal((b, a)) / math.sqrt(a) for a, b in itertools.pairwise(sizes)]
    if start is not None:
        weights = [np.asarray(start[name], "f8") for name in names]
    inputs = data.standard_normal((256, sizes[0]))
    targets = np.sin(inputs @ data.standard_normal((sizes[0], sizes[-1])) / 3)
    for _ in range(steps):
        first = np.tanh(inputs @ weights[0].T)
        second = np.tanh(first @ weights[1].T)
        error = (second @ weights[2].T - targets) / len(inputs)
        back = (error @ weights[2]) * (1 - second**2)
        front = (back @ weights[1]) * (1 - first**2)
        for weight, step in zip(weights, (front.T @ inputs, back.T @ first, error.T @ second), strict=True):
            weight -= 0.5 * step
    return dict(zip(names, weights, strict=True))


def test_the_right_base_is_found_among_the_models():
    root = trained(0)
    report = measured(trained(9), {"a": tuned(root, 1), "root": root, "b": tuned(root, 2)})
    found = better_base(report)
    assert (found.label, found.models, found.named) == ("root", ("a", "b"), None)
    assert abs(found.cosine) < 0.1


def test_a_sibling_named_as_base_gives_way_to_the_root():
    root = trained(0)
    report = measured(tuned(root, 3), {"a": tuned(root, 1), "b": tuned(root, 2), "root": root})
    found = better_base(report)
    assert found.label == "root"
    assert found.named == pytest.approx(0.5, abs=0.05)
    assert set(_verdicts(report).values()) == {True}


def test_the_right_base_stays():
    base = trained(0)
    assert better_base(measured(base, {str(seed): tuned(base, seed) for seed in range(4)})) is None


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("common", [0.0, 2.0])
def test_a_merge_of_the_models_is_no_base_of_theirs(count, common):
    """Of models of one task, which share most of what they learned, just as of independent ones."""
    base = trained(0)
    start = mixed(base, [(tuned(base, 99), common)])
    models = {str(seed): tuned(start, seed) for seed in range(count)}
    models["mean"] = mixed(start, [(one, 1 / count) for one in models.values()])
    assert better_base(measured(base, models)) is None
    first = models.pop("0")
    assert better_base(measured(first, models, base_named=False)) is None


def test_a_model_that_hardly_moved_is_no_better_base_than_the_base():
    base = trained(0)
    models = {"still": tuned(base, 1, size=1e-4), "a": tuned(base, 2), "b": tuned(base, 3), "base itself": base}
    assert better_base(measured(base, models)) is None


@pytest.mark.parametrize("first", ["a", "root"])
def test_where_no_base_was_named_the_first_model_is_one_of_them(first):
    root = trained(0)
    models = {"a": tuned(root, 1), "root": root, "b": tuned(root, 2)}
    start = models.pop(first)
    found = better_base(measured(start, models, base_named=False))
    # Its label in these reports is "base".
    assert found.label == ("base" if first == "root" else "root")
    assert len(found.models) == 2


def test_without_the_root_no_model_is_suggested():
    root = trained(0)
    assert better_base(measured(trained(9), {str(seed): tuned(root, seed) for seed in range(3)})) is None
    # Of two models, either could come from the other.
    assert better_base(measured(trained(9), {"root": root, "a": tuned(root, 1)})) is None
