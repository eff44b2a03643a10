"""transformers loads every result and computes with it: tiny random models of ten architectures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import weightsmith as ws  # noqa: E402

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {"image_size": 8, "patch_size": 4, **TEXT}
SMALL = {"vocab_size": 64, **TEXT}

# name -> (config class, model class, settings)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**SMALL, "num_key_value_heads": 1, "head_dim": 8}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}),
    "bert": ("BertConfig", "BertForMaskedLM", SMALL),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 16,
            "d_ff": 32,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": SMALL, "vision_config": VISION, "projection_dim": 8},
    ),
}
STACKABLE = ["llama", "qwen2", "mistral", "gemma", "mixtral", "gpt2", "bert", "vit"]


def make(folder: Path, name: str, seed: int, **settings: Any) -> Any:
    config_class, model_class, own = ARCHITECTURES[name]
    if name in ("t5", "bert", "gpt2", "llama"):
        settings = {"pad_token_id": 0, **settings}
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**own, **settings})
    model = getattr(transformers, model_class)(config).eval()
    model.save_pretrained(folder)
    return model


def load(folder: Path, name: str) -> Any:
    """Load without any tolerance: no missing, unexpected or mismatched weight."""
    model, info = getattr(transformers, ARCHITECTURES[name][1]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def compute(model: Any, name: str) -> Any:
    """Run the model: generate where it can, else its outputs."""
    with torch.no_grad():
        tokens = torch.arange(1, 9).reshape(1, 8)
        if name == "clip":
            return model(input_ids=tokens, pixel_values=torch.ones(1, 3, 8, 8)).logits_per_image
        if name == "vit":
            return model(pixel_values=torch.ones(1, 3, 8, 8)).logits
        if name == "bert":
            return model(input_ids=tokens).logits
        return model.generate(tokens, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_average_loads_and_computes_what_the_averaged_model_computes(name, tmp_path):
    one, other = make(tmp_path / "a", name, 0), make(tmp_path / "b", name, 1)
    ws.average([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    merged = load(tmp_path / "out", name)
    state = one.state_dict()
    for key, value in other.state_dict().items():
        if value.is_floating_point():
            state[key] = (state[key].double().add(value.double()) / 2).float()
    one.load_state_dict(state)
    torch.testing.assert_close(merged.state_dict(), one.state_dict(), rtol=0, atol=1e-7)
    torch.testing.assert_close(compute(merged, name), compute(one, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("choice", "rows"), [("pad", 70), ("crop", 64)])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "vit"])
def test_vocabularies_of_two_lengths_come_out_as_one_that_loads(name, choice, rows, tmp_path):
    longer = {"text_config": {**SMALL, "vocab_size": 70}} if name == "clip" else {"vocab_size": 70}
    one, other = make(tmp_path / "a", name, 0), make(tmp_path / "b", name, 1, **longer)
    ws.merge("linear", [tmp_path / "a", tmp_path / "b"], weight=[0.5, 0.5], on_shape_mismatch=choice).save(
        tmp_path / "out"
    )
    merged = load(tmp_path / "out", name)
    for key, value in merged.state_dict().items():
        if value.ndim:
            expected = torch.zeros(value.shape, dtype=torch.float64)
            for part in (one.state_dict()[key], other.state_dict()[key]):
                expected[: len(part)] += part[: len(value)].double() / 2
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    tables = [key for key, value in merged.state_dict().items() if value.shape[:1] == (rows,)]
    assert [key for key in tables if "emb" in key or "wte" in key or "shared" in key]
    compute(merged, name)


@pytest.mark.parametrize("name", STACKABLE)
def test_a_stacked_model_has_the_layers_and_the_config_that_it_needs(name, tmp_path):
    model = make(tmp_path / "a", name, 0)
    make(tmp_path / "b", name, 1)
    recipe = f"""
merge_method: passthrough
slices:
- sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}]
- sources: [{{model: {tmp_path}/b, layer_range: [1, 3]}}]
"""
    ws.merge_recipe(recipe).save(tmp_path / "out")
    merged = load(tmp_path / "out", name)
    assert compute(merged, name).shape[0] == 1
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, merged))
    layer = (before - sum(p.numel() for n, p in model.named_parameters() if not _in_layer(n))) / 3
    assert after == before + 2 * layer


def _in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def test_a_bfloat16_task_arithmetic_merge_generates(tmp_path):
    for i, folder in enumerate(("base", "a", "b")):
        make(tmp_path / folder, "llama", i).to(torch.bfloat16).save_pretrained(tmp_path / folder)
    ws.merge("ties", [tmp_path / "a", tmp_path / "b"], tmp_path / "base", weight=0.5, density=0.5).save(tmp_path / "o")
    merged = load(tmp_path / "o", "llama")
    assert merged.dtype == torch.bfloat16
    assert compute(merged, "llama").shape == (1, 12)


def test_a_sharded_result_loads(tmp_path):
    make(tmp_path / "a", "mixtral", 0)
    make(tmp_path / "b", "mixtral", 1)
    summary = ws.merge("slerp", [tmp_path / "b"], tmp_path / "a", t=0.5).save(tmp_path / "out", shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert len(index["weight_map"]) == summary.tensors
    compute(load(tmp_path / "out", "mixtral"), "mixtral")


def test_a_pickled_checkpoint_merges_with_one_in_safetensors(tmp_path):
    model = make(tmp_path / "a", "gpt2", 0)
    other = make(tmp_path / "b", "gpt2", 1)
    state = {key: value for key, value in other.state_dict().items() if key != "lm_head.weight"}
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "b" / "pytorch_model.bin")
    ws.average([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    merged = load(tmp_path / "out", "gpt2")
    expected = (model.transformer.wte.weight + other.transformer.wte.weight) / 2
    torch.testing.assert_close(merged.transformer.wte.weight, expected)


def test_a_text_model_is_merged_into_the_text_tower_of_a_larger_one(tmp_path):
    """The text tower of a CLIP takes part under its prefix; the vision tower is carried bit for bit."""
    whole = make(tmp_path / "clip", "clip", 0)
    config = transformers.CLIPTextConfig(**SMALL)
    torch.manual_seed(1)
    text = transformers.CLIPTextModel(config)
    text.save_pretrained(tmp_path / "text")
    recipe = f"""
merge_method: linear
base_model: {tmp_path}/clip
modules:
  text_model:
    models:
    - {{model: {tmp_path}/clip, parameters: {{weight: 0.75}}}}
    - {{model: {tmp_path}/text, parameters: {{weight: 0.25}}}}
"""
    ws.merge_recipe(recipe).save(tmp_path / "out")
    merged = load(tmp_path / "out", "clip").state_dict()
    before, tower = whole.state_dict(), text.state_dict()
    for key, value in merged.items():
        if key.startswith("text_model."):
            other = tower[key] if key in tower else tower[key.removeprefix("text_model.")]
            torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * other)
        else:
            assert torch.equal(value, before[key])
