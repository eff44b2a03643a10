"""Layouts by their names alone: what is recognised, brought into the normal form, written and refused."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from weightsmith.adapters.layouts import naming
from weightsmith.adapters.layouts.config import divide, patterns_of
from weightsmith.adapters.layouts.parts import is_adapter
from weightsmith.adapters.layouts.words import readings
from weightsmith.adapters.patterns import Patterns
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.cli.main import main
from weightsmith.errors import CheckpointError, OutputError, PlanError, RecipeError, WeightsmithError

RANK = 2


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def kohya(stem: str, out: int = 6, width: int = 4, alpha: Any = 1.0, rank: int = RANK) -> dict[str, Any]:
    return {
        f"{stem}.lora_down.weight": draw(rank, width, seed=1),
        f"{stem}.lora_up.weight": draw(out, rank, seed=2),
        f"{stem}.alpha": np.array(alpha, np.float32),
    }


def memory(tensors: dict[str, Any], name: str = "lora", **options: Any) -> Checkpoint:
    return Checkpoint(name, {key: ArrayTensor(key, np.asarray(a)) for key, a in tensors.items()}, **options)


def normal(tensors: dict[str, Any], base: dict[str, Any] | None = None) -> Checkpoint:
    return ws.adapters.normalize(memory(tensors, is_adapter=True), None if base is None else memory(base, "base"))


def modules(checkpoint: Checkpoint) -> list[str]:
    """Return the modules of a normal form."""
    ends = [name.removeprefix("base_model.model.").rpartition(".lora_") for name in checkpoint]
    return list(dict.fromkeys(head for head, _, _ in ends))


def product(up: Any, down: Any) -> np.ndarray[Any, Any]:
    return up.astype(np.float64).reshape(len(up), -1) @ down.astype(np.float64).reshape(len(down), -1)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("peft", ["base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.lora_B.weight"]),
        ("peft", ["model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"]),
        ("kohya", ["lora_unet_mid_block_x.lora_down.weight", "lora_te1_y.lora_up.weight", "lora_te1_y.alpha"]),
        ("kohya", ["lycoris_blocks_0_q.lokr_w1", "lycoris_blocks_0_q.lokr_w2"]),
        ("kohya", ["lora_unet_x.hada_w1_a", "lora_unet_x.dora_scale", "lora_unet_y.diff", "lora_unet_z.oft_blocks"]),
        ("kohya", ["lora_unet_x.weight", "lora_unet_x.on_input"]),
        ("diffusers", ["unet.mid_block.q.lora_A.weight", "text_encoder.x.lora_linear_layer.up.weight"]),
        ("diffusers", ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"]),
        ("diffusers", ["transformer.single_transformer_blocks.0.proj_out.lora_B.weight"]),
        ("original", ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]),
        (
            "original",
            ["double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"],
        ),
        ("mlx", ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"]),
        (None, ["model.layers.0.q_proj.weight", "model.layers.0.q_proj.lora_A.weight"]),
        (None, ["logit_scale.alpha", "blocks.0.diff"]),
        (None, []),
    ],
)
def test_layouts_are_recognised_by_names_alone(layout, names):
    assert ws.adapters.recognize(names) == layout
    random.Random(3).shuffle(names)
    assert ws.adapters.recognize(names) == layout


def test_a_model_is_no_adapter():
    from conftest import llama_tensors

    assert not is_adapter(llama_tensors(0))
    assert not is_adapter(["x" * 2000 + ".lora_A.weight"])


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("lora_unet_input_blocks_0_0", "unet/conv_in"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
         "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("lora_unet_input_blocks_5_0_in_layers_2", "unet/down_blocks.1.resnets.1.conv1"),
        ("lora_unet_input_blocks_6_0_op", "unet/down_blocks.1.downsamplers.0.conv"),
        ("lora_unet_input_blocks_4_0_skip_connection", "unet/down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_middle_block_1_proj_in", "unet/mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_emb_layers_1", "unet/mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_2_conv", "unet/up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "unet/up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_4_1_transformer_blocks_1_ff_net_0_proj",
         "unet/up_blocks.1.attentions.1.transformer_blocks.1.ff.net.0.proj"),
        ("lora_unet_label_emb_0_2", "unet/add_embedding.linear_2"),
        ("lora_unet_mid_block_resnets_0_time_emb_proj", "unet/mid_block.resnets.0.time_emb_proj"),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj",
         "text_encoder/text_model.encoder.layers.3.self_attn.q_proj"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "text_encoder_2/text_model.encoder.layers.3.mlp.fc1"),
        ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
         "text_encoder_3/encoder.block.0.layer.1.DenseReluDense.wi_0"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q",
         "transformer/single_transformer_blocks.0.attn.to_q"),
        ("lora_unet_double_blocks_3_img_mlp_0", "transformer/transformer_blocks.3.ff.net.0.proj"),
        ("lora_unet_joint_blocks_3_context_block_mlp_fc2", "transformer/transformer_blocks.3.ff_context.net.2"),
        ("diffusion_model.input_blocks.1.1.proj_out", "unet/down_blocks.0.attentions.0.proj_out"),
        ("diffusion_model.single_blocks.2.linear2", "transformer/single_transformer_blocks.2.proj_out"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2",
         "text_encoder/text_model.encoder.layers.0.mlp.fc2"),
        ("unet.conv_in", "unet/conv_in"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out", None),
    ],
)  # fmt: skip
def test_names_are_read_without_a_base(stem, module):
    found = normal(kohya(stem))
    if module is not None:
        assert modules(found) == [module]
        assert found.config["lora_alpha"] == 1
        assert found.config["r"] == RANK


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
         "unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
         "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
         "text_encoder/text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
         "text_encoder/text_model.encoder.layers.0.self_attn.q_proj"),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "unet/mid_block.attentions.0.proj_in"),
    ],
)  # fmt: skip
def test_diffusers_older_names_are_read(name, module):
    found = normal(
        {name: draw(RANK, 4), name.replace("down", "up", 1) if "blocks" not in name else up_of(name): draw(6, RANK)}
    )
    assert modules(found) == [module]
    assert found.config["lora_alpha"] == found.config["r"] == RANK


def up_of(name: str) -> str:
    head, _, tail = name.rpartition("down.weight")
    return f"{head}up.weight{tail}"


def test_a_base_decides_what_underscores_stand_for():
    base = {"odd_part.sub_name.weight": draw(6, 4), "other.weight": draw(3, 3)}
    found = normal(kohya("lora_unet_odd_part_sub_name"), base)
    assert modules(found) == ["odd_part.sub_name"]
    with pytest.raises(CheckpointError, match=r"no module that is known: name the base.*--base"):
        normal(kohya("lora_unet_odd_part_sub_name"))
    two = {"a.b_c.weight": draw(6, 4), "a_b.c.weight": draw(6, 4)}
    with pytest.raises(CheckpointError, match=r"may mean a\.b_c or a_b\.c of the base"):
        normal(kohya("lora_unet_a_b_c"), two)
    with pytest.raises(CheckpointError, match="the base has no such module either"):
        normal(kohya("lora_unet_odd_part_sub_nam"), base)


def test_a_file_of_a_whole_pipeline_is_a_base():
    rng = [
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ]
    base = {name: draw(6, 4) for name in rng}
    tensors = kohya("lora_unet_down_blocks_0_attentions_0_proj_in") | kohya(
        "lora_te_text_model_encoder_layers_0_mlp_fc1"
    )
    found = normal(tensors, base)
    assert modules(found) == [rng[0].removesuffix(".weight"), rng[2].removesuffix(".weight")]
    assert modules(normal(kohya("lora_unet_input_blocks_1_1_proj_in"), base)) == modules(found)[:1]


def test_a_one_by_one_convolution_fits_a_linear_layer_and_the_other_way_round():
    tensors = kohya("lora_unet_mid_block_attentions_0_proj_in")
    wide = {k: a[..., None, None] if a.ndim == 2 else a for k, a in tensors.items()}
    linear, conv = ({"mid_block.attentions.0.proj_in.weight": draw(*shape)} for shape in ((6, 4), (6, 4, 1, 1)))
    assert {t.shape for t in normal(wide, linear).values()} == {(2, 4), (6, 2)}
    assert {t.shape for t in normal(tensors, conv).values()} == {(2, 4, 1, 1), (6, 2, 1, 1)}


def test_a_convolution_in_tucker_form_becomes_one_with_the_kernel_in_a(tmp_path):
    down, middle, up = draw(3, 4, 1, 1), draw(3, 3, 3, 3), draw(6, 3, 1, 1)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{stem}.lora_{k}.weight": a for k, a in (("down", down), ("mid", middle), ("up", up))}
    write_safetensors(tmp_path / "lora.safetensors", tensors | {f"{stem}.alpha": np.array(6, np.float32)})
    base = draw(6, 4, 3, 3)
    write_safetensors(tmp_path / "base.safetensors", {"mid_block.resnets.0.conv1.weight": base})
    folded = ws.open(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'lora.safetensors'}")
    change = np.einsum("ijkl,pi,jr->prkl", *(a.astype(np.float64) for a in (middle, up[..., 0, 0], down[..., 0, 0])))
    np.testing.assert_allclose(
        folded["mid_block.resnets.0.conv1.weight"].numpy(), base + 2 * change, rtol=1e-5, atol=1e-5
    )


def test_doras_magnitudes_of_columns_are_refused():
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert normal(kohya(stem) | {f"{stem}.dora_scale": draw(6, 1)}).config["use_dora"]
    with pytest.raises(CheckpointError, match="for each column of the weight"):
        normal(kohya(stem) | {f"{stem}.dora_scale": draw(1, 4)})
    with pytest.raises(CheckpointError, match=r"\[6, 1\] is needed"):
        normal(kohya(stem) | {f"{stem}.dora_scale": draw(5, 1)})


def test_changes_of_whole_weights_and_biases_are_added(tmp_path):
    base = {"conv_in.weight": draw(6, 4), "conv_in.bias": draw(6), "conv_out.weight": draw(6, 4)}
    change = {"lora_unet_conv_in.diff": draw(6, 4, seed=9), "lora_unet_conv_in.diff_b": draw(6, seed=9)}
    write_safetensors(tmp_path / "base.safetensors", base)
    write_safetensors(tmp_path / "lora.safetensors", change | kohya("lora_unet_conv_out"))
    folded = ws.open(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'lora.safetensors'}")
    for name, added in zip(("conv_in.weight", "conv_in.bias"), change.values(), strict=True):
        expected = (base[name].astype(np.float64) + added).astype(np.float32)
        assert np.array_equal(folded[name].numpy(), expected)
    with pytest.raises(CheckpointError, match=r"name the base \(--base\)"):
        ws.adapters.convert(tmp_path / "lora.safetensors", "peft")
    target = tmp_path / "peft"
    ws.adapters.convert(tmp_path / "lora.safetensors", "peft", base=tmp_path / "base.safetensors").save(target)
    assert json.loads((target / "adapter_config.json").read_text())["modules_to_save"] == ["conv_in"]
    again = ws.open(f"{tmp_path / 'base.safetensors'}+{target}")
    assert all(np.array_equal(again[name].numpy(), folded[name].numpy()) for name in base)


def test_ia3_is_one_more_than_lycoris_keeps():
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    for flag, shape in ((0, (6, 1)), (1, (1, 6))):
        found = normal({f"{stem}.weight": draw(6), f"{stem}.on_input": np.array(flag)})
        (tensor,) = found.values()
        assert found.config["peft_type"] == "IA3"
        assert len(found.config["feedforward_modules"]) == flag
        assert np.array_equal(tensor.numpy(), (1 + draw(6).astype(np.float64)).astype(np.float32).reshape(shape))


def flux_base(hidden: int = 4) -> dict[str, Any]:
    block, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    names = {f"{block}.to_{x}": hidden for x in "qkv"} | {f"{single}.attn.to_{x}": hidden for x in "qkv"}
    names |= {f"{single}.proj_mlp": 3 * hidden, "norm_out.linear": 2 * hidden}
    return {f"{name}.weight": draw(rows, hidden, seed=len(name)) for name, rows in names.items()}


def folded(base: dict[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    from weightsmith.adapters.fold import fold

    return fold(memory(base, "base"), memory(tensors, is_adapter=True))


_STEM = "lora_unet_conv_in"


def _loha() -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    parts = [draw(*shape, seed=i) for i, shape in enumerate(((6, 2), (2, 4), (6, 2), (2, 4)))]
    named = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), parts, strict=True))
    a, b, c, d = (part.astype(np.float64) for part in parts)
    return named | {"alpha": np.array(3, np.float32)}, 3 / 2 * (a @ b) * (c @ d)


def _lokr() -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    w1, a, b = draw(2, 2), draw(3, 1), draw(1, 2)
    expected = 5 / 1 * np.kron(w1.astype(np.float64), a.astype(np.float64) @ b)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.array(5, np.float32)}, expected


def _lokr_of_whole_factors() -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """LyCORIS takes no notice of alpha where both factors are whole."""
    w1, w2 = draw(2, 2), draw(3, 2)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": np.array(5, np.float32)}, np.kron(w1.astype(np.float64), w2)


@pytest.mark.parametrize("make", [_loha, _lokr, _lokr_of_whole_factors])
def test_lycoris_kinds_fold_as_lycoris_computes_them(make):
    tensors, change = make()
    base = {"conv_in.weight": draw(6, 4, seed=7)}
    result = folded(base, {f"{_STEM}.{part}": value for part, value in tensors.items()})
    np.testing.assert_allclose(result["conv_in.weight"].numpy(), base["conv_in.weight"] + change, atol=1e-5)


@pytest.mark.parametrize(("on_input", "length"), [(0, 6), (1, 4)])
def test_lycoris_ia3_folds_as_lycoris_computes_it(on_input, length):
    base = {"conv_in.weight": draw(6, 4, seed=7)}
    weight = draw(length)
    result = folded(base, {f"{_STEM}.weight": weight, f"{_STEM}.on_input": np.array(on_input)})
    factors = 1 + (weight[None, :] if on_input else weight[:, None])
    np.testing.assert_allclose(result["conv_in.weight"].numpy(), base["conv_in.weight"] * factors, atol=1e-6)


@pytest.mark.parametrize("scheme", ["kohya", "comfy", "xlabs"])
def test_a_lora_on_joined_matrices_is_one_on_each(scheme):
    """The factors are dense: every part takes rows of B, and all of A."""
    base = flux_base()
    down, up = draw(RANK, 4, seed=1), draw(12, RANK, seed=2)
    stem, ends = {
        "kohya": ("lora_unet_double_blocks_0_img_attn_qkv", ("lora_down", "lora_up")),
        "comfy": ("diffusion_model.double_blocks.0.img_attn.qkv", ("lora_A", "lora_B")),
        "xlabs": ("double_blocks.0.processor.qkv_lora1", ("down", "up")),
    }[scheme]
    result = folded(base, {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up})
    change = product(up, down)
    for i, x in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{x}.weight"
        np.testing.assert_allclose(result[name].numpy(), base[name] + change[4 * i : 4 * i + 4], rtol=1e-5, atol=1e-6)


def test_squares_and_swapped_halves():
    base = flux_base()
    one, last = "lora_unet_single_blocks_0_linear1", "lora_unet_final_layer_adaLN_modulation_1"
    tensors = kohya(one, out=24, alpha=4) | kohya(last, out=8, alpha=4)
    result = folded(base, tensors)
    change = 2 * product(tensors[f"{one}.lora_up.weight"], tensors[f"{one}.lora_down.weight"])
    rows = np.split(change, [4, 8, 12])
    names = [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
    for name, part in zip(names, rows, strict=True):
        key = f"single_transformer_blocks.0.{name}.weight"
        np.testing.assert_allclose(result[key].numpy(), base[key] + part, rtol=1e-5, atol=1e-6)
    change = 2 * product(tensors[f"{last}.lora_up.weight"], tensors[f"{last}.lora_down.weight"])
    expected = base["norm_out.linear.weight"] + np.concatenate([change[4:], change[:4]])
    np.testing.assert_allclose(result["norm_out.linear.weight"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_loras_on_several_matrices_are_one_on_a_base_that_joins_them():
    base = {"double_blocks.0.img_attn.qkv.weight": draw(12, 4), "single_blocks.0.linear1.weight": draw(28, 4)}
    tensors = {}
    for x in "qv":
        for module in (f"transformer_blocks.0.attn.to_{x}", f"single_transformer_blocks.0.attn.to_{x}"):
            tensors[f"transformer.{module}.lora_A.weight"] = draw(RANK, 4, seed=ord(x))
            tensors[f"transformer.{module}.lora_B.weight"] = draw(4, RANK, seed=ord(x) + 1)
    result = folded(base, tensors)
    for name, array in base.items():
        change = np.zeros(array.shape)
        for start, x in ((0, "q"), (8, "v")):
            change[start : start + 4] = product(draw(4, RANK, seed=ord(x) + 1), draw(RANK, 4, seed=ord(x)))
        np.testing.assert_allclose(result[name].numpy(), array + change, rtol=1e-5, atol=1e-6)


def test_block_diagonals_of_other_tools_are_taken_apart():
    up = np.zeros((12, 6), np.float32)
    for i in range(3):
        up[4 * i : 4 * i + 4, 2 * i : 2 * i + 2] = draw(4, 2, seed=i)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    down = draw(6, 4)
    found = normal({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.array(3.0)})
    assert (found.config["r"], found.config["lora_alpha"]) == (2, 1)
    for i, x in enumerate("qkv"):
        module = f"base_model.model.transformer/transformer_blocks.0.attn.to_{x}"
        assert np.array_equal(found[f"{module}.lora_A.weight"].numpy(), down[2 * i : 2 * i + 2])
        assert np.array_equal(found[f"{module}.lora_B.weight"].numpy(), draw(4, 2, seed=i))


def test_what_cannot_be_joined_or_divided_is_refused():
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    kron = {f"{stem}.lokr_w1": draw(3, 2), f"{stem}.lokr_w2": draw(4, 2)}
    with pytest.raises(CheckpointError, match="LOKR.*name a base under the model's own names"):
        normal(kron)
    assert normal(kron, {"double_blocks.0.img_attn.qkv.weight": draw(12, 4)})
    with pytest.raises(CheckpointError, match="do not divide into"):
        normal(kohya(stem, out=13))
    with pytest.raises(CheckpointError, match="has no equal under diffusers' names"):
        normal({f"single_blocks.0.processor.proj_lora.{k}.weight": draw(2, 2) for k in ("down", "up")})


def save_peft(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", {f"base_model.model.{k}": a for k, a in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 3, **config}))
    return folder


def factors(*names: str, rank: int = RANK) -> dict[str, Any]:
    found = {}
    for i, name in enumerate(names):
        found |= {f"{name}.lora_A.weight": draw(rank, 4, seed=i), f"{name}.lora_B.weight": draw(6, rank, seed=i + 50)}
    return found


def test_mlx_stores_factors_transposed(tmp_path):
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"]
    source = save_peft(tmp_path / "peft", factors(*names))
    ws.adapters.convert(source, "mlx").save(tmp_path / "mlx")
    arrays = read_safetensors(tmp_path / "mlx")
    assert arrays[f"{names[0]}.lora_a"].shape == (4, RANK)
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["scale"] == 1.5
    assert settings["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert ws.open(tmp_path / "mlx").is_adapter
    ws.adapters.convert(tmp_path / "mlx", "peft").save(tmp_path / "back")
    assert read_safetensors(tmp_path / "back").keys() == read_safetensors(source).keys()
    for name, array in read_safetensors(tmp_path / "back").items():
        assert np.array_equal(array, read_safetensors(source)[name])
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 3)
    other = save_peft(tmp_path / "two", factors(names[0]) | factors(names[1], rank=3), rank_pattern={"v_proj": 3})
    with pytest.raises(CheckpointError, match="one rank for all modules"):
        ws.adapters.convert(other, "mlx")
    with pytest.raises(PlanError, match="kohya layout is for the models of image pipelines"):
        ws.adapters.convert(source, "kohya")


def test_scales_are_never_rounded(tmp_path):
    """alpha / sqrt(3) * 3 is no float32, and much less a float16; the factors may be rounded, alpha may not."""
    module = "mid_block.attentions.0.proj_in"
    source = save_peft(tmp_path / "peft", factors(module, rank=3), r=3, lora_alpha=5, use_rslora=True)
    ws.adapters.convert(source, "kohya", dtype="fp16").save(tmp_path / "lora.safetensors")
    arrays = read_safetensors(tmp_path / "lora.safetensors")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert arrays[f"{stem}.alpha"] == 5 / np.sqrt(3) * 3
    assert arrays[f"{stem}.lora_down.weight"].dtype == np.float16
    assert np.array_equal(arrays[f"{stem}.lora_down.weight"], draw(3, 4).astype(np.float16))
    ws.adapters.convert(source, "diffusers", dtype="bf16").save(tmp_path / "bf16.safetensors")
    assert {a.dtype for a in read_safetensors(tmp_path / "bf16.safetensors").values()} == {np.dtype(ml_dtypes.bfloat16)}
    scale = ws.adapters.normalize(ws.open(tmp_path / "bf16.safetensors")).config["lora_alpha"] / 3
    assert scale == pytest.approx(5 / np.sqrt(3), rel=1e-15)


def test_modules_of_one_name_keep_ranks_of_their_own():
    rng = random.Random(1)
    for _ in range(200):
        names = {".".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 12))}
        values = {name: float(rng.randint(1, 3)) for name in names}
        default, found = patterns_of(values)
        patterns = Patterns(found)
        assert {name: patterns.value(name, default) for name in names} == values


@pytest.mark.parametrize(("length", "factor", "sides"), [
    (128, -1, (8, 16)), (128, 4, (4, 32)), (128, 16, (8, 16)), (127, -1, (1, 127)), (250, -1, (10, 25)),
    (250, 4, (2, 125)), (360, 12, (12, 30)), (1, -1, (1, 1)),
])  # fmt: skip
def test_sides_divide_as_lycoris_divides_them(length, factor, sides):
    assert divide(length, factor) == sides


def test_layouts_are_folders_or_files_as_they_are(tmp_path):
    source = save_peft(tmp_path / "peft", factors("mid_block.attentions.0.proj_in"))
    with pytest.raises(OutputError, match="layout is a folder with a config"):
        ws.adapters.convert(source, "peft").save(tmp_path / "x.safetensors")
    ws.adapters.convert(source, "diffusers").save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pytorch_lora_weights.safetensors",
        "weightsmith.json",
    ]
    with pytest.raises(OutputError, match="exists"):
        ws.adapters.convert(source, "diffusers").save(tmp_path / "out")
    with pytest.raises(RecipeError, match="did you mean 'kohya'"):
        ws.adapters.convert(source, "kohia")
    with pytest.raises(CheckpointError, match="open the folder that holds both"):
        ws.adapters.convert(source / "adapter_model.safetensors", "kohya")


def test_verify_finds_a_changed_text_of_the_header(tmp_path):
    source = save_peft(tmp_path / "peft", factors("mid_block.attentions.0.proj_in"))
    file = tmp_path / "lora.safetensors"
    ws.adapters.convert(source, "diffusers").save(file)
    assert ws.verify(file).ok
    content = file.read_bytes()
    changed = content.replace(b'unet.lora_alpha\\": 3', b'unet.lora_alpha\\": 4')
    assert changed != content
    file.write_bytes(changed)
    assert not ws.verify(file).ok


def test_the_command_converts_and_says_what_it_cannot_do(tmp_path, capsys):
    source = save_peft(tmp_path / "peft", factors("mid_block.attentions.0.proj_in"))

    def run(*arguments: Any) -> int:
        with pytest.raises(SystemExit) as caught:
            main(["adapter", "convert", *map(str, arguments)])
        return int(caught.value.code or 0)

    assert run(source, tmp_path / "lora.safetensors", "--to", "kohya", "--dtype", "fp16") == 0
    assert "3 tensors" in capsys.readouterr().err
    assert run(tmp_path / "lora.safetensors", tmp_path / "back", "--to", "peft") == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_alpha"] == 3
    assert run(source, tmp_path / "no", "--to", "nothing") == 2
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 1]]}))
    assert run(source, tmp_path / "no", "--to", "kohya") == 1
    assert "replicates layers (layer_replication" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


STEM = "lora_unet_mid_block_attentions_0_proj_in"
MODULE = "unet.mid_block.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (kohya(STEM) | {f"{STEM}.alpha": np.ones(1000, np.float32)}, r"\[1000\], and alpha is one number"),
        (kohya(STEM, alpha=np.nan), "nan, and alpha is a finite number"),
        (kohya(STEM, alpha=np.inf), "inf, and alpha is a finite number"),
        ({f"{STEM}.alpha": np.array(1.0), **kohya(STEM.replace("0", "1"))}, "nothing but an alpha"),
        ({f"{STEM}.lora_down.weight": draw(2, 4)}, "has lora_A.weight for .* and no lora_B.weight"),
        (kohya(STEM) | {f"{STEM}.lora_up.weight": draw(6, 3)}, "different ranks"),
        (kohya(STEM) | {f"{STEM}.lora_up.weight": draw(6)}, "must be a matrix"),
        (kohya(STEM) | {f"{STEM}.lora_down.weight": draw(0, 4)}, "must not be empty"),
        (kohya(STEM) | {f"{STEM}.lora_down.weight": np.ones((2, 4), np.int64)}, "is int64, and must be floats"),
        (kohya(STEM) | {f"{STEM}.oft_blocks": draw(2, 2, 2)}, "belongs to no kind of adapter"),
        (kohya(STEM) | kohya("lora_unet_middle_block_1_proj_in"), "are two names of mid_block.attentions.0.proj_in"),
        (kohya(STEM) | {"lora_unet_conv_in.hada_w1_a": draw(4, 2), "lora_unet_conv_in.hada_w1_b": draw(2, 4),
                        "lora_unet_conv_in.hada_w2_a": draw(4, 2), "lora_unet_conv_in.hada_w2_b": draw(2, 4)},
         "several kinds of adapters"),
        (kohya(STEM) | {f"{STEM}.lora_mid.weight": draw(3, 3, 3, 3)}, "does not fit the other factors"),
        (kohya("lora_unet_" + "to_q_" * 30 + "x"), "no module that is known"),
        (kohya("lora_unet_input_blocks_999_0"), "no module of a Stable Diffusion UNet"),
        ({f"{MODULE}.lora_A.weight": draw(2, 4), f"{MODULE}.lora_A.default.weight": draw(2, 4),
          f"{MODULE}.lora_B.weight": draw(6, 2)}, "twice, as"),
    ],
)  # fmt: skip
def test_strangers_tensors_are_refused_with_one_error(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        normal(tensors)


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", "lora_unet_", "diffusion_model."])
def test_prefixes_are_taken_off_once(prefix):
    looped = prefix * 40 + "x.lora_A.weight"
    tensors = {looped: draw(2, 4), looped.replace("lora_A", "lora_B"): draw(6, 2)}
    begun = time.monotonic()
    try:
        found = normal(tensors)
    except WeightsmithError:
        pass
    else:
        assert len(found) == 2
    assert time.monotonic() - begun < 1


def test_long_names_take_no_time():
    begun = time.monotonic()
    for name in ("_".join(["0"] * 60), "_".join(["transformer", "blocks"] * 30), "mlp_0_" * 20 + "mlp", "_" * 300):
        assert len(readings(name)) <= 2
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("text", ["[]", "{", '{"unet.r": NaN, "unet.lora_alpha": 1}', '{"unet.r": "2"}', "[" * 5000,
                                  '{"unet.r": 3, "unet.lora_alpha": 1}', '{"unet.r": 2, "unet.rank_pattern": [1]}',
                                  '{"unet.r": 2, "unet.alpha_pattern": {"(a+)+\\\\1": 1}}'])  # fmt: skip
def test_what_a_header_says_is_checked(tmp_path, text):
    arrays = {f"{MODULE}.lora_A.weight": draw(2, 4), f"{MODULE}.lora_B.weight": draw(6, 2)}
    write_with_metadata(tmp_path / "lora.safetensors", arrays, {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        ws.adapters.normalize(ws.open(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("text", ["[]", "{", '{"STEM": [-1, 7]}', '{"STEM": [2, 2, 3]}', '{"STEM": "x"}',
                                  '{"STEM": [6, 0, 0]}', "[" * 5000])  # fmt: skip
def test_ranks_in_a_header_are_believed_where_the_zeros_say_the_same(tmp_path, text):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    arrays = {f"{stem}.lora_down.weight": draw(6, 4), f"{stem}.lora_up.weight": draw(12, 6)}
    write_with_metadata(tmp_path / "lora.safetensors", arrays, {"weightsmith_ranks": text.replace("STEM", stem)})
    found = ws.adapters.normalize(ws.open(tmp_path / "lora.safetensors"))
    assert {tensor.shape for name, tensor in found.items() if "lora_A" in name} == {(6, 4)}


def write_with_metadata(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values()))


def test_every_rule_of_a_family_leads_back():
    for family, rules in naming.FAMILIES.items():
        for rule in rules:
            module = rule.original.replace("#", "17")
            known = naming.original_rules(family)(module)
            assert known is not None
            for i, name in enumerate(known[1]):
                assert naming.fused_rules(family)(name) == (rule, module, i)


def test_tables_of_tokens_have_factors_of_their_own_names():
    module = "model.embed_tokens"
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 0.5}}
    tensors = {f"{module}.lora_a": draw(9, 2), f"{module}.lora_b": draw(2, 4)}
    adapter = Checkpoint("mlx", {k: ArrayTensor(k, a) for k, a in tensors.items()}, Companions(config), is_adapter=True)
    found = ws.adapters.normalize(adapter)
    assert [name.rpartition(".")[2] for name in found] == ["lora_embedding_A", "lora_embedding_B"]
    from weightsmith.adapters.fold import fold

    base = draw(9, 4, seed=3)
    result = fold(memory({f"{module}.weight": base}, "base"), adapter)[f"{module}.weight"]
    expected = base + 0.5 * tensors[f"{module}.lora_a"] @ tensors[f"{module}.lora_b"]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, "2", True, float("nan"), 10**400, [1]])
def test_mlx_scale_is_a_number(scale):
    config = {"lora_parameters": {"scale": scale}}
    tensors = {f"a.lora_{x}": ArrayTensor(f"a.lora_{x}", draw(2, 2)) for x in "ab"}
    with pytest.raises(CheckpointError, match=r"lora_parameters\.scale, a number"):
        ws.adapters.normalize(Checkpoint("mlx", tensors, Companions(config), is_adapter=True))


@pytest.mark.parametrize("config", [{"components": 5}, {"components": {"unet": 3}}, {"auto_mapping": [1]}])
def test_configs_of_strangers_do_no_harm(tmp_path, config):
    source = save_peft(tmp_path / "peft", factors("mid_block.attentions.0.proj_in"), **config)
    assert len(ws.adapters.convert(source, "kohya")) == 3


def test_an_adapter_for_no_or_several_models_of_a_pipeline_is_refused(tmp_path):
    source = save_peft(tmp_path / "peft", factors("x.proj"))
    both = {f"{model}/x.proj.weight": draw(6, 4) for model in ("unet", "transformer")}
    base = Checkpoint("base", {k: ArrayTensor(k, a) for k, a in both.items()}, components=("unet", "transformer"))
    with pytest.raises(PlanError, match="unet and transformer of unet, transformer has all modules"):
        ws.adapters.normalize(ws.open(source), base)
    one = Checkpoint("base", {k: base[k] for k in list(base)[:1]}, components=("unet", "transformer"))
    assert modules(ws.adapters.normalize(ws.open(source), one)) == ["unet/x.proj"]


def test_which_transformer_is_meant_is_asked_where_names_do_not_tell(tmp_path):
    source = save_peft(tmp_path / "peft", factors("transformer_blocks.0.attn.to_q"))
    with pytest.raises(CheckpointError, match=r"in Flux and in Stable Diffusion 3.*--base"):
        ws.adapters.convert(source, "kohya")
    named = {"base_model_class": "SD3Transformer2DModel", "parent_library": "diffusers"}
    told = save_peft(tmp_path / "told", factors("transformer_blocks.0.attn.to_q"), auto_mapping=named)
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight" in ws.adapters.convert(told, "kohya")
    other = {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight": draw(*s) for x, s in (("A", (2, 4)), ("B", (6, 2)))}
    with pytest.raises(CheckpointError, match="known for UNets, Flux and SD3"):
        ws.adapters.convert(memory(other, is_adapter=True), "kohya")
    assert len(ws.adapters.convert(memory(other, is_adapter=True), "peft")) == 2
