"""Adapters of any layout: names and shapes of tensors, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Target, check_tensor
from weightsmith.adapters.layouts.converted import LAYOUTS, convert
from weightsmith.adapters.layouts.normal import normalize
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

_WORDS = (
    b"lora_unet_ lora_te_ lora_te3_ lycoris_ unet. transformer. diffusion_model. base_model.model. text_encoder. "
    b"mid_block_attentions_0_proj_in input_blocks_1_1_proj_in double_blocks_0_img_attn_qkv single_blocks_0_linear1 "
    b"transformer_blocks.0.attn.to_q joint_blocks.0.x_block.attn.qkv conv_in processor.qkv_lora1 .lora_down.weight "
    b".lora_up.weight .alpha .lora_A.weight .lora_B.weight .dora_scale .lora_mid.weight .hada_w1_a .hada_w1_b "
    b".hada_w2_a .hada_w2_b .lokr_w1 .lokr_w2 .lokr_w2_a .on_input .weight .diff .lora_a .lora_b [2,4] [12,2] [] [0] "
    b'[12,1] "'
)
_MOST = 10_000


def _checkpoint(name: str, shapes: object, config: object = None, components: tuple[str, ...] = ()) -> Checkpoint:
    tensors = {}
    for key, shape in shapes.items() if isinstance(shapes, dict) else ():
        good = isinstance(shape, list) and len(shape) < 5 and all(type(n) is int and 0 <= n < 99 for n in shape)
        if good and np.prod(shape) < _MOST:
            tensors[key] = ArrayTensor(key, np.ones(shape, np.float32))
    companions = Companions(config if isinstance(config, dict) else {})
    return Checkpoint(name, tensors, companions, components=components, is_adapter=True)


_UNET = {
    "unet/conv_in.weight": [12, 4],
    "unet/conv_in.bias": [12],
    "unet/mid_block.attentions.0.proj_in.weight": [12, 4],
}
_DIT = {"transformer/transformer_blocks.0.attn.to_q.weight": [4, 4]}
_BASES = (
    None,
    _checkpoint("pipeline", {**_UNET, "unet/conv_in.bias": [12], **_DIT}, components=("unet", "transformer")),
    _checkpoint(
        "original", {"double_blocks.0.img_attn.qkv.weight": [12, 4], "single_blocks.0.linear1.weight": [28, 4]}
    ),
)


def run(content: bytes) -> None:
    """Bring an adapter, described as JSON, into the normal form and into every layout, with and without a base."""
    try:
        found = parse_object(content, "the adapter")
    except CheckpointError:
        return
    adapter = _checkpoint("adapter", found.get("tensors"), found.get("config"))
    for base in _BASES:
        try:
            for tensor in normalize(adapter, base).values():
                check_tensor(tensor)
        except (CheckpointError, PlanError):
            pass
        for layout in LAYOUTS:
            try:
                output = convert(adapter, layout, base=base)
                output.plan()
                for tensor in output.values():
                    check_tensor(tensor)
            except (CheckpointError, PlanError):
                pass


def seeds() -> Sequence[bytes]:
    """An adapter in each layout."""
    proj = "mid_block.attentions.0.proj_in"
    flat = f"lora_unet_{proj.replace('.', '_')}"
    joined = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {"down": [2, 4], "up": [12, 2]}
    adapters = [
        {"tensors": {**{f"{flat}.lora_{k}.weight": shape for k, shape in factors.items()}, f"{flat}.alpha": []}},
        {"tensors": {f"{joined}.lora_{k}.weight": shape for k, shape in factors.items()}},
        {"tensors": {f"unet.{proj}.lora_A.weight": [2, 4], f"unet.{proj}.lora_B.weight": [12, 2]}},
        {"tensors": {f"{flat}.hada_w{i}_{s}": shape for i in (1, 2) for s, shape in (("a", [12, 2]), ("b", [2, 4]))}},
        {"tensors": {f"{flat}.lokr_w1": [3, 2], f"{flat}.lokr_w2": [4, 2], f"{flat}.alpha": []}},
        {"tensors": {"lora_unet_conv_in.diff": [12, 4], "lora_unet_conv_in.diff_b": [12]}},
        {"tensors": {f"{flat}.weight": [12], f"{flat}.on_input": []}},
        {
            "tensors": {
                f"base_model.model.{proj}.lora_A.weight": [2, 4],
                f"base_model.model.{proj}.lora_B.weight": [12, 2],
            },
            "config": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "use_rslora": False},
        },
        {
            "tensors": {"model.layers.0.q_proj.lora_a": [4, 2], "model.layers.0.q_proj.lora_b": [2, 12]},
            "config": {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}},
        },
    ]
    return [json.dumps(adapter).encode() for adapter in adapters]


TARGET = Target("layouts", run, seeds, text_mutator(_WORDS.split()))
