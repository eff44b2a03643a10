"""What is in a checkpoint, from its headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from weightsmith import dtypes
from weightsmith.architecture.config import tied_embeddings
from weightsmith.architecture.stacks import Architecture, Stack, analyse
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class Entry:
    """One tensor: its name (within its layer, in a group of layers), shape, dtype and bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Group:
    """Layers that hold the same tensors: their numbers, and what each of them holds."""

    layers: tuple[int, ...]
    tensors: tuple[Entry, ...]
    parameters: int


@dataclass(frozen=True)
class StackFacts:
    """A stack of layers, grouped by what the layers hold."""

    prefix: str
    layers: int
    parameters: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        name: how it was named.
        model_type: the config's ``model_type``.
        architectures: the config's ``architectures``.
        is_adapter: whether it is an adapter.
        tied: whether the head is tied to the embeddings.
        tensors: number of tensors.
        parameters: number of elements.
        nbytes: bytes of all tensors.
        dtypes: dtype -> number of tensors and their bytes.
        files: input file -> its bytes.
        companions: names of the files beside the weights.
        components: folders of a pipeline.
        stacks: the stacks of layers.
        outside: tensors in no layer.
        all_tensors: every tensor.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    is_adapter: bool
    tied: bool
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, tuple[int, int]]
    files: dict[str, int]
    companions: tuple[str, ...]
    components: tuple[str, ...]
    stacks: tuple[StackFacts, ...]
    outside: tuple[Entry, ...]
    all_tensors: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; sizes are in bytes."""
        content = asdict(self)
        content["dtypes"] = {
            name: {"tensors": count, "nbytes": nbytes} for name, (count, nbytes) in self.dtypes.items()
        }
        return content


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe a checkpoint; nothing but its headers is looked at."""
    architecture = analyse(checkpoint, checkpoint.config)
    counts: dict[str, tuple[int, int]] = {}
    for tensor in checkpoint.values():
        count, nbytes = counts.get(dtypes.name_of(tensor.dtype), (0, 0))
        counts[dtypes.name_of(tensor.dtype)] = (count + 1, nbytes + tensor.nbytes)
    config = checkpoint.config
    return Inspection(
        name=checkpoint.name,
        model_type=text_of(config.get("model_type")) or text_of(config.get("peft_type")),
        architectures=texts_of(config.get("architectures")),
        is_adapter=checkpoint.is_adapter,
        tied=tied_embeddings(config),
        tensors=len(checkpoint),
        parameters=checkpoint.parameters,
        nbytes=checkpoint.nbytes,
        dtypes=counts,
        files={identity.path: identity.size for identity in checkpoint.identities},
        companions=tuple(sorted(checkpoint.companions.files)),
        components=checkpoint.components,
        stacks=tuple(_stack(checkpoint, architecture, stack) for stack in architecture.stacks),
        outside=_entries((name, checkpoint[name]) for name in checkpoint if architecture.locate(name) is None),
        all_tensors=_entries(checkpoint.items()),
    )


def text_of(value: Any) -> str:
    """Return what a config should hold as a text; it may hold anything."""
    return value if isinstance(value, str) else ""


def texts_of(value: Any) -> tuple[str, ...]:
    """Return the texts in what a config should list as texts; it may hold anything."""
    return tuple(entry for entry in value if isinstance(entry, str)) if isinstance(value, list) else ()


def _stack(checkpoint: Checkpoint, architecture: Architecture, stack: Stack) -> StackFacts:
    alike: dict[tuple[Entry, ...], list[int]] = {}
    for index in stack.indices:
        members = architecture.members(stack, index)
        alike.setdefault(_entries((s, checkpoint[n]) for s, n in members.items()), []).append(index)
    groups = []
    for entries, layers in alike.items():
        names = architecture.members(stack, layers[0]).values()
        groups.append(Group(tuple(layers), entries, sum(checkpoint[name].size for name in names)))
    total = sum(group.parameters * len(group.layers) for group in groups)
    return StackFacts(stack.prefix, len(stack.indices), total, tuple(groups))


def _entries(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Entry, ...]:
    return tuple(Entry(name, t.shape, dtypes.name_of(t.dtype), t.nbytes) for name, t in tensors)
