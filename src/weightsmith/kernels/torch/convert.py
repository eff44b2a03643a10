"""The twin of :mod:`weightsmith.kernels.convert`: between the dtypes of files and of arithmetic, on the device.

Eight-bit floats are bytes here: PyTorch's own conversions to them differ between its versions (beyond the largest
float8_e4m3fn some give NaN, some the largest).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from weightsmith.dtypes import DType, name_of


def torch_dtype(dtype: DType) -> Any:
    """Return the dtype of PyTorch that holds a floating dtype of a checkpoint: its own, uint8 for 8-bit floats."""
    return torch.uint8 if dtype.itemsize == 1 else getattr(torch, name_of(dtype))


def widen(data: Any, dtype: DType, working: Any) -> Any:
    """Convert the bytes of a file to float32 or float64, exactly.

    Args:
        data: ``[bytes]`` uint8 on any device.
        dtype: the floating dtype that they hold.
        working: ``torch.float32`` or ``torch.float64``.

    Returns:
        ``[n]`` of the working dtype on the same device. It shares the memory of ``data`` where that has this dtype.
    """
    if dtype.itemsize == 1:
        return _values(dtype, data.device)[data.to(torch.int32)].to(working)
    return data.view(torch_dtype(dtype)).to(working)


def narrow(values: Any, dtype: DType) -> Any:
    """Round float32 or float64 values to a floating dtype of a checkpoint: to nearest, ties to even, once.

    Args:
        values: ``[n]``, float32 or float64, on any device.
        dtype: the floating dtype to round to.

    Returns:
        ``[n]`` on the same device, of the dtype that :func:`torch_dtype` says.
    """
    if dtype.itemsize == 1:
        return _to_bytes(values, dtype)
    if values.dtype == torch.float64 and dtype.itemsize == 2:
        values = _round_to_odd(values)
    return values.to(torch_dtype(dtype))


def count_nonfinite(narrowed: Any, dtype: DType) -> Any:
    """Return how many values of :func:`narrow` are NaN or infinite: 0-D, on the device."""
    if dtype.itemsize == 1:
        bad = ~torch.isfinite(_values(dtype, narrowed.device))
        return torch.count_nonzero(bad[narrowed.to(torch.int32)])
    return torch.count_nonzero(~torch.isfinite(narrowed))


def _round_to_odd(values: Any) -> Any:
    """See :func:`weightsmith.kernels.convert._round_to_odd`."""
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    inexact = (back != values) & torch.isfinite(values)
    away = inexact & (torch.abs(back) > torch.abs(values))
    bits = near.view(torch.int32) - away.to(torch.int32)
    return (bits | inexact.to(torch.int32)).view(torch.float32)


def _to_bytes(values: Any, dtype: DType) -> Any:
    """Round to an 8-bit float by searching among its values.

    The byte of a value without its sign is the value's place among the non-negative ones.
    """
    boundaries, codes, nan = _search(dtype, values.dtype == torch.float64, values.device)
    code = codes[torch.bucketize(torch.abs(values), boundaries)]
    negative = torch.signbit(values) & (code != 0) if _unsigned_zero(dtype) else torch.signbit(values)
    return torch.where(torch.isnan(values), nan, code | (negative.to(torch.uint8) << 7))


def _unsigned_zero(dtype: DType) -> bool:
    """Whether the pattern of a negative zero stands for NaN, as in the "fnuz" formats."""
    return bool(np.isnan(np.array([0x80], np.uint8).view(dtype).astype(np.float32))[0])


@cache
def _search(dtype: DType, double: bool, device: Any) -> tuple[Any, Any, int]:
    """Return the largest numbers that round to each non-negative value, the bytes of these values, and that of NaN.

    There is a byte more than there are boundaries: that of what overflows.
    """
    working = np.dtype(np.float64 if double else np.float32)
    positive = np.arange(128, dtype=np.uint8).view(dtype).astype(working)
    count = int(np.count_nonzero(np.isfinite(positive)))
    finite = positive[:count]
    # The value after the largest, if the format went on: halfway there begins what overflows.
    steps = np.append(finite, 2 * finite[-1] - finite[-2])
    halfway = (steps[1:] + steps[:-1]) / 2
    # Halfway between two values, the one with the even byte is chosen.
    odd = np.arange(count) % 2 == 1
    boundaries = np.where(odd, np.nextafter(halfway, working.type(-np.inf)), halfway)
    overflow, nan = np.array([np.inf, np.nan], working).astype(dtype).view(np.uint8)
    codes = np.append(np.arange(count, dtype=np.uint8), overflow)
    return torch.from_numpy(boundaries).to(device), torch.from_numpy(codes).to(device), int(nan)


@cache
def _values(dtype: DType, device: Any) -> Any:
    return torch.from_numpy(np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)).to(device)
