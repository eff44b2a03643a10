"""Converted adapters are loaded by PEFT and diffusers, and theirs are read: real small UNets, DiTs and text encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.adapters.layouts import naming
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

# Outputs are of the order of one; a fold rounds each weight once more than an adapter beside it does.
CLOSE = 5e-6
UNET_TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj", "ff.net.0.proj"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def make_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


def make_clip() -> Any:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config).eval()


def make_flux() -> Any:
    torch.manual_seed(2)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()


def make_sd3() -> Any:
    torch.manual_seed(3)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    ).eval()


def run(model: Any) -> np.ndarray[Any, Any]:
    """Return what a model makes of fixed inputs."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    kind = type(inner).__name__
    with torch.no_grad():
        if kind == "UNet2DConditionModel":
            return model(draw(1, 4, 8, 8), torch.tensor([3]), draw(1, 3, 24)).sample.numpy()
        if kind == "CLIPTextModel":
            return model(torch.tensor([[0, 5, 7, 1]]))[0].numpy()
        shared = {"encoder_hidden_states": draw(1, 3, 32), "pooled_projections": draw(1, 32)}
        if kind == "SD3Transformer2DModel":
            return model(hidden_states=draw(1, 4, 8, 8), timestep=torch.tensor([5]), **shared).sample.numpy()
        places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "guidance": torch.tensor([1.0])}
        return model(hidden_states=draw(1, 4, 4), timestep=torch.tensor([0.5]), **shared, **places).sample.numpy()


def shaken(model: Any) -> Any:
    """Give the adapter on a model random parameters, as if it were trained."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("lora_", "hada_", "lokr_")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(model: Any, folder: Path, config: Any) -> Any:
    """Put an adapter on a model with PEFT, and save it in PEFT's layout."""
    wrapped = shaken(peft.get_peft_model(model, config))
    wrapped.save_pretrained(folder)
    return wrapped


def lora(targets: Any, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})


def filled(model: Any, checkpoint: Checkpoint, prefix: str = "") -> Any:
    """Return the model with the weights of a checkpoint, all of which must fit."""
    tensors = {
        name.removeprefix(prefix): torch.from_numpy(np.array(tensor.numpy()))
        for name, tensor in checkpoint.items()
        if name.startswith(prefix)
    }
    model.load_state_dict(tensors)
    return model.eval()


def same_tensors(one: Path, other: Path) -> bool:
    a, b = read_safetensors(one), read_safetensors(other)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    make_unet().save_pretrained(folder / "unet")
    make_clip().save_pretrained(folder / "text_encoder")
    return folder


def load_unet(file: Path) -> Any:
    mixin, unet = diffusers.loaders.StableDiffusionLoraLoaderMixin, make_unet()
    found = mixin.lora_state_dict(str(file), unet_config=unet.config, return_lora_metadata=True)
    tensors, alphas, metadata = found
    mixin.load_lora_into_unet(tensors, network_alphas=alphas, unet=unet, metadata=metadata)
    return unet.eval()


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"conv1": 2, "mid_block.attentions.0.proj_in": 3}, "alpha_pattern": {"conv1": 5}},
        {"use_rslora": True, "rank_pattern": {"proj_in": 2}},
    ],
)
def test_a_unets_lora_goes_out_and_comes_back_to_the_bit(pipeline, tmp_path, layout, options):
    wanted = run(adapted(make_unet(), tmp_path / "peft", lora(UNET_TARGETS, **options)))
    file = tmp_path / f"{layout}.safetensors"
    ws.adapters.convert(tmp_path / "peft", layout).save(file)
    ws.adapters.convert(file, "peft").save(tmp_path / "back")
    assert same_tensors(tmp_path / "peft", tmp_path / "back")
    again = peft.PeftModel.from_pretrained(make_unet(), tmp_path / "back")
    np.testing.assert_allclose(run(again.eval()), wanted, atol=CLOSE)
    for base, prefix in ((pipeline / "unet", ""), (pipeline, "unet/")):
        folded = filled(make_unet(), ws.open(f"{base}+{file}"), prefix)
        np.testing.assert_allclose(run(folded), wanted, atol=CLOSE)
    if layout == "diffusers" or not options:
        # diffusers takes different alphas of attention's projections wrongly from kohya's layout; a note says so.
        np.testing.assert_allclose(run(load_unet(file)), wanted, atol=CLOSE)
        whole = make_unet()
        if layout == "diffusers":
            whole.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="unet")
            np.testing.assert_allclose(run(whole.eval()), wanted, atol=CLOSE)


def test_a_note_says_where_diffusers_reads_alphas_wrongly(tmp_path):
    options = {"alpha_pattern": {"to_q": 2}}
    adapted(make_unet(), tmp_path / "peft", lora(UNET_TARGETS, **options))
    assert "alphas" in ws.adapters.convert(tmp_path / "peft", "kohya").warnings[0]
    assert not ws.adapters.convert(tmp_path / "peft", "diffusers").warnings


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_dora_keeps_its_magnitudes(pipeline, tmp_path, layout):
    wanted = run(adapted(make_unet(), tmp_path / "peft", lora(["to_k", "conv2", "proj_out"], use_dora=True)))
    file = tmp_path / "dora.safetensors"
    ws.adapters.convert(tmp_path / "peft", layout).save(file)
    ws.adapters.convert(file, "peft").save(tmp_path / "back")
    assert same_tensors(tmp_path / "peft", tmp_path / "back")
    folded = filled(make_unet(), ws.open(f"{pipeline / 'unet'}+{file}"))
    np.testing.assert_allclose(run(folded), wanted, atol=CLOSE)
    if layout == "diffusers":
        np.testing.assert_allclose(run(load_unet(file)), wanted, atol=CLOSE)
    else:
        shapes = {name: array.shape for name, array in read_safetensors(file).items() if name.endswith("dora_scale")}
        assert {len(shape) for shape in shapes.values()} == {2, 4}
        assert all(shape[0] > 1 and set(shape[1:]) == {1} for shape in shapes.values())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_lycoris_kinds_go_out_and_come_back(tmp_path, kind, both):
    config = {
        "LOHA": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1"], use_effective_conv2d=both),
        "LOKR": lambda: peft.LoKrConfig(
            r=2, alpha=2, target_modules=["to_q", "conv1", "ff.net.2"], decompose_both=both, decompose_factor=4
        ),
    }[kind]()
    wanted = run(adapted(make_unet(), tmp_path / "peft", config))
    file = tmp_path / "lycoris.safetensors"
    ws.adapters.convert(tmp_path / "peft", "kohya").save(file)
    ws.adapters.convert(file, "peft").save(tmp_path / "back")
    assert same_tensors(tmp_path / "peft", tmp_path / "back")
    again = peft.PeftModel.from_pretrained(make_unet(), tmp_path / "back")
    np.testing.assert_allclose(run(again.eval()), wanted, atol=CLOSE)


def save_with_diffusers(folder: Path, unet: Any, clip: Any) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers as named
    from peft.utils import get_peft_model_state_dict as state

    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=named(state(unet)),
        text_encoder_lora_layers=named(state(clip)),
        **_collate_lora_metadata({"unet": unet, "text_encoder": clip}),
    )


def test_what_diffusers_saves_is_read_and_written_for_all(pipeline, tmp_path):
    unet, clip = make_unet(), make_clip()
    unet.add_adapter(lora(["to_q", "to_out.0", "conv2"], r=3, use_rslora=True))
    clip.add_adapter(lora(CLIP_TARGETS, r=2, lora_alpha=3))
    save_with_diffusers(tmp_path / "own", shaken(unet), shaken(clip))
    wanted = run(unet), run(clip)
    sources = [tmp_path / "own"]
    for layout in ("peft", "kohya", "diffusers"):
        target = tmp_path / layout
        ws.adapters.convert(tmp_path / "own", layout, base=pipeline).save(target)
        sources.append(target)
        assert ws.verify(target).ok
        assert ws.reproduce(target).ok
    for source in sources:
        assert ws.open(source).is_adapter
        folded = ws.open(f"{pipeline}+{source}")
        np.testing.assert_allclose(run(filled(make_unet(), folded, "unet/")), wanted[0], atol=CLOSE)
        np.testing.assert_allclose(run(filled(make_clip(), folded, "text_encoder/")), wanted[1], atol=CLOSE)
    for model, name, output in ((make_unet(), "unet", wanted[0]), (make_clip(), "text_encoder", wanted[1])):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "peft" / name)
        np.testing.assert_allclose(run(loaded.eval()), output, atol=CLOSE)
    for layout in ("kohya", "diffusers"):
        pipe = diffusers.StableDiffusionPipeline(
            vae=None,
            text_encoder=make_clip(),
            tokenizer=None,
            unet=make_unet(),
            scheduler=diffusers.DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.load_lora_weights(str(tmp_path / layout), weight_name="pytorch_lora_weights.safetensors")
        np.testing.assert_allclose(run(pipe.unet), wanted[0], atol=CLOSE)
        np.testing.assert_allclose(run(pipe.text_encoder), wanted[1], atol=CLOSE)


def test_an_adapter_for_two_models_does_not_fit_one(pipeline, tmp_path):
    unet, clip = make_unet(), make_clip()
    unet.add_adapter(lora(["to_q"]))
    clip.add_adapter(lora(["q_proj"]))
    save_with_diffusers(tmp_path / "own", unet, clip)
    with pytest.raises(PlanError, match=r"no module .*self_attn\.q_proj"):
        ws.open(f"{pipeline / 'unet'}+{tmp_path / 'own'}")


TRANSFORMERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "flux": (
        make_flux,
        [
            *(
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "proj_mlp",
                "proj_out",
                "norm1.linear",
                "add_q_proj",
                "ff.net.0.proj",
            ),
            *("x_embedder", "norm_out.linear", "guidance_embedder.linear_1", "ff_context.net.2"),
        ],
    ),
    "flux-some": (make_flux, ["to_q", "to_v"]),
    "sd3": (
        make_sd3,
        [
            *("to_q", "to_k", "to_v", "to_out.0", "norm1_context.linear", "norm_out.linear", "add_q_proj", "ff.net.2"),
            *("pos_embed.proj", "linear_1"),
        ],
    ),
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("case", list(TRANSFORMERS))
def test_a_transformers_lora_goes_out_and_comes_back_to_the_bit(tmp_path, case, layout):
    make, targets = TRANSFORMERS[case]
    make().save_pretrained(tmp_path / "base")
    wanted = run(adapted(make(), tmp_path / "peft", lora(targets)))
    file = tmp_path / "lora.safetensors"
    # With the base, what the adapter leaves alone has its true height.
    ws.adapters.convert(tmp_path / "peft", layout, base=tmp_path / "base").save(file)
    ws.adapters.convert(file, "peft").save(tmp_path / "back")
    assert same_tensors(tmp_path / "peft", tmp_path / "back")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "back")
    np.testing.assert_allclose(run(again.eval()), wanted, atol=CLOSE)
    np.testing.assert_allclose(run(filled(make(), ws.open(f"{tmp_path / 'base'}+{file}"))), wanted, atol=CLOSE)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_loads_a_converted_flux_lora(tmp_path, layout):
    # Of the blocks with two streams: diffusers' converter knows the one width of the real model for the others.
    pattern = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)|ff\.net\.2|norm1_context\.linear)"
    wanted = run(adapted(make_flux(), tmp_path / "peft", lora(pattern, lora_alpha=8)))
    file = tmp_path / "lora.safetensors"
    ws.adapters.convert(tmp_path / "peft", layout).save(file)
    mixin, model = diffusers.loaders.FluxLoraLoaderMixin, make_flux()
    tensors, alphas, metadata = mixin.lora_state_dict(str(file), return_alphas=True, return_lora_metadata=True)
    mixin.load_lora_into_transformer(tensors, network_alphas=alphas, transformer=model, metadata=metadata)
    np.testing.assert_allclose(run(model.eval()), wanted, atol=CLOSE)


def test_unets_under_their_publishers_names_are_those_that_diffusers_converts(tmp_path):
    """The names are those of diffusers' converter of whole checkpoints, which knows nothing of adapters."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = make_unet()
    own = original_unet_names(unet)
    converted = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": torch.tensor(i) for i, name in enumerate(own)}, dict(unet.config)
    )
    theirs = {i.item(): name for name, i in converted.items()}
    assert len(theirs) > 100
    for i, name in enumerate(own):
        module, _, ending = name.rpartition(".")
        if i in theirs:
            assert f"{naming.ldm_to_diffusers(module)}.{ending}" == theirs[i]
    assert naming.ldm_to_diffusers("input_blocks.1.2.x") is None


def original_unet_names(unet: Any) -> list[str]:
    """Return the names of a UNet with two levels under its publishers' scheme, counted out block by block."""
    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    inner = [
        name.removeprefix("mid_block.attentions.0.") for name in unet.state_dict() if "mid_block.attentions.0" in name
    ]
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2", "input_blocks.3.0.op"]
    names += ["output_blocks.2.1.conv"]
    residual = [f"input_blocks.{i}.0" for i in (1, 2, 4, 5)] + ["middle_block.0", "middle_block.2"]
    residual += [f"output_blocks.{i}.0" for i in range(6)]
    names += [f"{place}.{part}" for place in residual for part in resnet]
    attention = ["input_blocks.1.1", "input_blocks.2.1", "middle_block.1", *(f"output_blocks.{i}.1" for i in (3, 4, 5))]
    whole = [f"{name}.{ending}" for name in names for ending in ("weight", "bias")]
    return whole + [f"{place}.{name}" for place in attention for name in inner]


def test_sd3_under_its_publishers_names_is_what_diffusers_converts(tmp_path):
    """A LoRA under Stability's names, folded by ours, is the change that diffusers' converter makes of W + s B A."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as to_diffusers

    rng = np.random.default_rng(5)
    width, shapes = 6, {}
    for i in range(2):
        for side in ("x_block", "context_block"):
            last = i == 1 and side == "context_block"
            shapes[f"joint_blocks.{i}.{side}.adaLN_modulation.1"] = (width * (2 if last else 6), width)
            shapes[f"joint_blocks.{i}.{side}.attn.qkv"] = (3 * width, width)
            if not last:
                shapes[f"joint_blocks.{i}.{side}.attn.proj"] = (width, width)
                shapes[f"joint_blocks.{i}.{side}.mlp.fc1"] = (4 * width, width)
                shapes[f"joint_blocks.{i}.{side}.mlp.fc2"] = (width, 4 * width)
    shapes |= {f"{name}_embedder.mlp.{i}": (width, width) for name in "ty" for i in (0, 2)}
    shapes |= {"final_layer.linear": (5, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    shapes |= {"context_embedder": (width, 7), "x_embedder.proj": (width, 4)}

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {name: draw(*shape) for name, shape in shapes.items()}
    factors = {name: (draw(shape[0], 2), draw(2, shape[1])) for name, shape in shapes.items()}

    def converted(arrays: dict[str, Any]) -> dict[str, Any]:
        tensors = {f"{name}.{end}": torch.from_numpy(a) for name, a in arrays.items() for end in ("weight", "bias")}
        return {
            k: v.numpy() for k, v in to_diffusers(Filling(tensors)).items() if k.endswith("weight") and v is not None
        }

    changed = {name: weights[name] + 1.5 * factors[name][0] @ factors[name][1] for name in weights}
    base, expected = converted(weights), converted(changed)
    (tmp_path / "base").mkdir()
    from conftest import write_safetensors

    write_safetensors(tmp_path / "base" / "model.safetensors", {k: v for k, v in base.items() if v.ndim == 2})
    lora_tensors = {}
    for name, (up, down) in factors.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        lora_tensors[f"{stem}.lora_up.weight"], lora_tensors[f"{stem}.lora_down.weight"] = up, down
        lora_tensors[f"{stem}.alpha"] = np.array(3.0, np.float32)
    write_safetensors(tmp_path / "lora.safetensors", lora_tensors)
    folded = ws.open(f"{tmp_path / 'base'}+{tmp_path / 'lora.safetensors'}")
    assert len(folded) > 30
    for name, tensor in folded.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-4, atol=1e-5)


class Filling(dict):  # type: ignore[type-arg]
    """A checkpoint in which whatever else a converter asks for is there."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(2, 2))


def test_whole_modules_are_refused_where_a_layout_cannot_say_them(tmp_path):
    config = lora(["to_q"], modules_to_save=["conv_out"])
    adapted(make_unet(), tmp_path / "peft", config)
    with pytest.raises(CheckpointError, match=r"replaces conv_out\.\w+ as a whole.*kohya"):
        ws.adapters.convert(tmp_path / "peft", "kohya")
    ws.adapters.convert(tmp_path / "peft", "peft", dtype="fp16").save(tmp_path / "half")
    assert {array.dtype.name for array in read_safetensors(tmp_path / "half").values()} == {"float16"}


def test_whole_modules_and_biases_stay_with_peft(pipeline, tmp_path):
    config = lora(["q_proj", "fc1"], bias="lora_only", modules_to_save=["final_layer_norm"])
    wrapped = peft.get_peft_model(make_clip(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "peft")
    wanted = run(wrapped.eval())
    base = pipeline / "text_encoder"
    ws.adapters.convert(tmp_path / "peft", "peft", base=base).save(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(make_clip(), tmp_path / "again")
    np.testing.assert_allclose(run(loaded.eval()), wanted, atol=CLOSE)
    np.testing.assert_allclose(run(filled(make_clip(), ws.open(f"{base}+{tmp_path / 'again'}"))), wanted, atol=CLOSE)
    with pytest.raises(CheckpointError, match="as a whole"):
        ws.adapters.convert(tmp_path / "peft", "diffusers")


def test_names_of_an_sdxl_lora_are_those_that_diffusers_makes_of_them():
    """Every module of SDXL's UNet under its publishers' names, and of its encoders, as kohya's trainer writes them."""
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as to_diffusers
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as to_blocks
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    attention = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    depths = {"input_blocks": {4: 2, 5: 2, 7: 10, 8: 10}, "output_blocks": {i: 10 if i < 3 else 2 for i in range(6)}}
    places = [(f"{way}.{i}.1", depth) for way, known in depths.items() for i, depth in known.items()]
    places.append(("middle_block.1", 10))
    modules = [f"{place}.{name}" for place, _ in places for name in ("proj_in", "proj_out")]
    for place, depth in places:
        inner = [*attention, "ff.net.0.proj", "ff.net.2"]
        modules += [f"{place}.transformer_blocks.{i}.{name}" for i in range(depth) for name in inner]
    layers = [f"text_model.encoder.layers.{i}" for i in range(2)]
    inner = [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    stems = [f"lora_unet_{module.replace('.', '_')}" for module in modules]
    stems += [f"lora_te{i}_{f'{one}.{name}'.replace('.', '_')}" for i in (1, 2) for one in layers for name in inner]
    assert len(stems) == 722 + 24
    ends = {"lora_down": (2, 4), "lora_up": (6, 2)}
    tensors = {f"{stem}.{end}.weight": torch.zeros(shape) for stem in stems for end, shape in ends.items()}
    ours = ws.adapters.normalize(
        Checkpoint("lora", {k: ArrayTensor(k, v.numpy()) for k, v in tensors.items()}, is_adapter=True)
    )
    theirs, _ = to_diffusers(to_blocks(dict(tensors), SimpleNamespace(layers_per_block=2)))
    expected = set()
    for model in ("unet", "text_encoder", "text_encoder_2"):
        own = {k.removeprefix(f"{model}."): v for k, v in theirs.items() if k.startswith(f"{model}.")}
        if model == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        expected |= {f"base_model.model.{model}/{name}" for name in own}
    assert set(ours) == expected
