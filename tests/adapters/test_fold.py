"""Several adapters at once, tied embeddings, longer vocabularies: folded models are held against PEFT's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.cli.main import main
from weightsmith.errors import CheckpointError, MethodError, PlanError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = [[1, 5, 9, 2, 30, 17, 4]]


def tiny_llama(folder: Path, *, tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    return saved(transformers.LlamaForCausalLM(config), folder)


def tiny_gpt2(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    return saved(transformers.GPT2LMHeadModel(config), folder)


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return model.eval()


def trained(model: Any, folder: Path, seed: int = 1, **config: Any) -> Any:
    """Attach an adapter with random parameters to a model, and save it."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def loaded(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return int(exited.value.code or 0)


@pytest.mark.parametrize(
    ("targets", "dora"),
    [
        (["q_proj", "down_proj"], False),
        (["q_proj", "down_proj"], True),
        (["embed_tokens", "v_proj"], False),
        (["lm_head", "q_proj"], False),
        (["lm_head", "q_proj"], True),
        (["embed_tokens", "lm_head"], False),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_model_computes_what_peft_does(tmp_path, tied, targets, dora):
    model = tiny_llama(tmp_path / "base", tied=tied)
    adapted = trained(model, tmp_path / "lora", r=3, lora_alpha=5, target_modules=targets, use_dora=dora)
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    folded = loaded(tmp_path / "out")
    np.testing.assert_allclose(logits(folded), logits(adapted), atol=2e-5)
    untied = {"lm_head", "embed_tokens"} & set(targets)
    assert folded.config.tie_word_embeddings == (tied and not untied)
    assert run("reproduce", tmp_path / "out", "--quiet") == 0


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_proj", "lm_head"], ["c_attn", "wte"]])
def test_layers_that_are_stored_transposed_fold_the_right_way(tmp_path, targets):
    """PEFT sets fan_in_fan_out by the module that it met last, so that the config may say the wrong thing of others."""
    adapted = trained(tiny_gpt2(tmp_path / "base"), tmp_path / "lora", r=3, target_modules=targets)
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    np.testing.assert_allclose(logits(loaded(tmp_path / "out")), logits(adapted), atol=2e-5)


def tiny_experts(folder: Path, kind: str) -> Any:
    """A mixture of experts, which transformers stores one by one and joins as it loads them."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 40,
    }
    if kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, num_local_experts=3))
    else:
        own = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 3}
        config = transformers.Qwen2MoeConfig(**common, **own, num_experts_per_tok=2)
        model = transformers.Qwen2MoeForCausalLM(config)
    return saved(model, folder)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("mixtral", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]),
        ("mixtral", ["mlp.experts.down_proj"]),
        ("qwen2_moe", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
)
def test_experts_that_are_stored_one_by_one_take_the_change_of_what_they_are_joined_to(tmp_path, kind, targets):
    model = tiny_experts(tmp_path / "base", kind)
    adapted = trained(
        model,
        tmp_path / "lora",
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"down_proj": 2},
    )
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    assert list(ws.open(tmp_path / "out")) == list(ws.open(tmp_path / "base"))
    np.testing.assert_allclose(logits(loaded(tmp_path / "out")), logits(adapted), atol=2e-5)
    half = {name: tensor.numpy() for name, tensor in ws.fuse(tmp_path / "base", tmp_path / "lora", [0.5]).items()}
    whole, base = ws.open(tmp_path / "out"), ws.open(tmp_path / "base")
    for name in half:
        np.testing.assert_allclose(half[name], (whole[name].numpy() + base[name].numpy()) / 2, atol=1e-6)
    found = {layer.module: layer for layer in ws.adapters.inspect(tmp_path / "lora", tmp_path / "base").layers}
    place = "block_sparse_moe.experts.{}.w2" if kind == "mixtral" else "mlp.experts.{}.down_proj"
    names = [f"model.layers.0.{place.format(expert)}.weight" for expert in range(3)]
    norm = np.linalg.norm([np.linalg.norm(whole[name].numpy() - base[name].numpy()) for name in names])
    layer = found["model.layers.0.mlp.experts.down_proj"]
    assert layer.rank == 2
    assert layer.norm == pytest.approx(norm, rel=1e-5)


def test_experts_of_several_shapes_and_merges_of_their_adapters_are_refused(tmp_path):
    model = tiny_experts(tmp_path / "base", "mixtral")
    trained(model, tmp_path / "lora", r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(CheckpointError, match=r"changes parameters of experts .*fold each into the base"):
        ws.adapters.merge([tmp_path / "lora", tmp_path / "lora"])
    tensors = {name: tensor.numpy() for name, tensor in ws.open(tmp_path / "base").items()}
    tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = np.ones((16, 7), np.float32)
    write_safetensors(tmp_path / "base" / "model.safetensors", tensors)
    with pytest.raises(PlanError, match=r"experts.1.w2.weight as \[16, 7\] .*cannot be joined"):
        ws.fuse(tmp_path / "base", tmp_path / "lora")


def test_modules_have_the_names_that_transformers_gives_them(tmp_path):
    """ViT's files have other names than its modules have in transformers 5, which adapters speak of."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    model = saved(transformers.ViTForImageClassification(config), tmp_path / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", bias="all"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "lora")
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    folded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(folded(pixels).logits, adapted.eval()(pixels).logits, atol=2e-5)


def test_a_model_of_diffusers_by_itself_keeps_the_name_of_its_file(write_model, tmp_path):
    base = write_model("base", {"l.weight": weight()}, {"_class_name": "UNet2DConditionModel"})
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    adapter, change = write_adapter(tmp_path / "a", 1)
    assert run("fuse", base, adapter, tmp_path / "out", "--quiet") == 0
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()
    np.testing.assert_allclose(ws.open(tmp_path / "out")["l.weight"].numpy(), weight() + change, atol=1e-12)
    assert ws.verify(tmp_path / "out").ok
    assert run("reproduce", tmp_path / "out", "--quiet") == 0


def test_embeddings_that_were_trained_whole_leave_a_tied_head_as_it_was(tmp_path):
    model = tiny_llama(tmp_path / "base", tied=True)
    adapted = trained(model, tmp_path / "lora", r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    np.testing.assert_allclose(logits(loaded(tmp_path / "out")), logits(adapted), atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_longer_vocabulary_comes_with_the_adapter(tmp_path, tied):
    model = tiny_llama(tmp_path / "base", tied=tied)
    torch.manual_seed(3)
    model.resize_token_embeddings(43)
    adapted = trained(model, tmp_path / "lora", r=3, target_modules=["q_proj"])
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    assert run("fuse", tmp_path / "base", tmp_path / "lora", tmp_path / "out", "--quiet") == 0
    folded = loaded(tmp_path / "out")
    assert folded.config.vocab_size == 43
    assert folded.config.tie_word_embeddings == tied
    np.testing.assert_allclose(logits(folded), logits(adapted), atol=2e-5)


def test_a_tied_head_that_is_scaled_cannot_be_untied(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_ff=24, d_kv=4, num_layers=1, num_heads=4, vocab_size=40, tie_word_embeddings=True
    )
    model = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "base")
    trained(model, tmp_path / "lora", r=2, target_modules=["lm_head"])
    with pytest.raises(PlanError, match="scale what a tied head sees"):
        ws.open(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")


# --- several adapters, without PEFT ---


def write_adapter(folder: Path, seed: int, *, dora: bool = False) -> tuple[Path, np.ndarray]:
    """Write a LoRA for ``l.weight`` [6, 5], and return it with the delta that it stands for."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 5)), rng.standard_normal((6, 2))
    folder.mkdir()
    tensors = {"base_model.model.l.lora_A.weight": a, "base_model.model.l.lora_B.weight": b}
    delta = 1.5 * b @ a
    if dora:
        magnitude = rng.uniform(0.5, 2, 6)
        tensors["base_model.model.l.lora_magnitude_vector"] = magnitude
        changed = weight() + delta
        delta = changed * (magnitude / np.linalg.norm(changed, axis=1))[:, None] - weight()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder, delta


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 5))


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_add_their_changes_of_the_base(write_model, tmp_path, dora):
    base = write_model("base", {"l.weight": weight()})
    (a, first), (b, second) = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2, dora=dora)
    expected = weight() + 0.5 * first - 2 * second
    for made in (
        ws.fuse(base, [a, b], [0.5, -2]),
        ws.fuse(ws.open(base), [ws.open(b), a], [-2, 0.5]),
        ws.open(f"{base}+0.5*{a}+-2*{b}"),
    ):
        np.testing.assert_allclose(made["l.weight"].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(ws.fuse(base, [a, b])["l.weight"].numpy(), weight() + first + second, atol=1e-12)
    same = ws.fuse(base, [b, b], [0.25])["l.weight"].numpy()
    np.testing.assert_allclose(same, weight() + 0.5 * second, atol=1e-12)


@pytest.mark.parametrize("scale", ["l.weight_scale_inv", "l.scale_weight", None])
def test_codes_of_a_quantised_base_are_no_weights(write_model, tmp_path, scale):
    """What is added to codes is lost in their scale; what the base keeps plain is changed as ever."""
    codes = weight().astype(ml_dtypes.float8_e4m3fn)
    tensors = {"l.weight": codes, "norm.weight": np.ones(3)} | ({} if scale is None else {scale: np.ones(1)})
    config = {"quantization_config": {"quant_method": "fp8"}} if scale is None else {}
    base = write_model("base", tensors, config)
    adapter, change = write_adapter(tmp_path / "a", 1)
    with pytest.raises(
        PlanError, match=r"l.weight, which is quantised in .* fold into the model that it was made from"
    ):
        ws.fuse(base, adapter)
    plain = write_model("plain", {"l.weight": weight(), "q.weight": codes, "q.weight_scale_inv": np.ones(1)}, config)
    np.testing.assert_allclose(ws.fuse(plain, adapter)["l.weight"].numpy(), weight() + change, atol=1e-12)
    packed = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(PlanError, match=r"changes l.weight, which .* does not have; it is quantised"):
        ws.fuse(write_model("packed", {"l.qweight": np.ones((2, 2), np.int32)}, packed), adapter)


def test_an_adapter_that_holds_nothing_is_refused(write_model, tmp_path):
    base = write_model("base", {"l.weight": weight()})
    adapter, _ = write_adapter(tmp_path / "a", 1)
    write_safetensors(adapter / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="holds nothing for any layer"):
        ws.fuse(base, adapter)


def test_a_weight_of_nothing_leaves_the_base(write_model, tmp_path):
    base = write_model("base", {"l.weight": weight()})
    adapter, _ = write_adapter(tmp_path / "a", 1, dora=True)
    assert np.array_equal(ws.fuse(base, adapter, [0])["l.weight"].numpy(), weight())


def test_an_adapter_is_no_base(write_model, tmp_path):
    adapter, _ = write_adapter(tmp_path / "a", 1)
    with pytest.raises(PlanError, match="is an adapter itself"):
        ws.fuse(adapter, adapter)
    with pytest.raises(CheckpointError, match="is no adapter"):
        ws.fuse(adapter.parent / "base", write_model("base", {"l.weight": weight()}))


@pytest.mark.parametrize("weights", [[1, 2, 3], [], [float("nan"), 1]])
def test_weights_that_do_not_fit_are_refused(write_model, tmp_path, weights):
    base = write_model("base", {"l.weight": weight()})
    (a, _), (b, _) = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2)
    with pytest.raises(MethodError, match="give a number for each, or one for all"):
        ws.fuse(base, [a, b], weights)


def test_the_command_takes_weights_and_keeps_the_dtype(write_model, tmp_path, capsys):
    base = write_model("base", {"l.weight": weight().astype(np.float32)})
    (a, first), (b, second) = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2)
    assert run("fuse", base, a, b, tmp_path / "out", "--weight", "0.5", "--weight", "2", "--quiet") == 0
    made = ws.open(tmp_path / "out")["l.weight"].numpy()
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, weight() + 0.5 * first + 2 * second, atol=1e-5)
    assert run("fuse", base, a, tmp_path / "half", "--dtype", "float16", "--quiet") == 0
    assert ws.open(tmp_path / "half")["l.weight"].dtype == np.float16
    assert run("fuse", base, a, b, tmp_path / "two", "--weight", "1", "--weight", "1", "--weight", "1") == 1
    assert "2 adapters" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
