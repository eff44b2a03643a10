"""The statistics that methods share: sums, products of vectors, and exact selection by rank.

Each is a generator (see :data:`weightsmith.methods.block.Statistic`) to be run with ``yield from``. Sums are
taken in float64 within a block and rounded once over all blocks (:func:`math.fsum`), so they depend neither
on the order in which blocks finish nor on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.methods.block import Array, Block, Statistic, Sweep

_EVERYWHERE = 2**62


def totals(values: Callable[[Block], Sequence[Any]]) -> Statistic[list[float]]:
    """Sum each of the numbers that ``values(block)`` gives over all blocks of the scope.

    Args:
        values: gives the same number of 0-D arrays or numbers for every block; make them float64.

    Returns:
        One float per number.
    """
    rows = yield Sweep(lambda block: [float(value) for value in values(block)])
    return [_sum(column) for column in zip(*rows, strict=True)]


def _sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        # Infinities of both signs, or a sum beyond float64: NaN or infinity, as IEEE has it, and no error.
        return sum(values)


def gram(vectors: Callable[[Block], Sequence[Array]]) -> Statistic[list[list[float]]]:
    """Return the matrix of inner products of vectors that span the scope: ``[n][n]``, float64.

    Args:
        vectors: gives the block's stretch of each of the n vectors.
    """

    def products(block: Block) -> list[float]:
        xp = block.xp
        wide = [xp.astype(vector, xp.float64) for vector in vectors(block)]
        return [float(xp.sum(wide[i] * wide[j])) for i in range(len(wide)) for j in range(i + 1)]

    rows = yield Sweep(products)
    if not rows:
        return []
    flat = [_sum(column) for column in zip(*rows, strict=True)]
    count = (math.isqrt(8 * len(flat) + 1) - 1) // 2
    lower = [[flat[i * (i + 1) // 2 + j] for j in range(i + 1)] for i in range(count)]
    return [[lower[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]


@dataclass(frozen=True)
class Cut:
    """The boundary between the k largest values of a scope and the rest.

    Equal values at the boundary are told apart by position: the earlier ones belong to the k largest. So
    exactly k are kept, the same ones on every machine.

    Attributes:
        value: the k-th largest value; infinity where k is 0.
        last: position of the last kept element among those equal to ``value``; -1 where none of them is kept.
    """

    value: float
    last: int

    def keeps(self, values: Array, block: Block) -> Array:
        """Return a boolean array: which of a block's values are among the k largest.

        Args:
            values: what was selected from, in the blocks' shape.
            block: the block; its positions decide between equal values where not all of them are kept.
        """
        if self.last >= _EVERYWHERE:
            return values >= self.value
        if self.last < 0:
            return values > self.value
        return (values > self.value) | ((values == self.value) & (block.positions <= self.last))


def largest(values: Callable[[Block], Sequence[Array]], counts: Sequence[int]) -> Statistic[list[Cut]]:
    """Find, exactly and without sorting, the boundary of the k largest values of a scope.

    A radix selection: non-negative floats order as their bit patterns do, so histograms of 16 bits at a time,
    from the top, narrow the k-th value down to one pattern in two sweeps (four in float64). Where only some of
    the values equal to it are kept, a third sweep counts them per block, and a last one visits the block in
    which the boundary lies.

    Args:
        values: gives for a block one array of non-negative numbers per selection, in the blocks' shape. NaN
            orders above infinity and is itself never kept.
        counts: k per selection, ``0 <= k <= size of the scope``.

    Returns:
        One :class:`Cut` per selection.
    """
    from weightsmith.kernels import select

    prefixes = [0] * len(counts)
    wanted = list(counts)
    equal = [0] * len(counts)
    bits = 16
    level = 0

    def histograms(block: Block) -> select.Counted:
        return select.histograms(values(block), prefixes, level)

    while level * 16 < bits:
        found = yield Sweep(histograms, select.add)
        if not found:
            return [Cut(math.inf, -1) for _ in counts]
        bits, combined = found[0]
        for i, histogram in enumerate(combined):
            digit, wanted[i], equal[i] = select.bucket(histogram, wanted[i])
            prefixes[i] = (prefixes[i] << 16) | digit
        level += 1
    cuts = []
    for i, count in enumerate(counts):
        value = select.value_of(prefixes[i], bits)
        if count == 0:
            cuts.append(Cut(math.inf, -1))
        elif math.isnan(value):
            # More NaNs than entries to keep: nothing else is kept, and NaN equals nothing to count.
            cuts.append(Cut(math.inf, -1))
        elif wanted[i] == equal[i]:
            cuts.append(Cut(value, _EVERYWHERE))
        else:
            cuts.append(Cut(value, (yield from _tie(values, i, value, wanted[i]))))
    return cuts


def _tie(values: Callable[[Block], Sequence[Array]], which: int, value: float, wanted: int) -> Statistic[int]:
    """Return the position of the wanted-th element (counted from 1) that equals the value."""
    per_block = yield Sweep(lambda block: int(block.xp.count_nonzero(values(block)[which] == value)))
    index = 0
    while per_block[index] < wanted:
        wanted -= per_block[index]
        index += 1
    found = yield Sweep(lambda block: int(block.positions[values(block)[which] == value][wanted - 1]), only=index)
    return int(found[0])
