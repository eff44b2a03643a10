"""Robust aggregates: cases by hand, breakdown under bad models, numbers of others' code."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError, PlanError
from weightsmith.methods.registry import get_method
from weightsmith.methods.sorting import comparisons, in_order, in_order_with_weights

# What rng = default_rng(0) draws: seven models [2, 3], of which the last two are pushed far away.
_RNG = np.random.default_rng(0)
SEVEN = [_RNG.standard_normal((2, 3)) for _ in range(7)]
SEVEN[5] += 4
SEVEN[6] -= 7


def like(values):
    return pytest.approx(np.reshape(values, (2, 3)), abs=1e-9)


# -- order, entry by entry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 13))
def test_a_network_that_sorts_every_row_of_zeros_and_ones_sorts_everything(count):
    rows = np.array(list(itertools.product((0, 1), repeat=count)))
    ordered = np.stack(in_order(np, list(rows.T)))
    assert np.array_equal(ordered, np.sort(rows.T, axis=0))


def test_networks_have_as_many_comparisons_as_the_literature_says():
    assert [len(list(comparisons(count))) for count in (1, 2, 3, 4, 5, 8, 16)] == [0, 1, 3, 5, 9, 19, 63]


def test_a_nan_anywhere_is_nan_everywhere_in_the_order():
    for broken in range(7):
        values = [np.array([1.0, float(i)]) for i in range(7)]
        values[broken][0] = np.nan
        ordered = np.stack(in_order(np, values))
        assert np.isnan(ordered[:, 0]).all()
        assert ordered[:, 1].tolist() == list(range(7))


def test_weights_go_with_their_entries():
    rng = np.random.default_rng(0)
    arrays = [rng.permutation(np.arange(50.0)) for _ in range(6)]
    values, owners = in_order_with_weights(np, arrays, range(6))
    assert np.array_equal(np.stack(values), np.sort(np.stack(arrays), axis=0))
    # The weights are the arrays' numbers here: each value lies in the array that its weight names.
    named = np.stack(arrays)[np.stack(owners).astype(int), np.arange(50)]
    assert np.array_equal(named, np.stack(values))
    assert np.array_equal(np.sort(np.stack(owners), axis=0), np.repeat(np.arange(6.0)[:, None], 50, axis=1))


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_median_and_trimmed_mean_of_many_models_are_those_of_a_sort(count):
    rng = np.random.default_rng(count)
    models = [rng.integers(-3, 4, 3000).astype(np.float32) for _ in range(count)]
    models[0][:5] = [np.inf, -np.inf, 0.0, -0.0, 3e38]
    stack = np.sort(np.stack(models).astype(np.float64), axis=0)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(merge_arrays("median", models), np.median(stack, axis=0), rtol=1e-6)
        for trim in range((count + 1) // 2):
            kept = stack[trim : count - trim].mean(axis=0)
            found = merge_arrays("trimmed_mean", models, parameters={"trim": trim})
            np.testing.assert_allclose(found, kept, rtol=1e-6, atol=1e-6)


def test_median_and_trimmed_mean_are_those_of_epfml():
    # codes/aggregator/{trimmed_mean,coordinatewise_median}.py of epfml/byzantine-robust-noniid-optimizer, in float64.
    by_one = [0.0839600419, 0.3465420206, -0.436251489, -0.2896101229, -0.5652246635, 0.1316652143]
    by_two = [0.4802769797, 0.3029961325, -0.5252563827, -0.5163642046, -0.5677342729, 0.2043437243]
    assert merge_arrays("trimmed_mean", SEVEN, parameters={"trim": 1}) == like(by_one)
    assert merge_arrays("trimmed_mean", SEVEN, parameters={"trim": 2}) == like(by_two)
    of_seven = [0.4116305364, 0.0940122978, -0.7037352358, -0.7322673547, -0.5442589829, 0.2201951235]
    of_six = [0.657550359, 0.5205466304, -0.4161349494, -0.3136836188, -0.539964178, 0.2858525968]
    assert merge_arrays("median", SEVEN) == like(of_seven)
    assert merge_arrays("median", SEVEN[:6]) == like(of_six)


# Entries 1, 2, 3 of the models; the weights, and where half of them is reached.
@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([1, 1, 1], 2.0),
        ([5, 1, 1], 1.0),
        ([1, 1, 5], 3.0),
        ([2, 1, 1], 1.5),
        ([1, 1, 2], 2.5),
        ([0.1, 0.2, 0.3], 2.5),
        ([0.0, 1, 1], 2.5),
        ([0.0, 0.7, 0.0], 2.0),
    ],
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_weighted_median_is_where_half_of_the_weight_is_reached(weight, expected, order):
    models = [np.full(5, float(i + 1), np.float32) for i in order]
    found = merge_arrays("median", models, parameters={"weight": [weight[i] for i in order]})
    assert found.tolist() == [expected] * 5


@pytest.mark.parametrize(
    ("count", "beta", "dropped"),
    [(5, 0.2, 1), (5, 0.21, 2), (4, 0.2, 1), (10, 0.3, 3), (3, 0.4, 1), (4, 0.5, 1), (9, 0.0, 0)],
)
def test_a_share_to_trim_is_rounded_up_and_leaves_the_median(count, beta, dropped):
    models = [np.array([2.0**i]) for i in range(count)]
    found = merge_arrays("trimmed_mean", models, parameters={"beta": beta})
    assert found == pytest.approx(np.mean([2.0**i for i in range(dropped, count - dropped)]))


def test_trimming_everything_away_is_refused():
    with pytest.raises(MethodError, match="'trimmed_mean' takes at least 5 model.* with trim: 2, and 4 are given"):
        merge_arrays("trimmed_mean", SEVEN[:4], parameters={"trim": 2})


# -- distances --------------------------------------------------------------------------------------------------------


def honest_and(bad, count=5, size=400, dtype=np.float32):
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(size)
    good = [centre + 0.1 * rng.standard_normal(size) for _ in range(count)]
    return centre, [model.astype(dtype) for model in (*good, *bad(centre))]


ATTACKS = {
    "far": lambda centre: [centre + 1000, centre - 500],
    "flipped": lambda centre: [-10 * centre, -10 * centre],
    "nan": lambda centre: [np.full_like(centre, np.nan), np.full_like(centre, np.inf)],
    "beyond squares": lambda centre: [np.full(centre.shape, 1e300), np.full(centre.shape, -1e300)],
    "huge": lambda centre: [np.full_like(centre, 3e38), np.full_like(centre, -3e38)],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("krum", {"byzantine": 2}),
        ("krum", {"byzantine": 2, "select": 3}),
        ("geometric_median", {}),
        ("median", {}),
        ("trimmed_mean", {"trim": 2}),
    ],
)
def test_two_bad_models_of_seven_spoil_no_robust_aggregate(method, given, attack):
    centre, models = honest_and(ATTACKS[attack], dtype=np.float64 if attack == "beyond squares" else np.float32)
    if attack == "nan":
        # A broken entry shows in the result, in its place alone: nothing else is moved by it.
        for model in models[5:]:
            model[10:] = centre[10:]
    merged = merge_arrays(method, models, parameters=given)
    healthy = slice(10, None) if attack == "nan" else slice(None)
    assert np.linalg.norm((merged - centre)[healthy]) < np.linalg.norm((models[0] - centre)[healthy]) * 1.1
    if attack == "nan":
        assert np.isnan(merged[:10]).all()


def test_krum_is_that_of_epfml():
    # _compute_scores and multi_krum of codes/aggregator/krum.py, epfml/byzantine-robust-noniid-optimizer, given
    # distances. (Its own caller gives squared ones, which are then squared again.)
    scores = [13.6602106571, 15.5760856639, 37.031157644, 18.63809624, 11.5343734049, 279.2232041056, 761.5284701603]
    for i, expected in enumerate(scores):
        apart = sorted(((SEVEN[i] - SEVEN[j]) ** 2).sum() for j in range(7) if j != i)
        assert sum(apart[: 7 - 2 - 2]) == pytest.approx(expected)
    assert np.array_equal(merge_arrays("krum", SEVEN, parameters={"byzantine": 2}), SEVEN[4])
    three = merge_arrays("krum", SEVEN, parameters={"byzantine": 2, "select": 3})
    np.testing.assert_allclose(three, (SEVEN[4] + SEVEN[0] + SEVEN[1]) / 3, rtol=1e-12)


def test_of_equal_scores_the_first_model_wins():
    one, other, far = np.zeros(4, np.float32), np.ones(4, np.float32), np.full(4, 9, np.float32)
    for models in itertools.permutations([one, other, far]):
        found = merge_arrays("krum", list(models), parameters={"byzantine": 0})
        near = next(model for model in models if model is not far)
        assert np.array_equal(found, near)


@pytest.mark.parametrize(("given", "least"), [({"byzantine": 2}, 7), ({"byzantine": 0, "select": 5}, 5)])
def test_krum_of_too_few_models_is_refused_before_a_weight_is_read(given, least, write_model):
    models = [write_model(f"m{i}", llama_tensors(i)) for i in range(4)]
    with pytest.raises(PlanError, match=f"takes at least {least} model.*and 4 are given"):
        ws.merge("krum", models, **given)


@pytest.mark.parametrize("scope", ["model", "layer", "tensor"])
def test_krum_measures_distances_over_its_scope(scope, write_model):
    """The second model is bad in one tensor, the third a little off everywhere."""
    base = llama_tensors(0)
    rng = np.random.default_rng(1)
    models = [{n: a + (0.01 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in base.items()} for _ in range(4)]
    bad = "model.layers.1.mlp.up_proj.weight"
    models[1][bad] = models[1][bad] + 5
    models[2] = {n: a + np.float32(0.3) for n, a in models[2].items()}
    paths = [write_model(f"m{i}", tensors) for i, tensors in enumerate(models)]
    merged = ws.merge("krum", paths, byzantine=0, distance_scope=scope)
    out = paths[0].parent / "out"
    merged.save(out)
    found = read_safetensors(out)
    groups = {
        "model": [list(base)],
        "tensor": [[name] for name in base],
        "layer": [[n for n in base if f"layers.{i}." in n] for i in (0, 1)] + [[n] for n in base if "layers" not in n],
    }[scope]
    for names in groups:
        flat = [np.concatenate([np.float64(m[n]).ravel() for n in names]) for m in models]
        scores = [sum(sorted(((a - b) ** 2).sum() for b in flat)[:3]) for a in flat]
        chosen = models[int(np.argmin(scores))]
        for name in names:
            assert np.array_equal(found[name], chosen[name]), name


def test_the_geometric_median_is_that_of_its_authors():
    # geometric_median_update of models/model.py, krishnap25/RFA, ftol 0: 4 steps, 4 with weights, and 500.
    equal = [0.2932981906, 0.2805776431, -0.2993888824, -0.2666537607, -0.54831288, 0.213055343]
    weighted = [-0.5336656133, -0.3057182246, -0.5390458936, -0.4101437348, -1.0915534661, -0.1748772282]
    final = [0.3068080063, 0.2831305602, -0.3111451571, -0.2822734187, -0.5475884648, 0.2116483788]
    four = {"max_iter": 4, "smoothing": 1e-5, "tol": 0.0}
    assert merge_arrays("geometric_median", SEVEN, parameters=four) == like(equal)
    given = {**four, "weight": [3.0, 1, 1, 2, 1, 1, 5]}
    assert merge_arrays("geometric_median", SEVEN, parameters=given) == like(weighted)
    assert merge_arrays("geometric_median", SEVEN) == like(final)


def test_the_geometric_median_of_points_in_the_plane():
    def of(*points, **given):
        return merge_arrays("geometric_median", [np.array(point, float) for point in points], parameters=given)

    # On a line it is the median; where diagonals cross, their crossing; of a wide triangle the blunt corner.
    assert of((0, 0), (1, 1), (9, 9)) == pytest.approx([1, 1], abs=1e-5)
    assert of((0, 0), (4, 0), (4, 4), (0, 4)) == pytest.approx([2, 2])
    assert of((0, 0), (10, 0), (10, 1), (0, 7)) == pytest.approx([70 / 8, 7 / 8], abs=1e-4)
    assert of((-5, 0), (5, 0), (0, 1)) == pytest.approx([0, 1], abs=1e-4)
    # From every corner of an equilateral triangle it is seen under 120 degrees.
    assert of((0, 0), (1, 0), (0.5, math.sqrt(0.75))) == pytest.approx([0.5, math.sqrt(1 / 12)])
    assert of((0, 0), (1, 0), (7, 7), weight=[1, 1, 5]) == pytest.approx([7, 7], abs=1e-5)


def test_the_geometric_median_turns_with_the_models():
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(20) for _ in range(5)]
    turn, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    turned = merge_arrays("geometric_median", [turn @ model for model in models])
    np.testing.assert_allclose(turned, turn @ merge_arrays("geometric_median", models), atol=1e-10)


@pytest.mark.parametrize("method", ["krum", "geometric_median"])
def test_distances_over_a_model_are_those_of_all_its_tensors_end_to_end(method, write_model):
    models = [llama_tensors(seed, dtype=np.float64) for seed in range(5)]
    given = {"byzantine": 1, "select": 2} if method == "krum" else {}
    merged = ws.merge(method, [write_model(f"m{i}", one) for i, one in enumerate(models)], **given)
    flat = [np.concatenate([model[name].ravel() for name in models[0]]) for model in models]
    expected = merge_arrays(method, flat, parameters=given)
    found = np.concatenate([merged[name].read(0, merged[name].size) for name in models[0]])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_small_distances_far_from_zero_are_not_lost():
    rng = np.random.default_rng(0)
    base = 1e4 * rng.standard_normal(1000)
    models = [base + 1e-5 * rng.standard_normal(1000) for _ in range(3)] + [base + 3e-5 * rng.standard_normal(1000)]
    found = merge_arrays("krum", models, parameters={"byzantine": 0})
    assert not np.array_equal(found, models[3])
    scores = [sum(sorted(((a - b) ** 2).sum() for b in models)[:3]) for a in models]
    assert np.array_equal(found, models[int(np.argmin(scores))])


# -- also known as ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ("coordinate_median", "median"),
        ("multi_krum", "krum"),
        ("rfa", "geometric_median"),
    ],
)
def test_methods_are_found_by_the_names_they_are_published_under(other, name):
    assert get_method(other) is get_method(name)
