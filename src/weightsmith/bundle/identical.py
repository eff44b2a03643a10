"""Whether tensors are the same to the bit, and the hash by which one is known again."""

from __future__ import annotations

import threading

import numpy as np

from weightsmith import dtypes
from weightsmith.bundle.tiles import TILE, tile_starts
from weightsmith.checkpoint.manifest import hash_part, join_parts
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError, shown


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; read only as far as they are the same.

    Raises:
        CheckpointError: if one cannot be read.
    """
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if _place(one) is not None and _place(one) == _place(other):
        return True
    return all(
        np.array_equal(
            _bytes(one, start, min(start + TILE, one.size)), _bytes(other, start, min(start + TILE, one.size))
        )
        for start in tile_starts(one.size)
    )


def hash_tensor(tensor: Tensor) -> str:
    """Return the hash of a tensor's bytes: 32 hexadecimal digits.

    Raises:
        CheckpointError: if it cannot be read.
    """
    starts = tile_starts(tensor.size)
    return join_parts([hash_part(_bytes(tensor, start, min(start + TILE, tensor.size))) for start in starts])


def _place(tensor: Tensor) -> tuple[str, int] | None:
    return (tensor.source.path, tensor.offset) if isinstance(tensor, StoredTensor) else None


def _bytes(tensor: Tensor, start: int, stop: int) -> Array:
    return np.ascontiguousarray(tensor.read(start, stop)).view(np.uint8)


class KnownTensor(Tensor):
    """A tensor of a base that is not in the bundle: its content is hashed before any of it is given away."""

    def __init__(self, tensor: Tensor, digits: str, where: str) -> None:
        """Expect a content.

        Args:
            tensor: the tensor of what is said to be the base.
            digits: the hash that its content must have.
            where: whose base it is to be, for errors.
        """
        self.name = tensor.name
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self._tensor = tensor
        self._digits = digits
        self._where = where
        self._lock = threading.Lock()
        self._found: str | None = None

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`.

        Raises:
            CheckpointError: if the content is not the one that was expected.
        """
        with self._lock:
            if self._found is None:
                self._found = hash_tensor(self._tensor)
        if self._found != self._digits:
            raise CheckpointError(
                f"{self._where}: {shown(self.name)} is not what it was in the base that the bundle was made with, "
                f"though it is {dtypes.name_of(self.dtype)} {list(self.shape)} here too: this is another version of it"
            )
        return self._tensor.read(start, stop)
