"""What the first publishers of image models call a model's modules, and diffusers calls them.

The weights of a model are published by those who trained it under their own names (LDM's for Stable Diffusion's UNets,
Black Forest Labs' for Flux, Stability's for Stable Diffusion 3), in which kohya's trainers and ComfyUI write adapters.
diffusers has other names, and where the first publishers have one matrix for queries, keys and values, diffusers has
three. The rules were checked against the converters of diffusers and kohya-ss/sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

# How the rows of a matrix become those of several: as they are; queries, keys and values of equal height; the same, and
# the rest; two halves that change places; or the latter where the matrix has two times as many rows as columns.
Cut = Literal["whole", "thirds", "squares", "swapped", "swapped if last"]
# diffusers' blocks of a UNet have as many layers; the models' own names count on through all blocks.
LAYERS_PER_BLOCK = 2


@dataclass(frozen=True)
class Rule:
    """One module of the first publisher's, and those of diffusers that are the same.

    Attributes:
        original: its name; ``#`` stands for a number.
        parts: diffusers' names, in the order of their rows.
        cut: how the rows are divided among them.
    """

    original: str
    parts: tuple[str, ...]
    cut: Cut = "whole"


_BLOCK, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"


def _stream(prefix: str, names: tuple[str, str, str, str, str], *, text: bool) -> list[Rule]:
    """Return the rules of one of the two streams of a block, image or text, that Flux and Stable Diffusion 3 have."""
    projections = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
    out, norm, feed = ("to_add_out", "norm1_context", "ff_context") if text else ("to_out.0", "norm1", "ff")
    joined, proj, modulation, up, down = (prefix + name for name in names)
    return [
        Rule(joined, tuple(f"{_BLOCK}.attn.{name}" for name in projections), "thirds"),
        Rule(proj, (f"{_BLOCK}.attn.{out}",)),
        # The last block's text stream has no way on: its modulation is of the kind that the model's last has.
        Rule(modulation, (f"{_BLOCK}.{norm}.linear",), "swapped if last" if text else "whole"),
        Rule(up, (f"{_BLOCK}.{feed}.net.0.proj",)),
        Rule(down, (f"{_BLOCK}.{feed}.net.2",)),
    ]


def _embedder(original: str, diffusers: str, first: str, second: str) -> list[Rule]:
    whole = f"time_text_embed.{diffusers}"
    return [Rule(f"{original}.{first}", (f"{whole}.linear_1",)), Rule(f"{original}.{second}", (f"{whole}.linear_2",))]


_LAST = [
    # diffusers' last modulation has scale before shift, the publishers' shift before scale.
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swapped"),
    Rule("final_layer.linear", ("proj_out",)),
]
_FLUX_STREAM = ("attn.qkv", "attn.proj", "mod.lin", "mlp.0", "mlp.2")
_SD3_STREAM = ("attn.qkv", "attn.proj", "adaLN_modulation.1", "mlp.fc1", "mlp.fc2")
FLUX = (
    *_stream("double_blocks.#.img_", _FLUX_STREAM, text=False),
    *_stream("double_blocks.#.txt_", _FLUX_STREAM, text=True),
    Rule(
        "single_blocks.#.linear1",
        (*(f"{_SINGLE}.attn.to_{name}" for name in "qkv"), f"{_SINGLE}.proj_mlp"),
        "squares",
    ),
    Rule("single_blocks.#.linear2", (f"{_SINGLE}.proj_out",)),
    Rule("single_blocks.#.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    Rule("img_in", ("x_embedder",)),
    Rule("txt_in", ("context_embedder",)),
    *_embedder("time_in", "timestep_embedder", "in_layer", "out_layer"),
    *_embedder("vector_in", "text_embedder", "in_layer", "out_layer"),
    *_embedder("guidance_in", "guidance_embedder", "in_layer", "out_layer"),
    *_LAST,
)
SD3 = (
    *_stream("joint_blocks.#.x_block.", _SD3_STREAM, text=False),
    *_stream("joint_blocks.#.context_block.", _SD3_STREAM, text=True),
    Rule("joint_blocks.#.x_block.attn2.qkv", tuple(f"{_BLOCK}.attn2.to_{name}" for name in "qkv"), "thirds"),
    Rule("joint_blocks.#.x_block.attn2.proj", (f"{_BLOCK}.attn2.to_out.0",)),
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    Rule("context_embedder", ("context_embedder",)),
    *_embedder("t_embedder", "timestep_embedder", "mlp.0", "mlp.2"),
    *_embedder("y_embedder", "text_embedder", "mlp.0", "mlp.2"),
    *_LAST,
)
FAMILIES: Mapping[str, tuple[Rule, ...]] = {"flux": FLUX, "sd3": SD3}
# The modules by which a transformer's names tell whose they are.
_TELLING = {
    "flux": r"double_blocks\.|single_blocks\.|single_transformer_blocks\.|(?:img|txt|time|vector|guidance)_in\b"
    r"|x_embedder\Z|time_text_embed\.guidance_embedder",
    "sd3": r"joint_blocks\.|[ty]_embedder\.|pos_embed\.proj|transformer_blocks\.\d+\.attn2\.|x_embedder\.proj",
}
_XLABS = re.compile(r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12])")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def family_of(modules: Iterable[str]) -> str | None:
    """Return whose transformer modules belong to, ``flux`` or ``sd3``; None where their names do not tell."""
    found = {name for module in modules for name, telling in _TELLING.items() if re.match(telling, module)}
    return found.pop() if len(found) == 1 else None


@lru_cache
def original_rules(family: str) -> Callable[[str], tuple[Rule, tuple[str, ...]] | None]:
    """Return a function from a module's name to the rule about it and diffusers' names for it."""
    rules = {rule.original: rule for rule in FAMILIES[family]}

    def find(module: str) -> tuple[Rule, tuple[str, ...]] | None:
        number, general = _general(module)
        rule = rules.get(general)
        return None if rule is None else (rule, tuple(part.replace("#", number) for part in rule.parts))

    return find


@lru_cache
def fused_rules(family: str) -> Callable[[str], tuple[Rule, str, int] | None]:
    """Return a function from diffusers' name of a module to the rule, the original's name and which of its parts."""
    rules = {part: (rule, i) for rule in FAMILIES[family] for i, part in enumerate(rule.parts)}

    def find(module: str) -> tuple[Rule, str, int] | None:
        number, general = _general(module)
        known = rules.get(general)
        return None if known is None else (known[0], known[0].original.replace("#", number), known[1])

    return find


def _general(module: str) -> tuple[str, str]:
    """Return the number of a module's block, and its name with ``#`` in that place."""
    number = _NUMBER.search(module)
    if number is None or not re.match(r"\w+_blocks\.\d", module):
        return "", module
    return number[0], f"{module[: number.start()]}#{module[number.end() :]}"


def plain_original(module: str) -> str:
    """Return the publisher's name of a module that XLabs' trainer names after its own processors."""
    match = _XLABS.fullmatch(module)
    if match is None:
        return module
    return f"double_blocks.{match[1]}.{'img' if match[3] == '1' else 'txt'}_attn.{match[2]}"


_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_PLACE = re.compile(r"(input_blocks|output_blocks)\.(\d{1,3})\.([012])(?:\.(.+))?|middle_block\.([012])\.(.+)")
_LDM = re.compile(r"(?:input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\.\d")
_UNET = re.compile(r"(?:down_blocks|up_blocks)\.\d|mid_block\.|conv_in\b|conv_out\b|time_embedding\.|add_embedding\.")
_CLIP = re.compile(r"text_model\.|(?:encoder\.layers\.\d+\.(?:self_attn|mlp)\.)|text_projection\b")
_T5 = re.compile(r"encoder\.block\.\d+\.layer\.")


def is_ldm(modules: Collection[str]) -> bool:
    """Whether modules are a UNet's under the names of its first publishers."""
    return any(_LDM.match(module) for module in modules)


def ldm_to_diffusers(module: str, layers: int = LAYERS_PER_BLOCK) -> str | None:
    """Return diffusers' name of a module of a Stable Diffusion UNet (1.x, 2.x, XL); None if it has no such module.

    The publishers count layers through all blocks: every block has ``layers`` of them and one more, which on the way
    down is the step to the next, and on the way up a layer.

    Args:
        module: its publishers' name, such as ``input_blocks.4.1.proj_in``.
        layers: layers in a block.
    """
    match = _PLACE.fullmatch(module)
    if module in _TOP or match is None:
        return _TOP.get(module)
    way, number, slot, inner, middle, core = match.groups()
    if middle == "1":
        return f"mid_block.attentions.0.{core}"
    if middle is not None:
        return f"mid_block.resnets.{int(middle) // 2}.{_RESNET.get(core, core)}"
    count = int(number) - (way == "input_blocks")
    block, layer = divmod(count, layers + 1)
    side = f"{'down' if way == 'input_blocks' else 'up'}_blocks.{block}"
    if inner == "op" and slot == "0":
        return f"{side}.downsamplers.0.conv"
    if inner == "conv" and slot != "0":
        return f"{side}.upsamplers.0.conv"
    if inner is None or slot == "2":
        return None
    if slot == "0":
        return f"{side}.resnets.{layer}.{_RESNET.get(inner, inner)}"
    return f"{side}.attentions.{layer}.{inner}"


def layers_per_block(modules: Collection[str]) -> int:
    """Return how many layers a block of a UNet has, as its modules' names tell in either way to write them."""
    steps = [int(match[1]) for module in modules if (match := re.fullmatch(r"input_blocks\.(\d{1,3})\.0\.op", module))]
    if steps:
        return min(steps) - 1
    found = {match[1] for module in modules if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", module))}
    return len(found) or LAYERS_PER_BLOCK


def component_of(module: str) -> str:
    """Return which model of a pipeline a module belongs to, by its name alone; an empty text where it does not tell."""
    if _UNET.match(module) or _LDM.match(module):
        return "unet"
    if _CLIP.match(module) or _T5.match(module):
        return "text_encoder"
    if family_of([module]) is not None or re.match(r"transformer_blocks\.\d+\.(?:attn|ff|norm1)", module):
        return "transformer"
    return ""


def is_t5(module: str) -> bool:
    """Whether a module is one of a T5's encoder."""
    return _T5.match(module) is not None
