"""Norms of the rows of a base with a low-rank change, and rows that are brought to norms (DoRA)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from weightsmith.adapters.change import Change, LowRank, Scaled
from weightsmith.adapters.layer import Weight
from weightsmith.checkpoint.tensor import Array

# Below this share of the base's own norm, squared, a norm found from its factors has lost digits.
_CANCELLED = 1e-4


class _Normed(Change):
    """A product is added, after which every row is brought to a norm."""

    def __init__(self, product: LowRank, magnitude: Array, weight: Weight | None) -> None:
        self._product = product
        self._magnitude = magnitude
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self._product.nbytes + self._magnitude.nbytes

    def rows(self, base: Array, start: int) -> Array:
        changed = self._product.rows(base, start)
        norms = np.sqrt(np.einsum("ij,ij->i", changed, changed))
        changed *= ratio(self._magnitude[start : start + len(base)], norms)[:, None]
        return changed

    def turned(self) -> Change | None:
        if self._weight is None:
            return None
        norms = row_norms(self._weight, self._product)
        return Scaled(self._product, rows=ratio(self._magnitude, norms)).turned()


def with_norms(product: LowRank, magnitude: Array, weight: Weight | None = None) -> Change:
    """Return a product that is added, after which every row is brought to a norm.

    Args:
        product: what is added.
        magnitude: the norms: ``[out]``, float64.
        weight: the base's weight. Where it is stored transposed, its rows are no rows of what is stored, and their
            norms are found before by :func:`row_norms`, so that the rest is done a block at a time as well.
    """
    return _Normed(product, magnitude, weight)


def ratio(magnitude: Array, norms: Array) -> Array:
    """Return the numbers that bring rows to their magnitudes: ``[out]``.

    A row of zeros has no direction; it stays as it is, whatever its magnitude.
    """
    return np.divide(magnitude, norms, out=np.ones(len(norms)), where=norms > 0)


def row_norms(weight: Weight, product: LowRank) -> Array:
    """Return the norms of the rows of ``W + L R``, without forming the product: ``[out]``, float64.

    ``||w + l R||^2 = w.w + 2 l.(R w) + l (R R^T) l``, in one pass over W. Where that is small beside ``w.w``, digits
    cancel; such rows are formed after all, in a second pass.

    Args:
        weight: W, read in tiles of what is stored.
        product: L ``[out, rank]`` and R ``[rank, columns]``.

    Source: the card of factored-norm DoRA (sockeye44/dorafactors); the second pass is ours.
    """
    left, right = product.left, product.right
    own = np.zeros(len(left))
    mixed = np.zeros(left.shape)
    for start, tile in _stored(weight):
        if weight.transposed:
            own += np.einsum("ij,ij->j", tile, tile)
            mixed += tile.T @ right[:, start : start + len(tile)].T
        else:
            own[start : start + len(tile)] = np.einsum("ij,ij->i", tile, tile)
            mixed[start : start + len(tile)] = tile @ right.T
    squares = own + 2 * np.einsum("ij,ij->i", left, mixed) + np.einsum("ij,ij->i", left @ (right @ right.T), left)
    (cancelled,) = np.nonzero(~(squares >= _CANCELLED * own))
    if len(cancelled):
        squares[cancelled] = 0
        for start, tile in _stored(weight):
            if weight.transposed:
                formed = tile[:, cancelled].T + left[cancelled] @ right[:, start : start + len(tile)]
                squares[cancelled] += np.einsum("ij,ij->i", formed, formed)
            else:
                here = cancelled[(cancelled >= start) & (cancelled < start + len(tile))]
                formed = tile[here - start] + left[here] @ right
                squares[here] = np.einsum("ij,ij->i", formed, formed)
    norms: Array = np.sqrt(squares)
    return norms


def _stored(weight: Weight) -> Iterator[tuple[int, Array]]:
    """Read what is stored, in tiles of its own rows."""
    return Weight(weight.tensor).tiles()
