"""Reads folders of torch.distributed.checkpoint without PyTorch, and without running what is in them.

``.metadata`` is a pickle of which tensors there are, of which chunks they consist and where each chunk lies: a range of
a ``.distcp`` file that holds what ``torch.save`` (or safetensors) writes of one tensor. It is read by the restricted
unpickler, which here may name a few plain classes more; none of them is built. Chunks are opened when they are read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.description import is_count, problem_with_name, problem_with_shape
from weightsmith.checkpoint.safetensors import natural_order, read_header
from weightsmith.checkpoint.storage import (
    Source,
    SourceRange,
    check_inside,
    is_file_name,
    join,
    open_source,
    read_whole,
)
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.checkpoint.torch_archive import open_archive
from weightsmith.checkpoint.torch_pickle import NESTS, tensor_of
from weightsmith.checkpoint.torch_unpickler import DTypeName, RestrictedUnpickler, View, counted, unpickle
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

METADATA_FILE = ".metadata"
SUFFIX = ".distcp"
_LARGEST_METADATA = 64_000_000
# What training programs keep optimisers, schedulers and the like under.
_NOT_MODEL = frozenset(
    {
        "optim", "optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict",
        "optim_state_dict", "optim_state", "lr_scheduler", "lr_schedulers", "scheduler", "opt_param_scheduler",
        "rng_state", "rng", "train_state", "dataloader",
    }
)  # fmt: skip
# Where a whole application is saved, the model is one of its parts.
_AROUND = ("app", *NESTS)
# Pieces that a tensor's axes are cut into by its chunks' edges; a chunk for each of thousands of ranks is far fewer.
_MOST_CELLS = 1 << 14


# -- the metadata -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Class:
    """A class that the metadata names; no object of it is made."""

    name: str


class _Record:
    """What the metadata says of an object: its class's name and its state."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = {}

    def get(self, field: str) -> Any:
        return self.state.get(field) if isinstance(self.state, dict) else None


_HOME = "torch.distributed.checkpoint.metadata"
_OLD_HOME = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES = {
    **{
        (_HOME, name): _Class(name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        )
    },
    (_OLD_HOME, "TensorProperties"): _Class("TensorProperties"),
    ("torch.distributed._shard.metadata", "ShardMetadata"): _Class("ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Class("_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Class("_StoragePrefix"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Class("Metadata"),
}


def _told(*parts: Any) -> tuple[Any, ...]:
    """Stand for an object of which nothing is needed: an enum's member, a layout, a path."""
    return parts


_FUNCTIONS = {
    ("torch.serialization", "_get_layout"): _told,
    (_HOME, "_MEM_FORMAT_ENCODING"): _told,
    (_OLD_HOME, "MEM_FORMAT_ENCODING"): _told,
    **{(module, f"{kind}Path"): _told for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows", "")},
}


class _MetadataUnpickler(RestrictedUnpickler):
    """Runs a ``.metadata`` pickle: objects of a few classes come out as records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few things that metadata may name."""
        found = _CLASSES.get((module, name)) or _FUNCTIONS.get((module, name))
        return super().find_class(module, name) if found is None else found


def _new_record(unpickler: _MetadataUnpickler) -> None:
    arguments = unpickler.stack.pop()
    named = unpickler.stack.pop()
    if not isinstance(named, _Class) or arguments != ():
        raise UnsafeFileError(f"{unpickler.path} makes an object that no metadata of a checkpoint needs")
    unpickler.append(_Record(named.name))


def _set_state(unpickler: _MetadataUnpickler) -> None:
    state = unpickler.stack.pop()
    record = unpickler.stack[-1]
    if not isinstance(record, _Record) or not isinstance(state, dict | tuple):
        raise UnsafeFileError(f"{unpickler.path} sets attributes of what is no part of a checkpoint's metadata")
    record.state = state


_MetadataUnpickler.dispatch = RestrictedUnpickler.dispatch | {
    ord("\x81"): counted(_new_record),
    ord("b"): counted(_set_state),
}


# -- tensors of chunks ------------------------------------------------------------------------------------------------


class _Chunk(Tensor):
    """A part of a tensor, in a range of a file that is opened when it is read first."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, source: Source, offsets: tuple[int, ...]):
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.offsets = offsets
        self._source = source

    @cached_property
    def _opened(self) -> Tensor:
        where = f"{self._source.path}: a chunk of {shown(self.name)}"
        if bytes(self._source.read(0, 4)) == b"PK\x03\x04":
            members, content = open_archive(self._source)
            view = unpickle(content, self._source.path)
            if not isinstance(view, View):
                raise CheckpointError(f"{where} holds no tensor")
            found = tensor_of(self.name, view, self._source, members)
        else:
            held = list(read_header(self._source)[0].values())
            if len(held) != 1:
                raise CheckpointError(f"{where} holds {len(held)} tensors instead of one")
            found = held[0]
        if found.shape != self.shape or found.dtype != self.dtype:
            raise CheckpointError(
                f"{where} has the shape {list(found.shape)} and dtype {found.dtype}, and {METADATA_FILE} says "
                f"{list(self.shape)} and {self.dtype}"
            )
        return found

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return self._opened.read(start, stop)

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """See :meth:`Tensor.read_into`."""
        return self._opened.read_into(start, stop, buffer)

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Tensor.prefetch`."""
        return self._opened.prefetch(start, stop)

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Tensor.copy_to`."""
        return self._opened.copy_to(start, stop, handle, offset)


class ChunkedTensor(Tensor):
    """A tensor of several chunks that cover it without overlap, cut along any axes."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, chunks: Sequence[_Chunk]) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._chunks = tuple(sorted(chunks, key=lambda chunk: chunk.offsets))

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        found = np.empty(stop - start, self.dtype)
        self._fill(found, (), start, self._chunks)
        return found

    def _fill(self, out: Array, index: tuple[int, ...], start: int, chunks: Sequence[_Chunk]) -> None:
        """Fill ``out`` with elements from ``start`` on of the part of the tensor at ``index`` of its first axes.

        Whole rows along the next axis are read together; of a row that is not wanted whole no more than that is read.
        """
        row = math.prod(self.shape[len(index) + 1 :])
        head = min(-start % row, len(out))
        whole = (len(out) - head) // row * row
        first = (start + head) // row
        if head:
            self._fill_part(out[:head], index, start // row, start % row, chunks)
        if whole:
            self._fill_rows(out[head : head + whole], index, first, whole // row, chunks)
        if head + whole < len(out):
            self._fill_part(out[head + whole :], index, first + whole // row, 0, chunks)

    def _fill_part(self, out: Array, index: tuple[int, ...], place: int, start: int, chunks: Sequence[_Chunk]) -> None:
        axis = len(index)
        inner = [chunk for chunk in chunks if 0 <= place - chunk.offsets[axis] < chunk.shape[axis]]
        self._fill(out, (*index, place), start, inner)

    def _fill_rows(self, out: Array, index: tuple[int, ...], first: int, count: int, chunks: Sequence[_Chunk]) -> None:
        axis = len(index)
        rows = out.reshape(count, *self.shape[axis + 1 :])
        for chunk in chunks:
            begin = max(chunk.offsets[axis], first)
            end = min(chunk.offsets[axis] + chunk.shape[axis], first + count)
            if begin >= end:
                continue
            within = [place - offset for place, offset in zip((*index, begin), chunk.offsets, strict=False)]
            inner = chunk.shape[axis + 1 :]
            width = math.prod(inner)
            position = _flat(chunk.shape, within) * width
            values = chunk.read(position, position + (end - begin) * width)
            inside = (slice(o, o + n) for o, n in zip(chunk.offsets[axis + 1 :], inner, strict=True))
            rows[(slice(begin - first, end - first), *inside)] = values.reshape(end - begin, *inner)


def _flat(shape: Sequence[int], index: Sequence[int]) -> int:
    """Return how many places lie before an index of the first axes of a shape."""
    flat = 0
    for length, place in zip(shape, index, strict=False):
        flat = flat * length + place
    return flat


# -- the folder -------------------------------------------------------------------------------------------------------


def is_distributed(entries: Sequence[str]) -> bool:
    """Whether a folder with these entries is one of torch.distributed.checkpoint."""
    # Whatever lies beside them (Megatron's common.pt) holds no weights, but for a converted copy.
    return (
        METADATA_FILE in entries
        and any(one.endswith(SUFFIX) for one in entries)
        and not any(one.endswith(".safetensors") for one in entries)
    )


def read_distributed(path: str) -> tuple[dict[str, Tensor], list[Identity]]:
    """Find the model's tensors in a folder of torch.distributed.checkpoint.

    Entries of optimisers, schedulers and the like are left out. Where the model was saved under a name beside others,
    such as ``model``, its tensors alone are taken, and that name is left out of theirs.

    Args:
        path: the folder, here or behind a URL.

    Returns:
        The tensors by name in natural order, and what the files were.

    Raises:
        UnsafeFileError: if the metadata asks for anything but tensors and plain data, or names files elsewhere.
        CheckpointError: if it is damaged, or the files do not hold what it says.
    """
    check_inside(path, METADATA_FILE)
    where = join(path, METADATA_FILE)
    content = read_whole(where, _LARGEST_METADATA)
    metadata = unpickle(content, where, _MetadataUnpickler)
    entries = metadata.get("state_dict_metadata") if isinstance(metadata, _Record) else None
    places = metadata.get("storage_data") if isinstance(metadata, _Record) else None
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{where} is no metadata of torch.distributed.checkpoint")
    files = _Files(path, hashlib.blake2b(content, digest_size=16).hexdigest())
    stored = {_key(index): info for index, info in places.items()}
    names = _model_names(entries, metadata.get("planner_data"))
    if not names:
        raise CheckpointError(f"{where} names no tensors of a model: {shown(list(entries)[:8])}")
    tensors = {}
    for name, full in names.items():
        problem = problem_with_name(name)
        if problem is not None:
            raise CheckpointError(f"{where}: tensor {shown(name)}: {problem}")
        tensors[name] = _tensor(name, full, entries[full], stored, files)
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_order)}
    return ordered, [files.identity(where), *files.identities()]


class _Files:
    """The files that chunks lie in, each opened once."""

    def __init__(self, path: str, digest: str) -> None:
        self.path = path
        self._digest = digest
        self._sources: dict[str, Source] = {}

    def range(self, file: str, start: int, length: int) -> SourceRange:
        if file not in self._sources:
            if not is_file_name(file):
                raise UnsafeFileError(
                    f"{join(self.path, METADATA_FILE)} names the file {shown(file)}, which is not in its folder"
                )
            check_inside(self.path, file)
            self._sources[file] = open_source(join(self.path, file))
        source = self._sources[file]
        if start + length > source.size:
            raise CheckpointError(
                f"{source.path} has {source.size:,} bytes, and {METADATA_FILE} says that a chunk reaches to "
                f"{start + length:,}: the file is cut short"
            )
        return SourceRange(source, start, length)

    def identity(self, path: str) -> Identity:
        source = open_source(path)
        return Identity(source.path, source.size, source.modified, self._digest)

    def identities(self) -> list[Identity]:
        # What these files hold is described by the metadata alone.
        return [Identity(one.path, one.size, one.modified, self._digest) for one in self._sources.values()]


def _key(index: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """Return what a MetadataIndex stands for: a name, and a chunk's offsets."""
    if not isinstance(index, _Record) or not isinstance(index.get("fqn"), str):
        raise CheckpointError(f"{METADATA_FILE} places what it does not name")
    offset = index.get("offset")
    if offset is not None and not (isinstance(offset, tuple) and all(map(is_count, offset))):
        raise CheckpointError(f"{METADATA_FILE} places a chunk of {shown(index.get('fqn'))} at {shown(offset)}")
    return index.get("fqn"), offset


def _model_names(entries: Mapping[Any, Any], planner: Any) -> dict[str, str]:
    """Return the model's tensors: name in the model -> name in the metadata."""
    paths: dict[str, tuple[str, ...]] = {}
    for full, entry in entries.items():
        if not isinstance(full, str) or not isinstance(entry, _Record) or entry.name != "TensorStorageMetadata":
            continue
        nested = planner.get(full) if isinstance(planner, dict) else None
        path = tuple(map(str, nested)) if isinstance(nested, tuple) and nested else (full,)
        # Some programs save flat names: what they are of is then the part before the first dot.
        if not _NOT_MODEL & {*path[:-1], *path[0].split(".")[:1]}:
            paths[full] = path
    while True:
        around = next((name for name in _AROUND if any(p[0] == name and len(p) > 1 for p in paths.values())), None)
        if around is None:
            return {".".join(path): full for full, path in paths.items()}
        paths = {full: path[1:] for full, path in paths.items() if path[0] == around and len(path) > 1}


def _tensor(
    name: str, full: str, entry: _Record, stored: Mapping[tuple[Any, tuple[Any, ...] | None], Any], files: _Files
) -> Tensor:
    where = f"{join(files.path, METADATA_FILE)}: tensor {shown(full)}"
    properties, shape, chunks = entry.get("properties"), entry.get("size"), entry.get("chunks")
    state = properties.state if isinstance(properties, _Record) else None
    named = (state.get("dtype") if isinstance(state, dict) else next(iter(state), None)) if state else None
    if not isinstance(named, DTypeName) or not isinstance(shape, tuple) or not isinstance(chunks, list):
        raise CheckpointError(f"{where} is not described as torch.distributed.checkpoint does it")
    dtype = named.dtype
    problem = problem_with_shape(shape, dtype)
    if problem is not None:
        raise CheckpointError(f"{where}: {problem}")
    parts = [_chunk(name, full, one, dtype, stored, files, where) for one in chunks]
    # Ranks that got nothing of a tensor may have saved an empty chunk.
    parts = [part for part in parts if part.size] or parts[:1]
    if not _cover(shape, parts):
        raise CheckpointError(
            f"{where} has the shape {list(shape)}, and its {len(chunks)} chunks do not cover that once: the checkpoint "
            "is damaged, or not all of its ranks had written when it was copied"
        )
    return parts[0] if len(parts) == 1 else ChunkedTensor(name, shape, dtype, parts)


def _chunk(
    name: str,
    full: str,
    entry: Any,
    dtype: DType,
    stored: Mapping[tuple[Any, tuple[Any, ...] | None], Any],
    files: _Files,
    where: str,
) -> _Chunk:
    offsets = entry.get("offsets") if isinstance(entry, _Record) else None
    sizes = entry.get("sizes") if isinstance(entry, _Record) else None
    if not isinstance(offsets, tuple) or not isinstance(sizes, tuple) or len(offsets) != len(sizes):
        raise CheckpointError(f"{where} has a chunk without offsets and sizes")
    problem = problem_with_shape(sizes, dtype)
    if problem is not None or not all(map(is_count, offsets)):
        raise CheckpointError(f"{where} has a chunk at {shown(offsets)}: {problem or 'offsets are whole numbers'}")
    info = stored.get((full, offsets))
    found = [info.get(field) for field in ("relative_path", "offset", "length")] if isinstance(info, _Record) else []
    if len(found) != 3 or not isinstance(found[0], str) or not is_count(found[1]) or not is_count(found[2]):
        raise CheckpointError(f"{where}: {METADATA_FILE} does not say where its chunk at {list(offsets)} lies")
    if isinstance(info, _Record) and info.get("transform_descriptors"):
        raise CheckpointError(
            f"{where} was written through {shown(info.get('transform_descriptors'))}, which is not read; save it "
            "without such an extension"
        )
    if math.prod(sizes) * dtype.itemsize > found[2]:
        raise CheckpointError(f"{where}: its chunk at {list(offsets)} is larger than the {found[2]:,} bytes it lies in")
    return _Chunk(name, sizes, dtype, files.range(*found), offsets)


def _cover(shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> bool:
    """Whether chunks cover a tensor, each element once: counted on the cells that their edges cut it into."""
    if not chunks or any(len(chunk.shape) != len(shape) for chunk in chunks):
        return False
    if math.prod(shape) == 0:
        return len(chunks) == 1 and chunks[0].shape == shape
    if sum(chunk.size for chunk in chunks) != math.prod(shape):
        return False
    edges = [
        sorted({0, length, *(edge for c in chunks for edge in (c.offsets[axis], c.offsets[axis] + c.shape[axis]))})
        for axis, length in enumerate(shape)
    ]
    if any(axis[-1] > length for axis, length in zip(edges, shape, strict=True)):
        return False
    cells = tuple(len(axis) - 1 for axis in edges)
    if math.prod(cells) > _MOST_CELLS:
        return False
    number = [{edge: place for place, edge in enumerate(axis)} for axis in edges]
    covered: npt.NDArray[np.int64] = np.zeros(cells, np.int64)
    for chunk in chunks:
        inside = (
            slice(places[offset], places[offset + length])
            for places, offset, length in zip(number, chunk.offsets, chunk.shape, strict=True)
        )
        covered[tuple(inside)] += 1
    return bool((covered == 1).all())
