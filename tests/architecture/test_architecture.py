"""Layers, towers and configs of many architectures, found by name alone."""

from __future__ import annotations

import time

import pytest

from weightsmith.architecture import config as configs
from weightsmith.architecture.stacks import Stack, analyse, before_layers, role
from weightsmith.architecture.towers import match_tower, tower
from weightsmith.errors import PlanError


def names(*templates: str, layers: int = 3, **more: int) -> list[str]:
    """Write out templates: N counts layers, E experts, S sublayers."""
    found = []
    for template in templates:
        partial = [template]
        for letter, count in (("N", layers), ("E", more.get("experts", 2)), ("S", more.get("sublayers", 2))):
            partial = [
                p.replace(f"<{letter}>", str(i)) for p in partial for i in range(count if f"<{letter}>" in p else 1)
            ]
        found += partial
    return found


LLAMA = names(
    "model.embed_tokens.weight", "model.layers.<N>.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"
)
MODELS = {
    "llama": (LLAMA, {"model.layers": 3}),
    "mixtral": (names("model.layers.<N>.block_sparse_moe.experts.<E>.w1.weight", experts=8), {"model.layers": 3}),
    "gpt2": (names("wte.weight", "h.<N>.attn.c_attn.weight", "ln_f.weight", layers=12), {"h": 12}),
    "bert": (names("bert.encoder.layer.<N>.attention.self.query.weight"), {"bert.encoder.layer": 3}),
    "t5": (
        names(
            "shared.weight",
            "encoder.block.<N>.layer.<S>.SelfAttention.q.weight",
            "decoder.block.<N>.layer.<S>.k.weight",
        ),
        {"encoder.block": 3, "decoder.block": 3},
    ),
    "clip": (
        names("text_model.encoder.layers.<N>.mlp.fc1.weight", "vision_model.encoder.layers.<N>.mlp.fc1.weight"),
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 3},
    ),
    "llava": (
        names("language_model.model.layers.<N>.mlp.up_proj.weight", "multi_modal_projector.linear.<S>.weight"),
        {"language_model.model.layers": 3},
    ),
    "mamba": (names("backbone.layers.<N>.mixer.A_log", "backbone.norm_f.weight"), {"backbone.layers": 3}),
    "unet": (names("down_blocks.<N>.resnets.<S>.conv1.weight", "conv_in.weight"), {"down_blocks": 3}),
    "namespaced": (names("unet/down_blocks.<N>.resnets.<S>.conv1.weight"), {"unet/down_blocks": 3}),
    "sequential": (names("net.<N>.weight", "net.<N>.bias"), {"net": 3}),
    "bare": (names("<N>.weight"), {"": 3}),
    "pruned": (["model.layers.0.a.w", "model.layers.5.a.w", "model.layers.9.b.w"], {"model.layers": 3}),
}


@pytest.mark.parametrize("model", MODELS)
def test_stacks_are_found_in_any_architecture(model):
    given, expected = MODELS[model]
    assert {stack.prefix: len(stack.indices) for stack in analyse(given).stacks} == expected


def test_a_tensor_is_located_by_its_outermost_number():
    found = analyse(MODELS["t5"][0])
    place = found.locate("encoder.block.2.layer.1.SelfAttention.q.weight")
    assert (place.stack.prefix, place.index, place.suffix) == ("encoder.block", 2, "layer.1.SelfAttention.q.weight")
    assert found.locate("shared.weight") is None
    assert found.locate("encoder.block.7.layer.1.q") is None
    assert list(found.members(place.stack, 0)) == ["layer.0.SelfAttention.q.weight", "layer.1.SelfAttention.q.weight"]


def test_fifty_thousand_names_are_analysed_in_no_time():
    many = names("model.layers.<N>.mlp.experts.<E>.up_proj.weight", layers=100, experts=500)
    started = time.process_time()
    found = analyse(many)
    assert all(found.locate(name) for name in many)
    assert time.process_time() - started < 5


BEFORE = [
    "model.embed_tokens.weight", "wte.weight", "transformer.wpe.weight", "bert.embeddings.LayerNorm.weight", "shared.weight",
    "vit.embeddings.cls_token", "vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm.weight",
    "conv_in.weight", "time_embedding.linear_1.weight", "patch_embed.proj.weight", "model.visual.patch_embed.proj.weight",
    "visual.conv1.weight", "x_embedder.proj.weight",
]  # fmt: skip
AFTER = [
    "model.norm.weight", "lm_head.weight", "ln_f.weight", "classifier.weight", "score.weight", "bert.pooler.dense.weight",
    "cls.predictions.bias", "vit.layernorm.weight", "conv_out.weight", "encoder.final_layer_norm.weight", "logit_scale",
    "backbone.norm_f.weight", "conv_norm_out.weight", "visual_projection.weight",
]  # fmt: skip


@pytest.mark.parametrize(("name", "before"), [*((n, True) for n in BEFORE), *((n, False) for n in AFTER)])
def test_embeddings_come_before_the_layers_and_norms_and_heads_after(name, before):
    assert before_layers(name) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention_q"),
        ("bert.encoder.layer.0.attention.self.value.weight", "attention_v"),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", "attention_k"),
        ("model.layers.0.self_attn.o_proj.weight", "attention_o"),
        ("h.0.attn.c_attn.weight", "attention"),
        ("model.layers.0.mlp.down_proj.weight", "mlp"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "expert"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("conv_in.weight", "conv"),
        ("logit_scale", "other"),
    ],
)
def test_roles_are_told_by_name(name, expected):
    assert role(name) == expected


VLM = [f"model.language_model.{n.removeprefix('model.')}" for n in LLAMA if "head" not in n]
VLM += names("model.visual.blocks.<N>.attn.qkv.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("model", "module", "prefix"),
    [
        (VLM, "text_decoder", "model.language_model."),
        (VLM, "vision_tower", "model.visual."),
        (VLM, "model.visual", "model.visual."),
        (MODELS["t5"][0], "decoder", "decoder."),
        (MODELS["clip"][0], "text_model", "text_model."),
        (MODELS["namespaced"][0], "unet", "unet/"),
    ],
)
def test_a_module_is_found_by_the_name_that_recipes_use(model, module, prefix):
    assert tower(model, module) == prefix


def test_a_module_that_is_not_there_is_an_error_that_lists_what_is():
    with pytest.raises(PlanError, match="no module 'audio'.*model.language_model, model.visual"):
        tower(VLM, "audio")


@pytest.mark.parametrize("wrapper", ["model.", "", "transformer.", "odd.wrapping."])
def test_a_text_models_own_prefix_is_found(wrapper):
    prefix = "model.language_model."
    inner = [n.removeprefix(prefix) for n in VLM if n.startswith(prefix)]
    assert match_tower(prefix, inner, [wrapper + n for n in inner], "text") == wrapper
    with pytest.raises(PlanError, match="no tensor of bert matches"):
        match_tower(prefix, inner, MODELS["bert"][0], "bert")


def stacked(config, prefix, old, picked, *others):
    stack = Stack(prefix, tuple(range(old)))
    given = [f"{p}.{i}.a.w" for p in (prefix, *others) for i in range(old)]
    return configs.with_layers(config, stack, picked, analyse(given))


def test_the_layer_count_and_lists_of_layers_follow_the_slices():
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "max_window_layers": 9, "hidden_size": 3}
    found, notes = stacked(config, "model.layers", 3, [0, 1, 1, 2])
    assert found == {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "b", "c"],
        "max_window_layers": 4,
        "hidden_size": 3,
    }
    assert notes == []
    assert config["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("config", "prefix", "others", "expected"),
    [
        ({"n_layer": 3}, "h", (), {"n_layer": 2}),
        (
            {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}},
            "vision_model.encoder.layers",
            ("text_model.encoder.layers",),
            {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}},
        ),
        (
            {"num_layers": 3, "num_decoder_layers": 3},
            "decoder.block",
            ("encoder.block",),
            {"num_layers": 3, "num_decoder_layers": 2},
        ),
        (
            {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3},
            "model.encoder.layers",
            ("model.decoder.layers",),
            {"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 3},
        ),
    ],
)
def test_each_stack_changes_its_own_count(config, prefix, others, expected):
    assert stacked(config, prefix, 3, [0, 2], *others)[0] == expected


def test_a_config_that_counts_no_layers_is_left_with_a_note():
    assert stacked({"model_type": "x"}, "layers", 3, [0])[1] != []


def test_dtype_and_ties():
    assert configs.with_dtype({"dtype": "float32", "text_config": {"torch_dtype": "x"}}, "float16") == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16"},
    }
    assert configs.tied_embeddings({"tie_word_embeddings": True})
    assert configs.tied_embeddings({"model_type": "gpt2"})
    assert not configs.tied_embeddings({"model_type": "gpt2", "tie_word_embeddings": False})
    assert not configs.tied_embeddings(configs.untie({"model_type": "gpt2"}))
    assert configs.tied_source("lm_head.weight", ["model.embed_tokens.weight"]) == "model.embed_tokens.weight"
    assert configs.tied_source("model.norm.weight", ["model.embed_tokens.weight"]) is None
