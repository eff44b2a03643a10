"""The models that a base is made of, and the names of their modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from weightsmith.adapters.layouts import naming
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor

# Where one file holds a whole pipeline -> which model is there; None for a UNet or transformer.
_IN_ONE_FILE: Mapping[str, str | None] = {
    "model.diffusion_model.": None,
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
_WRAPPER = "text_model."


@dataclass(frozen=True)
class Tower:
    """One model of a base.

    Attributes:
        component: which model of a pipeline it is; empty for a base that is one model.
        prefix: what the base's names of its tensors begin with.
        weights: module -> its weight.
        biases: module -> its bias.
    """

    component: str
    prefix: str
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]

    @cached_property
    def flat(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a module with underscores for dots -> the modules that are so written."""
        found: dict[str, tuple[str, ...]] = {}
        for module in self.weights:
            flat = module.replace(".", "_")
            found[flat] = (*found.get(flat, ()), module)
        return found

    @cached_property
    def diffusers(self) -> Mapping[str, str]:
        """diffusers' name of a module -> the name here, for a UNet under its publishers' names; else nothing."""
        if not naming.is_ldm(self.weights):
            return {}
        named = {naming.ldm_to_diffusers(module, self.layers): module for module in self.weights}
        return {name: module for name, module in named.items() if name is not None}

    @cached_property
    def layers(self) -> int:
        """How many layers a block has, if this is a UNet."""
        return naming.layers_per_block(self.weights)

    @cached_property
    def family(self) -> str | None:
        """Whose transformer it is, if it is one; see :func:`naming.family_of`."""
        return naming.family_of(self.weights)

    def find(self, module: str) -> str | None:
        """Return the name here of a module; CLIP's encoders have or lack the wrapper ``text_model``."""
        for candidate in (module, module.removeprefix(_WRAPPER), _WRAPPER + module):
            if candidate in self.weights:
                return candidate
        return self.diffusers.get(module)

    def find_flat(self, name: str) -> tuple[str, ...]:
        """Return the modules here whose names, with underscores for dots, are this one."""
        flat = _WRAPPER.replace(".", "_")
        for candidate in (name, name.removeprefix(flat), flat + name):
            if candidate in self.flat:
                return self.flat[candidate]
        return ()


def towers_of(base: Checkpoint) -> tuple[Tower, ...]:
    """Return the models of a base: those of a pipeline, of a file that holds one, or the base itself."""
    if base.components:
        return tuple(_tower(base, component, f"{component}/") for component in base.components)
    found = [
        _tower(base, component, prefix)
        for prefix, component in _IN_ONE_FILE.items()
        if any(name.startswith(prefix) for name in base)
    ]
    return tuple(found) or (_tower(base, "", ""),)


def _tower(base: Checkpoint, component: str | None, prefix: str) -> Tower:
    weights, biases = (
        {
            name[len(prefix) : -len(ending)]: tensor
            for name, tensor in base.items()
            if name.startswith(prefix) and name.endswith(ending)
        }
        for ending in (".weight", ".bias")
    )
    if component is None:
        component = "unet" if naming.is_ldm(weights) else "transformer"
    return Tower(component, prefix, weights, biases)
