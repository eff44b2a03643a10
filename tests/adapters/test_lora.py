"""LoRA folds are held against plain matrix products, and against adapters that do not fit."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.folded import FoldedTensor, Term
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

RANK, ALPHA = 3, 12


def base_tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (10, 6),
        "model.layers.0.q.weight": (8, 6),
        "model.layers.0.q.bias": (8,),
        "model.layers.1.c.weight": (6, 8),
        "model.conv.weight": (5, 4, 3, 3),
        "model.norm.weight": (6,),
        "score.weight": (2, 6),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_adapter(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named)
    return folder


def factors(module: str, down: tuple[int, ...], up: tuple[int, ...], seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": rng.standard_normal(down).astype(np.float32),
        f"{module}.lora_B.weight": rng.standard_normal(up).astype(np.float32),
    }


def change(given: dict[str, Any], module: str) -> np.ndarray:
    a, b = (given[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return b @ a


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"r": 7, "rank_pattern": {"q": RANK}}, ALPHA / RANK),
        ({"alpha_pattern": {"layers.0.q": 5}}, 5 / RANK),
        ({"r": 7, "rank_pattern": {r".*\.0\.q": RANK}, "alpha_pattern": {"q": 6}}, 6 / RANK),
    ],
)
def test_a_linear_layer_gets_the_scaled_product(write_model, tmp_path, config, scale):
    base = base_tensors()
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK))
    adapter = write_adapter(tmp_path / "lora", given, **config)
    folded = ws.open(f"{write_model('base', base)}+{adapter}")
    expected = base["model.layers.0.q.weight"] + scale * change(given, "model.layers.0.q")
    np.testing.assert_allclose(folded["model.layers.0.q.weight"].numpy(), expected, rtol=1e-5, atol=1e-5)
    for name in set(base) - {"model.layers.0.q.weight"}:
        assert np.array_equal(folded[name].numpy(), base[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [1000, 777, 3001, 65_536, 100_000])
def test_the_bytes_of_a_folded_tensor_do_not_depend_on_the_blocks(block, dtype):
    rng = np.random.default_rng(0)
    base, down, up = (rng.standard_normal(shape) for shape in ((256, 1000), (64, 1000), (256, 64)))
    tensor = FoldedTensor(ArrayTensor("w", base.astype(dtype)), [Term(0.5, lambda: LowRank(up, down))])
    whole = tensor.read(0, tensor.size)
    assert whole.dtype == dtype
    parts = [tensor.read(i, min(i + block, tensor.size)) for i in range(0, tensor.size, block)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert tensor.read(7, 7).shape == (0,)


def test_layers_stored_transposed_and_embeddings_and_convolutions(write_model, tmp_path):
    base = base_tensors()
    rng = np.random.default_rng(5)
    given = factors("model.layers.1.c", (RANK, 6), (8, RANK))
    adapter = write_adapter(tmp_path / "one", given, fan_in_fan_out=True)
    folded = ws.open(f"{write_model('base', base)}+{adapter}")
    expected = base["model.layers.1.c.weight"] + ALPHA / RANK * change(given, "model.layers.1.c").T
    np.testing.assert_allclose(folded["model.layers.1.c.weight"].numpy(), expected, rtol=1e-5, atol=1e-5)

    a = rng.standard_normal((RANK, 10)).astype(np.float32)
    b = rng.standard_normal((6, RANK)).astype(np.float32)
    conv_a = rng.standard_normal((RANK, 4, 3, 3)).astype(np.float32)
    conv_b = rng.standard_normal((5, RANK, 1, 1)).astype(np.float32)
    given = {
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
        "model.conv.lora_A.weight": conv_a,
        "model.conv.lora_B.weight": conv_b,
    }
    folded = ws.open(f"{tmp_path / 'base'}+{write_adapter(tmp_path / 'two', given)}")
    expected = base["model.embed_tokens.weight"] + ALPHA / RANK * (b @ a).T
    np.testing.assert_allclose(folded["model.embed_tokens.weight"].numpy(), expected, rtol=1e-5, atol=1e-5)
    kernel = np.einsum("or,rihw->oihw", conv_b[:, :, 0, 0], conv_a)
    expected = base["model.conv.weight"] + ALPHA / RANK * kernel
    np.testing.assert_allclose(folded["model.conv.weight"].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_saved_modules_and_trained_biases_replace_the_bases(write_model, tmp_path):
    base = base_tensors()
    given = {
        "score.modules_to_save.weight": np.ones((2, 6), np.float32),
        "model.layers.0.q.base_layer.bias": np.full(8, 2, np.float32),
    }
    folded = ws.open(f"{write_model('base', base)}+{write_adapter(tmp_path / 'lora', given, bias='all')}")
    assert (folded["score.weight"].numpy() == 1).all()
    assert (folded["model.layers.0.q.bias"].numpy() == 2).all()


def test_a_merge_of_a_base_with_an_adapter_on_it_rounds_once(write_model, tmp_path):
    """Rounding the fold to bfloat16 before averaging would show in the result."""
    import ml_dtypes

    base = {name: value.astype(ml_dtypes.bfloat16) for name, value in base_tensors().items()}
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK))
    folder, adapter = write_model("base", base), write_adapter(tmp_path / "lora", given)
    merged = ws.average([folder, f"{folder}+{adapter}"])
    wide = base["model.layers.0.q.weight"].astype(np.float64)
    expected = (wide + ALPHA / RANK / 2 * change(given, "model.layers.0.q")).astype(np.float32)
    found = merged["model.layers.0.q.weight"].numpy()
    assert np.array_equal(found, expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "model.layers.0.q: it has no magnitude, and the adapter's config says so"),
        ({"peft_type": "LORAX"}, "of the kind LORAX, of which nothing is known .did you mean 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "no plain weights equal: it adds virtual tokens"),
        ({"peft_type": ["LORA"]}, "of the kind ..LORA.., of which nothing is known"),
        ({"alora_invocation_tokens": [1]}, "it acts on some tokens alone"),
        ({"r": 4}, "model.layers.0.q: the adapter's config gives it rank 4, and its factors have 3"),
    ],
)
def test_what_no_plain_weights_equal_or_does_not_fit_its_config_is_refused(write_model, tmp_path, config, message):
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK))
    adapter = write_adapter(tmp_path / "lora", given, **config)
    with pytest.raises(CheckpointError, match=message):
        ws.open(f"{write_model('base', base_tensors())}+{adapter}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"(": 3}}, "rank_pattern in adapter_config.json: '(' is no pattern"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q'] as 'x', which is no number"),
        ({"alpha_pattern": [1]}, "alpha_pattern as [1], which is no map"),
        ({"r": "three"}, "r as 'three', which is no whole number"),
        ({"lora_alpha": None}, "lora_alpha as None"),
        ({"lora_alpha": float("nan")}, "lora_alpha as nan"),
        ({"lora_alpha": 10**400}, "lora_alpha as a whole number of 1,329 bits"),
    ],
)
def test_a_config_that_says_nothing_sensible_is_refused(write_model, tmp_path, config, message):
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK))
    adapter = write_adapter(tmp_path / "lora", given, **config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        ws.open(f"{write_model('base', base_tensors())}+{adapter}")


@pytest.mark.parametrize("down", [np.zeros((0, 6), np.float32), np.zeros((RANK, 6), np.int32)])
def test_factors_that_are_no_matrices_of_floats_are_refused(write_model, tmp_path, down):
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK)) | {"model.layers.0.q.lora_A.weight": down}
    adapter = write_adapter(tmp_path / "lora", given)
    with pytest.raises(CheckpointError, match="lora_A of model.layers.0.q is"):
        ws.open(f"{write_model('base', base_tensors())}+{adapter}")


def test_a_factor_given_twice_is_refused(write_model, tmp_path):
    given = factors("model.layers.0.q", (RANK, 6), (8, RANK))
    given["model.layers.0.q.lora_A.default.weight"] = given["model.layers.0.q.lora_A.weight"]
    adapter = write_adapter(tmp_path / "lora", given)
    with pytest.raises(CheckpointError, match="lora_A of model.layers.0.q twice"):
        ws.open(f"{write_model('base', base_tensors())}+{adapter}")


@pytest.mark.parametrize(
    ("module", "down", "message"),
    [
        ("model.layers.9.q", (RANK, 6), "changes model.layers.9.q.weight, which .* does not have"),
        ("model.layers.0.q", (RANK, 5), "do not fit model.layers.0.q.weight"),
    ],
)
def test_an_adapter_of_another_model_is_refused(write_model, tmp_path, module, down, message):
    adapter = write_adapter(tmp_path / "lora", factors(module, down, (8, RANK)))
    with pytest.raises(PlanError, match=message):
        ws.open(f"{write_model('base', base_tensors())}+{adapter}")


def test_names_may_lack_first_parts_as_long_as_one_tensor_is_meant(write_model, tmp_path):
    """Wrappers of a model put words before the names of its layers."""
    base = {"model.text.layers.0.q.weight": np.ones((8, 6), np.float32)}
    given = factors("layers.0.q", (RANK, 6), (8, RANK))
    adapter = write_adapter(tmp_path / "lora", given)
    folded = ws.open(f"{write_model('base', base)}+{adapter}")["model.text.layers.0.q.weight"].numpy()
    np.testing.assert_allclose(folded, 1 + ALPHA / RANK * change(given, "layers.0.q"), rtol=1e-5, atol=1e-5)
    two = base | {"model.vision.layers.0.q.weight": np.ones((8, 6), np.float32)}
    with pytest.raises(PlanError, match="changes layers.0.q.weight, which .* does not have"):
        ws.open(f"{write_model('two', two)}+{adapter}")
