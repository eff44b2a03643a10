"""What transformers 5 names or joins otherwise as it loads a model: adapters speak of that, files of what is stored.

From transformers' conversion_mapping of version 5.23: experts, which files hold one by one, are joined to one parameter
for each projection, and modules of some models have new names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import PlanError

# As a module is loaded -> as it is stored. They are tried where a base lacks the first alone, all of a row at once.
_SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    # Mixtral, MiniMax.
    ((r"\.mlp\.(gate|experts)(?=\.|$)", r".block_sparse_moe.\1"),),
    # ViT, DeiT, BEiT, AST and their kin.
    (
        (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    # Models of text and images: LLaVA and Gemma 3, Qwen2-VL.
    ((r"^model\.language_model\.", "language_model.model."),),
    ((r"^model\.language_model\.", "model."),),
)
# A parameter of joined experts -> what it is joined of, by rows, under one of two sets of names.
_JOINED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def stored_names(name: str) -> Iterator[str]:
    """Return how files may name what is loaded under a name."""
    for rules in _SPELLINGS:
        spelled = name
        for pattern, replacement in rules:
            spelled = re.sub(pattern, replacement, spelled)
        if spelled != name:
            yield spelled


# What stored names hold -> what stands there once transformers 5 has loaded the model.
_LOADED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".block_sparse_moe.": ".mlp.",
}


def renamed_as_loaded(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a part of stored names that transformers 5 changes as it loads a model, and what it becomes; or None."""
    for name in names:
        for stored, loaded in _LOADED.items():
            if stored in name:
                return stored.strip("."), loaded.strip(".")
    return None


class Experts(Tensor):
    """The parameter that experts are joined to as they are loaded: ``[experts, out, in]``.

    Attributes:
        experts: for each of them the tensors that are joined, one below the other: ``[n, in]`` each.
    """

    def __init__(self, name: str, experts: Sequence[Sequence[Tensor]]) -> None:
        """Join tensors of one dtype, whose shapes are the same for all experts."""
        self.name = name
        self.experts = experts
        first = experts[0]
        self.shape = (len(experts), sum(tensor.shape[0] for tensor in first), first[0].shape[1])
        self.dtype = dtypes.working_dtype([tensor.dtype for one in experts for tensor in one])

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        found: list[Array] = []
        first = 0
        for tensor in (tensor for one in self.experts for tensor in one):
            begin, end = max(start - first, 0), min(stop - first, tensor.size)
            if begin < end:
                found.append(tensor.read(begin, end).astype(self.dtype))
            first += tensor.size
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def join_experts(path: str, base: Checkpoint) -> dict[str, Experts]:
    """Return the parameters that a module of experts has once it is loaded, of a base that stores experts one by one.

    Args:
        path: the module, such as ``model.layers.0.mlp.experts``.
        base: the base.

    Returns:
        Name of the parameter -> the experts; nothing where the base stores none so.

    Raises:
        PlanError: if experts differ in their shapes.
    """
    for place in (path, *stored_names(path)):
        found = {}
        for parameter, choices in _JOINED.items():
            for parts in choices:
                experts: list[list[Tensor]] = []
                while all(f"{place}.{len(experts)}.{part}.weight" in base for part in parts):
                    experts.append([base[f"{place}.{len(experts)}.{part}.weight"] for part in parts])
                if experts:
                    found[f"{path}.{parameter}"] = _joined(f"{path}.{parameter}", experts, base)
        if found:
            return found
    return {}


def _joined(name: str, experts: list[list[Tensor]], base: Checkpoint) -> Experts:
    first = experts[0]
    for one in experts:
        for tensor, like in zip(one, first, strict=True):
            if tensor.shape != like.shape or len(tensor.shape) != 2 or tensor.shape[1] != first[0].shape[1]:
                raise PlanError(
                    f"{base.name} has {tensor.name} as {list(tensor.shape)} and {like.name} as {list(like.shape)}: "
                    f"they cannot be joined to {name}, which the adapter changes"
                )
            if not dtypes.is_float(tensor.dtype):
                found = dtypes.name_of(tensor.dtype)
                raise PlanError(f"the adapter changes {tensor.name}, which is {found} in {base.name}, not weights")
    return Experts(name, experts)
