"""Task arithmetic and what is built on it: trim task vectors, elect signs, add them to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.registry import Continuation, Param, PerModel, TrimScope, method
from weightsmith.methods.statistics import Cut, largest, totals

Weight = Annotated[float, Param("factor on this model's task vector")]
Density = Annotated[float, Param("share of the task vector's entries that is kept", minimum=0, maximum=1)]
Lambda = Annotated[float, Param("factor on the merged task vector")]
Normalize = Annotated[bool, Param("divide by the sum of the weights that take part")]
Int8Mask = Annotated[bool, Param("accepted for mergekit's recipes; the result does not depend on it")]
Scoped = Annotated[TrimScope, Param("what the entries to keep are chosen over")]


def combine(
    block: Block,
    deltas: Sequence[Array],
    weight: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    scale: float,
) -> Array:
    """Add weighted task vectors to the base.

    With consensus, only entries whose sign is that of the weighted sum count (TIES, section 3.3: elect sign,
    disjoint merge; a sum of zero elects plus, as in mergekit), and the divisor is the weights of those.
    """
    xp = block.xp
    weighted = [w * delta for w, delta in zip(weight, deltas, strict=True)]
    if consensus:
        agreeing = elect(xp, weighted)
        total = sum(
            (part * mask for part, mask in zip(weighted[1:], agreeing[1:], strict=True)), weighted[0] * agreeing[0]
        )
        if normalize:
            kept = [w * xp.astype(mask, block.base.dtype) for w, mask in zip(weight, agreeing, strict=True)]
            divisor = sum(kept[1:], kept[0])
            total = total / xp.where(divisor == 0, xp.ones_like(divisor), divisor)
    else:
        total = sum(weighted[1:], weighted[0])
        if normalize and abs(sum(weight)) >= 1e-8:
            total = total / sum(weight)
    return block.base + scale * total


def elect(xp: Any, deltas: Sequence[Array]) -> list[Array]:
    """Return, for each vector, where its entries have the sign of the vectors' sum; zeros never do."""
    total = sum(deltas[1:], deltas[0])
    positive = total >= 0
    return [(positive & (delta > 0)) | (~positive & (delta < 0)) for delta in deltas]


def _state(_: None, given: Mapping[str, Any], models: int) -> Mapping[str, float] | None:
    # What was added to the base is added again as it is, whatever lambda the next merge multiplies with.
    return None if given["normalize"] or not given["lambda"] else {"weight": 1.0 / given["lambda"]}


@method(
    base="required",
    minimum=1,
    continues=Continuation(("weight",), _state),
    properties=("symmetric", "translates", "removable"),
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089",
    example={"weight": 0.5},
)
def task_arithmetic(
    block: Block,
    *,
    weight: PerModel[Weight],
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    int8_mask: Int8Mask = False,
) -> Array:
    """The base plus a weighted sum of task vectors.

    ``B + lambda sum_i w_i (W_i - B)``; negative weights forget. With normalize, divided by ``sum_i w_i``.
    """
    return combine(block, block.deltas, weight, consensus=False, normalize=normalize, scale=lambda_)


@dataclass(frozen=True)
class Trim:
    """What is kept of each task vector: entries within ``outer`` and not within ``inner``, times ``scale``."""

    outer: Sequence[Cut]
    inner: Sequence[Cut]
    scale: Sequence[float]

    def apply(self, block: Block) -> list[Array]:
        """Return the trimmed task vectors."""
        found = []
        for delta, outer, inner, scale in zip(block.deltas, self.outer, self.inner, self.scale, strict=True):
            magnitude = block.xp.abs(delta)
            kept = outer.keeps(magnitude, block)
            if inner is not _NONE:
                kept = kept & ~inner.keeps(magnitude, block)
            found.append(delta * kept if scale == 1.0 else delta * kept * scale)
        return found


_NONE = Cut(float("inf"), -1)
_ALL = Cut(-1.0, -1)


def _cuts(scope: Scope, *counts: Sequence[int]) -> Statistic[list[list[Cut]]]:
    """Return boundaries of the k largest magnitudes of every task vector; k of 0 or all needs no sweep.

    Args:
        scope: what they range over.
        counts: lists of k per model; all are found in the same sweeps.
    """
    pairs = [(model, count) for row in counts for model, count in enumerate(row)]
    asked = [pair for pair in dict.fromkeys(pairs) if 0 < pair[1] < scope.size]
    found = []
    if asked:
        found = yield from largest(
            lambda block: [block.xp.abs(block.deltas[model]) for model, _ in asked],
            [count for _, count in asked],
            scope,
        )
    cuts = dict(zip(asked, found, strict=True))
    return [[cuts.get((model, count), _ALL if count else _NONE) for model, count in enumerate(row)] for row in counts]


def _with_scale(trim: Trim, *, rescale: bool) -> Statistic[Trim]:
    """Give a trim the factors that restore each task vector's sum of magnitudes."""
    if not rescale:
        return trim
    scales = yield from l1_ratios(trim.apply)
    return Trim(trim.outer, trim.inner, scales)


def l1_ratios(masked: Callable[[Block], Sequence[Array]]) -> Statistic[list[float]]:
    """Return, for each model, the sum of magnitudes before over after masking; 1 where either is below 1e-7."""

    def sums(block: Block) -> list[Any]:
        xp = block.xp
        return [
            xp.sum(xp.astype(xp.abs(delta), xp.float64))
            for pair in zip(block.deltas, masked(block), strict=True)
            for delta in pair
        ]

    found = yield from totals(sums)
    return [
        before / after if 1e-7 <= before < math.inf and after >= 1e-7 else 1.0
        for before, after in zip(found[::2], found[1::2], strict=True)
    ]


def _largest_share(scope: Scope, *, density: Sequence[float], rescale: bool) -> Statistic[Trim]:
    counts = [max(1, int(share * scope.size)) if share > 0 else 0 for share in density]
    (outer,) = yield from _cuts(scope, counts)
    return (yield from _with_scale(Trim(outer, [_NONE] * len(outer), [1.0] * len(outer)), rescale=rescale))


@method(
    base="required",
    minimum=1,
    statistic=_largest_share,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708",
    example={"weight": 1.0, "density": 0.4},
)
def ties(
    block: Block,
    trim: Trim,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: Annotated[bool, Param("restore each trimmed task vector's sum of magnitudes")] = False,
    trim_scope: Scoped = "tensor",
    int8_mask: Int8Mask = False,
) -> Array:
    """Trim task vectors to their largest entries, elect a sign per entry, average those that agree.

    Trim: the density share largest in magnitude is kept, exactly, equal magnitudes by position. Elect: the
    sign of ``sum_i w_i d_i``. Merge: the weighted mean of the entries of that sign, times lambda, plus the
    base. The paper trims over the whole model (``trim_scope: model``), density 0.2; the default is per
    tensor, as recipes are written for. Weights act before the election; with equal weights this is the paper.
    """
    return combine(block, trim.apply(block), weight, consensus=True, normalize=normalize, scale=lambda_)


def _middle_share(scope: Scope, *, density: Sequence[float], gamma: Sequence[float], rescale: bool) -> Statistic[Trim]:
    kept = [int(share * scope.size) for share in density]
    bottom = [max(0, scope.size - k - int(top * scope.size)) for k, top in zip(kept, gamma, strict=True)]
    outer, inner = yield from _cuts(
        scope,
        [scope.size - b for b in bottom],
        [scope.size - b - k for b, k in zip(bottom, kept, strict=True)],
    )
    return (yield from _with_scale(Trim(outer, inner, [1.0] * len(outer)), rescale=rescale))


Gamma = Annotated[float, Param("share of the largest entries that is dropped", minimum=0, maximum=1)]
_BREADCRUMBS = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv:2312.06795"


@method(
    base="required",
    minimum=1,
    statistic=_middle_share,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source=_BREADCRUMBS,
    example={"weight": 0.5, "density": 0.5},
)
def breadcrumbs(
    block: Block,
    trim: Trim,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Annotated[bool, Param("restore each trimmed task vector's sum of magnitudes")] = False,
    trim_scope: Scoped = "tensor",
    int8_mask: Int8Mask = False,
) -> Array:
    """Task arithmetic on task vectors without their largest and smallest entries.

    Of n entries ranked by magnitude, the ``gamma n`` largest are dropped as outliers and the ``density n``
    below them kept; where both do not fit, fewer outliers are dropped. ``B + lambda sum_i w_i d_i``. The
    authors' code ranks along each last axis, their paper per layer (``trim_scope: layer``).
    """
    return combine(block, trim.apply(block), weight, consensus=False, normalize=normalize, scale=lambda_)


@method(
    base="required",
    minimum=1,
    statistic=_middle_share,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source=f"{_BREADCRUMBS}; with the sign election of TIES, arXiv:2306.01708, as in mergekit",
    example={"weight": 0.5, "density": 0.5},
)
def breadcrumbs_ties(
    block: Block,
    trim: Trim,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Annotated[bool, Param("restore each trimmed task vector's sum of magnitudes")] = False,
    trim_scope: Scoped = "tensor",
    int8_mask: Int8Mask = False,
) -> Array:
    """Breadcrumbs' trimming, then the sign election of TIES.

    As ``breadcrumbs``, but only entries whose sign is that of ``sum_i w_i d_i`` are added.
    """
    return combine(block, trim.apply(block), weight, consensus=True, normalize=normalize, scale=lambda_)
