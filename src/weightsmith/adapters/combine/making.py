"""What is made of one layer: the product that a method gives, cut to a rank, rounded, and measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.adapters import factors
from weightsmith.adapters.change import Added, Change, LowRank
from weightsmith.adapters.combine import layout
from weightsmith.adapters.combine.inputs import Inputs, Site
from weightsmith.adapters.combine.registry import Combiner
from weightsmith.adapters.combine.report import LayerReport
from weightsmith.adapters.combine.stack import Stack
from weightsmith.adapters.combine.sums import largest_cosine
from weightsmith.adapters.folded import FoldedTensor, Term
from weightsmith.bundle.tiles import rounded
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.arrays import evaluate
from weightsmith.engine.expression import Computed
from weightsmith.kernels.convert import widen
from weightsmith.methods.matrices import Decomposition, leading, leading_work
from weightsmith.methods.registry import get_method

FLOAT64 = np.dtype(np.float64)
# Bytes of results that are kept while they are written: A of some layers, and then B of these.
_TOGETHER = 64_000_000


@dataclass(frozen=True)
class Limit:
    """How far results are cut.

    Attributes:
        rank: the greatest rank, or None.
        energy: the share of the squared norm that is kept, or None.
        decomposition: of dense matrices.
    """

    rank: int | None = None
    energy: float | None = None
    decomposition: Decomposition = "exact"

    def __bool__(self) -> bool:
        """Whether anything is cut that is not rounding."""
        return self.rank is not None or self.energy is not None

    def kept(self, values: Array, noise: float) -> int:
        """Return how many of some singular values are kept; at least one.

        Args:
            values: all of them, falling.
            noise: what a value may be by rounding alone.
        """
        count = int((values > noise).sum())
        if self.energy is not None and count:
            squares = np.cumsum(values * values)
            # The last ones may add less than the sum is exact to.
            count = min(count, int(np.searchsorted(squares, self.energy * squares[-1] * (1 - 1e-14))) + 1)
        return max(min(count, self.rank) if self.rank is not None else count, 1)


class Maker(ABC):
    """Makes the tensors of one layer at once.

    Attributes:
        site: the layer.
        facts: what is known of the result once it is made.
    """

    def __init__(self, site: Site) -> None:
        """Stand for a layer."""
        self.site = site
        self.facts: LayerReport | None = None

    @property
    @abstractmethod
    def held(self) -> int:
        """Bytes that are held while it is made, about."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return its tensors, whose shapes are known by now."""

    @abstractmethod
    def make(self) -> tuple[Array, ...]:
        """Make the arrays of all tensors, as they are written, and note the facts."""

    def known_facts(self) -> LayerReport:
        """Return the facts; what an earlier run wrote is made to be measured."""
        if self.facts is None:
            self.make()
        assert self.facts is not None
        return self.facts


class Made(Tensor):
    """One of the tensors of a maker."""

    whole = True

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType, maker: Maker, place: int) -> None:
        """Name one of a maker's arrays.

        Args:
            name: its key in the adapter.
            shape: its shape.
            dtype: its dtype.
            maker: makes it.
            place: which of the maker's arrays it is.
        """
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.held = maker.held
        self._maker = maker
        self._place = place

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return RECENT.get(self._maker, self._maker.make)[self._place].reshape(-1)[start:stop]


def in_turns(makers: Iterable[Maker]) -> dict[str, Tensor]:
    """Return the tensors of makers, the first ones of some layers before the second ones of these.

    The threads that write neighbouring tensors then work on different layers, instead of waiting for each other.
    """
    found: dict[str, Tensor] = {}
    group: list[list[Tensor]] = []
    room = _TOGETHER
    for maker in makers:
        own = maker.tensors()
        nbytes = sum(one.nbytes for one in own)
        if group and nbytes > room:
            found |= _by_place(group)
            group, room = [], _TOGETHER
        group.append(own)
        room -= nbytes
    return found | _by_place(group)


def _by_place(group: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    longest = max((len(own) for own in group), default=0)
    return {own[place].name: own[place] for place in range(longest) for own in group if place < len(own)}


class Product(Maker):
    """A layer's factors, as a method gives them."""

    def __init__(
        self, inputs: Inputs, site: Site, combiner: Combiner, parameters: Mapping[str, Any], limit: Limit, dtype: DType
    ) -> None:
        """Decide what the header tells of the rank.

        Args:
            inputs: the adapters.
            site: the layer.
            combiner: the method.
            parameters: its parameters.
            limit: how far results are cut.
            dtype: the dtype that factors are written in.
        """
        super().__init__(site)
        self._inputs = inputs
        self._combiner = combiner
        self._parameters = parameters
        self._limit = limit
        self._dtype = dtype
        self._sums = combiner.exact or combiner.works == "factors"
        # Factors are written as the method gives them, unless a person asks for less.
        self._as_it_is = not limit and (combiner.name == "cat" or not self._sums)
        self.dense = combiner.works == "entries" or None in site.ranks
        self.rank: int | None = self._rank()

    @property
    def held(self) -> int:
        """See :attr:`Maker.held`."""
        rows, columns = self.site.sides
        ranks = sum(rank or 0 for rank in self.site.ranks)
        low = 5 * ranks * (rows + columns) + 4 * ranks * ranks
        if not self.dense:
            return low * FLOAT64.itemsize
        # Two matrices beside what the decomposition holds: the result, and what is read or subtracted from it.
        work = leading_work(rows, columns, self.rank or 1, self._limit.decomposition, FLOAT64.itemsize)
        dense = 3 + sum(rank is None for rank in self.site.ranks)
        return (low + dense * rows * columns + work.elements) * FLOAT64.itemsize

    def settle(self) -> None:
        """Find the rank, where only the values tell it."""
        if self.rank is not None:
            return
        if self._sums and not self.dense:
            product = self._inputs.stack(self.site.module).sum()
            self.rank = self._limit.kept(factors.values(product), factors.rounding(product))
        else:
            made = RECENT.get(self, self.make)
            self.rank = made[0].shape[0]

    def tensors(self) -> list[Tensor]:
        """See :meth:`Maker.tensors`: A and B."""
        assert self.rank is not None
        pairs = zip(layout.keys(self.site), layout.shapes(self.site, self.rank), strict=True)
        return [Made(key, shape, self._dtype, self, place) for place, (key, shape) in enumerate(pairs)]

    def make(self) -> tuple[Array, ...]:
        """See :meth:`Maker.make`."""
        stack = None if self.dense else self._inputs.stack(self.site.module)
        if stack is None:
            product, norm, lost = self._of_matrix(self._matrix())
        else:
            product, norm, lost = self._of_factors(stack)
        if self.rank is not None:
            product = factors.padded(product, self.rank)
        names = layout.keys(self.site)
        made = [
            rounded(name, part, self._dtype)
            for name, part in zip(names, layout.arrays(self.site, product), strict=True)
        ]
        written = layout.product_of(self.site, *(widen(part.reshape(-1), FLOAT64).reshape(part.shape) for part in made))
        # What is cut is orthogonal to what is kept, and so, but for the square of rounding, to its rounding.
        error = math.hypot(lost, factors.change(product, written))
        self._note(stack, product, norm, error)
        return tuple(made)

    def _note(self, stack: Stack | None, product: LowRank, norm: float, error: float) -> None:
        sum_norm = from_sum = cosine = None
        if stack is not None and not self._sums:
            true = stack.sum()
            sum_norm, from_sum = factors.norm(true), factors.norm(factors.total([product, true], [1, -1]))
        if stack is not None and self._combiner.name == "orthogonal":
            cosine = largest_cosine(stack)
        site = self.site
        self.facts = LayerReport(
            site.module, site.shape, site.ranks, product.rank, norm, error, sum_norm, from_sum, cosine
        )

    def _rank(self) -> int | None:
        """Return the rank of the result, where the header tells it."""
        rows, columns = self.site.sides
        weights = self._inputs.weights if self._combiner.weighted else [1.0] * len(self.site.ranks)
        ranks = [
            min(rows, columns) if rank is None else rank
            for rank, weight in zip(self.site.ranks, weights, strict=True)
            if rank != 0 and weight
        ] or [1]
        own = self._combiner.rank(ranks, self._parameters) if self._combiner.rank is not None else None
        if self._limit.energy is not None:
            return None
        if self._as_it_is and not self.dense:
            return own
        if self._limit.rank is not None:
            # Entry by entry, a method gives more ranks than all adapters have.
            return min(self._limit.rank, rows, columns, *([] if self.dense else [sum(ranks)]))
        if own is None and not self.dense:
            return None
        return min(rows, columns, sum(ranks) if own is None else own)

    def _of_factors(self, stack: Stack) -> tuple[LowRank, float, float]:
        """Return the product that is kept, the norm of what the method gives, and that of what is cut."""
        given = stack.sum() if self._combiner.works == "factors" else self._combiner.call(stack, self._parameters)
        if self._as_it_is:
            return given, factors.norm(given), 0.0
        noise = factors.rounding(given)

        def kept(values: Array) -> int:
            count = min(self._limit.kept(values, noise), len(values))
            return count if self.rank is None else min(count, self.rank)

        u, s, vt = factors.triples(given, kept)
        count = len(vt)
        return factors.balanced(u, s[:count], vt), _norm(s), _norm(s[count:])

    def _of_matrix(self, matrix: Array) -> tuple[LowRank, float, float]:
        norm = _norm(matrix)
        most = min(self.site.sides)
        count = most if self.rank is None else self.rank
        u, s, vt = leading(xp, matrix, count, self._limit.decomposition)
        if self._limit.energy is not None:
            squares = np.cumsum(s * s)
            enough = int(np.searchsorted(squares, self._limit.energy * norm * norm * (1 - 1e-14))) + 1
            count = max(min(enough, count, self._limit.rank or count), 1)
        u, s, vt = factors.with_signs(u[:, :count], s[:count], vt[:count])
        product = factors.balanced(u, s, vt)
        return product, norm, _left_of(matrix, product)

    def _matrix(self) -> Array:
        """Return what the method gives as a matrix ``[out, everything else]``, float64."""
        inputs, site = self._inputs, self.site
        if self._combiner.works == "entries":
            name = f"{site.module}.weight"
            zeros = Zeros(name, site.sides)
            deltas = [
                FoldedTensor(zeros, [Term(1.0, partial(self._change, number))]) for number in range(len(site.ranks))
            ]
            tensor = Computed(
                name,
                FLOAT64,
                get_method(self._combiner.name),
                tuple(deltas),
                zeros,
                parameters=self._parameters,
                labels=inputs.labels,
                seed=inputs.seed,
            )
            return evaluate(tensor)
        if not self._sums:
            # Refused with the reason.
            inputs.stack(site.module)
        total = np.zeros(site.sides)
        for number, weight in enumerate(inputs.weights):
            if weight and site.ranks[number] != 0:
                change = inputs.change(number, site.module)
                total += weight * (change.left @ change.right if isinstance(change, LowRank) else change)
        return total

    def _change(self, number: int) -> Change:
        rows, columns = self.site.sides
        if self.site.ranks[number] == 0:
            return LowRank(np.zeros((rows, 0)), np.zeros((0, columns)))
        found = self._inputs.change(number, self.site.module)
        if isinstance(found, LowRank):
            return found
        return Added(lambda start, stop: found[start:stop], [found])


class Zeros(Tensor):
    """A matrix of zeros in float64: the base of task vectors that are given by themselves."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        """Name a matrix."""
        self.name = name
        self.shape = shape
        self.dtype = FLOAT64

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return np.zeros(stop - start)


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.reshape(-1))) if values.size else 0.0


def _left_of(matrix: Array, product: LowRank) -> float:
    """Return the norm of what a product leaves of a matrix, which is used up."""
    step = max((1 << 20) // max(matrix.shape[1], 1), 1)
    parts = []
    for start in range(0, len(matrix), step):
        rest = matrix[start : start + step] - product.delta(start, min(start + step, len(matrix)))
        parts.append(_norm(rest))
    return math.hypot(*parts)
