"""Stacks, places and towers on the name lists of real architectures, written out from templates."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from weightsmith.architecture.stacks import analyse, before_layers, role
from weightsmith.architecture.towers import Tower, match_tower, tower
from weightsmith.errors import PlanError


def expand(*templates: str) -> list[str]:
    """Write out templates: ``{a,b}`` stands for each word, ``<4>`` for the numbers 0 to 3."""
    found = []
    for template in templates:
        parts = re.split(r"(\{[^}]*\}|<\d+>)", template)
        choices = [
            p[1:-1].split(",") if p.startswith("{") else map(str, range(int(p[1:-1]))) if p.startswith("<") else [p]
            for p in parts
        ]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def decoder(prefix: str, layers: int) -> list[str]:
    return expand(
        f"{prefix}embed_tokens.weight",
        f"{prefix}layers.<{layers}>.self_attn.{{q,k,v,o}}_proj.weight",
        f"{prefix}layers.<{layers}>.mlp.{{gate,up,down}}_proj.weight",
        f"{prefix}layers.<{layers}>.{{input,post_attention}}_layernorm.weight",
        f"{prefix}norm.weight",
    )


def clip_tower(prefix: str, layers: int, *more: str) -> list[str]:
    own = expand(
        f"{prefix}encoder.layers.<{layers}>.self_attn.{{q,k,v,out}}_proj.{{weight,bias}}",
        f"{prefix}encoder.layers.<{layers}>.layer_norm{{1,2}}.weight",
        f"{prefix}encoder.layers.<{layers}>.mlp.fc{{1,2}}.weight",
    )
    return own + [prefix + name for name in more]


VISION = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "pre_layrnorm.weight",
    "post_layernorm.weight",
)
TEXT = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "final_layer_norm.weight")
BERT = expand(
    "bert.embeddings.{word,position,token_type}_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.<4>.attention.self.{query,key,value}.weight",
    "bert.encoder.layer.<4>.{attention.output,intermediate,output}.dense.weight",
    "bert.pooler.dense.weight",
    "cls.predictions.transform.dense.weight",
)
GPT2 = expand(
    "wte.weight",
    "wpe.weight",
    "h.<5>.attn.{bias,c_attn.weight,c_proj.weight}",
    "h.<5>.{ln_1,mlp.c_fc}.weight",
    "ln_f.weight",
)
T5 = expand(
    "shared.weight",
    "{encoder,decoder}.embed_tokens.weight",
    "{encoder,decoder}.block.<3>.layer.0.SelfAttention.{q,k,v,o}.weight",
    "{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "{encoder,decoder}.block.<3>.layer.1.layer_norm.weight",
    "decoder.block.<3>.layer.2.DenseReluDense.wo.weight",
    "{encoder,decoder}.final_layer_norm.weight",
    "lm_head.weight",
)
WHISPER = expand(
    "model.encoder.conv{1,2}.weight",
    "model.{encoder,decoder}.embed_positions.weight",
    "model.encoder.layers.<4>.self_attn.q_proj.weight",
    "model.decoder.layers.<2>.{self_attn,encoder_attn}.q_proj.weight",
    "model.{encoder,decoder}.layer_norm.weight",
    "proj_out.weight",
)
UNET = expand(
    "{conv_in,conv_out,conv_norm_out}.weight",
    "{time_embedding,add_embedding}.linear_{1,2}.weight",
    "down_blocks.<3>.resnets.<2>.conv{1,2}.weight",
    "down_blocks.{1,2}.attentions.<2>.transformer_blocks.<10>.attn{1,2}.to_{q,k,v}.weight",
    "up_blocks.<3>.resnets.<3>.conv1.weight",
)
QWEN2_VL = (*decoder("model.", 4), *expand("visual.patch_embed.proj.weight", "visual.blocks.<6>.attn.qkv.weight"))
QWEN2_VL = (*QWEN2_VL, *expand("visual.merger.mlp.{0,2}.weight", "visual.merger.ln_q.weight", "lm_head.weight"))
QWEN3_VL = (
    *decoder("model.language_model.", 4),
    *expand("model.visual.blocks.<6>.attn.qkv.weight", "model.visual.merger.norm.weight", "lm_head.weight"),
)
LLAVA_OLD = (
    *decoder("language_model.model.", 4),
    "language_model.lm_head.weight",
    *clip_tower("vision_tower.vision_model.", 3, *VISION),
    *expand("multi_modal_projector.linear_{1,2}.weight"),
)
LLAVA_SEQUENTIAL = (*decoder("model.", 4), *expand("model.mm_projector.{0,2}.{weight,bias}", "lm_head.weight"))
MODELS = {
    "llama": (decoder("model.", 4), {"model.layers": 4}),
    "mixtral": (
        decoder("model.", 2) + expand("model.layers.<2>.block_sparse_moe.{gate.weight,experts.<8>.w{1,2,3}.weight}"),
        {"model.layers": 2},
    ),
    "qwen2-moe": (
        decoder("model.", 3)
        + expand("model.layers.<3>.mlp.experts.<60>.up_proj.weight", "model.layers.<3>.mlp.shared_expert_gate.weight"),
        {"model.layers": 3},
    ),
    "gpt2": (GPT2, {"h": 5}),
    "gpt2 with its head": ([f"transformer.{name}" for name in GPT2], {"transformer.h": 5}),
    "bert": (BERT, {"bert.encoder.layer": 4}),
    "t5": (T5, {"encoder.block": 3, "decoder.block": 3}),
    "whisper": (WHISPER, {"model.encoder.layers": 4, "model.decoder.layers": 2}),
    "vit": (
        expand(
            "vit.embeddings.cls_token", "vit.encoder.layer.<4>.attention.attention.query.weight", "classifier.weight"
        ),
        {"vit.encoder.layer": 4},
    ),
    "clip": (
        clip_tower("text_model.", 3, *TEXT) + clip_tower("vision_model.", 5, *VISION),
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 5},
    ),
    "llava": (LLAVA_OLD, {"language_model.model.layers": 4, "vision_tower.vision_model.encoder.layers": 3}),
    "llava of its authors": (LLAVA_SEQUENTIAL, {"model.layers": 4}),
    "qwen2-vl": (QWEN2_VL, {"model.layers": 4, "visual.blocks": 6}),
    "qwen3-vl": (QWEN3_VL, {"model.language_model.layers": 4, "model.visual.blocks": 6}),
    "mamba": (
        expand(
            "backbone.embeddings.weight", "backbone.layers.<4>.mixer.{A_log,D,in_proj.weight}", "backbone.norm_f.weight"
        ),
        {"backbone.layers": 4},
    ),
    "sdxl": (
        [f"unet/{n}" for n in UNET] + [f"text_encoder/{n}" for n in clip_tower("text_model.", 3, *TEXT)],
        {"unet/down_blocks": 3, "unet/up_blocks": 3, "text_encoder/text_model.encoder.layers": 3},
    ),
    "sdxl in one file": (
        expand(
            "conditioner.embedders.0.transformer.text_model.encoder.layers.<3>.mlp.fc1.weight",
            "conditioner.embedders.1.model.transformer.resblocks.<5>.attn.in_proj_weight",
        ),
        {
            "conditioner.embedders.0.transformer.text_model.encoder.layers": 3,
            "conditioner.embedders.1.model.transformer.resblocks": 5,
        },
    ),
    "a pruned nemotron": (
        expand("model.layers.{0,1,3}.self_attn.q_proj.weight", "model.layers.{0,2,3}.mlp.up_proj.weight")
        + expand("model.layers.{0,1,2,3}.input_layernorm.weight"),
        {"model.layers": 4},
    ),
    "a sequence": (expand("net.{0,2,4}.{weight,bias}"), {"net": 3}),
    "a sequence by itself": (expand("{0,2}.{weight,bias}"), {"": 2}),
    "weight norm beside layers": (
        expand("encoder.layers.<2>.attention.q_proj.weight", "pos_conv.0.parametrizations.weight.original{0,1}"),
        {"encoder.layers": 2},
    ),
    "experts beside layers": (
        expand("layers.<2>.norm.weight", "experts.<4>.w1.weight"),
        {"layers": 2, "experts": 4},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_stacks_of_real_layouts_are_found(model):
    given, expected = MODELS[model]
    found = analyse(given)
    assert {stack.prefix: len(stack.indices) for stack in found.stacks} == expected


@pytest.mark.parametrize("model", MODELS)
def test_every_layered_tensor_is_put_back_together_from_its_place(model):
    given = MODELS[model][0]
    found = analyse(given)
    places = {name: found.locate(name) for name in given}
    assert {n: p.stack.name(p.index, p.suffix) for n, p in places.items() if p} == {
        n: n for n, p in places.items() if p
    }
    members = [name for stack in found.stacks for i in stack.indices for name in found.members(stack, i).values()]
    assert sorted(members) == sorted(name for name, place in places.items() if place)


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (decoder("model.", 4) + expand("mtp.layers.<2>.mlp.up_proj.weight", "mtp.fc.weight"), ["model.layers"]),
        (decoder("model.", 4) + expand("model.mtp_layers.<1>.mlp.up_proj.weight"), ["model.layers"]),
        (T5, ["encoder.block", "decoder.block"]),
        (expand("mtp.layers.<2>.mlp.up_proj.weight"), ["mtp.layers"]),
    ],
)
def test_stacks_that_only_predict_further_tokens_are_no_main_ones(names, main):
    assert [stack.prefix for stack in analyse(names).main] == main


SENTENCES = expand("0.auto_model.encoder.layer.<12>.attention.self.query.weight")


def test_a_config_tells_a_wrapped_model_from_a_stack_of_one_layer():
    experts = expand("model.layers.0.mlp.experts.<12>.up_proj.weight")
    assert [s.prefix for s in analyse(SENTENCES, {"num_hidden_layers": 12}).stacks] == ["0.auto_model.encoder.layer"]
    assert [s.prefix for s in analyse(experts, {"num_hidden_layers": 1}).stacks] == ["model.layers"]
    assert [s.prefix for s in analyse(experts, {}).stacks] == ["model.layers"]


def test_modules_with_nothing_in_common_are_no_layers():
    found = analyse([*SENTENCES, "2.linear.weight"])
    assert [s.prefix for s in found.stacks] == ["0.auto_model.encoder.layer"]
    assert found.locate("2.linear.weight") is None


@pytest.mark.parametrize("number", ["007", "9" * 5000, "٣", "-1"])
def test_numbers_that_no_module_has_are_not_layers(number):
    assert analyse([f"layers.{number}.attn.q.weight"]).stacks == ()


def test_fifty_thousand_names_take_well_under_a_second():
    many = expand("model.layers.<100>.mlp.experts.<500>.up_proj.weight")
    started = time.process_time()
    assert len(analyse(many, {"num_hidden_layers": 100}).stacks) == 1
    assert time.process_time() - started < 1


def test_a_name_of_endless_numbers_costs_nothing():
    hostile = [f"{i}." + "0.1." * 50_000 + f"w{i}" for i in range(2)]
    started = time.process_time()
    assert len(analyse(hostile, {"num_hidden_layers": 3}).stacks) == 1
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("emb.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        ("mtp.embed_tokens.weight", False),
        ("model.decoder.project_in.weight", True),
        ("model.decoder.project_out.weight", False),
        ("vision_model.layernorm_pre.weight", True),
        ("img_in.weight", True),
        ("bn1.weight", True),
        ("pos_embed", True),
        ("multi_modal_projector.patch_merger.merging_layer.weight", False),
        ("visual.merger.ln_q.weight", False),
        ("final_layer.linear.weight", False),
    ],
)
def test_stems_come_before_the_layers_and_what_predicts_after(name, before):
    assert before_layers(name) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.0.self_attention.query_key_value.weight", "attention"),
        ("model.layers.0.self_attn.q_b_proj.weight", "attention_q"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", "attention_o"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "norm"),
        ("blocks.0.norm2.bias", "norm"),
        ("embed_out.weight", "head"),
        ("output.weight", "head"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "expert"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
    ],
)
def test_roles_of_names_that_look_like_others(name, expected):
    assert role(name) == expected


@pytest.mark.parametrize(
    ("model", "module", "prefix"),
    [
        (QWEN2_VL, "text_decoder", "model."),
        (QWEN2_VL, "vision_tower", "visual."),
        (QWEN2_VL, "multi_modal_projector", "visual.merger."),
        (QWEN3_VL, "text_decoder", "model.language_model."),
        (LLAVA_OLD, "text_decoder", "language_model."),
        (LLAVA_OLD, "vision_tower", "vision_tower."),
        (WHISPER, "encoder", "model.encoder."),
        (T5, "shared", "shared."),
        (MODELS["sdxl"][0], "text_encoder", "text_encoder/"),
    ],
)
def test_modules_of_real_layouts_are_found(model, module, prefix):
    assert tower(model, module) == prefix


@pytest.mark.parametrize(
    ("names", "module", "prefix", "beside"),
    [
        (QWEN2_VL, "text_decoder", "model.", {"lm_head.weight": "lm_head.weight"}),
        (QWEN3_VL, "language_model", "model.language_model.", {"lm_head.weight": "lm_head.weight"}),
        (LLAVA_OLD, "text_decoder", "language_model.", {}),
        (LLAVA_OLD, "text_decoder", "language_model.model.", {"lm_head.weight": "language_model.lm_head.weight"}),
        (["thinker.model.norm.weight"], "text_decoder", "thinker.model.", {"lm_head.bias": "thinker.lm_head.bias"}),
        (T5, "shared", "shared.", {"lm_head.weight": "lm_head.weight"}),
        (T5, "decoder", "decoder.", {}),
        (QWEN2_VL, "model", "model.", {}),
        (QWEN3_VL, "multi_modal_projector", "model.visual.merger.",
         {"deepstack_merger_list.0.w": "model.visual.deepstack_merger_list.0.w"}),
    ],
)  # fmt: skip
def test_what_lies_beside_a_tower_is_part_of_it_and_what_lies_inside_stays_there(names, module, prefix, beside):
    found = Tower.under(prefix, module, names)
    assert {found.name(inner) for inner in ("norm.weight", *beside)} == {f"{prefix}norm.weight", *beside.values()}
    for inner, name in ({"norm.weight": f"{prefix}norm.weight"} | beside).items():
        assert found.inner(name) == inner
    seen = [name for name in names if found.inner(name) is not None]
    assert seen == [name for name in names if name.startswith((prefix, *beside.values()))]
    assert [found.name(str(found.inner(name))) for name in seen] == seen


@pytest.mark.parametrize(
    ("model", "module", "wrapper"),
    [(QWEN2_VL, "text_decoder", "model."), (QWEN3_VL, "text_decoder", "model."), (LLAVA_OLD, "text_decoder", "")],
)
def test_a_text_model_is_found_in_the_tower_of_a_larger_one(model, module, wrapper):
    text = [*decoder("model.", 4), "lm_head.weight"]
    prefix = tower(model, module)
    inner = [name.removeprefix(prefix) for name in model if name.startswith(prefix)]
    assert match_tower(prefix, inner, text, "text") == wrapper
    assert {wrapper + name for name in inner} <= set(text)


def test_the_part_that_fits_most_names_is_taken():
    inner = expand("layers.<3>.attn.q.weight", "norm.weight")
    other = [f"small.{inner[0]}", *(f"whole.{name}" for name in inner)]
    assert match_tower("model.text.", inner, other, "m") == "whole."


def test_parts_that_fit_equally_well_are_an_error_that_names_them():
    inner = expand("layers.<2>.attn.q.weight")
    other = [f"{part}.{name}" for part in ("alpha", "beta") for name in inner]
    with pytest.raises(PlanError, match=r"m has 2 parts .* 'alpha\.', 'beta\.'; say with prefix"):
        match_tower("model.", inner, other, "m")
    assert match_tower("beta.", inner, other, "m") == "beta."
