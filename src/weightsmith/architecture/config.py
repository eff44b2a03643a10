"""What a model's config says of its layers, dtype and tied weights, and how it changes with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weightsmith.architecture.stacks import Architecture, Stack

# Keys under which configs count layers. Which one a stack follows is found by its value, and by the part of the
# config that is about the stack's tower.
_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_blocks",
)
_TOWERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("vision_config", re.compile(r"vision|visual|image|vit")),
    ("text_config", re.compile(r"text|language")),
    ("llm_config", re.compile(r"text|language")),
    ("audio_config", re.compile(r"audio|speech")),
    ("encoder", re.compile(r"encoder")),
    ("decoder", re.compile(r"decoder")),
)
_HEADS = re.compile(r"^(.*\.)?(lm_head|embed_out|output|cls\.predictions\.decoder|proj_out)\.weight$")
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight",
    "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
    "model.tok_embeddings.weight",
    "model.decoder.embed_tokens.weight",
    "backbone.embeddings.weight",
    "shared.weight",
)
# T5 and its kin keep one table under three names.
_SHARED = re.compile(r"^(encoder|decoder|model\.encoder|model\.decoder)\.embed_tokens\.weight$")


def with_layers(
    config: Mapping[str, Any], stack: Stack, picked: Sequence[int], architecture: Architecture
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a model whose layers were put together anew, and what a person should know.

    Args:
        config: the donor's config.
        stack: the donor's stack that was changed.
        picked: for every new layer, the number of the donor's layer whose settings it takes, counted from 0.
        architecture: the donor's layers.
    """
    old, new = len(stack.indices), len(picked)
    changed = copy.deepcopy(dict(config))
    keys = list(_count_keys(changed, stack, old, several=len(architecture.stacks) > 1))
    if old == new and tuple(picked) == tuple(range(old)):
        return changed, []
    notes = []
    if not keys:
        notes.append(f"the config has no key with the old number of layers, {old}, so it still says what it said")
    for holder, key in keys:
        holder[key] = new
        for name, value in holder.items():
            if isinstance(value, list) and len(value) == old:
                holder[name] = [value[i] if i < old else value[-1] for i in picked]
        if isinstance(holder.get("max_window_layers"), int):
            holder["max_window_layers"] = min(holder["max_window_layers"], new)
    return changed, notes


def _count_keys(
    config: dict[str, Any], stack: Stack, count: int, *, several: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the keys that count a stack's layers: in its tower's part of the config first, else at the top."""
    for part, pattern in _TOWERS:
        holder = config.get(part)
        if isinstance(holder, dict) and pattern.search(stack.prefix):
            found = [key for key in _COUNTS if holder.get(key) == count]
            if found:
                yield from ((holder, key) for key in found)
                return
    found = [key for key in _COUNTS if config.get(key) == count]
    if several:
        wanted = "decoder" if "decoder" in stack.prefix else "encoder" if "encoder" in stack.prefix else ""
        own = [key for key in found if wanted and wanted in key]
        others = [key for key in found if "coder" not in key]
        found = own or others
    yield from ((config, key) for key in found)
    for part in ("text_config", "llm_config"):
        holder = config.get(part)
        if not found and isinstance(holder, dict):
            yield from ((holder, key) for key in _COUNTS if holder.get(key) == count)


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the config with the dtype of its weights, under whichever of the two keys it uses.

    transformers wrote ``torch_dtype`` until its version 5, and reads both.
    """
    changed = dict(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]
    for key in keys:
        changed[key] = name
    for part, value in changed.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changed[part] = with_dtype(value, name)
    return changed


def tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the output head to the embeddings."""
    own = config.get("tie_word_embeddings")
    text = config.get("text_config")
    if own is None and isinstance(text, Mapping):
        own = text.get("tie_word_embeddings")
    if own is None:
        # What these leave out because it is their default.
        own = config.get("model_type") in _TIED_BY_DEFAULT
    return bool(own)


_TIED_BY_DEFAULT = frozenset({"gpt2", "bert", "roberta", "t5", "bart", "gemma", "gemma2", "distilbert", "albert"})


def untie(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model whose output head is its own."""
    changed = {**config, "tie_word_embeddings": False}
    text = changed.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def tied_source(name: str, names: Iterable[str]) -> str | None:
    """Return the tensor that a missing one is tied to, or None.

    Args:
        name: the name of the missing tensor, such as ``lm_head.weight``.
        names: the names that the model has.
    """
    if _HEADS.match(name) is None and _SHARED.match(name) is None:
        return None
    known = names if isinstance(names, Mapping) else set(names)
    return next((embedding for embedding in _EMBEDDINGS if embedding in known and embedding != name), None)
