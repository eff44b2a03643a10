"""Merges that are gone on with: models that arrive later give what all models at once give."""

from __future__ import annotations

import json

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.errors import CheckpointError, PlanError, WeightsmithError


@pytest.fixture
def models(write_model):
    """The path of a base, and those of four fine-tunes of it."""
    base = llama_tensors(0)
    paths = []
    for seed in (1, 2, 3, 4):
        rng = np.random.default_rng(seed)
        tuned = {n: (a + 0.05 * seed * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in base.items()}
        paths.append(write_model(f"model{seed}", tuned))
    return write_model("base", base), paths


WAYS = {
    "opcm": {},
    "ema": {"momentum": 0.7},
    "magmax": {"lambda_": 0.5},
    "task_arithmetic": {"weight": 0.3, "lambda_": 0.5},
    "linear": {"weight": 1.0},
}


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("method", WAYS)
def test_models_that_arrive_one_at_a_time_give_what_all_at_once_give(models, method, single, tmp_path):
    base, paths = models
    base = None if method in ("linear", "ema") else base
    end = ".safetensors" if single else ""
    ws.merge(method, paths, base, **WAYS[method]).save(tmp_path / f"all{end}")
    ws.merge(method, paths[:2], base, **WAYS[method]).save(tmp_path / f"2{end}")
    for i in (3, 4):
        # Method, base and parameters are those of the merge.
        ws.merge(None, [paths[i - 1]], onto=tmp_path / f"{i - 1}{end}").save(tmp_path / f"{i}{end}")
    expected = read_safetensors(tmp_path / f"all{end}")
    for name, values in read_safetensors(tmp_path / f"4{end}").items():
        np.testing.assert_allclose(values, expected[name], atol=5e-6, err_msg=name)
    assert ws.verify(tmp_path / f"4{end}").ok
    assert ws.reproduce(tmp_path / f"4{end}").ok


def test_several_models_may_arrive_at_once_with_weights_of_their_own(models, tmp_path):
    _, paths = models
    weights = [0.5, 0.25, 1.0, 2.0]
    ws.merge("linear", paths, weight=weights).save(tmp_path / "all")
    ws.merge("linear", paths[:2], weight=weights[:2]).save(tmp_path / "some")
    ws.merge("linear", paths[2:], onto=tmp_path / "some", weight=weights[2:]).save(tmp_path / "rest")
    expected = read_safetensors(tmp_path / "all")
    for name, values in read_safetensors(tmp_path / "rest").items():
        np.testing.assert_allclose(values, expected[name], atol=2e-6)


def test_a_run_whose_tensors_were_all_finished_by_an_earlier_one_leaves_the_same_state(models, tmp_path, monkeypatch):
    base, paths = models
    merged = ws.merge("opcm", paths, base)
    merged.save(tmp_path / "whole")

    def killed(*_, **__):
        raise RuntimeError("killed before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.plan.output.describe", killed)
        with pytest.raises(RuntimeError, match="killed"):
            merged.save(tmp_path / "late")
    summary = merged.save(tmp_path / "late")
    assert summary.resumed == summary.tensors
    states = [json.loads((tmp_path / name / "weightsmith.json").read_text())["state"] for name in ("whole", "late")]
    assert states[0] == states[1]


def test_what_cannot_be_gone_on_with_says_why(models, tmp_path):
    base, paths = models
    ws.merge("ties", paths, base, weight=1.0).save(tmp_path / "ties")
    with pytest.raises(PlanError, match=r"made by ties, which needs all models at once.*opcm"):
        ws.merge(None, paths[:1], onto=tmp_path / "ties")
    ws.merge("opcm", paths, base, norm_scope="tensor").save(tmp_path / "tensors")
    ws.merge("linear", paths, weight=[[0.1, 0.9]] * 4).save(tmp_path / "schedule")
    ws.merge("task_arithmetic", paths, base, weight=1.0, normalize=True).save(tmp_path / "normalized")
    for name in ("tensors", "schedule", "normalized"):
        with pytest.raises(PlanError, match="does not say how it is gone on with"):
            ws.merge(None, paths[:1], onto=tmp_path / name)
    ws.merge("linear", paths, weight=1.0, rules=[{"filter": "norm", "parameters": {"weight": 2.0}}]).save(
        tmp_path / "rules"
    )
    with pytest.raises(PlanError, match="with rules"):
        ws.merge(None, paths[:1], onto=tmp_path / "rules")
    ws.merge("opcm", paths, base).save(tmp_path / "opcm")
    with pytest.raises(PlanError, match="only that method can go on with it, not ema"):
        ws.merge("ema", paths[:1], onto=tmp_path / "opcm", momentum=0.5)
    with pytest.raises(CheckpointError, match="not written by weightsmith"):
        ws.merge("opcm", paths[:1], onto=base)
    with pytest.raises(WeightsmithError, match="name a method"):
        ws.merge(None, paths)


def test_a_manifest_that_was_changed_is_not_gone_on_with(models, tmp_path):
    base, paths = models
    ws.merge("opcm", paths, base).save(tmp_path / "out")
    file = tmp_path / "out" / "weightsmith.json"
    content = json.loads(file.read_text())
    content["state"]["previous_lambda"] = "9.0000000000000000e+00  "
    file.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    with pytest.raises(CheckpointError, match="not as it was written"):
        ws.merge(None, paths[:1], onto=tmp_path / "out")
