"""The settings of ``adapter_config.json`` for each kind, and other names for modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightsmith.adapters.peft_config import PREFIX, most_common, patterns
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import MethodError, PlanError, shown
from weightsmith.extraction.lowrank import LowRank
from weightsmith.extraction.parts import Part
from weightsmith.extraction.placement import target_names
from weightsmith.extraction.recipe import Recipe


class Renaming:
    """Other names for modules, by regular expressions."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Read ``PATTERN=REPLACEMENT`` each; they are applied in their order.

        Raises:
            MethodError: if one is not that.
        """
        self._pairs = [_pattern(text) for text in texts]

    def name(self, name: str) -> str:
        """Return the name of a module, or of a tensor, where the adapter is loaded."""
        for pattern, replacement in self._pairs:
            name = pattern.sub(replacement, name)
        return name

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's tensors under these names.

        Raises:
            PlanError: if two of them get the same.
        """
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = PREFIX + self.name(key.removeprefix(PREFIX))
            if name in found:
                raise PlanError(f"rename gives {name} to two tensors; the second is {key.removeprefix(PREFIX)}")
            found[name] = tensor
        return found

    def targets(self, modules: Iterable[str], paths: Iterable[str]) -> list[str] | str:
        """Return ``target_modules``; see :func:`target_names`."""
        targets = dict.fromkeys(map(self.name, modules))
        return target_names(targets, {*targets, *map(self.name, paths)})


def low_rank_config(
    recipe: Recipe, parts: Sequence[LowRank], paths: Iterable[str], renaming: Renaming, *, biases: bool
) -> dict[str, Any]:
    """Return the settings of a LoRA.

    Args:
        recipe: how it is taken out.
        parts: its matrices.
        paths: all modules of the model.
        renaming: other names for modules.
        biases: whether it holds biases of its layers.
    """
    ranks = {module: part.rank for part in parts for module in part.modules}
    common = most_common(part.rank for part in parts)
    # A scale of 1: alpha is the rank, of every module.
    differing = patterns({renaming.name(module): rank for module, rank in ranks.items()}, common)
    ties = {"ensure_weight_tying": True} if len(ranks) > len(parts) else {}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": differing,
        "alpha_pattern": differing,
        "target_modules": renaming.targets(ranks, paths),
        "fan_in_fan_out": any(part.layer.form == "transposed" for part in parts),
        "bias": "lora_only" if biases else "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_dora": recipe.dora,
        "use_rslora": False,
        **ties,
    }


def shira_config(recipe: Recipe, parts: Sequence[Part], paths: Iterable[str], renaming: Renaming) -> dict[str, Any]:
    """Return the settings of a SHiRA; see :func:`low_rank_config`."""
    return {
        "peft_type": "SHIRA",
        "r": recipe.rank,
        "mask_type": "random",
        "target_modules": renaming.targets((part.module for part in parts), paths),
        "fan_in_fan_out": False,
        "init_weights": True,
    }


def own_config(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a kind whose layout is ours."""
    if recipe.kind == "sparse":
        return {"peft_type": "WEIGHTSMITH_SPARSE", "density": recipe.density, "scope": recipe.scope}
    if recipe.kind == "sign":
        return {"peft_type": "WEIGHTSMITH_SIGNS"}
    return {"peft_type": "WEIGHTSMITH_QUANTIZED", "bits": recipe.bits, "quantizer": recipe.quantizer}


def _pattern(text: str) -> tuple[re.Pattern[str], str]:
    """Read ``PATTERN=REPLACEMENT``."""
    pattern, separator, replacement = text.partition("=")
    try:
        if not separator:
            raise re.error("no '='")
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")
    except (re.error, IndexError) as error:
        raise MethodError(f"rename {shown(text)} is not PATTERN=REPLACEMENT: {error}") from error
    return compiled, replacement
