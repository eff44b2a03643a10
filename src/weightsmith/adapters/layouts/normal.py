"""Adapters of any layout brought into the normal form: PEFT's names and config."""

from __future__ import annotations

from weightsmith.adapters.layouts.config import to_checkpoint, to_config
from weightsmith.adapters.layouts.named import full_name, placed, tower_for
from weightsmith.adapters.layouts.read import read
from weightsmith.adapters.layouts.towers import towers_of
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.checkpoint.checkpoint import Checkpoint


def normalize(adapter: Checkpoint, base: Checkpoint | None = None) -> Checkpoint:
    """Return an adapter of any layout in the normal form: PEFT's names and config.

    Args:
        adapter: an adapter as it was opened: PEFT's, kohya's (with LyCORIS'), diffusers', MLX-LM's, or one under the
            names of a model's publisher.
        base: the model that it is for. Its names decide what underscores stand for, and are those of the result; the
            models of a pipeline stand before a slash: ``unet/conv_in``. Without one the names of diffusers are taken.

    Returns:
        The adapter, read lazily; itself where it has the form already.

    Raises:
        CheckpointError: if it is no adapter, cannot be understood, or needs a base to be.
        PlanError: if it does not fit the base.
    """
    towers = () if base is None else towers_of(base)
    whole = not adapter.components and adapter.config.get("peft_type") is not None
    if whole and (len(towers) < 2 or _fits(adapter, base) or not _has_layouts(adapter)):
        return adapter
    network = read(adapter, towers)
    names = {id(entry): name for entry, name in placed(network, towers)}
    plain = {
        ("", full_name(component, name, tower_for(component, towers))): tensor
        for (component, name), tensor in network.plain.items()
    }
    known = [name.removesuffix(".weight") for name in base or () if name.endswith(".weight")]
    config = to_config(network, network.entries, names, known)
    network.plain = plain
    return to_checkpoint(network, names, config, adapter)


def _fits(adapter: Checkpoint, base: Checkpoint | None) -> bool:
    """Whether an adapter in PEFT's layout names the models of a pipeline already."""
    components = () if base is None else base.components
    return any(name.startswith(f"{PREFIX}{component}/") for name in adapter for component in components)


def _has_layouts(adapter: Checkpoint) -> bool:
    return adapter.config.get("peft_type") in ("LORA", "LOHA", "LOKR")
