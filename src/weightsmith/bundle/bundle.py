"""A bundle on disk: its description, its parts, and each of its models as a lazy checkpoint."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from weightsmith import dtypes
from weightsmith.bundle.description import LARGEST, Description, Entry, Task, parse_description
from weightsmith.bundle.identical import KnownTensor
from weightsmith.bundle.kind import BASE, SHARED, TASKS, WHOLE, Kind, Stored, make_kind
from weightsmith.checkpoint import locate, open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, Identity
from weightsmith.checkpoint.folder import BUNDLE_FILE, local_copies, read_folder
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.manifest import MANIFEST_FILE
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.checkpoint.storage import check_inside, join, list_folder, open_source, read_whole
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, MethodError, did_you_mean, shown

_LARGEST_CONFIG = 16_000_000


@dataclass(frozen=True)
class Sizes:
    """What a bundle takes, in bytes.

    Attributes:
        base: the base's weights; 0 where it is kept by reference.
        shared: what all tasks share.
        tasks: what each needs beside that.
        beside: configs, tokenizers, description and manifest.
        models: what the weights of all models take by themselves.
    """

    base: int
    shared: int
    tasks: Mapping[str, int]
    beside: int
    models: int

    @property
    def total(self) -> int:
        """All of the bundle."""
        return self.base + self.shared + sum(self.tasks.values()) + self.beside

    @property
    def ratio(self) -> float:
        """The bundle's share of what all models take."""
        return self.total / self.models if self.models else 1.0


@dataclass(frozen=True)
class _Part:
    """A folder of a bundle with tensors in it."""

    tensors: Mapping[str, Tensor]
    identities: tuple[Identity, ...]

    @property
    def nbytes(self) -> int:
        return sum(identity.size for identity in self.identities)


class Bundle:
    """Several models in one folder.

    Attributes:
        path: the folder, here or behind a URL.
        name: how a person names it.
        description: what it says of itself.
        kind: its kind, with its parameters.
    """

    def __init__(self, path: str, name: str | None = None, *, base: Checkpoint | None = None) -> None:
        """Open a bundle; only its description is read.

        Args:
            path: the folder.
            name: how a person named it.
            base: the base, where the bundle keeps it by reference.

        Raises:
            CheckpointError: if it is no bundle, or its description is not as it must be.
        """
        self.path = path
        self.name = name or path
        file = join(path, BUNDLE_FILE)
        if BUNDLE_FILE not in list_folder(path):
            raise CheckpointError(f"{self.name} is no bundle: it has no {BUNDLE_FILE}")
        check_inside(path, BUNDLE_FILE)
        content = read_whole(file, LARGEST)
        self.description: Description = parse_description(content, file)
        try:
            self.kind: Kind = make_kind(self.description.kind, self.description.parameters)
        except MethodError as error:
            raise CheckpointError(f"{file}: {error}") from error
        if base is not None and self.description.base.tensors is None:
            raise CheckpointError(f"{self.name} holds its own base: leave out {base.name}")
        self._given = base
        source = open_source(file)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self._identity = Identity(file, source.size, source.modified, digest)
        self._parts: dict[str, _Part] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its models."""
        return tuple(self.description.tasks)

    def task(self, name: str) -> Checkpoint:
        """Return one of its models: a lazy checkpoint, each tensor in the model's own dtype.

        Args:
            name: the task.

        Raises:
            CheckpointError: if there is no such task, the base is needed and not given, or something does not fit.
        """
        task = self._task(name)
        where = f"{self.name}#{name}"
        own = self._part(f"{TASKS}/{name}")
        base = self._base(where) if any(entry.form != "whole" for entry in task.tensors.values()) else {}
        tensors = {}
        for key, entry in task.tensors.items():
            stored = Stored(where, key, self._part(SHARED).tensors, own.tensors)
            tensors[key] = _named(self._restored(entry, stored, base), key)
        identities = [self._identity, *self._part(SHARED).identities, *own.identities]
        identities += self._given.identities if self._given is not None else self._part(BASE).identities
        named = where if self._given is None else f"{self._given.name}+{where}"
        return Checkpoint(named, tensors, self._companions(task), tuple(dict.fromkeys(identities)))

    def sizes(self) -> Sizes:
        """Return what the parts take, by the lengths of their files."""
        tasks = self.description.tasks
        files = {file for task in tasks.values() for file in task.files.values()}
        files |= {MANIFEST_FILE} & set(list_folder(self.path))
        return Sizes(
            base=self._part(BASE).nbytes,
            shared=self._part(SHARED).nbytes,
            tasks={name: self._part(f"{TASKS}/{name}").nbytes for name in tasks},
            beside=self._identity.size + sum(map(self._length, sorted(files))),
            models=sum(
                _elements(entry) * entry.dtype.itemsize for task in tasks.values() for entry in task.tensors.values()
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what there is to say of it as JSON values."""
        sizes = self.sizes()
        return {
            "kind": self.kind.name,
            "parameters": self.kind.to_json(),
            "base": {
                "reference": self.description.base.reference,
                "stored": self.description.base.tensors is None,
                "bytes": sizes.base,
            },
            "shared_bytes": sizes.shared,
            "beside_bytes": sizes.beside,
            "total_bytes": sizes.total,
            "models_bytes": sizes.models,
            "ratio": sizes.ratio,
            "tasks": {
                name: {
                    "reference": task.reference,
                    "bytes": sizes.tasks[name],
                    "tensors": len(task.tensors),
                    "forms": _forms(task),
                    "files": sorted(task.files),
                    "error": None if task.error is None else vars(task.error),
                }
                for name, task in self.description.tasks.items()
            },
        }

    def _task(self, name: str) -> Task:
        found = self.description.tasks.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.name} has no task {shown(name)}{did_you_mean(name, self.tasks)}; it has {', '.join(self.tasks)}"
            )
        return found

    def _length(self, file: str) -> int:
        check_inside(self.path, file)
        return open_source(join(self.path, file)).size

    def _part(self, part: str) -> _Part:
        """Return the tensors in a folder of the bundle; a part that holds nothing is not there."""
        if part not in self._parts:
            folder = join(self.path, part)
            check_inside(self.path, part)
            entries = list_folder(folder)
            # The base's folder has a config in it, too, whether or not it has weights.
            tensors, identities = read_folder(folder, entries) if entries else ({}, [])
            self._parts[part] = _Part(tensors, tuple(identities))
        return self._parts[part]

    def _base(self, where: str) -> Mapping[str, Tensor]:
        """Return the base's tensors; where it is not in the bundle, those that it was made with."""
        known = self.description.base.tensors
        if known is None:
            return self._part(BASE).tensors
        reference = self.description.base.reference
        if self._given is None:
            raise CheckpointError(
                f"{self.name} keeps its base by reference, to {shown(reference)}, and opens nothing outside its folder "
                f"by itself: name the base as well, as BASE+{where} or with --base"
            )
        return dict(self._known)

    @cached_property
    def _known(self) -> Mapping[str, Tensor]:
        assert self._given is not None
        found = {}
        for name, expected in (self.description.base.tensors or {}).items():
            tensor = self._given.get(name)
            if tensor is None or (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                has = "lacks it" if tensor is None else f"has it as {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}"
                raise CheckpointError(
                    f"{self._given.name} is not the base of {self.name}, which was made with "
                    f"{shown(self.description.base.reference)}: {shown(name)} is {dtypes.name_of(expected.dtype)} "
                    f"{list(expected.shape)} there, and this one {has}"
                )
            found[name] = KnownTensor(tensor, expected.hash, f"{self._given.name} as the base of {self.name}")
        return found

    def _restored(self, entry: Entry, stored: Stored, base: Mapping[str, Tensor]) -> Tensor:
        if entry.form == "whole":
            return stored.own(WHOLE, entry.shape, entry.dtype)
        tensor = base.get(stored.name)
        if tensor is None:
            raise stored.fail("it rests on the base's, and the base has none")
        if tensor.shape != entry.shape:
            raise stored.fail(f"it is {list(entry.shape)}, and the base's, on which it rests, {list(tensor.shape)}")
        if entry.form == "base":
            if tensor.dtype != entry.dtype:
                own, other = dtypes.name_of(entry.dtype), dtypes.name_of(tensor.dtype)
                raise stored.fail(f"it is to be the base's and {own}, and the base's is {other}")
            return tensor
        if not self.kind.any_dtype and not (dtypes.is_float(tensor.dtype) and dtypes.is_float(entry.dtype)):
            raise stored.fail(f"it is {dtypes.name_of(entry.dtype)}, and changes are those of floats")
        return self.kind.restore(entry, tensor, stored)

    def _companions(self, task: Task) -> Companions:
        fetch = local_copies(self.path)
        config: Mapping[str, Any] = {}
        files: dict[str, Path] = {}
        for name, path in task.files.items():
            check_inside(self.path, path)
            if name == "config.json":
                where = join(self.path, path)
                config = parse_object(read_whole(where, _LARGEST_CONFIG), where)
            else:
                files[name] = fetch(path)
        return Companions(config, files)


def open_bundle(
    reference: str | os.PathLike[str], *, base: str | os.PathLike[str] | Checkpoint | None = None
) -> Bundle:
    """Open a bundle; only its description is read.

    Args:
        reference: a folder, a hub id or a URL, with ``@revision`` where it applies.
        base: the base, where the bundle keeps it by reference.

    Raises:
        CheckpointError: if it is no bundle, or its description is not as it must be.
    """
    parsed = parse_reference(reference)
    opened = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
    return Bundle(locate(parsed), str(parsed), base=opened)


def open_task(
    reference: str | os.PathLike[str],
    task: str | None = None,
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> Checkpoint:
    """Open one of the models of a bundle, reading headers only.

    Args:
        reference: the bundle, with ``#task`` where ``task`` is not given.
        task: which model.
        base: the base, where the bundle keeps it by reference.

    Raises:
        CheckpointError: if there is no such bundle or task, or the base is needed and is not this one.
    """
    parsed = parse_reference(reference)
    if parsed.adapters or (task is None) == (parsed.task is None):
        raise CheckpointError(f"{parsed}: name a bundle and one of its tasks, once")
    plain = replace(parsed, task=None)
    return open_bundle(str(plain), base=base).task(task or parsed.task or "")


def _named(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor under another name."""
    if tensor.name == name:
        return tensor
    other = copy.copy(tensor)
    other.name = name
    return other


def _elements(entry: Entry) -> int:
    size = 1
    for length in entry.shape:
        size *= length
    return size


def _forms(task: Task) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in task.tensors.values():
        found[entry.form] = found.get(entry.form, 0) + 1
    return found
