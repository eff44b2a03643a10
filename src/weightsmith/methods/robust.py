"""Aggregates that a few bad models cannot spoil: order statistics of every entry, and distances between models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.linear import (
    Share,
    not_finite_where,
    shares_of,
    weighted_sum,
    weights_have_a_sum,
    with_a_say,
)
from weightsmith.methods.registry import Param, PerModel, TrimScope, method
from weightsmith.methods.sorting import in_order, in_order_with_weights
from weightsmith.methods.statistics import totals

DistanceScope = Annotated[TrimScope, Param("what the distances between models range over")]


# -- order statistics, entry by entry ---------------------------------------------------------------------------------

# Sums of shares in float32 are off by less; a share of half to within this is half.
_HALF = 1e-5
_YIN = "Yin et al., Byzantine-robust distributed learning, ICML 2018, arXiv:1803.01498"


@method(
    minimum=1,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable", "translates"),
    also=("coordinate_median", "coordinate_wise_median"),
    source=f"{_YIN}, definition 1",
)
def median(block: Block, *, weight: PerModel[Share] = (1.0,)) -> Array:
    """Median of every entry over the models.

    Of an even number the mean of the middle two. With unequal weights the weighted median: of the entries in ascending
    order the first at which the weights so far reach half of all, and where they are just half, to within a
    hundred-thousandth of all, the mean of that entry and the next. A model of weight 0 has no say.
    """
    models, silent = with_a_say(weight, block.models)
    weights = [one for one in weight if one]
    middle = _median(block.xp, models) if len(set(weights)) == 1 else _weighted_median(block.xp, models, weights)
    return not_finite_where(silent, middle)


def _median(xp: Any, models: Sequence[Array]) -> Array:
    values = in_order(xp, models)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else 0.5 * values[middle - 1] + 0.5 * values[middle]


def _weighted_median(xp: Any, models: Sequence[Array], weights: Sequence[float]) -> Array:
    values, shares = in_order_with_weights(xp, models, shares_of(weights))
    reached = list(_running_sums(shares))
    # From the greatest down: the last that replaces the result is the least that reaches half.
    lower = upper = values[-1]
    for value, share in zip(values[-2::-1], reached[-2::-1], strict=True):
        lower = xp.where(share >= 0.5 - _HALF, value, lower)
        upper = xp.where(share > 0.5 + _HALF, value, upper)
    return 0.5 * lower + 0.5 * upper


def _running_sums(shares: Sequence[Array]) -> Iterator[Array]:
    total = shares[0]
    yield total
    for share in shares[1:]:
        total = total + share
        yield total


def _fewest_left(*, trim: int, beta: float | None) -> int:
    return 1 if beta is not None else 2 * trim + 1


@method(
    minimum=1,
    least=_fewest_left,
    properties=("idempotent", "symmetric", "translates"),
    source=f"{_YIN}, definition 2",
)
def trimmed_mean(
    block: Block,
    *,
    trim: Annotated[
        int, Param("how many of the least and of the greatest values of an entry are dropped", minimum=0)
    ] = 1,
    beta: Annotated[
        float | None, Param("in place of that number, a share of the models, rounded up", minimum=0, maximum=0.5)
    ] = None,
) -> Array:
    """Mean of every entry over the models, without the k greatest and the k least.

    k is trim, or, where beta is given, ``beta n`` of n models. The paper has whole numbers there; others are rounded
    up, so that no share above 0 leaves outliers in, but to no more than leaves the median. (SciPy and federated
    frameworks round down: 4 models and 0.2 are then a plain mean.) Trim at least as many as may be bad.
    """
    count = len(block.models)
    # What rounding adds to a whole number makes no more of it.
    dropped = trim if beta is None else min(math.ceil(beta * count - 1e-9), (count - 1) // 2)
    kept = in_order(block.xp, block.models)[dropped : count - dropped]
    return weighted_sum([1.0 / len(kept)] * len(kept), kept)


# -- aggregates that go by the distances between models ---------------------------------------------------------------


def _squared_distances(scope: Scope) -> Statistic[list[list[float]]]:
    """Return the squared distances between models, ``[n][n]``; infinite where one of the two is not finite.

    Of differences, not from inner products of models: fine-tunes are close to each other and far from zero.
    """
    pairs = [(i, j) for i in range(scope.models) for j in range(i)]

    def squares(block: Block) -> list[Any]:
        xp = block.xp
        # Widened first: the difference of two finite values may be too large for float32.
        wide = [xp.astype(model, xp.float64) for model in block.models]
        apart = [wide[i] - wide[j] for i, j in pairs]
        return [xp.sum(difference * difference) for difference in apart]

    found = dict(zip(pairs, (yield from totals(squares)), strict=True)) if pairs else {}
    known = {pair: square if math.isfinite(square) else math.inf for pair, square in found.items()}
    return [[known.get((max(i, j), min(i, j)), 0.0) for j in range(scope.models)] for i in range(scope.models)]


def _krum_shares(scope: Scope, *, byzantine: int, select: int) -> Statistic[list[float]]:
    squares = yield from _squared_distances(scope)
    near = scope.models - byzantine - 2
    scores = [sum(sorted(row[:i] + row[i + 1 :])[:near]) for i, row in enumerate(squares)]
    # Python's sort is stable: of equal scores the earlier model's comes first.
    best = sorted(range(scope.models), key=scores.__getitem__)[:select]
    return [1.0 / select if i in best else 0.0 for i in range(scope.models)]


@method(
    minimum=3,
    least=lambda *, byzantine, select: max(2 * byzantine + 3, select),
    statistic=_krum_shares,
    scope="distance_scope",
    properties=("idempotent", "translates"),
    also=("multi_krum",),
    source="Blanchard et al., Machine learning with adversaries, NeurIPS 2017, arXiv:1703.02757",
    example={"byzantine": 0},
)
def krum(
    block: Block,
    shares: list[float],
    *,
    byzantine: Annotated[int, Param("f, how many of the models may be bad", minimum=0)],
    select: Annotated[int, Param("m, of how many of the best models to take the mean", minimum=1)] = 1,
    distance_scope: DistanceScope = "model",
) -> Array:
    """The model that is nearest to most others, or the mean of the m nearest (Multi-Krum).

    The score of a model is the sum of its squared distances to the ``n - f - 2`` models nearest to it; the least wins,
    of equal ones the first. It takes ``n >= 2 f + 3`` models, as the proof does. Distances are over the whole model, as
    a client is good or bad as a whole; over a tensor or layer, the result can be put together from several models.
    A model with NaN or infinite values is infinitely far from all others, so that it is not chosen; where it
    has them, the result is NaN all the same, so that a broken input does not go unseen: leave such a model out.
    (A public implementation that many copied squares the distances twice; here they are squared once, as in the paper.)
    """
    return weighted_sum(shares, block.models)


def _median_shares(
    scope: Scope, *, weight: Sequence[float], smoothing: float, max_iter: int, tol: float
) -> Statistic[list[float]]:
    squares = yield from _squared_distances(scope)
    return weiszfeld(squares, shares_of(weight), smoothing=smoothing, max_iter=max_iter, tol=tol)


def weiszfeld(
    squares: Sequence[Sequence[float]], shares: Sequence[float], *, smoothing: float, max_iter: int, tol: float
) -> list[float]:
    """Return the geometric median of points as the shares of the points in it; they sum to 1.

    Args:
        squares: squared distances between the points ``[n][n]``.
        shares: weight of each point; they sum to 1.
        smoothing: distances below it count as this long.
        max_iter: most steps.
        tol: a step that moves less than this share in all is the last.
    """
    count = len(shares)
    # A point that is infinitely far from all others has no place among them.
    near = [
        i
        for i in range(count)
        if shares[i] and (count == 1 or any(math.isfinite(squares[i][j]) for j in range(count) if j != i))
    ]
    if not near:
        return list(shares)
    table = [[squares[i][j] for j in near] for i in near]
    weights = shares_of([shares[i] for i in near])
    point = weights
    for _ in range(max_iter):
        # The squared distance of a combination of points from each of them follows from the points' own.
        means = [sum(p * square for p, square in zip(point, row, strict=True)) for row in table]
        spread = 0.5 * sum(p * mean for p, mean in zip(point, means, strict=True))
        lengths = [math.sqrt(max(mean - spread, 0.0)) for mean in means]
        pulls = [w / max(length, smoothing) for w, length in zip(weights, lengths, strict=True)]
        following = shares_of(pulls)
        moved = sum(abs(one - other) for one, other in zip(following, point, strict=True))
        point = following
        if moved <= tol:
            break
    found = dict(zip(near, point, strict=True))
    return [found.get(i, 0.0) for i in range(count)]


@method(
    minimum=1,
    check=weights_have_a_sum,
    statistic=_median_shares,
    scope="distance_scope",
    properties=("idempotent", "symmetric", "removable", "translates"),
    also=("rfa",),
    source="Pillutla et al., Robust aggregation for federated learning, IEEE Trans. Signal Processing 2022, "
    "arXiv:1912.13445 (RFA: the smoothed Weiszfeld algorithm)",
)
def geometric_median(
    block: Block,
    shares: list[float],
    *,
    weight: PerModel[Share] = (1.0,),
    smoothing: Annotated[
        float, Param("shorter distances count as this, in the weights' own unit", minimum=0, exclusive=True)
    ] = 1e-6,
    max_iter: Annotated[int, Param("most steps", minimum=1)] = 1000,
    tol: Annotated[
        float, Param("stop when a step moves less than this share of the models' weights", minimum=0)
    ] = 1e-12,
    distance_scope: DistanceScope = "model",
) -> Array:
    """The point with the least sum of distances from the models, each model one point.

    It minimises ``sum_i w_i |z - W_i|``, by Weiszfeld's steps ``z <- sum_i b_i W_i / sum_i b_i`` with
    ``b_i = w_i / max(smoothing, |z - W_i|)`` from the weighted mean. z is a weighted mean of the models throughout, and
    its distances follow from theirs, so the steps run on n numbers in float64 and to the end; RFA, for which each costs
    a round of messages, takes three to five. Bad models are outvoted while they hold less than half of the weight.
    Distances are over the whole model; over a tensor or layer each of these has its own point. A model with NaN or
    infinite values has no share; where it has them, the result is NaN, so that a broken input does not go unseen.
    """
    return weighted_sum(shares, block.models)
