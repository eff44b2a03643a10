"""How many singular triples each matrix gets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError, PlanError, shown
from weightsmith.methods.matrices import effective_rank


@dataclass(frozen=True)
class Ranks:
    """The rule by which ranks are chosen: exactly one of the first four.

    Attributes:
        rank: the same for all matrices, as far as their sides allow it.
        energy: of each matrix, the least rank that keeps this share of the sum of squares of its change.
        effective: of each matrix, its effective rank, rounded up: the exponential of the entropy of the normalised
            singular values (Roy and Vetterli, The effective rank, EUSIPCO 2007).
        budget: bytes of all tensors of the adapter; triples are taken over all matrices where they keep the most per
            byte.
        most: the largest rank of any matrix.
    """

    rank: int | None = None
    energy: float | None = None
    effective: bool = False
    budget: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        given = [self.rank is not None, self.energy is not None, self.effective, self.budget is not None]
        if sum(given) != 1:
            raise MethodError(
                f"{'no rule for the rank is' if not any(given) else 'several rules for the rank are'} given; give one "
                "of rank, energy, effective_rank and budget"
            )
        for name, value in (("rank", self.rank), ("budget", self.budget), ("max_rank", self.most)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise MethodError(f"{name} is {shown(value)}; a whole number from 1 is needed")
        if self.energy is not None:
            number = isinstance(self.energy, int | float) and not isinstance(self.energy, bool)
            if not number or not 0 < self.energy <= 1:
                raise MethodError(f"energy is {shown(self.energy)}; a share above 0 and up to 1 is needed, such as 0.9")

    @property
    def needs_spectra(self) -> bool:
        """Whether singular values must be known before the adapter can be laid out."""
        return self.rank is None

    def cap(self, sides: tuple[int, int]) -> int:
        """Return the largest rank that a matrix of such sides may get."""
        return min(*sides, self.most or self.rank or min(sides), self.rank or min(sides))


@dataclass(frozen=True)
class Candidate:
    """What the choice of ranks depends on, of one matrix.

    Attributes:
        values: its singular values that are not zero but for rounding: ``[k]``, float64, falling.
        energy: the sum of squares of the whole matrix.
        triple: bytes that one singular triple takes.
        fixed: bytes that the matrix takes beside, as soon as it has one.
        complete: whether these are all of its singular values.
    """

    values: Array
    energy: float
    triple: int
    fixed: int = 0
    complete: bool = True


def choose(rule: Ranks, candidates: Sequence[Candidate], taken: int = 0) -> list[int]:
    """Return the rank of every matrix; 0 for one that gets none.

    Args:
        rule: the rule, one that needs spectra.
        candidates: the matrices.
        taken: bytes that the adapter takes for other tensors.

    Raises:
        PlanError: if the budget is spent before the first triple.
    """
    most = rule.most if rule.most is not None else max((len(one.values) for one in candidates), default=0)
    if rule.budget is not None:
        return _within_budget(rule.budget, candidates, most, taken)
    if rule.energy is not None:
        return [min(_reaching(one, rule.energy), most) for one in candidates]
    return [min(math.ceil(effective_rank(xp, one.values) - 1e-9), len(one.values), most) for one in candidates]


def _reaching(one: Candidate, share: float) -> int:
    """Return the least number of leading values whose squares sum to a share of the matrix's energy."""
    sums = np.cumsum(one.values**2)
    # What is left of a whole sum after rounding is no reason to take more.
    below = int(np.count_nonzero(sums < share * one.energy * (1 - 1e-12)))
    return min(below + 1, len(one.values))


def _within_budget(budget: int, candidates: Sequence[Candidate], most: int, taken: int) -> list[int]:
    """Take triples in the order of the energy that each keeps per byte.

    Of one matrix all triples cost the same and the first keeps the most, so the best choice takes its triples from the
    front; the sum kept is concave in the bytes spent. Taking by gain per byte is then the best choice for the bytes
    that it spends, and off the best choice for the whole budget by less than one triple: the one that did not fit.
    """
    left = budget - taken
    if left < 0:
        raise PlanError(
            f"the budget is {budget:,} bytes, and tensors that are kept whole take {taken:,}: allow more, or leave "
            "them out (--only-matrices)"
        )
    ranks = [0] * len(candidates)
    queue = [_offer(one, index, 0) for index, one in enumerate(candidates) if len(one.values)]
    heapq.heapify(queue)
    while queue:
        _, index, rank = heapq.heappop(queue)
        one = candidates[index]
        cost = one.triple + (one.fixed if rank == 0 else 0)
        if cost > left:
            # Its later triples keep less for as much, so none of them fits either.
            continue
        left -= cost
        ranks[index] = rank + 1
        if rank + 1 < min(len(one.values), most):
            heapq.heappush(queue, _offer(one, index, rank + 1))
    return ranks


def _offer(one: Candidate, index: int, rank: int) -> tuple[float, int, int]:
    cost = one.triple + (one.fixed if rank == 0 else 0)
    return -(float(one.values[rank]) ** 2) / cost, index, rank
