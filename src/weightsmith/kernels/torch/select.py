"""The twin of :mod:`weightsmith.kernels.select` for tensors: selects on the device, brings back what is small.

What comes back is NumPy's and unsigned, as a statistic would have it from the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightsmith.kernels.select import BINS, DIGIT

_SIGNED = {4: torch.int32, 8: torch.int64}
_UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}


def patterns(values: Any) -> Any:
    """Return the bit patterns of non-negative float32 or float64 values: ``[n]`` int32 or int64 on their device."""
    kind = _SIGNED[values.dtype.itemsize]
    # PyTorch compares signed numbers. The sign bit says nothing here, though a NaN may have it set.
    return values.contiguous().reshape(-1).view(kind) & torch.iinfo(kind).max


def gather(found: Any) -> npt.NDArray[Any]:
    """Return patterns as NumPy's unsigned integers."""
    return np.asarray(found.cpu().numpy().view(_UNSIGNED[found.dtype]))


def within(found: Any, low: int, high: int) -> tuple[int, npt.NDArray[Any]]:
    """See :func:`weightsmith.kernels.select.within`."""
    most = torch.iinfo(found.dtype).max
    inside = found[(found >= min(low, most)) & (found <= min(high, most))]
    return int(torch.count_nonzero(found > min(high, most))), gather(inside)


def histogram(found: Any, low: int, shift: int) -> npt.NDArray[np.int64]:
    """See :func:`weightsmith.kernels.select.histogram`."""
    digits = (found[found >= low] - low) >> shift
    return np.asarray(torch.bincount(digits[digits < BINS], minlength=BINS).cpu().numpy())


def equal(found: Any, pattern: int) -> npt.NDArray[np.int64]:
    """See :func:`weightsmith.kernels.select.equal`."""
    return np.asarray(torch.nonzero(found == pattern)[:, 0].cpu().numpy())


def look_up(values: Any, table: npt.NDArray[np.float64]) -> Any:
    """See :func:`weightsmith.kernels.select.look_up`."""
    found = patterns(values)
    digits = found >> (8 * found.dtype.itemsize - DIGIT)
    return torch.from_numpy(table).to(values.device)[digits].reshape(values.shape)
