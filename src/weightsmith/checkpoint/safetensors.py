"""Reads safetensors files: the header is checked completely before a tensor is touched.

The format: eight bytes, little-endian, give the header's length; the header is JSON and maps each name to its
dtype, shape and byte range; the ranges cover the rest of the file without gap or overlap. Scalars have shape
``[]``. Reference: the format's description in the safetensors repository.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.storage import Source
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError

_LARGEST_HEADER = 100_000_000
_LARGEST_SIZE = 2**63
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
    header = _parse(bytes(content), source.path)
    begin = 8 + len(content)
    tensors = {name: _tensor(name, entry, source, begin) for name, entry in header.items() if name != _METADATA}
    _check_cover(tensors, source, begin)
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return tensors, Identity(source.path, source.size, source.modified, digest)


def read_metadata(source: Source) -> dict[str, str]:
    """Return the texts that a file's header holds beside its tensors.

    Raises:
        CheckpointError: if the header is not as the format demands.
    """
    return dict(_parse(bytes(_header_of(source)), source.path).get(_METADATA, {}))


def _header_of(source: Source) -> bytearray | bytes:
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
    return source.read(8, 8 + length)


def _parse(content: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return found

    if not content.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with '{{': it is no safetensors file")
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's {_METADATA} is not a map of texts")
    return dict(header)


def _tensor(name: str, entry: Any, source: Source, begin: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _wrong(source, name, "is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = dtypes.from_code(code) if isinstance(code, str) else None
    if dtype is None:
        if code in _PACKED:
            raise _wrong(source, name, f"is {code}, packed below a byte, which is not supported")
        raise _wrong(source, name, f"has the unknown dtype {code!r}")
    if not isinstance(shape, list):
        raise _wrong(source, name, f"has the shape {shape!r}; lengths are whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not (_is_count(offsets[0]) and _is_count(offsets[1])):
        raise _wrong(source, name, f"has the data_offsets {offsets!r}; two whole numbers are needed")
    size = dtype.itemsize
    for length in shape:
        if not _is_count(length):
            raise _wrong(source, name, f"has the shape {shape!r}; lengths are whole numbers from 0")
        size *= length
        if size >= _LARGEST_SIZE:
            raise _wrong(source, name, f"has the shape {shape!r}, larger than any file")
    start, stop = offsets
    if stop - start != size:
        span = f"which takes {size:,} bytes, and its data_offsets span {stop - start:,}"
        raise _wrong(source, name, f"is {code} {shape!r}, {span}")
    if begin + stop > source.size:
        ends = f"ends at byte {begin + stop:,}, and the file at byte {source.size:,}"
        raise _wrong(source, name, f"{ends}: it is cut short")
    return StoredTensor(name, tuple(shape), dtype, source, begin + start)


def _wrong(source: Source, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{source.path}: tensor {name!r} {what}")


def _is_count(value: Any) -> bool:
    # The type itself: JSON's true and false are no counts.
    return type(value) is int and 0 <= value < _LARGEST_SIZE


def _check_cover(tensors: dict[str, StoredTensor], source: Source, begin: int) -> None:
    """Check that the tensors fill the file: bytes that belong to none, or to two, hide something."""
    end = begin
    previous = ""
    for start, nbytes, name in sorted([(tensor.offset, tensor.nbytes, tensor.name) for tensor in tensors.values()]):
        if start != end:
            what = "overlap" if start < end else "leave a gap"
            before = f"tensors {previous!r} and {name!r}" if previous else f"the start and {name!r}"
            raise CheckpointError(f"{source.path}: {before} {what}: {end:,} and {start:,}")
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
