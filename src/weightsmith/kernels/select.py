"""Histograms of bit patterns, for exact selection by rank.

The pattern of a non-negative IEEE float, read as an unsigned integer, orders as the float does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Histogram = npt.NDArray[np.int64]
# The width of the patterns in bits, and one histogram per array.
Counted = tuple[int, list[Histogram]]
_BINS = 1 << 16


def histograms(arrays: Sequence[Any], prefixes: Sequence[int], level: int) -> Counted:
    """Count, for each array, the elements whose leading bits equal its prefix, by their next 16 bits.

    Args:
        arrays: float32 or float64 arrays of non-negative numbers.
        prefixes: the leading ``16 * level`` bits, per array.
        level: how many times 16 bits are known.

    Returns:
        The width of the patterns in bits (32 or 64), and one histogram of 65,536 counts per array.
    """
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    width = flat[0].dtype.itemsize * 8
    counted = []
    for values, prefix in zip(flat, prefixes, strict=True):
        # On a little-endian machine the leading 16 bits of a float are the last of its halves.
        digits = values.view(np.uint16).reshape(values.size, width // 16)[:, -1 - level]
        if level:
            digits = digits[_leading(values, width - 16 * level) == prefix]
        counted.append(np.bincount(digits, minlength=_BINS))
    return width, counted


def add(one: Counted, other: Counted) -> Counted:
    """Add two results of :func:`histograms`."""
    return one[0], [a + b for a, b in zip(one[1], other[1], strict=True)]


def bucket(histogram: Histogram, wanted: int) -> tuple[int, int, int]:
    """Find the bin in which the wanted-th largest element lies.

    Args:
        histogram: counts by digit.
        wanted: rank from the top, counted from 1; 0 gives the topmost bin.

    Returns:
        The digit, the rank that remains within its bin, and the count in the bin.
    """
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, max(wanted, 1)))
    place = min(place, _BINS - 1)
    above = int(from_top[place - 1]) if place else 0
    digit = _BINS - 1 - place
    return digit, wanted - above, int(histogram[digit])


def value_of(pattern: int, width: int) -> float:
    """Return the float whose bit pattern this is."""
    if width == 32:
        return float(np.uint32(pattern).view(np.float32))
    return float(np.uint64(pattern).view(np.float64))


def rank_table(histogram: Histogram) -> npt.NDArray[np.float64]:
    """Return for every digit the mean rank of its elements, from 0 (smallest) to 1: ``[65536]``.

    A single element has the rank 0.5, as in a row of one.

    Args:
        histogram: counts by the leading 16 bits.
    """
    total = int(histogram.sum())
    if total == 1:
        return np.full(_BINS, 0.5)
    below = np.cumsum(histogram) - histogram
    return np.asarray((below + (histogram - 1) / 2.0) / max(total - 1, 1)).clip(0.0, 1.0)


def look_up(array: Any, table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the table's entry for the leading 16 bits of every element, in the array's shape."""
    values = np.ascontiguousarray(array)
    return np.asarray(table[_leading(values, values.dtype.itemsize * 8 - 16)])


def _leading(values: npt.NDArray[Any], shift: int) -> npt.NDArray[Any]:
    """Return the bit patterns of floats, shifted right."""
    if values.dtype.itemsize == 4:
        return values.view(np.uint32) >> np.uint32(shift)
    return values.view(np.uint64) >> np.uint64(shift)
