"""Where every output tensor will lie: shards, headers and offsets, known before a weight is read.

The files are safetensors: eight bytes of header length, a JSON header padded with spaces to a multiple of
eight, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightsmith import dtypes
from weightsmith.dtypes import DType

DEFAULT_SHARD_SIZE = 5_000_000_000
# The size of shards where there is to be one: loaders of adapters do not look for more.
ONE_FILE = 1 << 62


class Entry(Protocol):
    """A tensor to write, as far as its place depends on it."""

    @property
    def name(self) -> str:
        """Its name in the output."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> DType:
        """Its dtype in the output."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        ...


@dataclass(frozen=True)
class Placement:
    """One tensor's place in the output.

    Attributes:
        shard: index of its file in the layout.
        offset: position of its first byte in that file.
        nbytes: number of bytes it takes.
    """

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Attributes:
        path: path relative to the output folder.
        header: the file's first bytes, up to the first tensor's.
        nbytes: length of the whole file.
        tensors: the names in it, in the order of their bytes.
    """

    path: str
    header: bytes
    nbytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """All files of weights of an output.

    Attributes:
        placements: tensor name -> place.
        shards: the files.
        indexes: relative path -> content of each index file that transformers reads shards by.
    """

    placements: Mapping[str, Placement]
    shards: tuple[Shard, ...]
    indexes: Mapping[str, Mapping[str, Any]]

    @property
    def nbytes(self) -> int:
        """Length of all files of weights together."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True)
class Part:
    """One model of the output: all of it, or one component of a pipeline.

    Attributes:
        prefix: what its tensors' names in the checkpoint begin with and its files leave out, such as ``unet/``.
        stem: its files' name without extension and shard number: ``model``, ``diffusion_pytorch_model``.
    """

    prefix: str = ""
    stem: str = "model"


def lay_out(
    tensors: Sequence[Entry],
    parts: Sequence[Part] = (Part(),),
    shard_size: int = DEFAULT_SHARD_SIZE,
    file: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Decide where every tensor goes.

    Shards are filled in the order given; a tensor larger than a shard gets one to itself. Within a shard wider
    dtypes come first, so that every tensor is aligned to its dtype.

    Args:
        tensors: what to write, in order.
        parts: the models that the names belong to; each name must begin with one part's prefix.
        shard_size: most bytes of tensors in a file.
        file: write one file of this name instead of shards.
        metadata: texts for the headers, beside ``format``.
    """
    shards: list[Shard] = []
    placements: dict[str, Placement] = {}
    indexes: dict[str, Mapping[str, Any]] = {}
    for part in parts:
        own = [t for t in tensors if t.name.startswith(part.prefix)]
        groups = [own] if file is not None else _fill(own, shard_size)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            name = f"{part.stem}.safetensors"
            if len(groups) > 1:
                name = f"{part.stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            ordered = sorted(group, key=lambda t: -t.dtype.itemsize)
            header, offsets = make_header(ordered, part.prefix, metadata)
            end = len(header)
            for tensor, offset in zip(ordered, offsets, strict=True):
                end = offset + tensor.nbytes
                placements[tensor.name] = Placement(len(shards), offset, tensor.nbytes)
                weight_map[tensor.name.removeprefix(part.prefix)] = name
            path = file if file is not None else part.prefix + name
            shards.append(Shard(path, header, end, tuple(t.name for t in ordered)))
        if len(groups) > 1:
            total = sum(tensor.nbytes for tensor in own)
            indexes[f"{part.prefix}{part.stem}.safetensors.index.json"] = {
                "metadata": {"total_parameters": sum(t.size for t in own), "total_size": total},
                "weight_map": weight_map,
            }
    return Layout(placements, tuple(shards), indexes)


def _fill(tensors: Sequence[Entry], shard_size: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def make_header(
    tensors: Sequence[Entry], prefix: str = "", metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Return a file's first bytes, and the position of every tensor in it.

    Args:
        tensors: its tensors, in the order of their bytes.
        prefix: what the file leaves out of their names.
        metadata: texts for the header, beside ``format``.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    starts = []
    for tensor in tensors:
        starts.append(position)
        entries[tensor.name.removeprefix(prefix)] = {
            "dtype": dtypes.code_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in starts]
