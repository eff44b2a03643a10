"""The statistics that methods share: sums, products of vectors, and exact selection by rank.

Each is a generator (see :data:`weightsmith.methods.block.Statistic`) to be run with ``yield from``. Sums are
taken in float64 within a block and rounded once over all blocks (:func:`math.fsum`), so they depend neither
on the order in which blocks finish nor on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.methods.block import Array, Block, Scope, Statistic, Sweep
from weightsmith.methods.sweeps import Equal, Histograms, Numbers, Patterns, Within, digit_range

_EVERYWHERE = 2**62


def totals(values: Callable[[Block], Sequence[Any]]) -> Statistic[list[float]]:
    """Sum each of the numbers that ``values(block)`` gives over all blocks of the scope.

    Args:
        values: gives the same number of 0-D arrays or numbers for every block; make them float64.

    Returns:
        One float per number.
    """
    rows = yield Sweep(Numbers(values))
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

    def products(block: Block) -> list[Any]:
        xp = block.xp
        wide = [xp.astype(vector, xp.float64) for vector in vectors(block)]
        return [xp.sum(wide[i] * wide[j]) for i in range(len(wide)) for j in range(i + 1)]

    rows = yield Sweep(Numbers(products))
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


# Scopes up to this size are gathered whole; larger ones are sampled first.
_SMALL_SCOPE = 1 << 17
# Bytes of patterns that may be held at a time, for all selections of a sweep.
MOST_GATHERED = 64 << 20
_EVERY_PATTERN = (0, 2**64 - 1)
# Bytes of a float64's pattern, and what a selection may hold beyond twice what its sample promised.
_WIDEST, _SLACK = 8, 1 << 20


def largest(values: Callable[[Block], Sequence[Array]], counts: Sequence[int], scope: Scope) -> Statistic[list[Cut]]:
    """Find, exactly and without sorting, the boundary of the k largest values of a scope.

    A sample tells in which narrow range the k-th value must lie; one sweep counts what lies above the range and
    gathers what lies within it, and the k-th value is found among those. Where the sample misled, or too much lies
    within the range, 16 bits at a time of the value's bit pattern are found by histograms instead, in two
    sweeps (four in float64).

    Args:
        values: gives for a block one array of non-negative numbers per selection, in the blocks' shape. NaN
            orders above infinity and is itself never kept.
        counts: k per selection, ``0 <= k <= size of the scope``.
        scope: what the selection ranges over.

    Returns:
        One :class:`Cut` per selection.
    """
    return (yield from _selected(values, counts, scope, places=True))


def order_statistics(
    values: Callable[[Block], Sequence[Array]], ranks: Sequence[int], scope: Scope, *, signed: bool = True
) -> Statistic[list[float]]:
    """Find, exactly and without sorting, the k-th largest values of a scope.

    Args:
        values: gives for a block one array of numbers of either sign per rank, in the blocks' shape; NaN counts as 0.
        ranks: k for each of them, from 1 for the largest to the size of the scope for the smallest.
        scope: what the ranks range over.
        signed: whether there may be negative values; without any, a value of 0 is found in half the sweeps.

    Returns:
        One value per rank, exact in the dtype of the arrays; infinity for a k outside the range.
    """

    def side(which: Sequence[int], sign: float) -> Callable[[Block], list[Array]]:
        def of_block(block: Block) -> list[Array]:
            xp = block.xp
            turned = [sign * array for array in _chosen(values(block), which)]
            # Not -0.0, whose bit pattern is above all others.
            return [xp.where(array > 0, array, xp.zeros_like(array)) for array in turned]

        return of_block

    positive = yield from _selected(side(range(len(ranks)), 1.0), ranks, scope, places=False)
    found = [cut.value for cut in positive]
    # The others are zero or negative: the k-th largest is the (n - k + 1)-th largest of the opposites.
    others = [i for i, value in enumerate(found) if value == 0.0 and signed]
    if others:
        opposite = [scope.size - ranks[i] + 1 for i in others]
        negative = yield from _selected(side(others, -1.0), opposite, scope, places=False)
        for i, cut in zip(others, negative, strict=True):
            found[i] = 0.0 - cut.value
    return found


def _selected(
    values: Callable[[Block], Sequence[Array]], counts: Sequence[int], scope: Scope, *, places: bool
) -> Statistic[list[Cut]]:
    """Find boundaries; where places are not wanted, as if all values equal to the boundary were kept."""
    asked = [i for i, count in enumerate(counts) if 0 < count <= scope.size]
    found: dict[int, Cut] = {}
    if asked:
        wanted = [counts[i] for i in asked]
        cuts = yield from _cuts(lambda block: _chosen(values(block), asked), wanted, scope, places=places)
        found = dict(zip(asked, cuts, strict=True))
    return [found.get(i, _NOTHING) for i in range(len(counts))]


_NOTHING = Cut(math.inf, -1)


def _chosen(values: Sequence[Array], indices: Sequence[int]) -> list[Array]:
    return [values[i] for i in indices]


def _cuts(
    values: Callable[[Block], Sequence[Array]], counts: Sequence[int], scope: Scope, *, places: bool
) -> Statistic[list[Cut]]:
    from weightsmith.kernels import select

    ranges = [_EVERY_PATTERN] * len(counts)
    expected = [scope.size * _WIDEST] * len(counts)
    if scope.size > _SMALL_SCOPE:
        runs = yield Sweep(Patterns(values), sampled=True)
        for i, count in enumerate(counts):
            own = [run[i] for run in runs]
            ranges[i] = select.bracket(own, count, scope.size)
            expected[i] = int(select.share_within(own, *ranges[i]) * scope.size) * own[0].itemsize
    cuts: list[Cut | None] = [None] * len(counts)
    for together in _shared_out(expected):
        found = yield from _gathered(values, together, ranges, expected)
        for i, gathered in zip(together, found, strict=True):
            cuts[i] = yield from _cut_of(values, i, select.find(gathered, counts[i]), places=places)
    missed = [i for i, cut in enumerate(cuts) if cut is None]
    if missed:
        wanted = [counts[i] for i in missed]
        by_digits = yield from _radix(lambda block: _chosen(values(block), missed), wanted, places=places)
        for i, cut in zip(missed, by_digits, strict=True):
            cuts[i] = cut
    return [cut for cut in cuts if cut is not None]


def _shared_out(expected: Sequence[int]) -> list[list[int]]:
    """Divide selections such that what is expected of those in one sweep may be held at a time."""
    groups: list[list[int]] = [[]]
    held = 0
    for i, nbytes in enumerate(expected):
        if groups[-1] and held + nbytes > MOST_GATHERED // 2:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += nbytes
    return groups


def _gathered(
    values: Callable[[Block], Sequence[Array]],
    together: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    expected: Sequence[int],
) -> Statistic[list[Any]]:
    """Gather what lies in the ranges of some selections; what is far more than expected is let go."""
    limits = [min(MOST_GATHERED, 2 * expected[i] + _SLACK) for i in together]

    def join(one: list[Any], other: list[Any]) -> list[Any]:
        return [a.add(b, limit) for a, b, limit in zip(one, other, limits, strict=True)]

    within = Within(lambda block: _chosen(values(block), together), [ranges[i] for i in together])
    ((*gathered,),) = yield Sweep(within, join)
    return list(gathered)


def _cut_of(
    values: Callable[[Block], Sequence[Array]], which: int, found: Any, *, places: bool
) -> Statistic[Cut | None]:
    """Return the boundary at a pattern that was found; None if none was."""
    from weightsmith.kernels import select

    if found is None:
        return None
    value = select.value_of(found.pattern, found.width)
    if math.isnan(value):
        # More NaNs than entries to keep: nothing else is kept, and NaN equals nothing to count.
        return _NOTHING
    if found.block is None or not places:
        return Cut(value, _EVERYWHERE)
    return Cut(value, (yield from _last_kept(values, which, found.pattern, *found.block)))


def _radix(values: Callable[[Block], Sequence[Array]], counts: Sequence[int], *, places: bool) -> Statistic[list[Cut]]:
    """Find the boundaries by histograms of 16 bits at a time, from the top."""
    from weightsmith.kernels import select

    prefixes = [0] * len(counts)
    wanted = list(counts)
    equal = [0] * len(counts)
    bits = select.DIGIT
    level = 0

    while level * select.DIGIT < bits:
        ((bits, *histograms),) = yield Sweep(Histograms(values, tuple(prefixes), level), _add)
        for i, histogram in enumerate(histograms):
            digit, wanted[i], equal[i] = select.bucket(histogram, wanted[i])
            prefixes[i] = (prefixes[i] << select.DIGIT) | digit
        level += 1
    cuts = []
    for i in range(len(counts)):
        value = select.value_of(prefixes[i], bits)
        if math.isnan(value):
            cuts.append(_NOTHING)
        elif wanted[i] == equal[i] or not places:
            cuts.append(Cut(value, _EVERYWHERE))
        else:
            per_block = yield Sweep(Numbers(_equal(values, i, value)))
            place = select.place_of([int(count) for (count,) in per_block], wanted[i])
            cuts.append(Cut(value, (yield from _last_kept(values, i, prefixes[i], *place))))
    return cuts


# For a block: how many values it has, and for each selection a function that gives them, in arrays one after the other.
_Values = Callable[[Block], tuple[int, Sequence[Callable[[], Iterable[Array]]]]]


def boundaries(values: _Values, counts: Callable[[int], Sequence[int]]) -> Statistic[list[Cut]]:
    """Find the boundaries of the k largest of values that are costly to have, and whose number shows with them.

    By histograms of 16 bits at a time: two sweeps, four in float64. Of values equal to the k-th largest all are kept.

    Args:
        values: gives for a block how many values it has, and for each selection a function that gives them, in arrays
            of non-negative numbers. The selections are the same, and there is one at least, for all blocks.
        counts: number of values in all blocks -> k per selection.

    Returns:
        One :class:`Cut` per selection.
    """
    from weightsmith.kernels import select

    prefixes: list[int] = []
    asked: Sequence[int] = ()
    wanted: list[int] = []
    bits, level = select.DIGIT, 0
    while level * select.DIGIT < bits:
        ((bits, size, *histograms),) = yield Sweep(_Digits(values, tuple(prefixes), level), _add)
        if level == 0:
            asked = counts(size)
            wanted, prefixes = list(asked), [0] * len(asked)
        for i, histogram in enumerate(histograms):
            digit, wanted[i], _ = select.bucket(histogram, wanted[i])
            prefixes[i] = (prefixes[i] << select.DIGIT) | digit
        level += 1
    found = [
        select.value_of(prefix, bits) if count else math.nan for prefix, count in zip(prefixes, asked, strict=True)
    ]
    return [_NOTHING if math.isnan(value) else Cut(value, _EVERYWHERE) for value in found]


@dataclass(frozen=True)
class _Digits:
    """Counts of values by the 16 bits that follow a prefix of their bit patterns; see :class:`Histograms`."""

    values: _Values
    prefixes: Sequence[int]
    level: int

    def __call__(self, block: Block) -> list[Any]:
        """Return the width of the patterns in bits, the number of values, and 65,536 counts for each selection."""
        from weightsmith.kernels.select import selector

        size, selections = self.values(block)
        width, found = 0, []
        for i, arrays in enumerate(selections):
            prefix, counts = (self.prefixes[i] if self.prefixes else 0), None
            for array in arrays():
                kernel, width = selector(array), 8 * array.dtype.itemsize
                own = kernel.histogram(kernel.patterns(array), *digit_range(prefix, self.level, width))
                counts = own if counts is None else counts + own
            found.append(counts)
        return [width, size, *found]


def leading_bits(values: Callable[[Block], Sequence[Array]], scope: Scope) -> Statistic[list[Any]]:
    """Count values by the leading 16 bits of their bit patterns: 65,536 counts for each array that values gives.

    Args:
        values: gives arrays of non-negative numbers in the blocks' shape, one for each model.
        scope: what the counts range over.
    """
    found = yield Sweep(Histograms(values, (0,) * scope.models, 0), _add)
    return list(found[0][1:]) if found else []


def _add(one: list[Any], other: list[Any]) -> list[Any]:
    return [one[0], *(a + b for a, b in zip(one[1:], other[1:], strict=True))]


def _equal(values: Callable[[Block], Sequence[Array]], which: int, value: float) -> Callable[[Block], list[Any]]:
    return lambda block: [block.xp.count_nonzero(values(block)[which] == value)]


def _last_kept(
    values: Callable[[Block], Sequence[Array]], which: int, pattern: int, block: int, wanted: int
) -> Statistic[int]:
    """Return the position of the wanted-th element of a block (counted from 1) that has the pattern."""
    found = yield Sweep(Equal(lambda block: [values(block)[which]], pattern), only=block)
    return int(found[0][wanted - 1])
