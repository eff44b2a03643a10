"""Between the dtypes of files and the dtypes of arithmetic, on blocks.

ml_dtypes converts one element at a time and holds the interpreter's lock; these whole-array forms do not.
Rounding is to nearest, ties to even, and once: a float64 never passes through a rounded float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from weightsmith.dtypes import DType

Array = npt.NDArray[Any]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


def widen(values: Array, working: DType) -> Array:
    """Convert values of any floating dtype to float32 or float64, exactly.

    Args:
        values: ``[n]``, any floating dtype of a checkpoint.
        working: float32 or float64; float64 values need float64.

    Returns:
        ``[n]`` of the working dtype; the same array where it has that dtype already.
    """
    if values.dtype == working:
        return values
    if values.dtype == _BFLOAT16:
        bits = values.view(np.uint16).astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        values = bits.view(np.float32)
    elif values.dtype.itemsize == 1:
        values = _table(values.dtype)[values.view(np.uint8)]
    # A signalling NaN is a value like any other here; the engine counts and names them.
    with np.errstate(invalid="ignore"):
        return values.astype(working, copy=False)


def narrow(values: Array, dtype: DType) -> Array:
    """Round float32 or float64 values to a floating dtype of a checkpoint.

    Args:
        values: ``[n]``, float32 or float64.
        dtype: the floating dtype to round to. Values beyond its range become infinite, or NaN where the dtype
            has no infinity (float8_e4m3fn).

    Returns:
        ``[n]`` of that dtype.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype in (_FLOAT16, _FLOAT32, _FLOAT64):
            return values.astype(dtype)
        if values.dtype == _FLOAT64:
            values = _round_to_odd(values)
        return _to_bfloat16(values) if dtype == _BFLOAT16 else values.astype(dtype)


def largest_finite(dtype: DType) -> float:
    """Return the largest finite value of a floating dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


@cache
def _table(dtype: DType) -> Array:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _to_bfloat16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounding = np.right_shift(bits, 16)
    np.bitwise_and(rounding, 1, out=rounding)
    np.add(rounding, 0x7FFF, out=rounding)
    np.add(rounding, bits, out=rounding)
    np.right_shift(rounding, 16, out=rounding)
    rounded = rounding.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        # The carry of the rounding can turn a NaN into infinity or zero: keep its sign, make it quiet.
        sign = (bits[nan] >> np.uint32(16)) & np.uint32(0x8000)
        rounded[nan] = (sign | np.uint32(0x7FC0)).astype(np.uint16)
    return rounded.view(_BFLOAT16)


def _round_to_odd(values: Array) -> Array:
    """Reduce float64 to float32 such that a second rounding, to 16 bits or fewer, is the correct single one."""
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32).copy()
    inexact = (back != values) & np.isfinite(values)
    away = inexact & (np.abs(back) > np.abs(values))
    bits -= away
    bits |= inexact
    return bits.view(np.float32)
