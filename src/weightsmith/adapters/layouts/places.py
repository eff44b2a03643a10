"""Which module of which model a file's name of a module stands for, in every layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from weightsmith.adapters.layouts import naming
from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.towers import Tower
from weightsmith.adapters.layouts.words import readings
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.errors import CheckpointError, shown

_KOHYA = re.compile(r"(?:lora|oft)_(unet|transformer|te[123]?)_(.+)|lycoris_(.+)", re.DOTALL)
_COMPONENTS_OF_KOHYA = {
    "unet": ("unet", "transformer"),
    "transformer": ("transformer",),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    # T5 is the third encoder of Stable Diffusion 3, and the second of Flux.
    "te3": ("text_encoder_3", "text_encoder_2"),
}
_COMPONENT = re.compile(
    r"(unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior|controlnet)\.(?!h\.|wte\b|layers?\.)(.+)", re.DOTALL
)
_COMFY = (
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
)
# diffusers' attention processors, which held the factors before PEFT did, name projections so:
_PROCESSOR = re.compile(r"(.+\.attn\w*)\.processor\.(to_(?:q|k|v|out))")
_OLD_TEXT = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)")


def recognize(names: Iterable[str]) -> str | None:
    """Return the layout of an adapter's tensors by their names alone; None if they are no adapter's.

    Returns:
        ``peft``, ``kohya`` (with LyCORIS), ``diffusers``, ``original`` (the model publishers' own module names, with or
        without ComfyUI's prefixes) or ``mlx``.
    """
    known = list(names)
    if any(name.startswith(PREFIX) for name in known):
        return "peft"
    if not known or not p.is_adapter(known):
        return None
    found = [p.split(name) or p.split_scaling(name) or (name, "") for name in known]
    if all(_KOHYA.match(stem) for stem, _ in found):
        return "kohya"
    if any(part in (p.MLX_DOWN, p.MLX_UP) for _, part in found):
        return "mlx"
    stems = [stem for stem, _ in found]
    if any(stem.startswith(prefix) for stem in stems for prefix, _ in _COMFY):
        return "original"
    if any(
        re.match(r"(?:double_blocks|single_blocks|joint_blocks|input_blocks|output_blocks)\.", stem) for stem in stems
    ):
        return "original"
    if any(_COMPONENT.match(stem) or naming.component_of(stem) in ("unet", "transformer") for stem in stems):
        return "diffusers"
    return "peft"


def place(owner: str, stem: str, towers: Sequence[Tower]) -> tuple[str, str]:
    """Return the component and module that a file's name of a module stands for."""
    match = _KOHYA.fullmatch(stem)
    if match is not None:
        name, rest = match[1], (match[2] or match[3]).replace(".", "_")
        return _place_flat(owner, stem, _COMPONENTS_OF_KOHYA[name] if name else (), rest, towers)
    for prefix, component in _COMFY:
        if stem.startswith(prefix):
            module = naming.plain_original(stem.removeprefix(prefix))
            return component or (
                "unet" if naming.is_ldm([module]) else naming.component_of(module) or "transformer"
            ), module
    match = _COMPONENT.fullmatch(stem)
    component, module = (match[1], match[2]) if match is not None else ("", stem)
    processor = _PROCESSOR.fullmatch(module)
    if processor is not None:
        module = f"{processor[1]}.{processor[2]}{'.0' if processor[2] == 'to_out' else ''}"
    old = _OLD_TEXT.fullmatch(module)
    if old is not None:
        module = f"{old[1]}.{old[2]}_proj"
    module = naming.plain_original(module)
    return component or naming.component_of(module), module


def _place_flat(
    owner: str, stem: str, components: Sequence[str], name: str, towers: Sequence[Tower]
) -> tuple[str, str]:
    wanted = [tower for tower in towers if not components or tower.component in components or not tower.component]
    exact = [(tower.component, module) for tower in wanted for module in tower.find_flat(name)]
    if len(exact) > 1:
        raise CheckpointError(
            f"{owner}: {shown(stem)} may mean {exact[0][1]} or {exact[1][1]} of the base, which are written alike with "
            "underscores"
        )
    if exact:
        component, module = exact[0]
        return component or (components[0] if len(components) == 1 else naming.component_of(module)), module
    found = readings(name)
    if len(found) != 1:
        what = f"may mean {found[0]} or {found[1]}" if found else "is the name of no module that is known"
        way = "the base has no such module either" if towers else "name the base, whose modules decide (--base)"
        raise CheckpointError(f"{owner}: {shown(stem)} {what}: {way}")
    module = found[0]
    if len(components) == 1:
        return components[0], module
    if components == _COMPONENTS_OF_KOHYA["te3"]:
        there = [tower.component for tower in wanted if tower.component in components]
        return there[0] if there else components[0], module
    own = naming.component_of(module) or (components[-1] if components else "")
    return ("transformer" if components and own not in components else own), module
