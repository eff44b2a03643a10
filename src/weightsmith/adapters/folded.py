"""A tensor with adapters on it, formed as it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.change import Added, Change, LowRank, Whole
from weightsmith.adapters.layer import Weight
from weightsmith.checkpoint.recent import RECENT, Recent
from weightsmith.checkpoint.rows import read_wide, tile_rows, tiled
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.kernels.convert import narrow

# Bytes for an element of a tensor that is worked on whole.
_WHOLE = 32
# Tiles of changes that cost more than a product of factors are kept for the blocks that share them, a few at a time.
_WIDER = 4
_TILES = Recent(32_000_000)


@dataclass(frozen=True)
class Term:
    """What one adapter does to a tensor.

    Attributes:
        weight: how much of it is taken: 1 for all.
        make: reads what the adapter holds, and returns the change.
        nbytes: about how many bytes the change takes.
        whole: whether it needs the whole tensor at once.
    """

    weight: float
    make: Callable[[], Change]
    nbytes: int = 0
    whole: bool = False


class FoldedTensor(Tensor):
    """A base's tensor with what adapters do to it: ``W + sum_i w_i (f_i(W) - W)``.

    Rows are formed in tiles that the shape alone decides, not the stretch asked for: a matrix product sums in an order
    of its own for every number of rows. They are formed in float64, so that the order that a machine's BLAS prefers is
    lost when the result is rounded.

    Attributes:
        base: the base's tensor.
        terms: what adapters do to it.
    """

    def __init__(self, base: Tensor, terms: Sequence[Term], *, transposed: bool = False) -> None:
        """Combine a tensor with changes.

        Args:
            base: the base's tensor; the first axis is the rows that changes speak of, or the last, if transposed.
            terms: what adapters do to it.
            transposed: whether the base stores the layer's weight as ``[in, out]``.
        """
        self.name = base.name
        self.shape = base.shape
        self.dtype = base.dtype
        self.base = base
        self.terms = tuple(terms)
        self.whole = base.whole or any(term.whole for term in terms)
        # Whole: the base, what it becomes, and what is kept of that, or more of what a method needs on its way.
        own = base.size * _WHOLE if self.whole else 0
        self.held = base.held + own + sum(term.nbytes for term in terms)
        self._transposed = transposed
        self._view = Weight(base)

    @property
    def view(self) -> Weight:
        """The base's tensor as the layer uses it."""
        return Weight(self.base, transposed=self._transposed)

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to the base's dtype."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in the base's dtype: ``[n]``, float32 (float64 if the base is)."""
        working = dtypes.working_dtype([self.dtype])
        product = self.low_rank()
        if product is not None:
            added = tiled(start, stop, product.right.shape[1], len(product.left), product.delta)
            return narrow(read_wide(self.base, start, stop) + added, working)
        changes = self._changes()
        if any(change.whole for change in changes):
            (whole,) = RECENT.get(self, lambda: (narrow(self._whole(changes).reshape(-1), working),), "whole")
            return whole[start:stop]
        return narrow(self._of_tiles(changes, start, stop), working)

    def low_rank(self) -> LowRank | None:
        """Return the product of two factors that is added, in the shape that is stored; None if it is no such product.

        Returns:
            Factors ``[rows, rank]`` and ``[rank, columns]``, of the matrix ``[first axis, everything else]``.
        """
        changes = self._changes()
        products = [change for change in changes if isinstance(change, LowRank)]
        if len(products) < len(changes):
            return None
        if len(products) == 1 and self.terms[0].weight == 1:
            return products[0]
        return RECENT.get(self, partial(self._product, products), "product")[0]

    def change(self) -> Array:
        """Return what the adapters add, whole and as the layer uses it: ``[out, everything else]``, float64."""
        base = self.view.matrix()
        total = np.zeros_like(base)
        for term in self.terms:
            total += term.weight * (term.make().rows(base, 0) - base)
        return total

    def _product(self, products: Sequence[LowRank]) -> tuple[LowRank]:
        left = np.concatenate([one.left * term.weight for one, term in zip(products, self.terms, strict=True)], axis=1)
        right = np.concatenate([one.right for one in products])
        return (LowRank(left, right),)

    def _changes(self) -> tuple[Change, ...]:
        """Return the changes of the matrix that is stored."""
        return RECENT.get(self, lambda: tuple(self._made(term) for term in self.terms))

    def _made(self, term: Term) -> Change:
        change = term.make()
        return (change.turned() or _Turned(change)) if self._transposed else change

    def _of_tiles(self, changes: Sequence[Change], start: int, stop: int) -> Array:
        rows, width = self._view.sides

        def made(first: int, last: int) -> tuple[Array]:
            base = read_wide(self.base, first * width, last * width).reshape(last - first, width)
            return (self._changed(changes, base, first).reshape(-1),)

        # Rows longer than a tile, as those of experts are, are taken one at a time.
        tiles = _WIDER if tile_rows(width) > 1 else 1
        return tiled(
            start,
            stop,
            width,
            rows,
            lambda first, last: _TILES.get(self, partial(made, first, last), first)[0],
            tiles=tiles,
        )

    def _whole(self, changes: Sequence[Change]) -> Array:
        return self._changed(changes, self._view.matrix(), 0)

    def _changed(self, changes: Sequence[Change], base: Array, start: int) -> Array:
        if len(changes) == 1 and self.terms[0].weight == 1:
            return changes[0].rows(base, start)
        total = base.copy()
        for term, change in zip(self.terms, changes, strict=True):
            if isinstance(change, Added):
                total += term.weight * change.delta(start, start + len(base))
            else:
                total += term.weight * (change.rows(base, start) - base)
        return total


class _Turned(Whole):
    """What a change makes of a matrix whose transpose is stored."""

    def __init__(self, change: Change) -> None:
        def whole(base: Array) -> Array:
            return np.ascontiguousarray(change.rows(np.ascontiguousarray(base.T), 0).T)

        super().__init__(whole)
        self._nbytes = change.nbytes
