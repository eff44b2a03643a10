"""The layout of a LoRA for PEFT: keys and shapes of tensors, and ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine.inputs import Inputs, Site
from weightsmith.adapters.peft_config import PREFIX, most_common, patterns
from weightsmith.checkpoint.tensor import Array

# Keys of configs that are kept where all adapters agree, and bear on no weight of the result.
KEPT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "lora_dropout")
# Keys that narrow down the modules that target_modules names.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def keys(site: Site) -> tuple[str, str]:
    """Return the keys of the tensors A and B of a layer."""
    stem = f"{PREFIX}{site.module}."
    if site.form == "embedding":
        return f"{stem}lora_embedding_A", f"{stem}lora_embedding_B"
    return f"{stem}lora_A.weight", f"{stem}lora_B.weight"


def shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the tensors A and B of a layer."""
    first, *others = site.shape
    if site.form == "embedding":
        return (rank, first), (*others, rank)
    return (rank, *others), (first, rank, *[1] * (len(others) - 1))


def arrays(site: Site, product: LowRank) -> tuple[Array, Array]:
    """Return A and B of a product, in the order of their elements in the file."""
    pair = (product.left.T, product.right.T) if site.form == "embedding" else (product.right, product.left)
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])


def product_of(site: Site, down: Array, up: Array) -> LowRank:
    """Return the product of A and B, in the order of :func:`arrays`; their shapes may be those of the file."""
    down, up = down.reshape(len(down), -1), up.reshape(up.shape[0], -1)
    return LowRank(down.T, up.T) if site.form == "embedding" else LowRank(up, down)


def lora_config(
    inputs: Inputs, ranks: Mapping[str, int], plain: Iterable[str] = (), *, bias: bool = False
) -> dict[str, Any]:
    """Return ``adapter_config.json`` for a LoRA whose scale is 1.

    Args:
        inputs: the adapters that it is made of.
        ranks: module -> rank.
        plain: the keys of its tensors that are no factors.
        bias: whether its layers B have biases.
    """
    default = most_common(ranks.values())
    own = patterns(ranks, default)
    config: dict[str, Any] = {"peft_type": "LORA"}
    config |= {key: value for key in KEPT if (value := agreed(inputs.configs, key)) is not None}
    config |= {
        "r": default,
        "lora_alpha": default,
        "rank_pattern": own,
        "alpha_pattern": own,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": bias,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(inputs, ranks),
        "modules_to_save": _saved(inputs.configs) if any(not key.endswith(".bias") for key in plain) else None,
        "bias": _bias(inputs.configs) if any(key.endswith(".bias") for key in plain) else "none",
    }
    return config


def agreed(configs: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Return what all configs say of a key, or None where they do not agree."""
    first, *others = (config.get(key) for config in configs)
    return first if all(other == first for other in others) else None


def _targets(inputs: Inputs, modules: Iterable[str]) -> list[str]:
    """Return ``target_modules``: the ends of names that the inputs gave, where these say it all, else whole names."""
    listed: set[str] = set()
    modules = list(modules)
    for adapter in inputs.adapters:
        config = adapter.checkpoint.config
        names = config.get("target_modules")
        if not isinstance(names, list) or any(config.get(key) for key in _NARROWING):
            return modules
        if adapter.kind.peft_type != "LORA" or not all(isinstance(name, str) for name in names):
            return modules
        listed |= set(names)
    return sorted(listed) if all(_ends(module, listed) for module in modules) else modules


def _ends(module: str, names: set[str]) -> bool:
    words = module.split(".")
    return any(".".join(words[place:]) in names for place in range(len(words)))


def _saved(configs: Sequence[Mapping[str, Any]]) -> list[str] | None:
    found: dict[str, None] = {}
    for config in configs:
        listed = config.get("modules_to_save")
        found |= dict.fromkeys(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else {}
    return list(found) or None


def _bias(configs: Sequence[Mapping[str, Any]]) -> str:
    found = {config.get("bias") for config in configs} & {"all", "lora_only"}
    return "all" if "all" in found else "lora_only"
