"""The element types of checkpoints: one table of their names in every format.

A dtype is a ``numpy.dtype`` everywhere in the package; bfloat16 and the 8-bit floats come from ml_dtypes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from weightsmith.errors import RecipeError, did_you_mean

DType = np.dtype[Any]

# safetensors code -> (numpy dtype, the name PyTorch and transformers use)
_TABLE: dict[str, tuple[DType, str]] = {
    "F64": (np.dtype(np.float64), "float64"),
    "F32": (np.dtype(np.float32), "float32"),
    "F16": (np.dtype(np.float16), "float16"),
    "BF16": (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    "F8_E4M3": (np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
    "F8_E5M2": (np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2"),
    "F8_E4M3FNUZ": (np.dtype(ml_dtypes.float8_e4m3fnuz), "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (np.dtype(ml_dtypes.float8_e5m2fnuz), "float8_e5m2fnuz"),
    "F8_E8M0": (np.dtype(ml_dtypes.float8_e8m0fnu), "float8_e8m0fnu"),
    "C64": (np.dtype(np.complex64), "complex64"),
    "I64": (np.dtype(np.int64), "int64"),
    "I32": (np.dtype(np.int32), "int32"),
    "I16": (np.dtype(np.int16), "int16"),
    "I8": (np.dtype(np.int8), "int8"),
    "U64": (np.dtype(np.uint64), "uint64"),
    "U32": (np.dtype(np.uint32), "uint32"),
    "U16": (np.dtype(np.uint16), "uint16"),
    "U8": (np.dtype(np.uint8), "uint8"),
    "BOOL": (np.dtype(np.bool_), "bool"),
}
_BY_CODE = {code: dtype for code, (dtype, _) in _TABLE.items()}
_BY_NAME = {name: dtype for _, (dtype, name) in _TABLE.items()}
_CODES = {dtype: code for code, dtype in _BY_CODE.items()}
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}
# E8M0 holds powers of two only: it stores the scales of block-quantised weights, never weights.
_FLOATS = frozenset(
    _BY_CODE[code] for code in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
)
FLOAT_NAMES = tuple(_NAMES[dtype] for dtype in _BY_CODE.values() if dtype in _FLOATS)


def from_code(code: str) -> DType | None:
    """Return the dtype of a safetensors code such as ``"BF16"``, or None if there is no such code."""
    return _BY_CODE.get(code)


def code_of(dtype: DType) -> str:
    """Return the safetensors code of a dtype."""
    return _CODES[dtype]


def name_of(dtype: DType) -> str:
    """Return the name PyTorch and transformers use, such as ``"bfloat16"``."""
    return _NAMES[dtype]


def is_name(name: Any) -> bool:
    """Whether a value is the name of a dtype, such as ``"bfloat16"``."""
    return isinstance(name, str) and name in _BY_NAME


def from_name(name: str) -> DType:
    """Return the dtype of a name that :func:`is_name` knows."""
    return _BY_NAME[name]


def float_from_name(name: str) -> DType:
    """Return the floating dtype of a name such as ``"bfloat16"``.

    Raises:
        RecipeError: if the name is not that of a floating dtype that a checkpoint can hold.
    """
    dtype = _BY_NAME.get(name.removeprefix("torch."))
    if dtype is None or dtype not in _FLOATS:
        raise RecipeError(
            f"{name!r} is not a floating dtype{did_you_mean(name, FLOAT_NAMES)}; use one of " + ", ".join(FLOAT_NAMES)
        )
    return dtype


def is_float(dtype: DType) -> bool:
    """Whether tensors of this dtype are merged; all others are carried."""
    return dtype in _FLOATS


def promote(dtypes: list[DType]) -> DType:
    """Return the floating dtype that holds every given one: the widest, or float32 where two differ in kind.

    bfloat16 with float16, and any two different 8-bit floats, promote as PyTorch promotes them: to float32.
    """
    unique = list(dict.fromkeys(dtypes))
    if len(unique) == 1:
        return unique[0]
    widest = max(dtype.itemsize for dtype in unique)
    candidates = [dtype for dtype in unique if dtype.itemsize == widest]
    if len(candidates) == 1 and candidates[0].itemsize >= 2:
        return candidates[0]
    return np.dtype(np.float32)


def working_dtype(dtypes: list[DType]) -> DType:
    """Return the dtype of the arithmetic on such inputs: float64 if any is float64, else float32."""
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
