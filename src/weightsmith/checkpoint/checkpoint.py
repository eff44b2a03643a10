"""A checkpoint: a lazy, immutable mapping from tensor name to tensor, with the files that travel beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.tensor import Tensor

# A file that lies somewhere, or the content of one that was made: a tokenizer for a union of vocabularies.
File = Path | bytes


@dataclass(frozen=True)
class Companions:
    """The files that travel beside the weights: configs, tokenizer, chat template, processors.

    Attributes:
        config: the parsed ``config.json``, or an empty mapping.
        files: relative path -> absolute local path of every other file worth carrying, or the content of one that
            was made. For a diffusers pipeline the paths include the component's folder.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What one input file was when it was opened, to tell later whether it is still the same.

    Attributes:
        path: the file.
        size: its length in bytes.
        modified: its modification time in nanoseconds; behind a URL, a number that changes with the file, or 0
            where the storage tells nothing of its version.
        header: a hash of its header (not of its data).
    """

    path: str
    size: int
    modified: int
    header: str


class Checkpoint(Mapping[str, Tensor]):
    """A lazy, immutable mapping from tensor name to :class:`Tensor`, in a defined order.

    Attributes:
        name: how a person names it: the reference it was opened by, or the name given in a recipe.
        companions: the files that travel beside the weights.
        identities: the input files behind the tensors.
        components: for a pipeline of several models (diffusers), the folder names that prefix the tensor
            names (``"unet/conv_in.weight"``), else empty.
        is_adapter: whether the tensors are those of an adapter rather than of a model.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        companions: Companions | None = None,
        identities: tuple[Identity, ...] = (),
        components: tuple[str, ...] = (),
        is_adapter: bool = False,
    ) -> None:
        self.name = name
        self._tensors = dict(tensors)
        self.companions = companions or Companions()
        self.identities = identities
        self.components = components
        self.is_adapter = is_adapter

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``."""
        return self.companions.config

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(tensor.size for tensor in self._tensors.values())

    @property
    def nbytes(self) -> int:
        """Number of bytes that all tensors take."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self)} tensors, {self.parameters:,} parameters)"
