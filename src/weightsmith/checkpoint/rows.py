"""Tensors that are made some rows at a time: in tiles that their shape alone decides.

A matrix product sums in an order of its own for every number of rows, so that the stretch that is asked for must not
decide how many are made. Rows are made in float64: the order that a machine's BLAS prefers is lost when the result is
rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.kernels.convert import widen

FLOAT64 = np.dtype(np.float64)
# Elements of a tile.
TILE = 1 << 16


def tile_rows(width: int) -> int:
    """Return how many rows of this width are worked on at a time."""
    return max(TILE // max(width, 1), 1)


def tiled(start: int, stop: int, width: int, rows: int, make: Callable[[int, int], Array], *, tiles: int = 1) -> Array:
    """Return elements of a matrix that is made in tiles of rows: ``[stop - start]``, float64.

    Args:
        start: flat index of the first element.
        stop: flat index after the last.
        width: columns of the matrix.
        rows: rows of it.
        make: returns rows ``first`` to ``last``: ``[last - first, width]``, or any shape of as many elements.
        tiles: how many tiles are made at once.
    """
    step = tile_rows(width) * tiles
    result = np.empty(stop - start)
    for first in range(start // width // step * step, -(-stop // width), step):
        last = min(first + step, rows)
        begin, end = max(start, first * width), min(stop, last * width)
        tile = make(first, last).reshape(-1)
        result[begin - start : end - start] = tile[begin - first * width : end - first * width]
    return result


def read_wide(tensor: Tensor, start: int, stop: int) -> Array:
    """Read elements as float64, of a computed tensor before they are rounded: ``[stop - start]``."""
    wide = getattr(tensor, "read_wide", None)
    return widen(wide(start, stop) if wide is not None else tensor.read(start, stop), FLOAT64)
