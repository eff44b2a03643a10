"""What adapters hold beside factors, and changes of no low rank: through the base where it is given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import PREFIX, Q0, Q1, SHAPES, best, deltas, relative, write_lora

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.errors import CheckpointError, PlanError

ONE = {Q0: SHAPES[Q0]}
BIAS, HEAD = f"{Q0}.base_layer.bias", "score.weight"


def base_of(write_model: Any) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(9)
    shapes = {f"{Q0}.weight": (24, 18), f"{Q0}.bias": (24,), "score.weight": (3, 18), f"{Q1}.weight": (24, 18)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return write_model("base", tensors), tensors


def with_saved(folder: Path, seed: int, *, head: bool = True) -> Path:
    rng = np.random.default_rng(seed)
    extra: dict[str, Any] = {BIAS: rng.standard_normal(24)}
    extra |= {HEAD: rng.standard_normal((3, 18))} if head else {}
    return write_lora(folder, 2, seed, shapes=ONE, extra=extra, bias="lora_only", modules_to_save=["score"])


def test_sums_of_saved_modules_are_those_of_fused_models(tmp_path, write_model):
    base, tensors = base_of(write_model)
    given, weights = [with_saved(tmp_path / "a", 1), with_saved(tmp_path / "b", 2, head=False)], [0.5, 1.5]
    ws.adapters.merge(given, weight=weights, base=base).save(tmp_path / "out")
    once = ws.fuse(base, [tmp_path / "out"])
    apart = ws.fuse(base, given, weights)
    for name in tensors:
        np.testing.assert_allclose(once[name].numpy(), apart[name].numpy(), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["score"])
    assert not ws.reproduce(tmp_path / "out").problems


def test_without_a_base_a_sum_takes_weights_that_sum_to_one(tmp_path):
    given = [with_saved(tmp_path / "a", 1), with_saved(tmp_path / "b", 2)]
    own = [read_safetensors(folder) for folder in given]
    ws.adapters.merge(given, weight=[0.25, 0.75]).save(tmp_path / "out")
    for key in (PREFIX + BIAS, PREFIX + HEAD):
        wanted = 0.25 * own[0][key] + 0.75 * own[1][key]
        np.testing.assert_allclose(read_safetensors(tmp_path / "out")[key], wanted, rtol=1e-6)
    with pytest.raises(PlanError, match="trained by 2 of the 2 adapters, and their changes are added up.*--saved mean"):
        ws.adapters.merge(given)
    ws.adapters.merge(given, weight=[1, 3], saved="mean").save(tmp_path / "mean")
    for key in (PREFIX + BIAS, PREFIX + HEAD):
        wanted = 0.25 * own[0][key] + 0.75 * own[1][key]
        np.testing.assert_allclose(read_safetensors(tmp_path / "mean")[key], wanted, rtol=1e-6)
    ws.adapters.merge(given, saved="drop").save(tmp_path / "drop")
    assert not any(key.endswith((".bias", HEAD)) for key in read_safetensors(tmp_path / "drop"))
    assert json.loads((tmp_path / "drop" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_methods_that_give_no_sum_take_means_of_saved_modules(tmp_path):
    given = [with_saved(tmp_path / "a", 1), with_saved(tmp_path / "b", 2)]
    own = [read_safetensors(folder) for folder in given]
    ws.adapters.merge(given, "copa").save(tmp_path / "out")
    key = PREFIX + HEAD
    np.testing.assert_allclose(read_safetensors(tmp_path / "out")[key], (own[0][key] + own[1][key]) / 2, rtol=1e-6)
    other = with_saved(tmp_path / "c", 3, head=False)
    with pytest.raises(PlanError, match="not all adapters have it"):
        ws.adapters.merge([given[0], other], "copa")
    with pytest.raises(PlanError, match="which a basis of factors does not give back"):
        ws.adapters.merge(given, "rmm")


def test_biases_of_layers_b_are_added_up(tmp_path, write_model):
    base, _ = base_of(write_model)
    rng = np.random.default_rng(4)
    given = []
    for name, rank in (("a", 2), ("b", 3)):
        extra = {f"{Q0}.lora_B.bias": rng.standard_normal(24)} if name == "a" else {}
        given.append(write_lora(tmp_path / name, rank, rank, shapes=ONE, extra=extra, lora_bias=bool(extra)))
    ws.adapters.merge(given, weight=[2, 1]).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is True
    once, apart = ws.fuse(base, [tmp_path / "out"]), ws.fuse(base, given, [2, 1])
    for name in (f"{Q0}.weight", f"{Q0}.bias"):
        np.testing.assert_allclose(once[name].numpy(), apart[name].numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match="says nothing of these; use linear, cat or svd"):
        ws.adapters.merge(given, "lego")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_dora_is_combined_on_its_base_or_refused_with_the_way_out(tmp_path, write_model, method):
    base, tensors = base_of(write_model)
    magnitude = np.random.default_rng(3).uniform(1, 3, 24)
    extra = {f"{Q0}.lora_magnitude_vector": magnitude}
    dora = write_lora(tmp_path / "dora", 2, 1, shapes=ONE, extra=extra, use_dora=True)
    lora = write_lora(tmp_path / "lora", 2, 2, shapes=ONE)
    with pytest.raises(CheckpointError, match="what DoRA changes is no product .*--base"):
        ws.adapters.merge([lora, dora])
    weight = tensors[f"{Q0}.weight"].astype(np.float64)
    raised = weight + deltas(dora)[Q0]
    change = raised * (magnitude / np.linalg.norm(raised, axis=1))[:, None] - weight
    options = {"density": 1.0} if method == "ties" else {}
    merged = ws.adapters.merge([lora, dora], method, weight=[0.5, 1], base=base, rank=6, **options)
    merged.save(tmp_path / "out")
    parts = [0.5 * deltas(lora)[Q0], change]
    wanted = sum(parts)
    if method == "ties":
        sign = np.where(wanted >= 0, 1, -1)
        agree = [np.sign(part) == sign for part in parts]
        divisor = 0.5 * agree[0] + agree[1]
        wanted = sum(part * mask for part, mask in zip(parts, agree, strict=True)) / np.where(divisor, divisor, 1)
    assert relative(deltas(tmp_path / "out")[Q0], best(wanted, 6)) < 1e-5
    (layer,) = merged.report().layers
    assert layer.ranks == (2, None)
    assert layer.relative == pytest.approx(relative(deltas(tmp_path / "out")[Q0], wanted), rel=1e-4)
    with pytest.raises(CheckpointError, match="this method works on factors"):
        ws.adapters.merge([lora, dora], "lego", base=base).report()


def test_layers_that_are_stored_transposed_are_combined_as_the_layer_uses_them(tmp_path, write_model):
    base, tensors = base_of(write_model)
    turned = write_model("turned", {name: np.ascontiguousarray(value.T) for name, value in tensors.items()})
    extra = {f"{Q0}.lora_magnitude_vector": np.linspace(1, 2, 24)}
    dora = write_lora(tmp_path / "a", 2, 1, shapes=ONE, extra=extra, use_dora=True)
    same = write_lora(tmp_path / "b", 2, 1, shapes=ONE, extra=extra, use_dora=True, fan_in_fan_out=True)
    for name, own, model in (("straight", dora, base), ("across", same, turned)):
        ws.adapters.merge([own], base=model, rank=5).save(tmp_path / name)
    assert relative(deltas(tmp_path / "across")[Q0], deltas(tmp_path / "straight")[Q0]) < 1e-6
    assert json.loads((tmp_path / "across" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    one, other = ws.adapters.inspect(dora, base), ws.adapters.inspect(same, turned)
    assert other.layers[0].shape == one.layers[0].shape == (24, 18)
    assert other.layers[0].relative == pytest.approx(one.layers[0].relative)


def test_looking_at_an_adapter_measures_through_its_factors(tmp_path, write_model):
    base, tensors = base_of(write_model)
    shapes = {Q0: (24, 18), Q1: (24, 18), "embed": (40, 6), "conv": (10, 6, 3, 3)}
    folder = write_lora(tmp_path / "a", 4, 1, shapes=shapes, use_rslora=True, base_model_name_or_path="org/base")
    found = ws.adapters.inspect(folder)
    assert (found.kind, found.base, found.targets["q_proj"]) == ("LoRA", "org/base", 2)
    assert found.parameters == sum(value.size for value in read_safetensors(folder).values())
    assert found.nbytes == 4 * found.parameters
    for layer in found.layers:
        s = np.linalg.svd(deltas(folder)[layer.module], compute_uv=False)
        shares = s[s > 1e-9] / s.sum()
        assert layer.rank == 4
        assert layer.scale == pytest.approx(12 / 2)
        assert layer.norm == pytest.approx(np.linalg.norm(s))
        assert layer.spectral == pytest.approx(s[0])
        assert layer.effective == pytest.approx(math.exp(-np.sum(shares * np.log(shares))))
        assert layer.relative is None
    assert found.norm == pytest.approx(math.hypot(*(np.linalg.norm(one) for one in deltas(folder).values())))
    short = write_lora(tmp_path / "b", 4, 1, shapes=ONE)
    (layer,) = ws.adapters.inspect(short, base).layers
    assert layer.relative == pytest.approx(np.linalg.norm(deltas(short)[Q0]) / np.linalg.norm(tensors[f"{Q0}.weight"]))
    with pytest.raises(CheckpointError, match="is no adapter"):
        ws.adapters.inspect(base)


def test_of_kinds_without_factors_norms_take_the_base(tmp_path, write_model):
    base, tensors = base_of(write_model)
    magnitude = np.linspace(1, 2, 24)
    extra = {f"{Q0}.lora_magnitude_vector": magnitude}
    dora = write_lora(tmp_path / "dora", 2, 1, shapes=ONE, extra=extra, use_dora=True)
    alone = ws.adapters.inspect(dora)
    assert alone.layers[0].norm is None
    assert alone.norm is None
    assert "name the base" in str(alone.reason)
    (layer,) = ws.adapters.inspect(dora, base).layers
    weight = tensors[f"{Q0}.weight"].astype(np.float64)
    raised = weight + deltas(dora)[Q0]
    change = raised * (magnitude / np.linalg.norm(raised, axis=1))[:, None] - weight
    assert layer.norm == pytest.approx(np.linalg.norm(change))
    assert layer.spectral == pytest.approx(np.linalg.norm(change, 2))
    assert layer.rank is None
