"""Exact selection by rank among non-negative floats.

The bit pattern of a non-negative IEEE float, read as an unsigned integer, orders as the float does: so ranges and
histograms of patterns find the k-th largest value without sorting and without rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Patterns = npt.NDArray[Any]

# Standard errors between the sample's estimate of a rank and the bounds of the range to search.
_CAUTION = 4.0
DIGIT = 16
BINS = 1 << DIGIT


def selector(values: Any) -> ModuleType:
    """Return the module that selects among such values where they lie: this one, or its twin for PyTorch's tensors.

    Both have ``patterns``, ``gather``, ``within``, ``histogram``, ``equal`` and ``look_up``.
    """
    if isinstance(values, np.ndarray):
        return sys.modules[__name__]
    from array_api_compat import is_torch_array

    if not is_torch_array(values):
        return sys.modules[__name__]
    from weightsmith.kernels.torch import select

    return select


def patterns(values: Any) -> Patterns:
    """Return the bit patterns of float32 or float64 values, NumPy's or any library's on the CPU: ``[n]`` unsigned."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint64 if flat.dtype.itemsize == 8 else np.uint32)


def gather(found: Patterns) -> Patterns:
    """Return patterns as NumPy's, which they are."""
    return found


def value_of(pattern: int, width: int) -> float:
    """Return the float whose bit pattern this is, of 32 or 64 bits."""
    if width == 32:
        return float(np.uint32(pattern).view(np.float32))
    return float(np.uint64(pattern).view(np.float64))


def within(found: Patterns, low: int, high: int) -> tuple[int, Patterns]:
    """Return how many patterns lie above a range, and those within it (bounds included) in order of position."""
    inside = found[(found >= low) & (found <= high)]
    return int(np.count_nonzero(found > high)), inside


def histogram(found: Patterns, low: int, shift: int) -> npt.NDArray[np.int64]:
    """Count patterns from ``low`` on, ``2**shift`` of them in each of 65,536 bins; others are not counted."""
    digits = (found[found >= low] - low) >> shift
    return np.bincount(digits[digits < BINS].astype(np.int64), minlength=BINS)


def equal(found: Patterns, pattern: int) -> npt.NDArray[np.int64]:
    """Return the places of a pattern, ascending."""
    return np.flatnonzero(found == pattern)


@dataclass
class Gathered:
    """The patterns found within a range, block after block.

    Attributes:
        above: how many lie above the range.
        blocks: the patterns within it, an array for each block; None where there were too many to keep.
        count: how many there are.
    """

    above: int
    blocks: list[Patterns] | None
    count: int

    @classmethod
    def of_block(cls, above: int, inside: Patterns) -> Gathered:
        """Return what was found in one block."""
        return cls(above, [inside], len(inside))

    def add(self, other: Gathered, limit: int) -> Gathered:
        """Append the blocks that follow, and let go of all patterns where they take more than ``limit`` bytes."""
        self.above += other.above
        self.count += other.count
        if self.blocks is None or other.blocks is None or self.count * other.blocks[0].itemsize > limit:
            self.blocks = None
        else:
            self.blocks += other.blocks
        return self


@dataclass(frozen=True)
class Found:
    """The k-th largest pattern.

    Attributes:
        pattern: the pattern.
        width: its width in bits.
        block: None if all values equal to it are among the k largest; otherwise the index of the block in which
            the last of those lies, and its number among the equal ones of that block, from 1.
    """

    pattern: int
    width: int
    block: tuple[int, int] | None


def find(gathered: Gathered, count: int) -> Found | None:
    """Find the ``count``-th largest pattern of all; None if it does not lie in the range, or patterns are missing."""
    rank = count - gathered.above
    if gathered.blocks is None or not 1 <= rank <= gathered.count:
        return None
    everything = np.concatenate(gathered.blocks)
    place = len(everything) - rank
    pattern = np.partition(everything, place)[place]
    wanted = rank - int(np.count_nonzero(everything > pattern))
    per_block = [int(np.count_nonzero(block == pattern)) for block in gathered.blocks]
    return Found(
        pattern=int(pattern),
        width=8 * everything.dtype.itemsize,
        block=place_of(per_block, wanted) if wanted < sum(per_block) else None,
    )


def place_of(per_block: Sequence[int], wanted: int) -> tuple[int, int]:
    """Return in which block the wanted-th of the counted values lies, and its number within that block, from 1."""
    index = 0
    while per_block[index] < wanted:
        wanted -= per_block[index]
        index += 1
    return index, wanted


def bracket(runs: Sequence[Patterns], count: int, size: int) -> tuple[int, int]:
    """Estimate a range of patterns in which the ``count``-th largest of ``size`` lies.

    Args:
        runs: samples from several places. The range is wide enough for what differs between places, so far as
            the samples tell.
        count: the rank from the top, from 1.
        size: how many values there are.

    Returns:
        The least and the greatest pattern of the range.
    """
    sample = np.sort(np.concatenate(runs))
    length, share = len(sample), count / size
    middle = sample[min(max(int(length * (1 - share)), 0), length - 1)]
    above = np.array([np.count_nonzero(run > middle) / max(len(run), 1) for run in runs])
    spread = float(above.std()) / math.sqrt(len(runs))
    error = max(spread, math.sqrt(share * (1 - share) / length))
    margin = math.ceil(_CAUTION * error * length) + 2
    place = int(length * (1 - share))
    low, high = place - margin, place + margin
    most = (1 << (8 * sample.dtype.itemsize)) - 1
    return (int(sample[low]) if low >= 0 else 0), (int(sample[high]) if high < length else most)


def share_within(runs: Sequence[Patterns], low: int, high: int) -> float:
    """Return the share of a sample that lies in a range."""
    sample = np.concatenate(runs)
    return float(np.count_nonzero((sample >= low) & (sample <= high))) / max(len(sample), 1)


def bucket(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int, int]:
    """Find the bin in which the wanted-th largest element lies.

    Args:
        counts: how many elements each bin holds, the bin of the smallest first.
        wanted: rank from the top, counted from 1.

    Returns:
        The bin, the rank that remains within it, and the count in it.
    """
    from_top = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(from_top, max(wanted, 1))), len(counts) - 1)
    above = int(from_top[place - 1]) if place else 0
    digit = len(counts) - 1 - place
    return digit, wanted - above, int(counts[digit])


def rank_table(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return for every leading 16 bits the mean rank of the elements that have them, from 0 to 1: ``[65536]``.

    A single element has the rank 0.5, as in a row of one.

    Args:
        counts: elements by their leading 16 bits.
    """
    total = int(counts.sum())
    if total == 1:
        return np.full(len(counts), 0.5)
    below = np.cumsum(counts) - counts
    return np.asarray((below + (counts - 1) / 2.0) / max(total - 1, 1)).clip(0.0, 1.0)


def look_up(values: Any, table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the table's entry for the leading 16 bits of every element, in the array's shape."""
    array = np.ascontiguousarray(values)
    found = patterns(array)
    return np.asarray(table[found >> (8 * found.dtype.itemsize - DIGIT)]).reshape(array.shape)
