"""Spectra are held against NumPy's SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.errors import ReportError
from weightsmith.report import spectra

NAME = "model.layers.0.self_attn.q_proj.weight"


def pair(seed=0, rows=40, columns=60, rank=5, noise=0.0):
    rng = np.random.default_rng(seed)
    base = {NAME: rng.standard_normal((rows, columns)).astype(np.float32)}
    models = []
    common = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    for _ in range(2):
        own = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
        change = 0.01 * (common + own + noise * rng.standard_normal((rows, columns)))
        models.append({NAME: (base[NAME] + change).astype(np.float32)})
    return base, *models


def written(write_model, *models):
    return [write_model(name, one) for name, one in zip(("base", "x", "y"), models, strict=True)]


def deltas(base, *models):
    return [one[NAME].astype(np.float64) - base[NAME] for one in models]


@pytest.mark.parametrize("transposed", [False, True])
def test_spectra_are_those_of_the_svd(write_model, transposed):
    sides = (60, 40) if transposed else (40, 60)
    models = pair(rows=sides[0], columns=sides[1], noise=1.0)
    base, x, y = written(write_model, *models)
    found = ws.report(x, y, base=base)
    assert [(row.model, row.tensor, row.shape) for row in found.spectra] == [("x", NAME, sides), ("y", NAME, sides)]
    for row, delta in zip(found.spectra, deltas(*models), strict=True):
        values = np.linalg.svd(delta, compute_uv=False)
        assert (row.computed, row.exact) == (40, True)
        assert row.values == pytest.approx(values[np.array(row.indices) - 1], rel=1e-4, abs=1e-5)
        assert (row.indices[0], row.indices[-1]) == (1, 40)
        assert row.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        share = values / values.sum()
        assert row.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-4)
        assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        energy = np.cumsum(values**2) / np.sum(values**2)
        assert row.ranks == tuple(int(np.searchsorted(energy, one)) + 1 for one in (0.90, 0.95, 0.99))


def test_subspaces_are_those_of_the_svd(write_model):
    models = pair(noise=1.0)
    base, x, y = written(write_model, *models)
    (row,) = ws.report(x, y, base=base).subspaces
    factors = [np.linalg.svd(delta) for delta in deltas(*models)]
    k = row.rank
    left = np.linalg.norm(factors[0].U[:, :k].T @ factors[1].U[:, :k]) ** 2 / k
    right = np.linalg.norm(factors[0].Vh[:k] @ factors[1].Vh[:k].T) ** 2 / k
    assert (row.left, row.right) == pytest.approx((left, right), abs=1e-3)
    assert (row.chance_left, row.chance_right) == (k / 40, k / 60)
    assert (row.first, row.second, k) == ("x", "y", 16)


def test_a_low_rank_change_needs_that_rank_and_has_no_further_directions(write_model):
    base, x, y = written(write_model, *pair(rank=3))
    found = ws.report(x, y, base=base)
    assert found.spectra[0].ranks[-1] <= 6
    assert found.spectra[0].effective_rank < 6.5
    # Beyond its rank, singular vectors are what rounding makes of them: nothing is compared.
    assert found.subspaces == () or found.subspaces[0].rank == 16


def test_large_matrices_have_their_leading_values_found_and_say_so(write_model, monkeypatch):
    monkeypatch.setattr(spectra, "_EXACT_SIDE", 64)
    monkeypatch.setattr(spectra, "_COMPUTED", 32)
    models = pair(rows=200, columns=300, rank=20, noise=0.3)
    base, x, y = written(write_model, *models)
    found = ws.report(x, y, base=base)
    values = np.linalg.svd(deltas(*models)[0], compute_uv=False)
    (row, _) = found.spectra
    assert (row.computed, row.exact, row.effective_rank) == (32, False, None)
    assert row.values[:5] == pytest.approx(values[:5], rel=1e-2)
    energy = np.cumsum(values**2) / np.sum(values**2)
    ranks = [int(np.searchsorted(energy, one)) + 1 for one in (0.90, 0.95, 0.99)]
    assert [abs(a - b) <= 1 if a is not None else b > 32 for a, b in zip(row.ranks, ranks, strict=True)] == [True] * 3
    assert any("randomised" in one.rule for one in found.sampling)
    exact = ws.report(x, y, base=base, exact=True)
    assert (exact.spectra[0].computed, exact.spectra[0].exact) == (200, True)
    assert not any("randomised" in one.rule for one in exact.sampling)


def test_models_that_changed_nothing_have_no_rank(write_model):
    models = pair()
    base, x, _ = written(write_model, *models)
    same = write_model("same", models[0])
    found = ws.report(x, same, base=base)
    row = found.spectra[1]
    assert (row.norm, row.effective_rank, row.stable_rank, row.ranks) == (0, None, None, (None, None, None))
    assert found.subspaces == ()


def test_by_default_some_projections_of_three_layers_are_taken(write_model):
    base = llama_tensors(0, layers=7, hidden=16)
    path = write_model("base", base)
    x = write_model("x", {name: array * np.float32(1.01) for name, array in base.items()})
    found = ws.report(x, base=path)
    assert [row.layer for row in found.spectra] == [f"model.layers.{i}" for i in (0, 3, 6)]
    assert {row.component for row in found.spectra} == {"attention_q"}
    (sampling,) = [one for one in found.sampling if one.statistic == "spectra"]
    assert (sampling.looked_at, sampling.of) == (3, 2 * 7 + 2)


def test_models_of_other_parts_have_their_largest_matrices_taken(write_model):
    rng = np.random.default_rng(0)
    names = ("blocks.{}.wide.weight", "blocks.{}.narrow.weight")
    base = {
        name.format(layer): rng.standard_normal((12, width)).astype(np.float32)
        for layer in range(5)
        for name, width in zip(names, (20, 10), strict=True)
    }
    base["embed_tokens.weight"] = rng.standard_normal((90, 12)).astype(np.float32)
    other = {name: array + np.float32(0.01) for name, array in base.items()}
    found = ws.report(write_model("x", other), base=write_model("base", base))
    assert [row.tensor for row in found.spectra] == [f"blocks.{layer}.wide.weight" for layer in (0, 2, 4)]
    assert found.sampling[0].rule.startswith("the largest matrix of the first, middle and last layer")
    flat = {name.replace("blocks.", "part"): array for name, array in base.items()}
    other = {name: array + np.float32(0.01) for name, array in flat.items()}
    found = ws.report(write_model("y", other), base=write_model("flat", flat))
    assert [row.tensor for row in found.spectra] == [f"part{layer}.wide.weight" for layer in (0, 1, 2)]


def test_matrices_are_chosen_by_pattern(write_model):
    base = llama_tensors(0, hidden=16)
    path = write_model("base", base)
    x = write_model("x", {name: array * np.float32(1.01) for name, array in base.items()})
    found = ws.report(x, base=path, matrices=["*.1.mlp.*", "lm_head.*"])
    assert [row.tensor for row in found.spectra] == ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    with pytest.raises(ReportError, match=r"no matrix that base and models share fits 'lm_haed.weight' \(did you mean"):
        ws.report(x, base=path, matrices="lm_haed.weight")
