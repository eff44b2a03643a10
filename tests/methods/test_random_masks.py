"""DARE and DELLA as chance has it: shares kept, expectations, and sums of magnitudes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError
from weightsmith.kernels.select import histogram, look_up, patterns, rank_table

SHAPE = (64, 512)
BASE = np.zeros(SHAPE, np.float32)
DELTA = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def thinned(method: str, seed: int = 0, **parameters: object) -> np.ndarray:
    given = {"weight": 1.0, "density": 0.5, **parameters}
    return merge_arrays(method, [DELTA], BASE, parameters=given, seed=seed)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_share_and_divides_by_it(density):
    out = thinned("dare_linear", density=density)
    kept = out != 0
    assert abs(kept.mean() - density) < 4 * np.sqrt(density * (1 - density) / DELTA.size)
    np.testing.assert_allclose(out[kept], DELTA[kept] / density, rtol=1e-6)
    assert np.array_equal(out != 0, thinned("dare_linear", density=density, rescale=False) != 0)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_thinning_leaves_the_expectation(method):
    """The mean over many seeds approaches the task vector: four standard errors, entry by entry on average."""
    seeds = 400
    more = {"epsilon": 0.2} if method == "della_linear" else {}
    mean = sum(thinned(method, seed, **more).astype(np.float64) for seed in range(seeds)) / seeds
    # Variance of d m / p is d^2 (1 - p) / p, with p at least 0.3 here.
    assert np.mean((mean - DELTA) ** 2) < 1.2 * np.mean(DELTA**2) * (0.7 / 0.3) / seeds
    assert abs(np.sum((mean - DELTA) * DELTA)) / np.sum(DELTA**2) < 0.02


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_of_the_weights_masks_the_fine_tuned_weights_themselves(method):
    base = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    given = {"weight": 1.0, "density": 0.5, "object": "weights"}
    out = merge_arrays(method, [base + DELTA], base, parameters=given)
    kept = np.abs(out) > 1e-5
    np.testing.assert_allclose(out[kept], 2 * (base + DELTA)[kept], rtol=1e-5, atol=1e-5)
    # The same draws as for the task vector.
    of_delta = merge_arrays(method, [base + DELTA], base, parameters={**given, "object": "delta"})
    assert np.array_equal(kept[np.abs(DELTA) > 1e-2], (np.abs(of_delta - base) > 1e-5)[np.abs(DELTA) > 1e-2])


def test_dare_of_all_weights_is_dare_of_the_task_vector():
    given = {"weight": 0.5, "density": 1.0}
    expected = merge_arrays("dare_linear", [DELTA], BASE, parameters=given)
    assert np.array_equal(
        merge_arrays("dare_linear", [DELTA], BASE, parameters={**given, "object": "weights"}), expected
    )


def test_the_l1_rescaling_restores_the_sum_of_magnitudes():
    for method in ("dare_linear", "della_linear"):
        more = {"epsilon": 0.1} if method == "della_linear" else {}
        out = thinned(method, density=0.3, rescale_by="l1", **more)
        assert np.abs(out).sum(dtype=np.float64) == pytest.approx(np.abs(DELTA).sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_della_keeps_large_entries_more_often(scope):
    """By rank, in ten classes: the chance rises linearly from density - epsilon to density + epsilon."""
    kept = sum((thinned("della_linear", seed, epsilon=0.3, trim_scope=scope) != 0).astype(float) for seed in range(40))
    axis = -1 if scope == "row" else None
    magnitudes = np.abs(DELTA)
    order = magnitudes.argsort(axis=axis).argsort(axis=axis).reshape(SHAPE) if axis else None
    rank = (
        order / (SHAPE[1] - 1) if axis else (magnitudes.ravel().argsort().argsort() / (DELTA.size - 1)).reshape(SHAPE)
    )
    for low in np.arange(0, 1, 0.1):
        chosen = (rank >= low) & (rank < low + 0.1)
        expected = 0.2 + 0.6 * (low + 0.05)
        assert kept[chosen].mean() / 40 == pytest.approx(expected, abs=0.01)


def test_della_keeps_entries_alone_in_their_row_with_the_density_as_chance():
    column, zero = np.ones((4000, 1), np.float32), np.zeros((4000, 1), np.float32)
    merged = merge_arrays("della_linear", [column], zero, parameters={"weight": 1.0, "density": 0.4})
    assert np.mean(merged != 0) == pytest.approx(0.4, abs=0.03)
    np.testing.assert_allclose(merged[merged != 0], 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("density", "epsilon", "good"),
    [(0.5, 0.4, True), (0.25, 0.25, False), (0.75, 0.25, False), (0.5, 0.5, False), (1.0, 0.4, True), (0.0, 0.4, True)],
)
def test_della_takes_windows_of_chances_within_zero_and_one(density, epsilon, good):
    if good:
        thinned("della_linear", density=density, epsilon=epsilon)
        return
    with pytest.raises(MethodError, match="both must lie within"):
        thinned("della_linear", density=density, epsilon=epsilon)


def test_ranks_over_a_scope_are_those_of_the_leading_bits():
    values = np.abs(DELTA)
    counts = histogram(patterns(values), 0, 16)
    ranks = look_up(values, rank_table(counts)).ravel()
    coarse = (values.view(np.uint32) >> 16).ravel()
    sample = np.random.default_rng(1).choice(values.size, 200)
    for i in sample:
        below, equal = np.count_nonzero(coarse < coarse[i]), np.count_nonzero(coarse == coarse[i])
        assert ranks[i] == pytest.approx((below + (equal - 1) / 2) / (values.size - 1))


GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "random" / "statistics.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_mergekits_statistics_are_met_with_its_rescaling(name, monkeypatch):
    """As golden/make.py measured mergekit: other masks, the same shares, scale and sums of magnitudes."""
    recipe = (GOLDEN / "random" / f"{name}.yaml").read_text()
    monkeypatch.chdir(GOLDEN / "models")
    base, tuned = (read_safetensors(Path(model)) for model in ("base", "a"))
    kept, small, large, scale, ratios = [], [], [], [], []
    for seed in range(RECORDED[name]["seeds"]):
        merged = ws.merge_recipe(f"{recipe}\ncompat: mergekit\nseed: {seed}\n")
        for key, start in base.items():
            delta = np.atleast_2d((tuned[key] - start).astype(np.float64))
            after = (merged[key].numpy().astype(np.float64) - start).reshape(delta.shape)
            # What float32 leaves of base + 0 - base.
            changed, survives = delta != 0, np.abs(after) > 1e-6 * np.abs(delta).max()
            survives &= changed
            rank = np.abs(delta).argsort(axis=-1).argsort(axis=-1)
            upper = rank >= delta.shape[-1] // 2
            kept.append(survives[changed])
            small.append(survives[changed & ~upper])
            large.append(survives[changed & upper])
            scale.append(after[survives] / delta[survives])
            ratios.append(np.array([np.abs(after).sum() / np.abs(delta).sum()]))
    found = {"kept": kept, "kept_small": small, "kept_large": large, "scale": scale, "l1_ratio": ratios}
    for key, parts in found.items():
        # Four standard errors of the difference: tensors of eight entries make the scale scatter.
        allowed = 0.06 if key == "scale" else 0.015
        assert np.concatenate(parts).mean() == pytest.approx(RECORDED[name][key], abs=allowed), key
