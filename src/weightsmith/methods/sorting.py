"""Entries of several models in order, entry by entry, without a sort: a network of minima and maxima.

Which pairs are compared does not depend on the values, so a whole block goes through at once, and a fused loop keeps
no more than one value for each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from weightsmith.methods.block import Array


def comparisons(count: int) -> Iterator[tuple[int, int]]:
    """Yield the comparisons that put ``count`` values in order: of each pair, the lesser goes to the first place.

    Batcher's merge exchange (Knuth, The Art of Computer Programming, volume 3, 5.2.2, algorithm M): 3 comparisons of
    three values, 9 of five, 63 of sixteen.
    """
    top = 1 << (count - 1).bit_length() >> 1
    width = top
    while width > 0:
        reach, offset, distance = top, 0, width
        while True:
            yield from ((i, i + distance) for i in range(count - distance) if i & width == offset)
            if reach == width:
                break
            distance, reach, offset = reach - width, reach >> 1, width
        width >>= 1


def in_order(xp: Any, arrays: Sequence[Array]) -> list[Array]:
    """Return the entries in ascending order: the first array holds the least of every entry, the last the greatest.

    An entry that is NaN in one array is NaN in all results: whatever is compared with it is NaN from there on, and
    every result depends on every input.

    Args:
        xp: the arrays' namespace.
        arrays: arrays of one shape.
    """
    values = list(arrays)
    for i, j in comparisons(len(values)):
        values[i], values[j] = xp.minimum(values[i], values[j]), xp.maximum(values[i], values[j])
    return values


def in_order_with_weights(
    xp: Any, arrays: Sequence[Array], weights: Sequence[float]
) -> tuple[list[Array], list[Array]]:
    """Return the entries in ascending order, and beside every entry the weight of the array that it came from.

    Args:
        xp: the arrays' namespace.
        arrays: arrays of one shape.
        weights: one number for each array.
    """
    values = list(arrays)
    beside = [xp.full_like(array, weight) for array, weight in zip(arrays, weights, strict=True)]
    for i, j in comparisons(len(values)):
        one, other = values[i], values[j]
        swapped = one > other
        values[i], values[j] = xp.minimum(one, other), xp.maximum(one, other)
        beside[i], beside[j] = (
            xp.where(swapped, beside[j], beside[i]),
            xp.where(swapped, beside[i], beside[j]),
        )
    return values, beside
