"""Averages other than the arithmetic mean with given weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.linear import (
    Share,
    not_finite_where,
    shares_of,
    weighted_sum,
    weights_have_a_sum,
    with_a_say,
)
from weightsmith.methods.registry import Param, PerModel, method
from weightsmith.methods.statistics import totals

Metric = Literal["loss", "exp_loss", "score"]


# -- weights that follow from a metric --------------------------------------------------------------------------------


def _metric_is_usable(parameters: Mapping[str, Any]) -> None:
    """Refuse metrics that have no such power."""
    metric, kind = parameters["metric"], parameters["kind"]
    for i, value in enumerate(metric):
        bad = not math.isfinite(value) or (kind == "loss" and value <= 0) or (kind == "score" and value < 0)
        if bad:
            wanted = {"loss": "above 0", "score": "0 or above", "exp_loss": "finite"}[kind]
            raise MethodError(f"the metric of model {i + 1} is {value:g}; with kind: {kind} it must be {wanted}")
    if kind == "score" and parameters["p"] > 0 and not any(metric):
        raise MethodError("the metric of every model is 0, so none has a weight; give at least one above 0")


def metric_shares(metric: Sequence[float], kind: Metric, p: float) -> list[float]:
    """Return the share of each model by its metric; see :func:`metric_weighted`."""
    if p == 0:
        return [1.0 / len(metric)] * len(metric)
    if kind == "exp_loss":
        powers = [-p * (value - min(metric)) for value in metric]
    else:
        sign = -p if kind == "loss" else p
        powers = [sign * math.log(value) if value > 0 else -math.inf for value in metric]
    # The largest becomes 1: no power overflows, and not all of them vanish.
    return shares_of([math.exp(power - max(powers)) for power in powers])


@method(
    minimum=1,
    check=_metric_is_usable,
    properties=("idempotent", "symmetric", "translates"),
    also=("mwa",),
    source="Yu and Choi, Parameter-efficient checkpoint merging via metrics-weighted averaging (MWA), 2025, "
    "arXiv:2504.18580; the forms of the weights inferred from the abstract",
    example={"metric": 0.5},
)
def metric_weighted(
    block: Block,
    *,
    metric: PerModel[Annotated[float, Param("this model's loss, score or training step")]],
    kind: Annotated[Metric, Param("what the metric is, and so the form of the weights")] = "loss",
    p: Annotated[float, Param("how sharply weights follow the metric; 0 is the plain mean", minimum=0)] = 1.0,
) -> Array:
    """Mean weighted by a metric of each model: its loss, its score, or the step it was saved at.

    ``sum_i w_i W_i`` with ``sum_i w_i = 1`` and

    - ``kind: loss``: ``w_i ~ loss_i^-p``, for losses above 0;
    - ``kind: exp_loss``: ``w_i ~ exp(-p loss_i)``, for losses of any sign;
    - ``kind: score``: ``w_i ~ score_i^p``, for what is better when it is higher: accuracies, or training steps.

    The paper has one such penalty for losses and one for steps; its exact formula is not public, so these are the
    forms that have its stated properties (inferred). Checkpoints of a LoRA run are given on their base
    (``base+adapter``): then it is the products of the factors that are averaged, as the mean of A times the mean of B
    is not the mean of A B.
    """
    return weighted_sum(metric_shares(metric, kind, p), block.models)


# -- a mean whose spread is corrected ---------------------------------------------------------------------------------


def _correction(
    scope: Scope, *, weight: Sequence[float], self_share: float, eps: float, max_gain: float | None, vectors: bool
) -> Statistic[tuple[float, float]]:
    """Return the mean of the averaged tensor, and the factor on its deviations from that."""
    shares, n = shares_of(weight), scope.size
    if n < 2 or not (vectors or (scope.form is not None and len(scope.form.shape) > 1)):
        return 0.0, 1.0

    def sums(block: Block) -> list[Any]:
        xp = block.xp
        wide = [xp.astype(part, xp.float64) for part in (weighted_sum(shares, block.models), *block.models)]
        return [number for part in wide for number in (xp.sum(part), xp.sum(part * part))]

    found = yield from totals(sums)
    if not all(math.isfinite(number) for number in found):
        # What is not finite stays in its entry.
        return 0.0, 1.0
    variances = [_variance(total, square, n) for total, square in zip(found[::2], found[1::2], strict=True)]
    others = math.fsum(share * variance for share, variance in zip(shares, variances[1:], strict=True))
    target = self_share * variances[1] + (1.0 - self_share) * others
    gain = math.sqrt((target + eps) / (variances[0] + eps)) if variances[0] + eps > 0 else 1.0
    return found[0] / n, gain if max_gain is None else min(gain, max_gain)


def _variance(total: float, square: float, count: int) -> float:
    deviation = square - total * total / count
    # Of a constant tensor only rounding is left, and a ratio of that to anything means nothing.
    return deviation / (count - 1) if deviation > 1e-13 * square else 0.0


@method(
    minimum=1,
    statistic=_correction,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable"),
    source="Tian et al., Vanishing variance problem in fully decentralized neural-network systems, 2024, "
    "arXiv:2404.04616; eps and the rule for the target from the public simulator",
)
def variance_corrected(
    block: Block,
    correction: tuple[float, float],
    *,
    weight: PerModel[Share] = (1.0,),
    self_share: Annotated[
        float,
        Param("share of the first model's variance in the target; the rest is the models' mean", minimum=0, maximum=1),
    ] = 0.0,
    eps: Annotated[float, Param("added to both variances", minimum=0)] = 1e-4,
    max_gain: Annotated[float | None, Param("greatest factor", minimum=1)] = None,
    vectors: Annotated[bool, Param("correct 1-D tensors too: biases and norms")] = False,
) -> Array:
    """Mean of the models, stretched about its own mean to the variance that the models have.

    Per tensor, with ``u = sum_i w_i W_i / sum_i w_i``: ``mean(u) + (u - mean(u)) sqrt((v + eps) / (var(u) + eps))``,
    all variances unbiased. The target v is the weighted mean of the models' variances (the paper's "follow others"),
    with self_share 1 that of the first model ("self"), between 0 and 1 a mix ("conservative").

    Averaging n models that were trained apart shrinks the variance to a n-th, and this restores it; fine-tunes of one
    base are so close that it changes next to nothing. 1-D tensors are left as averaged, as the simulator leaves norms;
    with ``vectors: true`` mind near-constant biases, whose factor can be anything (max_gain bounds it). eps is in the
    square of the weights' unit, and 1e-4 is about the variance of a transformer's weights: with eps 0 the correction
    is complete.
    """
    mean = weighted_sum(shares_of(weight), block.models)
    centre, gain = correction
    return mean if gain == 1.0 else centre + gain * (mean - centre)


# -- geometric and harmonic mean --------------------------------------------------------------------------------------

Mixed = Annotated[
    Literal["mean", "zero", "sign"],
    Param("what becomes of an entry that is positive in one model, negative in another"),
]


def _by_magnitudes(
    block: Block,
    weight: Sequence[float],
    mixed: str,
    of_magnitudes: Callable[[Sequence[tuple[float, Array]]], Array],
) -> Array:
    """Return a mean of magnitudes with the sign that all entries have; zeros have either."""
    xp = block.xp
    # A model of weight 0 has no say in the sign either.
    models, silent = with_a_say(weight, block.models)
    shares = shares_of([one for one in weight if one])
    wide = [xp.astype(model, xp.float64) for model in models]
    positive, negative = wide[0] >= 0, wide[0] <= 0
    for model in wide[1:]:
        positive, negative = positive & (model >= 0), negative & (model <= 0)
    size = of_magnitudes([(share, xp.abs(model)) for share, model in zip(shares, wide, strict=True)])
    mean = weighted_sum(shares, wide)
    if mixed == "mean":
        otherwise = mean
    else:
        # NaN, which is neither positive nor negative, stays NaN in the product.
        otherwise = 0.0 * mean
        if mixed == "sign":
            otherwise = xp.where(mean > 0, size, xp.where(mean < 0, -size, otherwise))
    result = xp.where(positive, size, xp.where(negative, -size, otherwise))
    return not_finite_where(silent, xp.astype(result, block.models[0].dtype))


@method(
    minimum=1,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable"),
    also=("geometric_mean",),
    source="the weighted geometric mean, entry by entry; signs and zeros as defined here",
)
def geometric(block: Block, *, weight: PerModel[Share] = (1.0,), mixed: Mixed = "mean") -> Array:
    """Weighted geometric mean of the entries' magnitudes, with their common sign.

    ``exp(sum_i w_i log |W_i|)`` with ``sum_i w_i = 1``. An entry that is not negative in any model, or not positive in
    any, has that mean of its magnitudes, and that sign; one that is zero in any of these is zero, as the limit is.
    Entries of mixed sign have no such mean. They take the weighted arithmetic mean (``mixed: mean``), zero (``zero``:
    the only choice without a jump where an entry changes its sign), or the mean of the magnitudes with the sign of the
    arithmetic mean (``sign``). Models of weight 0 have no say. No paper: the definition is ours.
    """
    xp = block.xp

    def of_magnitudes(parts: Sequence[tuple[float, Array]]) -> Array:
        return xp.exp(weighted_sum([share for share, _ in parts], [xp.log(size) for _, size in parts]))

    return _by_magnitudes(block, weight, mixed, of_magnitudes)


@method(
    minimum=1,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable"),
    also=("harmonic_mean",),
    source="the weighted harmonic mean, entry by entry; signs and zeros as defined here",
)
def harmonic(block: Block, *, weight: PerModel[Share] = (1.0,), mixed: Mixed = "mean") -> Array:
    """Weighted harmonic mean of the entries' magnitudes, with their common sign.

    ``1 / sum_i (w_i / |W_i|)`` with ``sum_i w_i = 1``. Signs, zeros and entries of mixed sign as for ``geometric``.
    """

    def of_magnitudes(parts: Sequence[tuple[float, Array]]) -> Array:
        inverse = [share / size for share, size in parts]
        return 1.0 / sum(inverse[1:], inverse[0])

    return _by_magnitudes(block, weight, mixed, of_magnitudes)
