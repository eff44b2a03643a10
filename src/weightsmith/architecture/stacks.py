"""Layers, found in the names of tensors.

A stack is a prefix under which numbered blocks lie: ``model.layers`` in ``model.layers.7.mlp.up_proj.weight``.
The outermost number counts, so experts and sublayers belong to their layer. A numbered name that holds bare
parameters (``classifier.2.weight``) is a stack only in models that have no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_NUMBERED = re.compile(r"^(?P<prefix>.*?)(?:^|\.)(?P<index>\d+)(?:\.(?P<suffix>.+))?$")
_BARE = re.compile(r"^[^.]+$")
# Tensors outside layers that belong before the first: embeddings and stems, with their norms.
_BEFORE = re.compile(
    r"(^|[._/])(embed\w*|wte|wpe|word_embeddings|shared|tok_embeddings|position\w*|patch\w*|cls_token|class_embedding"
    r"|mask_token|register_tokens|stem|conv_?in|conv1|conv2|pre_?layr?norm|ln_pre|norm_pre|time_embed\w*|time_embedding"
    r"|time_proj|x_embedder|context_embedder|timestep_embedder|rotary\w*|relative_attention_bias|proj_in)([._/]|$)"
)
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("router", r"(^|\.)(router|gate|shared_expert_gate)(\.|$)"),
        ("expert", r"experts?\."),
        ("head", r"(^|\.)(lm_head|score|classifier|head|cls|pooler|output_projection|qa_outputs|proj_out)(\.|$)"),
        ("norm", r"(norm|ln_\w+|layrnorm|layernorm|LayerNorm|\bbn\d*)(\.|_|$)"),
        ("embedding", r"(embed|wte|wpe|shared\.weight|cls_token|class_embedding)"),
        ("attention_q", r"(\.|_)(q|query|to_q|wq|q_proj|q_lin|SelfAttention\.q|EncDecAttention\.q)(\.|$)"),
        ("attention_k", r"(\.|_)(k|key|to_k|wk|k_proj|k_lin)(\.|$)"),
        ("attention_v", r"(\.|_)(v|value|to_v|wv|v_proj|v_lin)(\.|$)"),
        ("attention_o", r"(attn|attention|Attention)[\w.]*\.(o|o_proj|out_proj|out_lin|c_proj|to_out|wo|dense)(\.|$)"),
        ("attention", r"(attn|attention|Attention|c_attn|qkv)"),
        ("conv", r"conv"),
        ("mlp", r"(mlp|ffn?|feed_forward|intermediate|DenseReluDense|fc\d|c_fc|dense|w[123]|output)(\.|$|_)"),
    )
)


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
        head = f"{self.prefix}." if self.prefix else ""
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
    _names: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def _by_prefix(self) -> dict[str, Stack]:
        return {stack.prefix: stack for stack in self.stacks}

    @cached_property
    def _members(self) -> dict[tuple[str, int], list[str]]:
        found: dict[tuple[str, int], list[str]] = {}
        for name in self._names:
            place = self.locate(name)
            if place is not None:
                found.setdefault((place.stack.prefix, place.index), []).append(place.suffix)
        return found

    def locate(self, name: str) -> Place | None:
        """Return where a tensor lies, or None if it belongs to no layer."""
        match = _NUMBERED.match(name)
        if match is None:
            return None
        stack = self._by_prefix.get(match["prefix"])
        index = int(match["index"])
        if stack is None or index not in stack.ranks:
            return None
        return Place(stack, index, match["suffix"] or "")

    def members(self, stack: Stack, index: int) -> dict[str, str]:
        """Return the tensors of one layer: the part of the name after the number -> the whole name."""
        return {suffix: stack.name(index, suffix) for suffix in self._members.get((stack.prefix, index), [])}


def analyse(names: Iterable[str], config: Mapping[str, Any] | None = None) -> Architecture:
    """Find the stacks of layers among the names of a model's tensors.

    Args:
        names: the tensors' names.
        config: the model's config; where it gives a layer count, a stack of one layer is told from a name that
            happens to hold a number.
    """
    names = tuple(names)
    indices: dict[str, set[int]] = {}
    blocks: set[str] = set()
    for name in names:
        match = _NUMBERED.match(name)
        if match is None:
            continue
        indices.setdefault(match["prefix"], set()).add(int(match["index"]))
        if match["suffix"] and not _BARE.match(match["suffix"]):
            blocks.add(match["prefix"])
    chosen = blocks or set(indices)
    stacks = tuple(Stack(prefix, tuple(sorted(found))) for prefix, found in indices.items() if prefix in chosen)
    return Architecture(stacks, names)


def before_layers(name: str) -> bool:
    """Whether a tensor outside all layers belongs before the first (an embedding, say) or after the last."""
    return _BEFORE.search(name) is not None


def role(name: str) -> str:
    """Return what a tensor is for, as far as its name tells.

    One of ``attention_q``, ``attention_k``, ``attention_v``, ``attention_o``, ``attention``, ``mlp``,
    ``norm``, ``embedding``, ``head``, ``router``, ``expert``, ``conv`` and ``other``.
    """
    return next((known for known, pattern in _ROLES if pattern.search(name)), "other")
