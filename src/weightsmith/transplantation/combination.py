"""What the linear ways of making new rows share: each row is a weighted sum of rows of anchors.

An anchor is a token that both vocabularies have. A way looks at the donor's rows alone, and says for each target, a
token that only the donor has, which anchors make it up and with which weights. The same anchors with the same weights
are then added up in the model's space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.rows import tile_rows
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError

# Bytes that the anchors of all new tokens may take.
_MOST_BYTES = 4_000_000_000
# Told how many targets were finished since it was told last; from one thread at a time.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Combinations:
    """For each target the anchors that make it up.

    Attributes:
        anchors: ``[T, k]`` int32: numbers of anchors, counted from 0 among the anchors and not in the vocabulary;
            -1 in places that are not used.
        weights: ``[T, k]`` float64; 0 in places that are not used.
        residual: ``[T]`` float64: ``||d_t - sum_j w_j d_j|| / ||d_t||`` in the donor's space, which is 0 where the
            target is rebuilt exactly and 1 where nothing of it is; 0 for a target that is zero itself. NaN where the
            way does not try to rebuild.
    """

    anchors: Array
    weights: Array
    residual: Array

    def __len__(self) -> int:
        return len(self.anchors)

    @classmethod
    def padded(cls, parts: list[tuple[Array, Array]], residual: Array) -> Combinations:
        """Lay targets side by side that have different numbers of anchors.

        Args:
            parts: for each target the numbers of its anchors and their weights, ``[k_t]`` each.
            residual: ``[T]``.

        Raises:
            MethodError: if one of them has so many that places for all of them would fill the memory.
        """
        most = max((len(anchors) for anchors, _ in parts), default=0)
        if 12 * most * len(parts) > _MOST_BYTES:
            usual = int(np.median([len(anchors) for anchors, _ in parts]))
            raise MethodError(
                f"a new token would be mixed of {most:,} anchors (the median token of {usual:,}), so that those of "
                f"{len(parts):,} tokens take {12 * most * len(parts) / 1e9:,.0f} GB: rows that are alike say nothing "
                "of one another; choose another --method, such as wechsel or omp, or --trained-only"
            )
        anchors = np.full((len(parts), most), -1, np.int32)
        weights = np.zeros((len(parts), most))
        for place, (numbers, values) in enumerate(parts):
            anchors[place, : len(numbers)] = numbers
            weights[place, : len(values)] = values
        return cls(anchors, weights, residual)


def combine(
    combinations: Combinations, rows: Array, first: int = 0, last: int | None = None, *, centre: Array | None = None
) -> Array:
    """Add up the anchors' rows: ``[last - first, d']``, float64.

    Every element is ``((w_1 e_1) + w_2 e_2) + ...`` in float64 in the order of the places, each operation rounded
    once, so that no row depends on those that are made with it, and none on the machine.

    Args:
        combinations: which anchors, with which weights.
        rows: ``[S, d']`` float32 or float64: the anchors' rows in the space of the result.
        first: the first target.
        last: the target after the last; all by default.
        centre: ``[d']`` float64: what the weights are completed to one by, if they are of rows that were taken from
            there on: ``m + sum_j w_j (e_j - m)``.
    """
    last = len(combinations) if last is None else last
    result = np.zeros((last - first, rows.shape[1]))
    # A tile of the result stays in the cache while its anchors go by.
    step = tile_rows(rows.shape[1])
    for start in range(0, last - first, step):
        tile = result[start : start + step]
        chosen = slice(first + start, first + start + len(tile))
        anchors, weights = combinations.anchors[chosen], combinations.weights[chosen]
        if centre is not None:
            tile += (1 - weights.sum(1))[:, None] * centre
        for place in range(anchors.shape[1]):
            used = np.flatnonzero(weights[:, place])
            if len(used) == len(tile):
                tile += weights[:, place, None] * rows[anchors[:, place]]
            elif len(used):
                tile[used] += weights[used, place, None] * rows[anchors[used, place]]
    return result
