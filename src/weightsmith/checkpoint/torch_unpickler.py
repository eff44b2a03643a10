"""Runs the pickle of a PyTorch file: descriptions of tensors and plain data come out, and nothing else is done.

Globals are looked up in a short table, and every other is refused by its name before anything is called. The
table's functions are all that a pickle can call, and no object's attributes can be set, so what was checked stays
as it was checked. Instructions that torch never writes are refused. The unpickler is Python's own in Python: the
one in C makes room in its memo up to whatever index the pickle names.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from weightsmith import dtypes
from weightsmith.checkpoint.description import is_count, problem_with_shape
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

# A tensor takes about thirty. Some instructions of one byte make a hundred bytes of Python objects.
_MOST_INSTRUCTIONS = 4_000_000

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
class DTypeName:
    """A dtype that the pickle names."""

    dtype: DType


@dataclass(frozen=True)
class Storage:
    """A storage: a member of the archive.

    Attributes:
        key: its name in the archive's ``data`` folder.
        dtype: the dtype of its elements, or None where its tensors bring theirs.
    """

    key: str
    dtype: DType | None


@dataclass(frozen=True)
class View:
    """A tensor as the pickle describes it: a strided view of a storage; lengths and strides from 0.

    Attributes:
        storage: where its elements are.
        dtype: their dtype.
        offset: the storage's element that is its first.
        shape: the lengths of its axes.
        strides: how many elements of the storage one step along each axis is.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mapping(dict[Any, Any]):
    """A dictionary with plain keys: a tuple of itself twice, over and over, is small to write and endless to hash."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise CheckpointError("its pickle has a dictionary whose key is a nested tuple")
        super().__setitem__(key, value)


def unpickle(content: bytes, path: str, reader: type[RestrictedUnpickler] | None = None) -> Any:
    """Run a pickle of ``torch.save``.

    Args:
        content: the pickle.
        path: its file, as errors name it.
        reader: what runs it, where the pickle may name more than a file of tensors may.

    Returns:
        What was saved, with :class:`View` in place of every tensor.

    Raises:
        UnsafeFileError: if it asks for anything but tensors and plain data.
        CheckpointError: if it is damaged, or describes a tensor that cannot be.
    """
    try:
        return (reader or RestrictedUnpickler)(content, path).load()
    except UnsafeFileError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        # What an error of Python says may quote the pickle, at any length.
        raise CheckpointError(f"{path}: its pickle is damaged: {type(error).__name__}: {str(error)[:200]}") from error


class RestrictedUnpickler(pickle._Unpickler):
    """Runs what builds tensors and plain data, and refuses the rest."""

    # What the unpickler in Python keeps its state in.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes, path: str) -> None:
        super().__init__(io.BytesIO(content))
        self.path = path
        self.instructions = 0

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
            return DTypeName(dtype)
        raise UnsafeFileError(
            f"{self.path} asks for {module[:100]}.{name[:100]}, which no file of weights needs; it was not run. If you "
            "trust the file, load it with its own program and save the state dict alone, as safetensors"
        )

    def persistent_load(self, saved: Any) -> Storage:
        """Return the storage that a persistent id of torch describes."""
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise UnsafeFileError(f"{self.path} holds a persistent object that is no storage, which torch never writes")
        _, kind, key, _, elements = saved
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not is_count(elements):
            raise CheckpointError("a storage is not described as torch does it")
        return Storage(key, kind.dtype)


def _leave_state(unpickler: RestrictedUnpickler) -> None:
    """Run BUILD: torch sets a state dict's ``_metadata`` by it, of no meaning here; nothing else may be set."""
    unpickler.stack.pop()
    if not isinstance(unpickler.stack[-1], _Mapping):
        kind = type(unpickler.stack[-1]).__name__
        raise UnsafeFileError(f"{unpickler.path} sets attributes of a {kind}, which no file of weights needs")


def _empty_mapping(unpickler: RestrictedUnpickler) -> None:
    unpickler.append(_Mapping())


def _full_mapping(unpickler: RestrictedUnpickler) -> None:
    items = unpickler.pop_mark()
    unpickler.append(_mapping(zip(items[::2], items[1::2], strict=True)))


def _refusal(instruction: str) -> Callable[[RestrictedUnpickler], None]:
    def refuse(unpickler: RestrictedUnpickler) -> None:
        raise UnsafeFileError(
            f"{unpickler.path}: its pickle holds the instruction {instruction}, which torch.save never writes"
        )

    return refuse


# fmt: off
_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT",
    "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "SETITEM",
    "SETITEMS", "GLOBAL", "STACK_GLOBAL", "PERSID", "BINPERSID", "GET", "BINGET", "LONG_BINGET", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "REDUCE",
))
# fmt: on
_OWN = {"BUILD": _leave_state, "EMPTY_DICT": _empty_mapping, "DICT": _full_mapping}


def _loader(instruction: pickletools.OpcodeInfo) -> Any:
    if instruction.name in _OWN:
        return counted(_OWN[instruction.name])
    if instruction.name in _PLAIN:
        return counted(pickle._Unpickler.dispatch[ord(instruction.code)])
    return _refusal(instruction.name)


def counted(load: Callable[[Any], None]) -> Any:
    """Return an instruction that counts itself, so that a pickle of too many ends with an error."""

    def run(unpickler: Any) -> None:
        unpickler.instructions += 1
        if unpickler.instructions > _MOST_INSTRUCTIONS:
            raise CheckpointError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} instructions")
        load(unpickler)

    return run


RestrictedUnpickler.dispatch = {ord(instruction.code): _loader(instruction) for instruction in pickletools.opcodes}


def _mapping(items: Iterable[tuple[Any, Any]] = ()) -> _Mapping:
    found = _Mapping()
    for key, value in items:
        found[key] = value
    return found


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> View:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise CheckpointError("a tensor has no typed storage")
    return _view(storage, storage.dtype, offset, shape, strides, metadata)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> View:
    if not isinstance(storage, Storage) or not isinstance(dtype, DTypeName):
        raise CheckpointError("a tensor has no storage or dtype")
    return _view(storage, dtype.dtype, offset, shape, strides, metadata)


def _view(storage: Storage, dtype: DType, offset: Any, shape: Any, strides: Any, metadata: Any) -> View:
    if metadata:
        # Conjugate and negative views: the elements lie in the file with the other sign.
        raise CheckpointError("a tensor is a conjugate or negative view; save it with resolve_conj() or resolve_neg()")
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) != len(strides) or not all(map(is_count, (offset, *strides))):
        raise CheckpointError(f"a tensor of shape {shown(shape)} has the strides {shown(strides)}")
    problem = problem_with_shape(shape, dtype)
    if problem is not None:
        raise CheckpointError(f"a tensor cannot be: {problem}")
    return View(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _size(lengths: Any = ()) -> tuple[Any, ...]:
    return tuple(lengths)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _mapping,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
}
