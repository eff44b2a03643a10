"""Layers, found in the names of tensors.

A stack is a prefix under which numbered blocks lie: ``model.layers`` in ``model.layers.7.mlp.up_proj.weight``.
The outermost number counts, so experts and sublayers belong to their layer. A numbered name that holds bare
parameters (``classifier.2.weight``) is a stack only in models that have no other. A list of whole models
(``0.auto_model.encoder.layer.7…`` of a sentence encoder) is no stack: the layers are those inside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

# A number as modules are numbered: no leading zero, or the name could not be written back; no endless digits.
_NUMBER = re.compile(r"(?<![^./])(0|[1-9][0-9]{0,8})(?![^.])")
_BARE = re.compile(r"^(\d+\.)*(parametrizations\.\w+\.\w+|[^.]*)$")
_DEEPEST = 8
# Keys under which configs count layers.
LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "num_single_layers",
    "depth",
    "num_blocks",
)
# Tensors outside layers that belong before the first: embeddings and stems, with their norms …
_BEFORE = re.compile(
    r"(^|[._/])(emb\w*|wte|wpe|shared|tok_embeddings|position\w*|patch(?!_merg)\w*|cls_token|class_embedding"
    r"|mask_token|register_tokens|stem|conv1|conv2|bn1|pre_?layr?norm|(layer)?norm_pre|ln_pre|time_proj|x_embedder"
    r"|rotary\w*|relative_attention_bias|altup_projections|per_layer_\w+)([._/]|$)"
    r"|(^|[./])(\w+_in)([./]|$)"
)
# … but these come after the last whatever else their names say.
_MTP = r"mtp\w*"
_AFTER = re.compile(rf"(^|[./])({_MTP}|lm_head|emb\w*_out)([./]|$)")
# Stacks behind another, which predict further tokens from what its last layer gives.
_PREDICTION = re.compile(rf"(^|[./]){_MTP}([./]|$)")
_ATTENTION = r"(attn|attention|Attention)[\w.]*\."
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("router", r"(^|\.)(router|gate|shared_expert_gate)(\.|$)"),
        ("expert", r"experts?\."),
        # The ways into and out of a block of a UNet, which has its attention and its MLP in it.
        ("attention", r"(^|\.)attentions\.\d+\.proj_(in|out)(\.|$)"),
        (
            "head",
            r"(^|\.)(lm_head|embed_out|score|classifier|head|cls|pooler|output_layer|output_projection|qa_outputs"
            r"|vocab_projector|proj_out)(\.|$)|^(model\.)?output\.weight$",
        ),
        ("norm", r"(norm|ln|ln_\w+|LayerNorm|(\b|_)bn)\d*(\.|_|$)"),
        ("embedding", r"(embed|wte|wpe|shared\.weight|cls_token|(^|\.)emb\.)"),
        ("attention_q", r"(\.)(q|query|to_q|wq|q_proj|q_lin|q_[ab]_proj)(\.|$)"),
        ("attention_k", r"(\.)(k|key|to_k|wk|k_proj|k_lin)(\.|$)"),
        ("attention_v", r"(\.)(v|value|to_v|wv|v_proj|v_lin)(\.|$)"),
        ("attention_o", _ATTENTION + r"(o|o_proj|out_proj|out_lin|c_proj|to_out|wo|dense)(\.|$)"),
        ("attention", r"(attn|attention(?!s\.\d+\.transformer_blocks)|Attention|qkv)"),
        ("conv", r"conv"),
        ("mlp", r"(mlp|ffn?|feed_forward|intermediate|DenseReluDense|fc\d|dense|w[123]|output)(\.|$|_)"),
    )
)
# What a name says at a number: what stands before it, the number, and what stands after it.
_Split = tuple[str, int, str]


@dataclass(frozen=True)
class Stack:
    """Numbered blocks under one prefix.

    Attributes:
        prefix: what stands before the number, without the dot: ``model.layers``, ``encoder.block``, ``h``.
        indices: the numbers that occur, in order.
    """

    prefix: str
    indices: tuple[int, ...]

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Number of a layer -> how many layers come before it."""
        return {index: rank for rank, index in enumerate(self.indices)}

    def name(self, index: int, suffix: str) -> str:
        """Return the name of a tensor of one of its layers."""
        head = f"{self.prefix}." if self.prefix and not self.prefix.endswith("/") else self.prefix
        return f"{head}{index}.{suffix}" if suffix else f"{head}{index}"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its stack, the number of its layer, and the rest of its name."""

    stack: Stack
    index: int
    suffix: str


@dataclass(frozen=True)
class Architecture:
    """The layers of a model.

    Attributes:
        stacks: its stacks, in the order of their first tensors.
    """

    stacks: tuple[Stack, ...]
    _known: Mapping[str, tuple[_Split, ...]] = field(default_factory=dict, repr=False)

    @property
    def main(self) -> tuple[Stack, ...]:
        """The stacks without those that only predict further tokens (multi-token prediction), if there are others."""
        return tuple(stack for stack in self.stacks if not _PREDICTION.search(stack.prefix)) or self.stacks

    @cached_property
    def _by_prefix(self) -> dict[str, Stack]:
        return {stack.prefix: stack for stack in self.stacks}

    @cached_property
    def _members(self) -> dict[tuple[str, int], list[str]]:
        found: dict[tuple[str, int], list[str]] = {}
        for name in self._known:
            place = self.locate(name)
            if place is not None:
                found.setdefault((place.stack.prefix, place.index), []).append(place.suffix)
        return found

    def locate(self, name: str) -> Place | None:
        """Return where a tensor lies, or None if it belongs to no layer."""
        splits = self._known.get(name)
        for prefix, index, suffix in _splits(name) if splits is None else splits:
            stack = self._by_prefix.get(prefix)
            if stack is not None:
                return Place(stack, index, suffix) if index in stack.ranks else None
        return None

    def members(self, stack: Stack, index: int) -> dict[str, str]:
        """Return the tensors of one layer: the part of the name after the number -> the whole name."""
        return {suffix: stack.name(index, suffix) for suffix in self._members.get((stack.prefix, index), [])}


def analyse(names: Iterable[str], config: Mapping[str, Any] | None = None) -> Architecture:
    """Find the stacks of layers among the names of a model's tensors, in time linear in their number.

    Args:
        names: the tensors' names.
        config: the model's config; where it counts layers, it tells a wrapper that holds one whole model
            (``0.auto_model.…``) from a stack of one layer.
    """
    known = {name: tuple(_splits(name)) for name in names}
    numbered = [splits for splits in known.values() if splits]
    found = _stacks(numbered, frozenset(_counts(config or {})))
    blocks = {prefix: indices for prefix, (indices, block) in found.items() if block}
    chosen = blocks or {prefix: indices for prefix, (indices, _) in found.items()}
    return Architecture(tuple(Stack(prefix, tuple(sorted(indices))) for prefix, indices in chosen.items()), known)


def _splits(name: str) -> Iterator[_Split]:
    """Take a name apart at its numbers, the outermost first; a name with more than any model has is hostile."""
    for match in islice(_NUMBER.finditer(name), _DEEPEST):
        yield name[: match.start()].removesuffix("."), int(match[1]), name[match.end() + 1 :]


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the layer counts that a config states, those of its parts included."""
    for key, value in config.items():
        if key in LAYER_COUNTS and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _counts(value)


def _stacks(names: Sequence[tuple[_Split, ...]], counts: frozenset[int]) -> dict[str, tuple[set[int], bool]]:
    """Return prefix -> the numbers under it, and whether they are blocks rather than bare parameters."""
    groups: dict[str, list[tuple[_Split, ...]]] = {}
    for splits in names:
        groups.setdefault(splits[0][0], []).append(splits)
    found: dict[str, tuple[set[int], bool]] = {}
    for prefix, group in groups.items():
        indices = {splits[0][1] for splits in group}
        if any(len(splits) > 1 for splits in group) and _may_hold_models(group, indices, counts):
            deeper = _stacks([splits[1:] for splits in group if len(splits) > 1], counts)
            sizes = {len(numbers) for numbers, block in deeper.values() if block}
            if sizes & counts if len(indices) == 1 else any(size > 1 for size in sizes):
                found |= deeper
                continue
        found[prefix] = indices, any(not _BARE.match(splits[0][2]) for splits in group)
    return found


def _may_hold_models(group: Sequence[tuple[_Split, ...]], indices: set[int], counts: frozenset[int]) -> bool:
    """Whether numbered modules may be whole models: alone against the config's count, or with nothing in common."""
    if len(indices) == 1:
        return bool(counts) and 1 not in counts
    owner: dict[str, int] = {}
    blocks = (splits[0] for splits in group if not _BARE.match(splits[0][2]))
    return all(owner.setdefault(suffix, index) == index for _, index, suffix in blocks)


def before_layers(name: str) -> bool:
    """Whether a tensor outside all layers belongs before the first (an embedding, say) or after the last."""
    return _BEFORE.search(name) is not None and _AFTER.search(name) is None


def role(name: str) -> str:
    """Return what a tensor is for, as far as its name tells.

    One of ``attention_q``, ``attention_k``, ``attention_v``, ``attention_o``, ``attention``, ``mlp``,
    ``norm``, ``embedding``, ``head``, ``router``, ``expert``, ``conv`` and ``other``.
    """
    return next((known for known, pattern in _ROLES if pattern.search(name)), "other")
