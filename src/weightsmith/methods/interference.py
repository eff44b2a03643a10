"""Methods that decide entry by entry which task vectors take part, and the baselines that chance and signs set them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.deltas import (
    Density,
    Lambda,
    Scoped,
    Trim,
    Weight,
    added,
    joined,
    largest_share,
    shared_out,
)
from weightsmith.methods.registry import Continuation, Param, PerModel, TrimScope, method
from weightsmith.methods.statistics import order_statistics, totals

# -- one task vector's entry for all ------------------------------------------------------------------------------


def extremes(xp: Any, deltas: Sequence[Array]) -> tuple[Array, Array]:
    """Return the largest and the smallest entry over several task vectors; NaN where one of them is NaN."""
    return reduce(xp.maximum, deltas), reduce(xp.minimum, deltas)


def unified_vector(xp: Any, deltas: Sequence[Array]) -> Array:
    """Return EMR-Merging's unified task vector: of the entries that have the elected sign, the largest in magnitude.

    The sign is that of the entries' sum, a sum of zero counting as minus, as in the authors' code.

    Args:
        xp: the arrays' namespace.
        deltas: one task vector or more, of one shape and floating dtype.

    Returns:
        An array of that shape and dtype; NaN where an entry is NaN.
    """
    highest, lowest = extremes(xp, deltas)
    # The extreme of the sum's own sign; where all entries are zero, so are the extremes.
    return xp.where(added(deltas) > 0, highest, lowest)


def _weighted(block: Block, weight: Sequence[float]) -> list[Array]:
    return [w * delta for w, delta in zip(weight, block.deltas, strict=True)]


@method(
    base="required",
    minimum=1,
    properties=("idempotent", "symmetric", "translates", "removable"),
    source="Huang et al., EMR-Merging, NeurIPS 2024, arXiv:2405.17461, the unified task vector; used as one model",
)
def emr(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
) -> Array:
    """EMR-Merging's unified task vector as a model: of the entries of the elected sign, the largest.

    The sign of an entry is that of ``sum_i w_i d_i``, a sum of zero counting as minus, as in the authors' code. Of
    the ``w_i d_i`` that have it, the largest in magnitude is taken: ``B + lambda u``. EMR-Merging itself restores a
    model per task from u, a mask and a factor each, and is no single model; u alone is TIES's ``dis-max`` without
    its trimming. The paper has neither weights nor lambda.
    """
    return block.base + lambda_ * unified_vector(block.xp, _weighted(block, weight))


@method(
    base="required",
    minimum=1,
    # The entries that were chosen compete again at the size they had before lambda.
    continues=Continuation(
        ("weight",), lambda _, given, models: {"weight": 1.0 / given["lambda"]} if given["lambda"] else None
    ),
    properties=("idempotent", "symmetric", "translates", "removable"),
    source="Marczak et al., MagMax, ECCV 2024, arXiv:2407.06322",
)
def magmax(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
) -> Array:
    """The base plus, in every entry, the task vectors' entry that is largest in magnitude.

    ``B + lambda w_i d_i`` with the i for which ``|w_i d_i|`` is largest; of two equal ones of opposite sign, the
    positive one (the authors' code takes the later model's). The authors' experiments use lambda 0.5 and fine-tune
    each model from the one before.

    Models may come one at a time (``weightsmith merge --onto``): the result, with the weight ``1 / lambda``, merged
    with a further model is what all of them at once give; with lambda 1 and without weights to the last bit, where
    the output keeps the inputs' dtype.
    """
    xp = block.xp
    highest, lowest = extremes(xp, _weighted(block, weight))
    chosen = xp.where(highest >= -lowest, highest, lowest)
    merged = block.base + lambda_ * chosen
    if lambda_ != 1.0 or any(w != 1.0 for w in weight):
        return merged
    # Not base + delta where that is a model: the sum is rounded, the model is exact.
    for model, delta in zip(block.models, block.deltas, strict=True):
        merged = xp.where(chosen == delta, model, merged)
    return merged


# -- entries that several task vectors share ----------------------------------------------------------------------

_MULTI_TASK = {"sum": 1.0, "ties": 0.2}
TrimDensity = Annotated[
    float | None,
    Param(
        "share of each task vector's entries that is kept first; by default 1, and 0.2 for ties", minimum=0, maximum=1
    ),
]


def _pre_trim(scope: Scope, *, density: Sequence[float | None], multi_task: str) -> Statistic[Trim]:
    return (yield from largest_share(scope, [_MULTI_TASK[multi_task] if one is None else one for one in density]))


@method(
    base="required",
    minimum=1,
    statistic=_pre_trim,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source="Wang et al., Localizing task information for improved model merging and compression (TALL masks, "
    "Consensus), ICML 2024, arXiv:2405.07813",
)
def consensus(
    block: Block,
    trim: Trim,
    *,
    weight: PerModel[Weight] = (1.0,),
    k: Annotated[int, Param("least number of models that must use an entry", minimum=0)] = 2,
    mask_lambda: PerModel[Annotated[float, Param("larger values let a model use fewer entries", minimum=0)]] = (0.4,),
    multi_task: Annotated[Literal["sum", "ties"], Param("how the task vectors are joined")] = "sum",
    density: PerModel[TrimDensity] = (None,),
    lambda_: Lambda = 1.0,
    trim_scope: Scoped = "model",
) -> Array:
    """The multi-task vector in those entries that several models use by their TALL masks (Consensus).

    With the multi-task vector ``D = sum_i w_i d_i``, model i uses the entries where
    ``|d_i| > mask_lambda_i |D - d_i|``; entries that at least k models use are kept: ``B + lambda m D``. ``k: 0`` is
    ``task_arithmetic``, ``k: 1`` drops what no model uses, the default 2 also what one model alone uses.
    ``multi_task: ties`` sums the entries of the elected sign after trimming to the largest 0.2 (dis-sum).

    The authors choose mask_lambda per model from 0.2 to 0.6 and lambda from 0.1 to 1 on validation data; 0.4 serves
    without data. Masks compare whole task vectors with D, even where D is made of trimmed ones. A model of weight 0
    uses nothing. Their trimming keeps one entry more, and where a sum is zero lets the whole model's majority elect
    the sign; here it elects plus. As a control, ``dare_linear`` with ``rescale: false`` keeps as many at random.
    """
    xp = block.xp
    vector = joined(xp, trim.apply(block), weight, consensus=multi_task == "ties", normalize=False)
    if k > 0:
        uses = [
            xp.astype(xp.abs(delta) > limit * xp.abs(vector - delta), vector.dtype)
            for delta, w, limit in zip(block.deltas, weight, mask_lambda, strict=True)
            if w != 0
        ]
        # A NaN stays where it is: its product with a mask is NaN.
        vector = vector * (added(uses) >= k) if uses else vector * 0.0
    return block.base + lambda_ * vector


def _localized(scope: Scope, *, density: Sequence[float]) -> Statistic[Trim]:
    return (yield from largest_share(scope, density))


@method(
    base="required",
    minimum=1,
    statistic=_localized,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source="He et al., Localize-and-Stitch, TMLR 2025, arXiv:2408.13656, the mask that needs no data",
    example={"density": 0.05},
)
def localize_and_stitch(
    block: Block,
    trim: Trim,
    *,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (0.05,),
    lambda_: Lambda = 1.0,
    trim_scope: Scoped = "model",
) -> Array:
    """Each model's largest changes, averaged in the entries that several models hold.

    Localize: of each task vector the density share largest in magnitude over the whole model, exactly, equal
    magnitudes by position; entries of zero are never held. Stitch: ``B + lambda sum_i w_i m_i d_i / sum_i w_i m_i``,
    the mean over the models whose mask m_i holds the entry, and the base where none does. It is ``ties`` without
    the election.

    This is the variant without data (density 0.05 in the authors' language script; their masks learned on labelled
    examples keep 0.01). Their code drops the entries that equal the smallest one kept. They leave embeddings, the
    final norm and projections to the base: do so with a filter.
    """
    xp = block.xp
    kept = trim.apply(block)
    weighted = [w * part for w, part in zip(weight, kept, strict=True)]
    return block.base + lambda_ * shared_out(xp, added(weighted), weight, [part != 0 for part in kept])


# -- parameter competition balancing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Competitor:
    """What PCB-Merging knows of one task vector over the scope.

    Attributes:
        low: magnitudes below it count as it.
        high: magnitudes above it count as it.
        cut: entries with this score or a lower one are dropped.
        top: the highest score.
    """

    low: float
    high: float
    cut: float = math.inf
    top: float = math.inf

    def clipped(self, xp: Any, delta: Array) -> Array:
        """Return the task vector with its magnitudes clipped; zeros stay."""
        magnitude = xp.clip(xp.abs(delta), self.low, self.high)
        return xp.where(delta > 0, magnitude, xp.where(delta < 0, -magnitude, delta))

    def normalized(self, xp: Any, delta: Array) -> Array:
        """Return the clipped magnitudes from 0 to 1."""
        return (xp.clip(xp.abs(delta), self.low, self.high) - self.low) / _span(self.low, self.high)

    def coefficient(self, xp: Any, score: Array) -> Array:
        """Return scores from 0, at the cut and below it, to 1, which is the highest even where it is the cut."""
        share = xp.clip((score - self.cut) / _span(self.cut, self.top), 0.0, 1.0)
        return xp.where(score >= self.top, xp.ones_like(share), share)


def _span(low: float, high: float) -> float:
    return high - low if low < high < math.inf else 1.0


def _scores(block: Block, competitors: Sequence[Competitor], inter: str) -> list[Array]:
    """Return how well each task vector's entries compete, float64: intra score times inter score."""
    xp = block.xp
    wide = [xp.astype(delta, xp.float64) for delta in block.deltas]
    shares = [one.normalized(xp, delta) for one, delta in zip(competitors, wide, strict=True)]
    if inter == "sum":
        total = added(wide)
        # An infinite entry would have the highest score of all: it has none.
        total = xp.where(xp.isfinite(total), total, total - total)
        across = [_tanh(xp, delta * total) for delta in wide]
    else:
        signed = [xp.where(delta < 0, -share, share) for delta, share in zip(wide, shares, strict=True)]
        pairs = {(i, j): _tanh(xp, signed[i] * signed[j]) for i in range(len(signed)) for j in range(i + 1)}
        across = [added([pairs[max(i, j), min(i, j)] for j in range(len(signed))]) for i in range(len(signed))]
    return [xp.exp(len(wide) * share * share) * one for share, one in zip(shares, across, strict=True)]


# Below it the series up to the 13th power is exact to float64; above it 1 - 2 / (e^2x + 1) is, to within 4e-15.
_SERIES_BELOW = 0.05
_TANH_SERIES = (21844 / 6081075, -1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3)


def _tanh(xp: Any, x: Array) -> Array:
    """Return tanh of float64 values, from operations that give the same bits on every machine."""
    square = x * x
    series: Array = 0.0
    for coefficient in _TANH_SERIES:
        series = (series + coefficient) * square
    return xp.where(xp.abs(x) < _SERIES_BELOW, x + x * series, 1.0 - 2.0 / (xp.exp(2.0 * x) + 1.0))


def _competition(scope: Scope, *, density: Sequence[float], clip: float, inter: str) -> Statistic[list[Competitor]]:
    count, size = scope.models, scope.size
    # Places in ascending order, as the authors' code has them: no interpolation.
    low, high = int(size * clip), max(int(size * (1 - clip) - 1), int(size * clip))

    values = yield from order_statistics(
        lambda block: [block.xp.abs(delta) for delta in block.deltas] * 2,
        [size - low] * count + [size - high] * count,
        scope,
        signed=False,
    )
    clipped = [Competitor(values[i], values[count + i]) for i in range(count)]
    kept = [size - int(size * (1 - share)) for share in density]
    found = yield from order_statistics(
        lambda block: _scores(block, clipped, inter) * 2, [*kept, *(min(k, 1) for k in kept)], scope
    )
    return [replace(one, cut=found[i], top=found[count + i]) for i, one in enumerate(clipped)]


Factor = Annotated[float, Param("factor on this model's task vector in the mean; its score stays")]
Clip = Annotated[float, Param("share of the magnitudes that is clipped at either end", minimum=0, maximum=0.5)]
Inter = Annotated[Literal["sum", "pairs"], Param("score an entry against the models' sum, or against each in turn")]


@method(
    base="required",
    minimum=1,
    statistic=_competition,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates"),
    source="Du et al., Parameter competition balancing for model merging (PCB-Merging), NeurIPS 2024, "
    "arXiv:2410.02396, as in the authors' code",
    example={"density": 0.1},
)
def pcb(
    block: Block,
    competitors: Sequence[Competitor],
    *,
    weight: PerModel[Factor] = (1.0,),
    density: PerModel[Density] = (0.1,),
    clip: Clip = 1e-4,
    inter: Inter = "sum",
    lambda_: Lambda = 1.0,
    trim_scope: Annotated[TrimScope, Param("what the entries compete over")] = "model",
) -> Array:
    """Let the entries of task vectors compete, within their vector and between vectors (PCB-Merging).

    Over the whole model (trim_scope), for each of n task vectors: magnitudes are clipped to those at the shares clip
    and 1 - clip of their order, and a is the clipped magnitude from 0 to 1. An entry's score is ``exp(n a^2)``
    (within) times ``tanh(d_i sum_j d_j)`` (between). The density share with the highest scores is kept, and scores
    are brought from 0 (the lowest kept) to 1: s. Result: ``B + lambda sum_i w_i c_i s_i / sum_i s_i`` with the
    clipped task vectors c_i, and the base where no model's entry is kept.

    Order statistics are exact and those of the authors' code: entries of the sorted vector, not interpolated. Their
    function has density 0.1 and clip 0.0001; their experiments density 0.05 and clip 0.01, with tanh of the
    normalised entries of every pair, summed (``inter: pairs``), for vision. The paper writes both scores with
    softmax, the code nowhere. Weights are the factors that it searches from 0.8 to 1.3 (vision) or 0.5 to 3 (text).
    Where its quotients are 0 / 0, the highest score counts 1 and equal magnitudes 0.
    """
    xp = block.xp
    total, divisor = [], []
    scores = _scores(block, competitors, inter)
    for one, w, delta, score in zip(competitors, weight, block.deltas, scores, strict=True):
        share = one.coefficient(xp, score)
        total.append(w * xp.astype(one.clipped(xp, delta), xp.float64) * share)
        divisor.append(share)
    merged = added(total) / xp.clip(added(divisor), 1e-12, None)
    return block.base + lambda_ * xp.astype(merged, block.base.dtype)


# -- baselines -----------------------------------------------------------------------------------------------------


def _mean_magnitude(scope: Scope, *, weight: Sequence[float]) -> Statistic[float]:
    """Return the mean magnitude of the task vectors' entries, models by the magnitude of their weights."""

    def sums(block: Block) -> list[Any]:
        xp = block.xp
        wide = [xp.abs(xp.astype(delta, xp.float64)) for delta in block.deltas]
        # What is not finite has no magnitude, and does not spread.
        return [xp.sum(xp.where(xp.isfinite(one), one, xp.zeros_like(one))) for one in wide]

    found = yield from totals(sums)
    shares = [abs(w) for w in weight]
    return math.fsum(w * one for w, one in zip(shares, found, strict=True)) / (scope.size * sum(shares) or 1.0)


@method(
    base="required",
    minimum=1,
    statistic=_mean_magnitude,
    scope="mean_scope",
    properties=("symmetric", "translates", "removable"),
    source="a baseline, inferred; for a single model the 1-bit delta of Liu et al., BitDelta, 2024, arXiv:2402.10193, "
    "before its scales are trained",
)
def sign_only(
    block: Block,
    magnitude: float,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
    mean_scope: Annotated[TrimScope, Param("what the mean magnitude is taken over")] = "tensor",
) -> Array:
    """A baseline: of the task vectors only the elected sign of every entry, all of one magnitude.

    ``B + lambda mu sign(sum_i w_i d_i)``, with mu the mean of ``|d_i|`` over the entries of the tensor (mean_scope)
    and over the models, these by ``|w_i|``. Where the sum is zero, the base stays. What a method gains over this
    one, it gains by magnitudes.
    """
    xp = block.xp
    total = added(_weighted(block, weight))
    size = xp.full_like(total, magnitude)
    # A sum that is zero or NaN stays what it is.
    return block.base + lambda_ * xp.where(total > 0, size, xp.where(total < 0, -size, total))


def _some_chance(parameters: Mapping[str, Any]) -> None:
    if not any(parameters["weight"]):
        raise MethodError("the weights are all 0, so no model can be chosen; give at least one a weight above 0")


@method(
    minimum=1,
    random=True,
    check=_some_chance,
    also=("randmix",),
    properties=("idempotent", "symmetric", "translates", "removable"),
    source="the baseline RandMix of Marczak et al., MagMax, ECCV 2024, arXiv:2407.06322, with chances",
)
def random_select(
    block: Block,
    *,
    weight: PerModel[Annotated[float, Param("chance of this model, relative to the others'", minimum=0)]] = (1.0,),
) -> Array:
    """A baseline: every entry from one model, chosen at random.

    Model i is chosen with the chance ``w_i / sum_j w_j``, in every entry by itself. Draws depend on seed, tensor,
    model name and position alone: the model with the smallest ``-log(1 - u_i) / w_i`` is chosen, so a further model
    changes only the entries that it is chosen for. Of two that tie (once in 16 million), the larger entry is taken.
    """
    xp = block.xp
    chosen = least = None
    for i, (w, model) in enumerate(zip(weight, block.models, strict=True)):
        if w == 0:
            continue
        time = -xp.log(1.0 - xp.astype(block.draw(i), xp.float64)) / w
        if chosen is None:
            chosen, least = model, time
            continue
        sooner = (time < least) | ((time == least) & (model > chosen))
        chosen, least = xp.where(sooner, model, chosen), xp.minimum(time, least)
    # A NaN in any model is one in the result: the merge is of broken models.
    total = added(block.models)
    return xp.where(xp.isnan(total), total, chosen)
