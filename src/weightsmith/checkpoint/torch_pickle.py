"""Reads PyTorch's zip files of state dicts without PyTorch, and without running what is in them.

A file of ``torch.save`` is a zip archive: ``…/data.pkl`` describes the tensors and ``…/data/KEY`` holds each
storage's bytes, uncompressed. Tensors are therefore ranges of the file, read when they are asked for. The
pickle is run by an unpickler that knows the constructors of tensors and of plain containers, and refuses every
other global by its name before anything is called.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.checkpoint.storage import Source
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.checkpoint.torch_archive import open_archive
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, UnsafeFileError

# Where frameworks put the state dict among other things.
_NESTS = (
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

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
    "ComplexFloatStorage": "C64",
}
_DTYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
}


@dataclass(frozen=True)
class _StorageType:
    """What the pickle names as a storage's class; None for storages whose tensors bring their dtype."""

    dtype: DType | None


@dataclass(frozen=True)
class _DTypeName:
    dtype: DType


@dataclass(frozen=True)
class _Storage:
    """A storage: a member of the archive."""

    key: str
    dtype: DType | None
    elements: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: a strided view of a storage."""

    storage: _Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StridedTensor(Tensor):
    """A tensor whose elements do not lie one after the other: a transposed or expanded view.

    Its whole storage is read at the first use, and kept as long as the tensor.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], storage: Tensor, offset: int
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = storage.dtype
        self._strides = strides
        self._storage = storage
        self._offset = offset

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        places = np.full(stop - start, self._offset, np.int64)
        left = np.arange(start, stop, dtype=np.int64)
        for length, stride in zip(reversed(self.shape), reversed(self._strides), strict=True):
            left, coordinate = np.divmod(left, length)
            places += coordinate * stride
        if not len(places):
            return np.zeros(0, self.dtype)
        first, last = int(places.min()), int(places.max())
        return self._storage.read(first, last + 1)[places - first]


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
    try:
        loaded = _Unpickler(content, source.path).load()
    except (UnsafeFileError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{source.path}: its pickle is damaged: {type(error).__name__}: {error}") from error
    views = _state_dict(loaded)
    if not views:
        raise CheckpointError(f"{source.path} holds no state dict: no mapping of names to tensors is in it")
    tensors = {name: _tensor(name, view, source, members) for name, view in views.items()}
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return tensors, Identity(source.path, source.size, source.modified, digest)


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors and plain containers, and nothing else."""

    def __init__(self, content: bytes, path: str) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few things that a file of weights may name."""
        found = _ALLOWED.get((module, name))
        if found is not None:
            return found
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _StorageType(dtypes.from_code(_STORAGES[name]))
        if module == "torch.storage" and name in ("UntypedStorage", "TypedStorage"):
            return _StorageType(None)
        if module == "torch" and name in _DTYPES:
            dtype = dtypes.from_code(_DTYPES[name])
            assert dtype is not None
            return _DTypeName(dtype)
        raise UnsafeFileError(
            f"{self._path} asks for {module}.{name}, which no file of weights needs; it was not run. If you "
            "trust the file, load it with its own program and save the state dict alone, as safetensors"
        )

    def persistent_load(self, saved: Any) -> _Storage:
        """Return the storage that a persistent id of torch describes."""
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise UnsafeFileError(f"{self._path} holds a persistent object that is no storage: {saved!r:.80}")
        _, kind, key, _, elements = saved
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_count(elements):
            raise CheckpointError(f"{self._path}: the storage {key!r:.80} is not described as torch does it")
        return _Storage(key, kind.dtype, elements)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    # torch appends requires_grad, backward hooks and metadata: of no meaning for weights.
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise CheckpointError("a tensor without a typed storage")
    return _view(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> _View:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _DTypeName):
        raise CheckpointError("a tensor without a storage or dtype")
    return _view(storage, dtype.dtype, offset, shape, strides)


def _view(storage: _Storage, dtype: DType, offset: Any, shape: Any, strides: Any) -> _View:
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) != len(strides) or not all(map(_is_count, (offset, *shape, *strides))):
        raise CheckpointError(f"a tensor of shape {shape!r:.80} and strides {strides!r:.80}")
    return _View(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _as_is(*values: Any) -> Any:
    return tuple(values[0]) if values else ()


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch", "Size"): _as_is,
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _state_dict(loaded: Any) -> dict[str, _View]:
    """Find the state dict: the object itself, or what it holds under one of the usual names."""
    if not isinstance(loaded, dict):
        return {}
    own = {name: value for name, value in loaded.items() if isinstance(value, _View)}
    if own and all(isinstance(name, str) for name in own):
        return own
    for nest in _NESTS:
        found = _state_dict(loaded.get(nest))
        if found:
            return found
    return {}


def _tensor(name: str, view: _View, source: Source, members: Mapping[str, tuple[int, int]]) -> Tensor:
    where = f"{source.path}: tensor {name!r}"
    place = members.get(view.storage.key)
    if place is None:
        raise CheckpointError(f"{where} lies in the storage {view.storage.key!r}, which the file lacks")
    start, length = place
    width = view.dtype.itemsize
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    empty = 0 in view.shape
    if not empty and (last + 1) * width > length:
        raise CheckpointError(
            f"{where} reaches to byte {(last + 1) * width:,} of a storage of {length:,}: the file is damaged"
        )
    if empty or view.strides == _contiguous(view.shape, view.strides):
        return StoredTensor(name, view.shape, view.dtype, source, start + view.offset * width)
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
