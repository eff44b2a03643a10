"""WIDEN: what an embedding's columns are, and what its ranks are made for."""

from __future__ import annotations

import numpy as np
import pytest

import weightsmith as ws
from conftest import read_safetensors
from tests.conformance.references_columns import widen
from weightsmith.engine.arrays import merge_arrays


def inputs(shape, size=0.1, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [(base + size * rng.standard_normal(shape)).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_size", [7, 1 << 17])
def test_the_columns_of_an_embedding_are_its_tokens(threads, block_size, monkeypatch):
    monkeypatch.setattr("weightsmith.engine.backend.NumpyBackend.sweep", 50)
    base, models = inputs((23, 9))
    wide = [model.astype(np.float64) for model in models]
    for name, transposed in (("model.embed_tokens.weight", True), ("lm_head.weight", False), ("mlp.weight", False)):
        merged = merge_arrays("widen", models, base, name=name, threads=threads, block_size=block_size)
        np.testing.assert_allclose(merged, widen(wide, base, transposed=transposed), atol=3e-6)


def test_a_model_that_moved_a_tenth_as_far_counts_as_much():
    """What the method is for: a model that was pre-trained further beside a fine-tune."""
    base, (one, other, _) = inputs((40, 60), size=0.01)
    base, one, other = base.astype(np.float64), one.astype(np.float64), other.astype(np.float64)
    shares = []
    for scale in (1.0, 0.1):
        small = base + scale * (one - base)
        change = merge_arrays("widen", [small, other], base) - base
        pairs = [np.stack([small[:, j] - base[:, j], other[:, j] - base[:, j]], 1) for j in range(60)]
        shares.append([np.linalg.lstsq(pair, change[:, j], rcond=None)[0][0] for j, pair in enumerate(pairs)])
    # Small changes of lengths and angles are ranked alike but for neighbours that change places.
    assert np.mean(np.isclose(*shares, atol=0.02)) > 0.9
    assert np.std(shares[0]) > 0.05


def test_with_ratio_zero_it_is_task_arithmetic():
    base, models = inputs((20, 30))
    merged = merge_arrays("widen", models, base, parameters={"ratio": 0.0})
    # The least of every model's ranks is 0, which is not above 0: those columns go through the softmax.
    added = merge_arrays("task_arithmetic", models, base, parameters={"weight": 1.0})
    same = np.isclose(merged, added, atol=1e-5).all(0)
    assert 30 - 2 * len(models) <= same.sum() < 30


def test_padded_tokens_that_no_model_changed_stay_as_they_are(write_model, tmp_path):
    base, models = inputs((16, 8))
    for array in (base, *models):
        array[10:] = 0
    name = "model.embed_tokens.weight"
    paths = [write_model(f"m{i}", {name: model}) for i, model in enumerate(models)]
    ws.merge("widen", paths, write_model("base", {name: base})).save(tmp_path / "out")
    merged = read_safetensors(tmp_path / "out")[name]
    np.testing.assert_array_equal(merged[10:], 0)
    assert (merged[:10] != base[:10]).all()
