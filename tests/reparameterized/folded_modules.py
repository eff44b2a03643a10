"""Models of PyTorch written as checkpoints and folded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import weightsmith as ws
from conftest import read_safetensors, write_safetensors


def write_module(path: Path, module: torch.nn.Module) -> Path:
    """Write a module's tensors; of tensors that share memory, the first, as safetensors does."""
    seen: dict[int, str] = {}
    state = module.state_dict()
    kept = {name: t for name, t in state.items() if seen.setdefault(t.data_ptr() or id(t), name) == name}
    write_safetensors(path, {name: tensor.numpy() for name, tensor in kept.items()})
    return path


def fold_and_save(
    folder: Path, module: torch.nn.Module, rules: Sequence[Any] = (), **options: Any
) -> dict[str, torch.Tensor]:
    """Write a module, fold it, save the result, and return the result's tensors."""
    folded = ws.fold_model(write_module(folder / "model.safetensors", module), rules)
    folded.save(folder / "out.safetensors", overwrite=True, **options)
    return {name: torch.from_numpy(a.copy()) for name, a in read_safetensors(folder / "out.safetensors").items()}
