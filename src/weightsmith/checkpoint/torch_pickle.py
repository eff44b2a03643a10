"""Reads PyTorch's zip files of state dicts without PyTorch, and without running what is in them.

A file of ``torch.save`` is a zip archive: ``…/data.pkl`` describes the tensors and ``…/data/KEY`` holds each
storage's bytes, uncompressed. Tensors are therefore ranges of the file, read when they are asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.description import problem_with_name
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.checkpoint.storage import Source
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.checkpoint.torch_archive import open_archive
from weightsmith.checkpoint.torch_unpickler import View, unpickle
from weightsmith.errors import CheckpointError, shown

# Where frameworks put the state dict among other things.
NESTS = (
    "state_dict",
    "model",
    "module",
    "model_state_dict",
    "params",
    "params_ema",
    "ema",
    "net",
    "weights",
)
# A view may repeat its storage: what it then claims to hold is bounded by the file, or by this.
_LARGEST_EXPANSION = 2**30
# How many mappings are looked at: they may hold one another, and themselves.
_MOST_MAPPINGS = 100


class StridedTensor(Tensor):
    """A tensor whose elements do not lie one after the other: a transposed or expanded view.

    Where a few elements lie far apart, as in a transposed matrix, its part of the storage is read whole and kept for
    the blocks after.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], storage: Tensor, offset: int
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = storage.dtype
        self._strides = strides
        self._storage = storage
        self._begin = offset
        self._end = offset + _reach(shape, strides) + 1

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        if start == stop:
            return np.zeros(0, self.dtype)
        places = np.full(stop - start, self._begin, np.int64)
        left = np.arange(start, stop, dtype=np.int64)
        for length, stride in zip(reversed(self.shape), reversed(self._strides), strict=True):
            left, coordinate = np.divmod(left, length)
            places += coordinate * stride
        first, last = int(places.min()), int(places.max())
        if last - first < 4 * len(places):
            return self._storage.read(first, last + 1)[places - first]
        (span,) = RECENT.get(self, lambda: (self._storage.read(self._begin, self._end),))
        found: Array = span[places - self._begin]
        return found


def read_state_dict(source: Source) -> tuple[Mapping[str, Tensor], Identity]:
    """Find the tensors of a PyTorch file.

    Args:
        source: the file.

    Returns:
        The tensors of its state dict by name, and what the file was.

    Raises:
        UnsafeFileError: if the pickle asks for anything but tensors and plain data.
        CheckpointError: if the file is not such a file, or is damaged.
    """
    members, content = open_archive(source)
    views = _state_dict(unpickle(content, source.path), set())
    if not views:
        raise CheckpointError(f"{source.path} holds no state dict: no mapping of names to tensors is in it")
    tensors = {name: tensor_of(name, view, source, members) for name, view in views.items()}
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return tensors, Identity(source.path, source.size, source.modified, digest)


def _state_dict(loaded: Any, seen: set[int]) -> dict[str, View]:
    """Find the state dict: what lies under one of the usual names, or the object itself.

    A state dict holds no mappings. So where one of them lies beside tensors, these are a step counter or the like.
    """
    if not isinstance(loaded, dict) or id(loaded) in seen or len(seen) > _MOST_MAPPINGS:
        return {}
    seen.add(id(loaded))
    for nest in NESTS:
        found = _state_dict(loaded.get(nest), seen)
        if found:
            return found
    own = {name: value for name, value in loaded.items() if isinstance(value, View)}
    return own if all(isinstance(name, str) for name in own) else {}


def tensor_of(name: str, view: View, source: Source, members: Mapping[str, tuple[int, int]]) -> Tensor:
    """Return the tensor that a view of an archive's storage is.

    Args:
        name: its name.
        view: the view.
        source: the archive.
        members: the place of every storage in it.

    Raises:
        CheckpointError: if the storage is not there, or shorter than the view says.
    """
    where = f"{source.path}: tensor {shown(name)}"
    problem = problem_with_name(name)
    if problem is not None:
        raise CheckpointError(f"{where}: {problem}")
    place = members.get(view.storage.key)
    if place is None:
        raise CheckpointError(f"{where} lies in the storage {shown(view.storage.key)}, which the file lacks")
    start, length = place
    width = view.dtype.itemsize
    last = view.offset + _reach(view.shape, view.strides)
    empty = 0 in view.shape
    if not empty and (last + 1) * width > length:
        raise CheckpointError(
            f"{where} reaches to byte {(last + 1) * width:,} of a storage of {length:,}: the file is damaged"
        )
    if empty:
        # Wherever it says it begins: there may be nothing, and no file reaches so far.
        return StoredTensor(name, view.shape, view.dtype, source, start)
    if view.strides == _contiguous(view.shape, view.strides):
        return StoredTensor(name, view.shape, view.dtype, source, start + view.offset * width)
    nbytes = math.prod(view.shape) * width
    if nbytes > max(source.size, _LARGEST_EXPANSION):
        raise CheckpointError(f"{where} repeats its storage of {length:,} bytes to {nbytes:,}, more than the file has")
    storage = StoredTensor(name, (length // width,), view.dtype, source, start)
    return StridedTensor(name, view.shape, view.strides, storage, view.offset)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of row-major order; those of axes of length 1 do not matter and are kept."""
    found = []
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        found.append(stride if length == 1 else step)
        step *= length
    return tuple(reversed(found))


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements of its storage after its first a tensor's last one lies."""
    return sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
