"""Adapters to begin with, against plain decompositions; and files of activations that do not fit."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.cli.main import main
from weightsmith.errors import CheckpointError, MethodError, PlanError
from weightsmith.initialization.starting import shared_out

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def base(write_model):
    return write_model("base", llama_tensors(0, hidden=12))


@pytest.fixture
def weight(base):
    return read_safetensors(base)[f"{NAME}.weight"].astype(np.float64)


def factors(adapter: Any, name: str = NAME) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB")
    return down, up


def start(base: Any, method: str, **settings: Any) -> Any:
    return ws.initialize_adapter(base, method=method, **{"rank": 3, "threads": 1, **settings})


def test_linear_layers_within_layers_are_meant(base):
    adapter = start(base, "kaiming")
    assert sorted(adapter.config["target_modules"]) == ["q_proj", "up_proj"]
    assert len(adapter) == 8
    assert len(start(base, "kaiming", targets=["*layers.1*", "lm_head"])) == 6


@pytest.mark.parametrize("alpha", [None, 6])
def test_pissa_and_milora_take_either_end_of_the_spectrum(base, weight, alpha):
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    scale = (alpha or 3) / 3
    for method, chosen in (("pissa", slice(3)), ("milora", slice(-3, None))):
        down, up = factors(start(base, method, alpha=alpha))
        np.testing.assert_allclose(scale * up @ down, (u[:, chosen] * s[chosen]) @ vt[chosen], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.sqrt(s[chosen] / scale), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(down, axis=1), np.sqrt(s[chosen] / scale), rtol=1e-5)


def test_olora_has_orthonormal_columns(base, weight):
    down, up = factors(start(base, "olora"))
    np.testing.assert_allclose(up.T @ up, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(up @ down, up @ up.T @ weight, atol=1e-5)


def test_eva_takes_principal_components_of_the_inputs(base, weight, tmp_path):
    rng = np.random.default_rng(0)
    samples = {}
    for name in read_safetensors(base):
        if "proj" in name:
            spread = rng.standard_normal((50, 12)) * np.linspace(3, 0.1, 12) + 5
            samples[name.removesuffix(".weight")] = (spread @ np.linalg.qr(rng.standard_normal((12, 12)))[0]).astype(
                "f4"
            )
    write_safetensors(tmp_path / "inputs.safetensors", samples)
    down, up = factors(start(base, "eva", activations=tmp_path / "inputs.safetensors"))
    centred = samples[NAME] - samples[NAME].astype(np.float64).mean(0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(down @ vt[:3].T), np.eye(3), atol=1e-5)
    assert not up.any()
    # Gram matrices tell no mean.
    grams = {name: one.astype(np.float64).T @ one.astype(np.float64) for name, one in samples.items()}
    write_safetensors(tmp_path / "grams.safetensors", grams)
    down, _ = factors(start(base, "eva", activations=tmp_path / "grams.safetensors"))
    _, _, vt = np.linalg.svd(samples[NAME].astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(down @ vt[:3].T), np.eye(3), atol=1e-5)
    # Without either, the weight's own directions.
    down, up = factors(start(base, "eva"))
    _, _, vt = np.linalg.svd(weight)
    np.testing.assert_allclose(np.abs(down @ vt[:3].T), np.eye(3), atol=1e-5)


def test_corda_weighs_by_second_moments(base, weight, tmp_path):
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((40, 12)) * np.linspace(2, 0.2, 12)
    write_safetensors(tmp_path / "one.safetensors", {f"{NAME}.weight": inputs})
    moments = inputs.T @ inputs
    moments += 0.01 * np.trace(moments) / 12 * np.eye(12)
    u, s, vt = np.linalg.svd(weight @ moments, full_matrices=False)
    for smallest, chosen in ((False, slice(3)), (True, slice(-3, None))):
        adapter = start(
            base, "corda", targets=[NAME], activations=tmp_path / "one.safetensors", smallest=smallest, alpha=6
        )
        down, up = factors(adapter)
        wanted = (u[:, chosen] * s[chosen]) @ vt[chosen] @ np.linalg.inv(moments)
        np.testing.assert_allclose(2 * up @ down, wanted, atol=1e-5)
    down, up = factors(start(base, "corda", targets=[NAME]))
    assert up.tobytes() == factors(start(base, "pissa", targets=[NAME]))[1].tobytes()


def test_random_numbers_depend_on_seed_and_name_alone(base):
    one, same, other = (start(base, "kaiming", seed=seed) for seed in (1, 1, 2))
    down, up = factors(one)
    assert np.array_equal(down, factors(same)[0])
    assert not np.array_equal(down, factors(other)[0])
    assert not np.array_equal(down, factors(one, "model.layers.1.mlp.up_proj")[0])
    assert not up.any()
    assert np.abs(down).max() <= 1 / np.sqrt(12)
    assert down.std() == pytest.approx(1 / np.sqrt(36), rel=0.3)


def test_ranks_are_shared_out_by_what_directions_explain(base, tmp_path):
    assert shared_out([[0.9, 0.05], [0.3, 0.2]], 1) == [1, 1]
    assert shared_out([[0.9, 0.5], [0.3, 0.2]], 1) == [2, 0]
    adapter = start(base, "eva", rank=2, rho=3, alpha=4)
    ranks = {name: len(tensor.numpy()) for name, tensor in adapter.items() if "lora_A" in name}
    assert sum(ranks.values()) == 2 * 4
    found = adapter.config
    for name in ranks:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        # The scale stays the same.
        assert found["alpha_pattern"].get(module, found["lora_alpha"]) == 2 * ranks[name]


@pytest.mark.parametrize(
    ("dtype", "wider", "off"), [("f4", None, 3e-7), ("bf16", None, 1e-2), ("bf16", "float32", 3e-7)]
)
def test_base_and_adapter_together_are_the_base(write_model, tmp_path, dtype, wider, off):
    base = write_model("base", llama_tensors(0, hidden=12, dtype=ml_dtypes.bfloat16 if dtype == "bf16" else dtype))
    adapter = start(base, "pissa", residual_dtype=wider)
    adapter.save(tmp_path / "a", threads=1)
    adapter.residual().save(tmp_path / "b", threads=3)
    whole = ws.open(f"{tmp_path / 'b'}+{tmp_path / 'a'}")
    for name, values in read_safetensors(base).items():
        np.testing.assert_allclose(whole[name].numpy().astype("f4"), values.astype("f4"), rtol=0, atol=off)
    for path in (tmp_path / "a", tmp_path / "b"):
        assert not ws.reproduce(path).problems


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"method": "pisa"}, MethodError, "did you mean 'pissa'"),
        ({"method": "pissa", "rank": 0}, MethodError, "whole number"),
        ({"method": "pissa", "rho": 2}, MethodError, "for eva"),
        ({"method": "pissa", "alpha": -1}, MethodError, "above 0"),
        ({"method": "pissa", "smallest": True}, MethodError, "choice of corda"),
        ({"method": "milora", "decomposition": "randomized"}, MethodError, "for pissa"),
        ({"method": "pissa", "dtype": "float8_e5m2"}, MethodError, "too coarse"),
        ({"method": "pissa", "targets": ["nothing"]}, PlanError, "no linear layer that fits nothing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(base, settings, error, said):
    with pytest.raises(error, match=said):
        ws.initialize_adapter(base, **{"rank": 2, **settings})


def test_activations_that_do_not_fit_are_refused(base, tmp_path):
    file = tmp_path / "inputs.safetensors"
    for tensors, said in (
        ({"other": np.ones((4, 12))}, f"no activations of {NAME}"),
        ({NAME: np.ones((4, 11))}, "takes 12 inputs"),
        ({NAME: np.ones((4, 12), np.int32)}, "takes 12 inputs"),
        ({NAME: np.full((4, 12), np.nan)}, "NaN or infinite"),
        ({NAME: np.ones((4, 12))}, "do not vary"),
    ):
        write_safetensors(file, tensors)
        with pytest.raises(CheckpointError, match=said):
            factors(start(base, "eva", targets=[NAME], activations=file))
    write_safetensors(file, {NAME: np.zeros((4, 12))})
    with pytest.raises(CheckpointError, match="are zero"):
        factors(start(base, "corda", targets=[NAME], activations=file))
    with pytest.raises(MethodError, match="uses no activations"):
        start(base, "pissa", activations=file)


def test_the_command_writes_both(base, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["adapter", "init", str(base), *map(str, arguments)])
        return end.value.code, capsys.readouterr().err

    code, err = run(tmp_path / "a", "--method", "pissa", "--rank", 2)
    assert code == 2
    assert "--residual" in err
    code, err = run(tmp_path / "a", "--method", "pissa", "--rank", 2, "--residual", tmp_path / "b")
    assert code == 0, err
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (found["r"], found["base_model_name_or_path"]) == (2, str(tmp_path / "b"))
    assert (tmp_path / "b" / "config.json").exists()
    code, err = run(tmp_path / "c", "--method", "kaiming", "--rank", 2, "--residual", tmp_path / "d")
    assert code == 2
    assert run(tmp_path / "c", "--method", "kaiming", "--rank", 2, "--target", "q_proj")[0] == 0
