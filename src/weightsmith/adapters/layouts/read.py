"""Adapters of any layout, read as one :class:`Network`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.adapters.layouts import naming
from weightsmith.adapters.layouts import network as n
from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.config import from_config, refuse_only_peft
from weightsmith.adapters.layouts.named import named
from weightsmith.adapters.layouts.network import Entry, Network
from weightsmith.adapters.layouts.places import place, recognize
from weightsmith.adapters.layouts.tensors import transposed
from weightsmith.adapters.layouts.towers import Tower
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.folder import COMPONENTS
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.safetensors import read_metadata
from weightsmith.checkpoint.storage import open_source
from weightsmith.errors import CheckpointError, shown

# The keys of a file's header under which diffusers keeps the config, and weightsmith how ranks were put together.
DIFFUSERS_KEY = "lora_adapter_metadata"
# Tables of tokens, whose factors PEFT names otherwise than those of other layers.
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|wte)\Z")


def read(checkpoint: Checkpoint, towers: Sequence[Tower]) -> Network:
    """Read an adapter of any layout: its headers, alphas, and B where it is for a matrix that diffusers has divided.

    Args:
        checkpoint: the adapter, as it was opened.
        towers: the models of the base; none where there is no base.

    Returns:
        The adapter, its modules under the names of the base where there is one, and otherwise under those of diffusers.

    Raises:
        CheckpointError: if it is no adapter, or cannot be understood.
        PlanError: if it does not fit the base.
    """
    layout = "peft" if checkpoint.config.get("peft_type") else recognize(checkpoint)
    if checkpoint.components:
        network = _read_folders(checkpoint)
    elif layout is None:
        raise CheckpointError(
            f"{checkpoint.name} is no adapter: it has no adapter_config.json with a peft_type, and its tensors are "
            "named as in no known layout"
        )
    elif layout == "peft" and checkpoint.config.get("peft_type"):
        network = _read_peft(checkpoint, checkpoint.config, "")
    elif layout == "mlx":
        network = _read_mlx(checkpoint)
    else:
        network = _read_plain(checkpoint, towers, images=layout != "peft")
    return named(network, towers, _header(checkpoint))


def _header(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the texts of the header of an adapter that is one safetensors file."""
    paths = [identity.path for identity in checkpoint.identities]
    if len(paths) != 1 or not paths[0].endswith(".safetensors"):
        return {}
    return read_metadata(open_source(paths[0]))


def _read_peft(checkpoint: Checkpoint, config: Mapping[str, Any], component: str) -> Network:
    kind = config.get("peft_type")
    owner = checkpoint.name
    if not isinstance(kind, str) or kind not in n.ALPHA_KEYS:
        raise CheckpointError(
            f"{owner} is an adapter of the kind {shown(kind)[:60]}, which PEFT's layout alone can say; LORA, LOHA and "
            "LOKR have other layouts"
        )
    refuse_only_peft(owner, config)
    start = f"{component}/" if component else ""
    found, plain = [], {}
    for name, tensor in checkpoint.items():
        if not name.startswith(start):
            continue
        bare = name.removeprefix(start).removeprefix(PREFIX)
        divided = p.split(bare)
        if divided is None:
            inner = re.sub(r"\.modules_to_save(?:\.default)?\.|\.base_layer\.", ".", bare)
            plain[component, inner] = tensor
        elif divided[1] in (p.UNKNOWN, p.ALPHA, p.CHANGE, p.BIAS_CHANGE, p.MIDDLE):
            raise CheckpointError(f"{owner} holds {shown(name)}, which is no part of {kind} in PEFT's layout")
        else:
            found.append((component, divided[0], divided[1], divided[0], tensor))
    entries = n.collect(owner, found)
    from_config(checkpoint, iter(entries.values()), config, kind)
    mapping = config.get("auto_mapping")
    hints = {}
    if isinstance(mapping, Mapping) and isinstance(mapping.get("base_model_class"), str):
        hints = {"class": mapping["base_model_class"], "library": str(mapping.get("parent_library"))}
    return Network(owner, list(entries.values()), plain, hints)


def _read_folders(checkpoint: Checkpoint) -> Network:
    """Read an adapter of several models of a pipeline, each in a folder of its own."""
    configs = checkpoint.config[COMPONENTS]
    networks = [_read_peft(checkpoint, configs[component], component) for component in checkpoint.components]
    merged = Network(checkpoint.name, [entry for network in networks for entry in network.entries])
    for network in networks:
        merged.plain |= network.plain
    return merged


def _read_mlx(checkpoint: Checkpoint) -> Network:
    """Read an adapter of MLX-LM: ``y + scale (x a) b``, with a ``[in, rank]`` and b ``[rank, out]``."""
    owner, config = checkpoint.name, checkpoint.config
    settings = config.get("lora_parameters") or {}
    scale = settings.get("scale") if isinstance(settings, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e18:
        raise CheckpointError(f"{owner}: adapter_config.json must give lora_parameters.scale, a number")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"{owner}: adapter_config.json gives fine_tune_type as {shown(kind)}; lora and dora are known"
        )
    found = []
    for name, tensor in checkpoint.items():
        divided = p.split(name)
        if divided is None and kind == "dora" and name.endswith(".m"):
            divided = (name[:-2], p.MLX_MAGNITUDE)
        part = {p.MLX_DOWN: "lora_A.weight", p.MLX_UP: "lora_B.weight", p.MLX_MAGNITUDE: p.MAGNITUDE}
        if divided is None or divided[1] not in part or (divided[1] != p.MLX_MAGNITUDE and len(tensor.shape) != 2):
            raise CheckpointError(f"{owner} holds {shown(name)} as {list(tensor.shape)}, which is no part of MLX' LoRA")
        module, own = divided[0], part[divided[1]]
        if own != p.MAGNITUDE and _EMBEDDING.search(module):
            own = "lora_embedding_A" if own == "lora_A.weight" else "lora_embedding_B"
        found.append(("", module, own, module, tensor if own == p.MAGNITUDE else transposed(tensor)))
    entries = n.collect(owner, found)
    for entry in entries.values():
        entry.alpha = scale * (entry.rank or 0)
    return Network(owner, list(entries.values()))


def _read_plain(checkpoint: Checkpoint, towers: Sequence[Tower], *, images: bool) -> Network:
    """Read an adapter without a config: kohya's, diffusers', or one under the publishers' names.

    Without ``images``, its names are PEFT's, or a model's own.
    """
    owner = checkpoint.name
    found = []
    places: dict[str, tuple[str, str]] = {}
    for name, tensor in checkpoint.items():
        divided = p.split(name) or p.split_scaling(name)
        if divided is None or divided[1] in (p.UNKNOWN, p.MLX_DOWN, p.MLX_UP):
            raise CheckpointError(
                f"{owner} holds {shown(name)}, which belongs to no kind of adapter that has an equal in PEFT's layout "
                "(LoRA, DoRA, LoHa, LoKr, IA3 and changes of whole weights have)"
            )
        stem, part = divided
        if stem not in places:
            places[stem] = place(owner, stem, towers) if images else ("", stem.removeprefix(PREFIX))
        found.append((*places[stem], part, stem, tensor))
    collected = list(n.collect(owner, found).values())
    if not images and any(entry.kind in n.ALPHA_KEYS and entry.alpha is None for entry in collected):
        raise CheckpointError(
            f"{owner} has no adapter_config.json beside it, which says the scale of its changes: open the folder that "
            "holds both"
        )
    if naming.family_of(entry.module for entry in collected if entry.component == "transformer") == "flux":
        for entry in collected:
            if entry.component == "text_encoder_3":
                entry.component = "text_encoder_2"
    metadata = _header(checkpoint).get(DIFFUSERS_KEY)
    if metadata is not None:
        _apply_metadata(
            checkpoint, collected, parse_object(metadata.encode(), f"{owner}: {DIFFUSERS_KEY} in its header")
        )
    return Network(owner, collected)


def _apply_metadata(checkpoint: Checkpoint, entries: Sequence[Entry], metadata: Mapping[str, Any]) -> None:
    """Give modules the alphas of the configs that diffusers keeps in the header: ``unet.r``, ``unet.lora_alpha``, …"""
    for component in dict.fromkeys(entry.component for entry in entries):
        own = {
            key.removeprefix(f"{component}."): value
            for key, value in metadata.items()
            if key.startswith(f"{component}.")
        }
        members = [entry for entry in entries if entry.component == component]
        kinds = {entry.kind for entry in members}
        kind = kinds.pop() if len(kinds) == 1 else None
        if own and kind in n.ALPHA_KEYS:
            refuse_only_peft(checkpoint.name, own)
            from_config(checkpoint, iter(members), own, str(kind))
