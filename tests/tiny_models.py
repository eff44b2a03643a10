"""Small models with trained tokenizers, written by NumPy under the names that transformers gives their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import trained_tokenizers as trained
from conftest import llama_tensors, write_safetensors
from weightsmith.tokenizer.tokenizer import Tokenizer, read_tokenizer

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def llama(
    folder: Path,
    tokenizer: Any,
    *,
    rows: int | None = None,
    hidden: int = 8,
    seed: int = 0,
    tied: bool = False,
    tensors: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a Llama of random weights, with a row for each of its tokens or more; ``settings`` are the tokenizer's."""
    trained.save(tokenizer, folder, **settings)
    count = tokenizer.get_vocab_size() if rows is None else rows
    made = {**llama_tensors(seed, hidden=hidden, vocabulary=count), **(tensors or {})}
    if tied:
        del made["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", made)
    ids = {f"{role}_id": tokenizer.token_to_id(settings[role]) for role in ROLES if role in settings}
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": count, "hidden_size": hidden}
    content |= {"num_hidden_layers": 2, "tie_word_embeddings": tied, "torch_dtype": "float32", **ids, **(config or {})}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder."""
    found = read_tokenizer({path.name: path for path in folder.iterdir()}, folder.name)
    assert found is not None
    return found


def renumbered(tokenizer: Any, seed: int = 0) -> tuple[Any, np.ndarray[Any, Any]]:
    """Return a BPE tokenizer with its numbers shuffled, and the old number of each new one."""
    import tokenizers

    content = json.loads(tokenizer.to_str())
    order = np.random.default_rng(seed).permutation(tokenizer.get_vocab_size())
    now = np.argsort(order)
    content["model"]["vocab"] = {token: int(now[number]) for token, number in content["model"]["vocab"].items()}
    for entry in content["added_tokens"]:
        entry["id"] = int(now[entry["id"]])
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    return tokenizers.Tokenizer.from_str(json.dumps(content)), order
