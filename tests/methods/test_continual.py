"""Continual merging: properties of OPCM by hand, over whole models, and merges that are gone on with."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import PlanError
from weightsmith.methods import continual


def near(base, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return {name: (array + size * rng.standard_normal(array.shape)).astype(array.dtype) for name, array in base.items()}


@pytest.fixture
def stream(write_model):
    """A base and four fine-tunes of it, of unequal length."""
    base = llama_tensors(0)
    models = [near(base, seed, 0.05 * seed) for seed in (1, 2, 3, 4)]
    paths = [write_model(f"model{i}", tensors) for i, tensors in enumerate(models)]
    return write_model("base", base), base, paths, models


@pytest.mark.parametrize("shape", [(9, 9), (7, 12), (12, 7)])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.99])
def test_what_is_added_is_orthogonal_to_what_is_there(shape, alpha):
    rng = np.random.default_rng(0)
    merged, delta = rng.standard_normal(shape), rng.standard_normal(shape)
    outside = continual._outside(np, merged, delta, alpha)
    assert abs(np.sum(merged * outside)) < 1e-12 * np.linalg.norm(merged) * np.linalg.norm(delta)
    assert np.linalg.norm(outside) < np.linalg.norm(delta)
    # What was cleared stays clear, and what is left is not touched again.
    np.testing.assert_allclose(continual._outside(np, merged, outside, alpha), outside, atol=1e-12)


def test_a_task_vector_within_the_dominant_subspace_is_lost_and_one_outside_is_kept():
    u, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    v, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))
    merged = 5 * np.outer(u[:, 0], v[:, 0]) + 4 * np.outer(u[:, 1], v[:, 1]) + np.outer(u[:, 2], v[:, 2])
    # Sums of the singular values: 0.5, 0.9, 1; the first above 0.8 is that of the second, so one is dominant.
    inside, across = np.outer(u[:, 0], v[:, 0]), np.outer(u[:, 0], v[:, 1])
    np.testing.assert_allclose(continual._outside(np, merged, inside, 0.8), 0, atol=1e-12)
    np.testing.assert_allclose(continual._outside(np, merged, across, 0.8), across, atol=1e-12)
    np.testing.assert_allclose(continual._outside(np, merged, across, 0.95), 0, atol=1e-12)
    # Directions in which the update has no length are no directions: nothing is taken away along them.
    nowhere = np.outer(u[:, 5], v[:, 5])
    np.testing.assert_allclose(continual._outside(np, merged, nowhere, 0.8), nowhere, atol=1e-12)


def test_after_an_unchanged_model_the_next_counts_in_full():
    base = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    other = base + np.float32(0.1)
    merged = merge_arrays("opcm", [base, other], base)
    # Mean length of none and of one: half of it.
    np.testing.assert_allclose(merged, base + 0.05, atol=1e-6)


def _plain(base, models):
    """OPCM over a whole model: lengths over all tensors, scaled after every model, full bases."""
    merged = {name: models[0][name].astype(np.float64) - base[name] for name in base}
    norms = [math.sqrt(sum(np.sum(np.square(delta)) for delta in merged.values()))]
    undo = 1.0
    for model in models[1:]:
        deltas = {name: model[name].astype(np.float64) - base[name] for name in base}
        norms.append(math.sqrt(sum(np.sum(np.square(delta)) for delta in deltas.values())))
        for name, delta in deltas.items():
            added = delta
            if delta.ndim == 2 and "embed" not in name:
                u, s, vt = np.linalg.svd(merged[name])
                projected = u.T @ delta @ vt.T
                rank = int(np.argmax(np.cumsum(s) / s.sum() > 0.5))
                projected[:rank, :rank] = 0
                np.fill_diagonal(projected, 0)
                added = u @ projected @ vt
            merged[name] = undo * merged[name] + added
        length = math.sqrt(sum(np.sum(np.square(delta)) for delta in merged.values()))
        undo = length / np.mean(norms)
        merged = {name: delta / undo for name, delta in merged.items()}
    return {name: base[name] + merged[name] for name in base}, np.mean(norms), undo


@pytest.mark.parametrize("threads", [1, 2])
def test_opcm_over_a_model_takes_lengths_over_all_of_it(stream, tmp_path, threads):
    base_path, base, paths, models = stream
    ws.merge("opcm", paths, base_path).save(tmp_path / "out", threads=threads)
    expected, mean, undo = _plain(base, models)
    found = read_safetensors(tmp_path / "out")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=3e-6, err_msg=name)
    state = json.loads((tmp_path / "out" / "weightsmith.json").read_text())["state"]
    assert {name: float(text) for name, text in state.items()} == pytest.approx(
        {"seen": 4, "mean_norm": mean, "previous_lambda": undo}, rel=1e-6
    )


def test_opcm_gives_the_same_bytes_on_any_number_of_threads(stream, tmp_path):
    base_path, _, paths, _ = stream
    written = []
    for threads in (1, 2, 5):
        ws.merge("opcm", paths, base_path).save(tmp_path / f"{threads}", threads=threads)
        written.append((tmp_path / f"{threads}" / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_merge_of_a_merge_must_say_how_long_its_task_vectors_were(stream):
    base_path, _, paths, _ = stream
    with pytest.raises(PlanError, match="mean_norm"):
        ws.merge("opcm", paths, base_path, seen=2)


def test_ema_over_checkpoints_is_the_recurrence():
    rng = np.random.default_rng(0)
    models = rng.standard_normal((6, 50)).astype(np.float32)
    slow = models[0].astype(np.float64)
    for model in models[1:]:
        slow = 0.9**3 * slow + (1 - 0.9**3) * model
    merged = merge_arrays("momentum", models, parameters={"momentum": 0.9, "interval": 3})
    np.testing.assert_allclose(merged, slow, atol=1e-6)


def test_imm_averages_the_original_with_a_masked_model():
    base = np.zeros(100_000, np.float32)
    merged = merge_arrays("imm", [base + 1], base)
    values, counts = np.unique(merged, return_counts=True)
    np.testing.assert_allclose(values, [0, 0.5 / 0.8], rtol=1e-6)
    assert counts[0] / counts.sum() == pytest.approx(0.2, abs=0.01)
