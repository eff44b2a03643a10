"""An adapter apart from any layout: for each module of each model of a pipeline, its parts, rank and alpha."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from weightsmith import dtypes
from weightsmith.adapters.layouts import parts as p
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, shown

# What the key of alpha is in PEFT's configs of a kind, of the kinds whose scale is alpha / rank.
ALPHA_KEYS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_KIND_OF = (("lora_", "LORA"), ("hada_", "LOHA"), ("lokr_", "LOKR"), ("ia3_", "IA3"))
LARGEST = 1e18


@dataclass
class Entry:
    """What an adapter holds for one module.

    Attributes:
        component: which model of a pipeline the module belongs to, such as ``unet``; empty where nothing says it.
        module: its name there.
        parts: part -> tensor, by PEFT's names for parts.
        alpha: what the rank is set against: the change is scaled by ``alpha / rank``; None for no scaling.
        origin: the module as the file names it, for errors.
    """

    component: str
    module: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    origin: str = ""

    @property
    def rank(self) -> int | None:
        """The rank as the shapes say it; None where there is none (LoKr of whole factors, IA3)."""
        for part in ("lora_A.weight", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if part in self.parts:
                return self.parts[part].shape[0] if self.parts[part].shape else 0
        return None

    @property
    def scale(self) -> float:
        """What the change is multiplied by."""
        rank = self.rank
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    @property
    def kind(self) -> str | None:
        """The kind of adapter, by its parts; None for one that only replaces weights."""
        return next((kind for head, kind in _KIND_OF for part in self.parts if part.startswith(head)), None)


@dataclass
class Network:
    """A whole adapter.

    Attributes:
        name: how a person names it.
        entries: what it holds.
        plain: component and name of a tensor of the base -> what takes its place.
        hints: what its config says beside that, which bears on names: the class of the model that it was trained on.
    """

    name: str
    entries: list[Entry]
    plain: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """The models that it changes, in their order in the file."""
        return tuple(dict.fromkeys([*(entry.component for entry in self.entries), *(one for one, _ in self.plain)]))

    @property
    def kind(self) -> str:
        """The kind, of which there must be one.

        Raises:
            CheckpointError: if there are several, or none.
        """
        kinds: dict[str, str] = {}
        for entry in self.entries:
            if entry.kind is not None:
                kinds.setdefault(entry.kind, entry.origin or entry.module)
        if not kinds and self.plain:
            return "LORA"
        if len(kinds) != 1:
            found = ", ".join(f"{kind} (as in {shown(module)})" for kind, module in kinds.items()) or "none"
            raise CheckpointError(
                f"{self.name} holds several kinds of adapters, and PEFT's layout has one for all modules: {found}"
                if kinds
                else f"{self.name} holds no parts of any kind of adapter that is known"
            )
        return next(iter(kinds))


def number_of(owner: str, tensor: Tensor) -> float:
    """Return the number that a scalar tensor holds.

    Raises:
        CheckpointError: if it is no single finite number.
    """
    if tensor.size != 1 or len(tensor.shape) > 4:
        raise CheckpointError(
            f"{owner}: {shown(tensor.name)} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}, and alpha is one "
            "number"
        )
    try:
        value = float(tensor.numpy().reshape(-1).astype("f8")[0])
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) < LARGEST:
        raise CheckpointError(f"{owner}: {shown(tensor.name)} is {value}, and alpha is a finite number")
    return value


def collect(owner: str, found: Iterable[tuple[str, str, str, str, Tensor]]) -> dict[tuple[str, str], Entry]:
    """Put the tensors of an adapter together by modules.

    Args:
        owner: the adapter's name.
        found: component, module, part, the module as the file names it, and the tensor.

    Raises:
        CheckpointError: if a part is there twice, an alpha is no number, or a module lacks a part that it must have.
    """
    entries: dict[tuple[str, str], Entry] = {}
    first: dict[tuple[str, str, str], str] = {}
    for component, module, part, origin, tensor in found:
        known = first.setdefault((component, module, part), tensor.name)
        if known != tensor.name:
            raise CheckpointError(
                f"{owner} holds {part} of {module} twice, as {shown(known)} and as {shown(tensor.name)}"
            )
        entry = entries.setdefault((component, module), Entry(component, module, origin=origin))
        if part == p.ALPHA:
            entry.alpha = number_of(owner, tensor)
        else:
            if not tensor.size and part != p.ON_INPUT:
                raise CheckpointError(f"{owner}: {shown(tensor.name)} is {list(tensor.shape)}, and must not be empty")
            entry.parts[part] = tensor
    for entry in entries.values():
        _check(owner, entry)
    return entries


_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w2_a"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)


# Part -> one of those without which it means nothing.
_NEEDS = {
    "lora_B.bias": ("lora_B.weight",),
    p.MIDDLE: ("lora_A.weight",),
    p.MAGNITUDE: ("lora_A.weight", "lora_embedding_A"),
    p.DORA_SCALE: ("lora_A.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a"),
    "hada_t1": ("hada_w1_a",),
    "hada_t2": ("hada_t1",),
    "lokr_t2": ("lokr_w2_a",),
}
_MATRICES = {
    p.MIDDLE,
    "lokr_w1",
    "lokr_w2",
    "lokr_t2",
    "hada_t1",
    "hada_t2",
    *(part for pair in _PAIRS for part in pair),
}


def _check(owner: str, entry: Entry) -> None:
    for pair in _PAIRS:
        held = [part for part in pair if part in entry.parts]
        if len(held) == 1:
            missing = pair[1 - pair.index(held[0])]
            raise CheckpointError(f"{owner} has {held[0]} for {shown(entry.origin)}, and no {missing}")
    for part, needed in _NEEDS.items():
        if part in entry.parts and not any(one in entry.parts for one in needed):
            raise CheckpointError(f"{owner} has {part} for {shown(entry.origin)}, and no {needed[0]}")
    kinds = [kind for head, kind in _KIND_OF if any(part.startswith(head) for part in entry.parts)]
    if len(kinds) > 1:
        raise CheckpointError(f"{owner} has parts of {' and '.join(kinds)} for {shown(entry.origin)}")
    if not entry.parts:
        raise CheckpointError(f"{owner} has nothing but an alpha for {shown(entry.origin)}")
    for part, tensor in entry.parts.items():
        if part != p.ON_INPUT and not dtypes.is_float(tensor.dtype):
            raise CheckpointError(
                f"{owner}: {shown(tensor.name)} is {dtypes.name_of(tensor.dtype)}, and must be floats"
            )
        if part in _MATRICES and len(tensor.shape) < 2:
            raise CheckpointError(f"{owner}: {shown(tensor.name)} is {list(tensor.shape)}, and must be a matrix")
    down, up = entry.parts.get("lora_A.weight"), entry.parts.get("lora_B.weight")
    if down is not None and up is not None and p.MIDDLE not in entry.parts and up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{owner}: the factors of {shown(entry.origin)} are {list(up.shape)} and {list(down.shape)}, and have "
            "different ranks"
        )
    magnitude, rows = (
        entry.parts.get(p.MAGNITUDE),
        entry.parts.get("lora_B.weight", entry.parts.get("lora_embedding_B")),
    )
    if magnitude is not None and rows is not None and magnitude.size != rows.shape[0]:
        raise CheckpointError(
            f"{owner}: {shown(magnitude.name)} is {list(magnitude.shape)}, and must have {rows.shape[0]} elements"
        )
