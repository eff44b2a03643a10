"""Rows that are all zero, and rows that are there twice, found by hashes of their bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.tensor import Array

# Rows of fewer entries are alike by chance; longer ones are not held in a block.
SHORTEST_ROW, LONGEST_ROW = 8, 1 << 18
# Of more rows hashes would take too much memory.
MOST_ROWS = 1 << 22
# Rows that are named; all are counted.
_NAMED = 10


@dataclass(frozen=True)
class RowHashes:
    """The rows of a tensor: a hash of each, uint64 ``[rows]``, and whether it is all zero, bool ``[rows]``."""

    hashes: Array
    zero: Array


@dataclass(frozen=True)
class DeadRows:
    """Rows of a tensor that are zero or there twice; see :class:`weightsmith.report.findings.Rows`."""

    rows: int
    dead: int
    first_dead: tuple[int, ...]
    duplicated: int
    first_duplicated: tuple[tuple[int, int], ...]
    new_dead: int


def find_rows(sides: Sequence[int], found: Sequence[RowHashes]) -> dict[int, DeadRows]:
    """Return the dead and duplicated rows of each side that has some.

    Args:
        sides: numbers of the models that tensors of one name are of; -1 for the base, which comes first if it is there.
        found: the rows of each.
    """
    base = found[0].zero if sides[0] == -1 else None
    return {
        side: _rows_of(one, None if side == -1 else base)
        for side, one in zip(sides, found, strict=True)
        if one.zero.any() or _are_repeated(one.hashes)
    }


def _are_repeated(hashes: Array) -> bool:
    """Whether a hash occurs twice: in most tensors none does, and there are many tensors."""
    ordered = np.sort(hashes)
    return bool((ordered[1:] == ordered[:-1]).any())


def _rows_of(found: RowHashes, base: Array | None) -> DeadRows:
    dead = np.flatnonzero(found.zero)
    alive = np.flatnonzero(~found.zero)
    hashes = found.hashes[alive]
    _, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = alive[first][place]
    again = alive != earlier
    pairs = zip(alive[again][:_NAMED].tolist(), earlier[again][:_NAMED].tolist(), strict=True)
    return DeadRows(
        rows=len(found.zero),
        dead=len(dead),
        first_dead=tuple(dead[:_NAMED].tolist()),
        duplicated=int(np.count_nonzero(again)),
        first_duplicated=tuple(pairs),
        new_dead=0 if base is None else int(np.count_nonzero(found.zero & ~base)),
    )
