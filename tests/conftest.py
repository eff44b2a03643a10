"""Inputs for tests: small checkpoints, written by the reference library, not by the code under test."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import settings

Arrays = Mapping[str, np.ndarray[Any, Any]]
WriteModel = Callable[..., Path]

# Jobs in the background of a script ignore Ctrl-C, and so would every process that they start: these tests' included.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long a case takes says more of the other work on a machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def write_safetensors(path: Path, tensors: Arrays) -> None:
    """Write a file with the safetensors library."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=str(array.dtype), shape=list(tensors[name].shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    path.write_bytes(safetensors.serialize(specs, {"format": "pt"}))


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read a file, or all files of a folder, with the safetensors library."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    names = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
    extra = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }
    found = {}
    for file in files:
        for name, entry in safetensors.deserialize(file.read_bytes()):
            dtype = np.dtype(extra.get(entry["dtype"]) or names[entry["dtype"]])
            found[name] = np.frombuffer(bytes(entry["data"]), dtype).reshape(entry["shape"])
    return found


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Return a function that writes a folder in the transformers layout: ``write_model(name, tensors)``."""

    def write(name: str, tensors: Arrays, config: Mapping[str, Any] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", tensors)
        default = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
        (folder / "config.json").write_text(json.dumps(default if config is None else config))
        return folder

    return write


def llama_tensors(
    seed: int,
    *,
    layers: int = 2,
    hidden: int = 8,
    vocabulary: int = 16,
    scale: float = 1.0,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return random tensors under a Llama's names."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * scale).astype(dtype)

    tensors = {"model.embed_tokens.weight": draw(vocabulary, hidden)}
    for i in range(layers):
        head = f"model.layers.{i}"
        tensors[f"{head}.self_attn.q_proj.weight"] = draw(hidden, hidden)
        tensors[f"{head}.mlp.up_proj.weight"] = draw(2 * hidden, hidden)
        tensors[f"{head}.input_layernorm.weight"] = draw(hidden)
    tensors["model.norm.weight"] = draw(hidden)
    tensors["lm_head.weight"] = draw(vocabulary, hidden)
    return tensors
