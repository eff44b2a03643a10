"""LoRAs written by hand, and their deltas computed plainly: whole matrices, float64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conftest import read_safetensors, write_safetensors

Q0, Q1, MLP = "model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.mlp"
SHAPES = {Q0: (24, 18), Q1: (24, 18), MLP: (30, 24)}
PREFIX = "base_model.model."


def write_lora(
    folder: Path,
    rank: int,
    seed: int,
    *,
    alpha: float = 12,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: Any = np.float32,
    extra: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA of random factors; a name with ``embed`` is an embedding, four axes are a convolution."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for module, (first, *others) in shapes.items():
        if "embed" in module:
            down, up = rng.standard_normal((rank, first)), rng.standard_normal((*others, rank))
            tensors |= {f"{module}.lora_embedding_A": down, f"{module}.lora_embedding_B": up}
            continue
        down = rng.standard_normal((rank, *others))
        up = rng.standard_normal((first, rank, *[1] * (len(others) - 1)))
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    tensors |= dict(extra or {})
    folder.mkdir(parents=True)
    cast = {PREFIX + name: np.asarray(value).astype(dtype) for name, value in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", cast)
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Return the delta of every module of a LoRA's folder: a matrix ``[out, everything else]``."""
    tensors = {name.removeprefix(PREFIX): value.astype(np.float64) for name, value in read_safetensors(folder).items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, down in tensors.items():
        if ".lora_A." in name or name.endswith("lora_embedding_A"):
            module = name.split(".lora_")[0]
            up = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank = len(down)
            assert config.get("rank_pattern", {}).get(module, config["r"]) == rank
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            if "embedding" in name:
                found[module] = scale * (up @ down).T
            else:
                found[module] = scale * up.reshape(len(up), rank) @ down.reshape(rank, -1)
    return found


def true_sum(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    """Return the weighted sum of deltas; a module that an adapter lacks counts as zeros."""
    total: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the Frobenius norm of a difference as a share of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of a rank, by a plain SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]
