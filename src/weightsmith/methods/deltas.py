"""Task arithmetic and what is built on it: trim task vectors, elect signs, add them to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from weightsmith.methods.block import Array, Block, Form, Scope, Statistic, rank_in_rows
from weightsmith.methods.registry import Continuation, Granularity, Param, PerModel, TrimScope, method
from weightsmith.methods.statistics import Cut, largest, totals

Weight = Annotated[float, Param("factor on this model's task vector")]
Density = Annotated[float, Param("share of the task vector's entries that is kept", minimum=0, maximum=1)]
Lambda = Annotated[float, Param("factor on the merged task vector")]
Normalize = Annotated[bool, Param("divide by the sum of the weights that take part")]
Int8Mask = Annotated[bool, Param("accepted for mergekit's recipes; the result does not depend on it")]
Scoped = Annotated[TrimScope, Param("what the entries to keep are chosen over")]
RankScope = Annotated[Literal["row", "tensor", "layer", "model"], Param("what magnitudes are ranked over")]


def combine(
    block: Block,
    deltas: Sequence[Array],
    weight: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    scale: float,
) -> Array:
    """Add weighted task vectors to the base; see :func:`joined`."""
    return block.base + scale * joined(block.xp, deltas, weight, consensus=consensus, normalize=normalize)


def joined(xp: Any, deltas: Sequence[Array], weight: Sequence[float], *, consensus: bool, normalize: bool) -> Array:
    """Return the weighted sum of task vectors, or with normalize their weighted mean.

    With consensus, only entries whose sign is that of the weighted sum count (TIES, section 3.3: elect sign,
    disjoint merge; a sum of zero elects plus, as in mergekit), and the divisor is the weights of those.
    """
    weighted = [w * delta for w, delta in zip(weight, deltas, strict=True)]
    if consensus:
        agreeing = elect(xp, weighted)
        total = added([part * mask for part, mask in zip(weighted, agreeing, strict=True)])
        return shared_out(xp, total, weight, agreeing) if normalize else total
    total = added(weighted)
    if normalize and abs(sum(weight)) >= 1e-8:
        total = total / sum(weight)
    return total


def added(arrays: Sequence[Array]) -> Array:
    """Return the sum of one or more arrays, from the first on."""
    return sum(arrays[1:], arrays[0])


def shared_out(xp: Any, total: Array, weight: Sequence[float], masks: Sequence[Array]) -> Array:
    """Divide every entry by the weights of the models whose masks hold it, where there are any."""
    divisor = added([w * xp.astype(mask, total.dtype) for w, mask in zip(weight, masks, strict=True)])
    return total / xp.where(divisor == 0, xp.ones_like(divisor), divisor)


def elect(xp: Any, deltas: Sequence[Array]) -> list[Array]:
    """Return, for each vector, where its entries have the sign of the vectors' sum; zeros never do."""
    positive = added(deltas) >= 0
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


@dataclass(frozen=True)
class RowTrim:
    """What is kept of each row of each task vector: ``density`` of it below its ``gamma`` largest, times ``scale``."""

    density: Sequence[float]
    gamma: Sequence[float]
    scale: Sequence[float]

    def apply(self, block: Block) -> list[Array]:
        """Return the trimmed task vectors; a scalar, which has no row, as it is."""
        if block.base.ndim == 1:
            return list(block.deltas)
        xp, length = block.xp, block.base.shape[-1]
        found = []
        for delta, density, gamma, scale in zip(block.deltas, self.density, self.gamma, self.scale, strict=True):
            magnitude = xp.abs(delta)
            # Ranks come in the dtype of the magnitudes, and float32 cannot count further.
            rank = rank_in_rows(xp, magnitude if length <= _COUNTABLE else xp.astype(magnitude, xp.float64))
            stop = length - int(length * gamma)
            kept = (rank >= stop - int(length * density)) & (rank < stop)
            found.append(delta * kept if scale == 1.0 else delta * kept * scale)
        return found


_COUNTABLE = 1 << 24
_NONE = Cut(float("inf"), -1)
_ALL = Cut(-1.0, -1)


def keeping(outer: Sequence[Cut]) -> Trim:
    """Return what trims each task vector to the entries within a boundary."""
    return Trim(outer, [_NONE] * len(outer), [1.0] * len(outer))


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


_AnyTrim = TypeVar("_AnyTrim", Trim, RowTrim)


def _with_scale(trim: _AnyTrim, *, rescale: bool) -> Statistic[_AnyTrim]:
    """Give a trim the factors that restore each task vector's sum of magnitudes."""
    return replace(trim, scale=(yield from l1_ratios(trim.apply))) if rescale else trim


def l1_ratios(
    masked: Callable[[Block], Sequence[Array]],
    whole: Callable[[Block], Sequence[Array]] = lambda block: block.deltas,
) -> Statistic[list[float]]:
    """Return, for each model, the sum of magnitudes before over after masking; 1 where either is below 1e-7.

    Args:
        masked: gives what is left, for each model.
        whole: gives what was masked: by default the task vectors.
    """

    def sums(block: Block) -> list[Any]:
        xp = block.xp
        return [
            xp.sum(xp.astype(xp.abs(part), xp.float64))
            for pair in zip(whole(block), masked(block), strict=True)
            for part in pair
        ]

    found = yield from totals(sums)
    return [
        before / after if 1e-7 <= before < math.inf and after >= 1e-7 else 1.0
        for before, after in zip(found[::2], found[1::2], strict=True)
    ]


def kept_of(size: int, share: float) -> int:
    """Return how many of so many entries a share is: at least one, unless it is 0 or there are none."""
    return min(max(1, int(share * size)), size) if share > 0 else 0


def largest_share(scope: Scope, density: Sequence[float]) -> Statistic[Trim]:
    """Find each task vector's largest entries: the density share of them, and at least one unless it is 0."""
    (outer,) = yield from _cuts(scope, [kept_of(scope.size, share) for share in density])
    return keeping(outer)


def _largest_share(scope: Scope, *, density: Sequence[float], rescale: bool) -> Statistic[Trim]:
    return (yield from _with_scale((yield from largest_share(scope, density)), rescale=rescale))


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


def _middle_share(
    scope: Scope, *, density: Sequence[float], gamma: Sequence[float], rescale: bool, trim_scope: str
) -> Statistic[Trim | RowTrim]:
    ones = [1.0] * len(density)
    if trim_scope == "row":
        return (yield from _with_scale(RowTrim(density, gamma, ones), rescale=rescale))
    kept = [int(share * scope.size) for share in density]
    bottom = [max(0, scope.size - k - int(top * scope.size)) for k, top in zip(kept, gamma, strict=True)]
    outer, inner = yield from _cuts(
        scope,
        [scope.size - b for b in bottom],
        [scope.size - b - k for b, k in zip(bottom, kept, strict=True)],
    )
    return (yield from _with_scale(Trim(outer, inner, ones), rescale=rescale))


def _breadcrumbs_reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    # A scalar has no row: it is read, and left, as it is.
    return "rows" if parameters["trim_scope"] == "row" and form.shape else "elements"


Gamma = Annotated[float, Param("share of the largest entries that is dropped", minimum=0, maximum=1)]
_BREADCRUMBS = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv:2312.06795"


@method(
    base="required",
    minimum=1,
    statistic=_middle_share,
    reads=_breadcrumbs_reads,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source=_BREADCRUMBS,
    example={"weight": 0.5, "density": 0.5},
)
def breadcrumbs(
    block: Block,
    trim: Trim | RowTrim,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Annotated[bool, Param("restore each trimmed task vector's sum of magnitudes")] = False,
    trim_scope: RankScope = "tensor",
    int8_mask: Int8Mask = False,
) -> Array:
    """Task arithmetic on task vectors without their largest and smallest entries.

    Of n entries ranked by magnitude, the ``gamma n`` largest are dropped as outliers and the ``density n``
    below them kept; where both do not fit, fewer outliers are dropped. ``B + lambda sum_i w_i d_i``. The paper
    ranks per layer (``trim_scope: layer``).

    With ``trim_scope: row``, as in the authors' code: each vector along the last axis is ranked by itself, a
    1-D tensor as a whole; the outliers are dropped first, then the ``density n`` largest of the rest are kept, or
    all of it where there are fewer; a scalar is left as it is. Both shares are rounded down in every row, so where
    ``density n`` is below 1 (the three entries of a kernel's row with density 0.15) the whole tensor stays at the
    base. Of equal magnitudes in a row, later ones rank as larger. The authors search density from 0.05 to 0.2,
    gamma from 0.001 to 0.01 and lambda from 0.01 to 1, starting at 0.15, 0.006 and 0.2.
    """
    return combine(block, trim.apply(block), weight, consensus=False, normalize=normalize, scale=lambda_)


@method(
    base="required",
    minimum=1,
    statistic=_middle_share,
    reads=_breadcrumbs_reads,
    selects=True,
    scope="trim_scope",
    properties=("symmetric", "translates", "removable"),
    source=f"{_BREADCRUMBS}; with the sign election of TIES, arXiv:2306.01708, as in mergekit",
    example={"weight": 0.5, "density": 0.5},
)
def breadcrumbs_ties(
    block: Block,
    trim: Trim | RowTrim,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Annotated[bool, Param("restore each trimmed task vector's sum of magnitudes")] = False,
    trim_scope: RankScope = "tensor",
    int8_mask: Int8Mask = False,
) -> Array:
    """Breadcrumbs' trimming, then the sign election of TIES.

    As ``breadcrumbs``, but only entries whose sign is that of ``sum_i w_i d_i`` are added.
    """
    return combine(block, trim.apply(block), weight, consensus=True, normalize=normalize, scale=lambda_)
