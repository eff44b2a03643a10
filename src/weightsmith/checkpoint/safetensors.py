"""Reads safetensors files: the header is checked completely before a tensor is touched.

The format: eight bytes, little-endian, give the header's length; the header is JSON and maps each name to its
dtype, shape and byte range; the ranges cover the rest of the file without gap or overlap. Scalars have shape
``[]``. Reference: the format's description in the safetensors repository.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.description import is_count, problem_with_name, problem_with_shape
from weightsmith.checkpoint.json_text import JsonReader
from weightsmith.checkpoint.storage import Source
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, shown

_LARGEST_HEADER = 100_000_000
# Of one tensor's description, in characters: dtype, two offsets and 64 lengths take fewer.
_LONGEST_ENTRY = 10_000
_MOST_METADATA = 100_000
# Known to the format, but packed below a byte: a range of elements is no range of bytes.
_PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


class StoredTensor(Tensor):
    """A tensor whose elements lie one after the other in a file.

    Attributes:
        source: the file.
        offset: position of its first byte.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, source: Source, offset: int) -> None:
        self.name = name
        self.shape = shape
        self.size = math.prod(shape)
        self.dtype = dtype
        self.source = source
        self.offset = offset

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        content = self.source.read(*self._bytes(start, stop))
        return np.frombuffer(content, self.dtype)

    def read_into(self, start: int, stop: int, buffer: Array) -> Array:
        """See :meth:`Tensor.read_into`."""
        self.source.read_into(self._bytes(start, stop)[0], buffer)
        return buffer.view(self.dtype)

    def read_parts(self, starts: Sequence[int], out: Array) -> None:
        """See :meth:`Tensor.read_parts`."""
        offset, width = self.offset, self.dtype.itemsize
        self.source.read_parts([offset + start * width for start in starts], out.view(np.uint8))

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Tensor.prefetch`."""
        return self.source.prefetch(*self._bytes(start, stop))

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Tensor.copy_to`."""
        return self.source.copy_to(*self._bytes(start, stop), handle, offset)

    def _bytes(self, start: int, stop: int) -> tuple[int, int]:
        width = self.dtype.itemsize
        return self.offset + start * width, self.offset + stop * width


def read_header(source: Source) -> tuple[dict[str, StoredTensor], Identity]:
    """Read and check a file's header.

    Args:
        source: the file.

    Returns:
        The tensors, in the order of their names in the header, and what the file was.

    Raises:
        CheckpointError: if anything about the header is not as the format demands.
    """
    content = _header_of(source)
    tensors, _ = _parse(content, source)
    _check_cover(tensors, source, 8 + len(content))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return tensors, Identity(source.path, source.size, source.modified, digest)


def read_metadata(source: Source) -> dict[str, str]:
    """Return the texts that a file's header holds beside its tensors.

    Raises:
        CheckpointError: if the header is not as the format demands.
    """
    return _parse(_header_of(source), source)[1]


def _header_of(source: Source) -> bytes:
    if source.size < 8:
        raise CheckpointError(f"{source.path} has {source.size} bytes, too few for a safetensors file")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > _LARGEST_HEADER:
        raise CheckpointError(
            f"{source.path} claims a header of {length:,} bytes; at most {_LARGEST_HEADER:,} are read: it is "
            "no safetensors file, or a hostile one"
        )
    if 8 + length > source.size:
        raise CheckpointError(
            f"{source.path} claims a header of {length:,} bytes and has only {source.size - 8:,} after the "
            "first eight: it is cut short, or no safetensors file"
        )
    return bytes(source.read(8, 8 + length))


def _parse(content: bytes, source: Source) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return a header's tensors and its metadata."""
    path, begin = source.path, 8 + len(content)
    if not content.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with '{{': it is no safetensors file")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] | None = None
    try:
        header = JsonReader(content.decode("utf-8"))
        for name in header.object_keys():
            if name in tensors or (name == _METADATA and metadata is not None):
                raise CheckpointError(f"{path}: the header names {shown(name)} twice")
            if name == _METADATA:
                metadata = _metadata(header, path)
            else:
                tensors[name] = _tensor(name, header.flat_object(_LONGEST_ENTRY), source, begin)
        header.end()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    return tensors, metadata or {}


def _metadata(header: JsonReader, path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        for key in header.object_keys():
            if key in found:
                raise CheckpointError(f"{path}: the header's {_METADATA} names {shown(key)} twice")
            if len(found) == _MOST_METADATA:
                raise CheckpointError(f"{path}: the header's {_METADATA} has more than {_MOST_METADATA:,} entries")
            found[key] = header.text()
    except ValueError as error:
        raise CheckpointError(f"{path}: the header's {_METADATA} is not a map of texts: {error}") from error
    return found


def _tensor(name: str, entry: Any, source: Source, begin: int) -> StoredTensor:
    problem = problem_with_name(name)
    if problem is not None:
        raise _wrong(source, name, problem)
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _wrong(source, name, "it is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = dtypes.from_code(code) if isinstance(code, str) else None
    if dtype is None:
        if isinstance(code, str) and code in _PACKED:
            raise _wrong(source, name, f"it is {code}, packed below a byte, which is not supported")
        raise _wrong(source, name, f"it has the unknown dtype {shown(code)}")
    problem = problem_with_shape(shape, dtype) if isinstance(shape, list) else f"its shape is {shown(shape)}"
    if problem is not None:
        raise _wrong(source, name, problem)
    if not isinstance(offsets, list) or len(offsets) != 2 or not (is_count(offsets[0]) and is_count(offsets[1])):
        raise _wrong(source, name, f"it has the data_offsets {shown(offsets)}; two whole numbers are needed")
    size = dtype.itemsize * math.prod(shape)
    start, stop = offsets
    if stop - start != size:
        span = f"which takes {size:,} bytes, and its data_offsets span {stop - start:,}"
        raise _wrong(source, name, f"it is {code} {shape!r}, {span}")
    if begin + stop > source.size:
        ends = f"it ends at byte {begin + stop:,}, and the file at byte {source.size:,}"
        raise _wrong(source, name, f"{ends}: it is cut short")
    return StoredTensor(name, tuple(shape), dtype, source, begin + start)


def _wrong(source: Source, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{source.path}: tensor {shown(name)}: {what}")


def _check_cover(tensors: dict[str, StoredTensor], source: Source, begin: int) -> None:
    """Check that the tensors fill the file: bytes that belong to none, or to two, hide something."""
    end = begin
    previous: str | None = None
    for start, nbytes, name in sorted([(tensor.offset, tensor.nbytes, tensor.name) for tensor in tensors.values()]):
        if start != end:
            what = "overlap" if start < end else "leave a gap"
            before = "the start" if previous is None else f"tensor {shown(previous)}"
            raise CheckpointError(f"{source.path}: {before} and {shown(name)} {what}: {end:,} and {start:,}")
        end += nbytes
        previous = name
    if end != source.size:
        raise CheckpointError(f"{source.path}: the tensors end at byte {end:,}, and the file at byte {source.size:,}")


# At most as many digits at a time as are quickly turned to a number; hostile names may have any number of them.
_NUMBER = re.compile(r"([0-9]{1,18})")


def natural_order(name: str) -> list[str | int]:
    """Return a sort key by which the numbers in names count as numbers: layer 2 comes before layer 10."""
    # Texts and numbers take turns, so that texts meet texts where two keys are compared, and numbers meet numbers.
    parts: list[str | int] = [*_NUMBER.split(name)]
    parts[1::2] = map(int, parts[1::2])
    return parts
