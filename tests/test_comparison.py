"""Comparisons are held against plain NumPy on whole tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, write_safetensors


def plain(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return {
        "norm": np.linalg.norm(b - a),
        "relative": np.linalg.norm(b - a) / np.linalg.norm(a),
        "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "equal": np.mean(a == b),
        "largest": np.abs(b - a).max(),
    }


def check(found, a, b):
    for name, value in plain(a, b).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_every_measure_is_that_of_the_whole_tensors(tmp_path, dtype):
    rng = np.random.default_rng(0)
    a = {"x": rng.standard_normal((300, 2001)).astype(dtype), "n": rng.integers(0, 9, 50)}
    b = {"x": (a["x"].astype(np.float32) + 0.1 * (rng.random((300, 2001)) > 0.5)).astype(dtype), "n": a["n"] + 1}
    write_safetensors(tmp_path / "a.safetensors", a)
    write_safetensors(tmp_path / "b.safetensors", b)
    found = ws.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for name in a:
        check(found.tensors[name], a[name], b[name])


def test_layers_and_the_whole_add_up(write_model):
    a, b = llama_tensors(0), llama_tensors(1)
    found = ws.diff(write_model("a", a), write_model("b", b))

    def joined(tensors, start):
        return np.concatenate([v.ravel() for k, v in sorted(tensors.items()) if k.startswith(start)])

    check(found.layers["model.layers.1"], joined(a, "model.layers.1."), joined(b, "model.layers.1."))
    check(found.total, joined(a, ""), joined(b, ""))
    assert list(found.layers)[-1] == "model.norm.weight"


@pytest.mark.parametrize("layer", ["model.layers.0", "unet/0", "0"])
def test_layers_are_named_as_their_tensors_are(tmp_path, layer):
    write_safetensors(tmp_path / "a.safetensors", {f"{layer}.attn.weight": np.ones(3, np.float32)})
    found = ws.diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert list(found.layers) == [layer]


def test_what_is_on_one_side_only_is_listed(write_model):
    a, b = llama_tensors(0), llama_tensors(0)
    del b["model.norm.weight"]
    b["new"] = np.ones(1)
    b["lm_head.weight"] = b["lm_head.weight"][:-1]
    b["model.embed_tokens.weight"] = b["model.embed_tokens.weight"].astype(np.float64)
    found = ws.diff(write_model("a", a), write_model("b", b))
    assert (found.only_a, found.only_b) == (("model.norm.weight",), ("new",))
    assert found.shapes == {"lm_head.weight": ((16, 8), (15, 8))}
    assert found.dtypes == {"model.embed_tokens.weight": ("float32", "float64")}
    assert found.tensors["model.embed_tokens.weight"].equal == 1.0
    assert not found.identical


def test_zeros_nan_and_empty_tensors_have_honest_measures(tmp_path):
    a = {"zero": np.zeros(3), "nan": np.array([1.0, np.nan, np.inf]), "none": np.zeros((0, 2))}
    b = {"zero": np.ones(3), "nan": np.array([2.0, np.nan, 0.0]), "none": np.zeros((0, 2))}
    write_safetensors(tmp_path / "a.safetensors", a)
    write_safetensors(tmp_path / "b.safetensors", b)
    found = ws.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors
    assert (found["zero"].cosine, found["zero"].relative, found["zero"].equal) == (None, None, 0.0)
    assert (found["nan"].nonfinite, found["nan"].norm, found["nan"].equal) == (2, 1.0, pytest.approx(1 / 3))
    assert (found["none"].equal, found["none"].norm) == (1.0, 0.0)


def test_a_model_is_identical_to_itself_on_any_number_of_threads(write_model):
    folder = write_model("a", llama_tensors(0))
    assert ws.diff(folder, folder).identical
