"""Task vectors thinned at random: DARE and DELLA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Form, Scope, Statistic, rank_in_rows
from weightsmith.methods.deltas import (
    Density,
    Int8Mask,
    Lambda,
    Normalize,
    RankScope,
    Scoped,
    Weight,
    combine,
    l1_ratios,
)
from weightsmith.methods.registry import Granularity, Param, PerModel, method
from weightsmith.methods.statistics import leading_bits

Rescale = Annotated[bool, Param("make up for what was dropped")]
RescaleBy = Annotated[
    Literal["expected", "l1"],
    Param("divide by the chance of being kept, or restore the sum of magnitudes that was there"),
]
_DARE = "Yu et al., Language models are super Mario (DARE), ICML 2024, arXiv:2311.03099"
_DELLA = "Deep et al., DELLA-Merging, 2024, arXiv:2406.11617"


Object = Annotated[
    Literal["delta", "weights"], Param("what is thinned: task vectors, or the fine-tuned weights themselves")
]


def _dropped(block: Block, density: Sequence[float], dropped_of: str) -> list[Array]:
    """Return the task vectors, or the models, with each entry kept with the chance ``density``."""
    return [
        part if share >= 1 else part * (block.draw(i) < share)
        for i, (part, share) in enumerate(zip(_whole(block, dropped_of), density, strict=True))
    ]


def _whole(block: Block, dropped_of: str) -> Sequence[Array]:
    return block.deltas if dropped_of == "delta" else block.models


def _dare_scales(
    scope: Scope, *, density: Sequence[float], rescale: bool, rescale_by: str, object: str
) -> Statistic[list[float]]:
    if not rescale:
        return [1.0] * len(density)
    if rescale_by == "expected":
        return [1.0 / share if share > 0 else 1.0 for share in density]
    return (yield from l1_ratios(lambda block: _dropped(block, density, object), lambda block: _whole(block, object)))


def _dare(block: Block, scales: Sequence[float], density: Sequence[float], dropped_of: str) -> list[Array]:
    """Return the task vectors of models of which entries were dropped."""
    kept = [scale * part for scale, part in zip(scales, _dropped(block, density, dropped_of), strict=True)]
    return kept if dropped_of == "delta" else [part - block.base for part in kept]


@method(
    base="required",
    minimum=1,
    statistic=_dare_scales,
    scope="trim_scope",
    random=True,
    properties=("symmetric", "translates", "removable"),
    source=_DARE,
    compat={"mergekit": {"rescale_by": "l1"}},
    example={"weight": 0.5, "density": 0.5},
)
def dare_linear(
    block: Block,
    scales: Sequence[float],
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "expected",
    trim_scope: Scoped = "tensor",
    object: Object = "delta",
    int8_mask: Int8Mask = False,
) -> Array:
    """Drop entries of task vectors at random and rescale the rest, then task arithmetic.

    Every entry is kept with the chance density and divided by it, so that its expectation stays:
    ``B + lambda sum_i w_i m_i d_i / density_i``. mergekit restores each tensor's sum of magnitudes instead
    (``rescale_by: l1``, over trim_scope). Masks depend on seed, tensor, model name and position alone.

    With ``object: weights``, the fine-tuned weights themselves are masked and rescaled, ``m_i W_i / density_i``,
    and the base subtracted after that: the paper's ablation, which ruins most models at the densities that task
    vectors bear. With ``rescale: false`` and a density, this is the random baseline for methods that choose as
    many entries by other means (``ties``, ``consensus``).
    """
    deltas = _dare(block, scales, density, object)
    return combine(block, deltas, weight, consensus=False, normalize=normalize, scale=lambda_)


@method(
    base="required",
    minimum=1,
    statistic=_dare_scales,
    scope="trim_scope",
    random=True,
    properties=("symmetric", "translates", "removable"),
    source=f"{_DARE}; with the sign election of TIES, arXiv:2306.01708",
    compat={"mergekit": {"rescale_by": "l1"}},
    example={"weight": 0.5, "density": 0.5},
)
def dare_ties(
    block: Block,
    scales: Sequence[float],
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "expected",
    trim_scope: Scoped = "tensor",
    object: Object = "delta",
    int8_mask: Int8Mask = False,
) -> Array:
    """Drop entries of task vectors at random and rescale the rest, then the sign election of TIES.

    As ``dare_linear``, ``object`` included, but only entries whose sign is that of ``sum_i w_i d_i`` are added.
    """
    deltas = _dare(block, scales, density, object)
    return combine(block, deltas, weight, consensus=True, normalize=normalize, scale=lambda_)


Epsilon = Annotated[float, Param("half the width of the window of chances", minimum=0, maximum=0.5)]


def _chances_in_bounds(parameters: Mapping[str, Any]) -> None:
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise MethodError(
                f"density {density:g} with epsilon {epsilon:g} keeps entries with chances from "
                f"{density - epsilon:g} to {density + epsilon:g}; both must lie within (0, 1)"
            )


def _della_reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    return "filters" if parameters["trim_scope"] == "row" else "elements"


# What DELLA knows of a scope: each model's ranks by the leading bits of the magnitude (None where ranks are
# those within rows), and the factors that restore the sums of magnitudes.
_Ranks = tuple[list[Array] | None, list[float]]


def _della_statistic(
    scope: Scope,
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool,
    rescale_by: str,
    trim_scope: str,
) -> Statistic[_Ranks]:
    tables = None
    if trim_scope != "row":
        from weightsmith.kernels import select

        found = yield from leading_bits(lambda block: [block.xp.abs(delta) for delta in block.deltas], scope)
        tables = [select.rank_table(counts) for counts in found]
    scales = [1.0] * scope.models
    if rescale and rescale_by == "l1":
        scales = yield from l1_ratios(
            lambda block: [delta for delta, _ in _della_kept(block, tables, density, epsilon)]
        )
    return tables, scales


def _della_kept(
    block: Block, tables: list[Array] | None, density: Sequence[float], epsilon: Sequence[float]
) -> list[tuple[Array, Array | float]]:
    """Return each thinned task vector, and the chance with which its entries were kept."""
    found: list[tuple[Array, Array | float]] = []
    for i, (delta, share, half) in enumerate(zip(block.deltas, density, epsilon, strict=True)):
        if share >= 1 or share <= 0:
            found.append((delta * (1.0 if share >= 1 else 0.0), 1.0))
            continue
        rank = _rank_in_row(block, delta) if tables is None else _rank_by_table(block, delta, tables[i])
        chance = (share - half) + 2.0 * half * rank
        found.append((delta * (block.draw(i) < chance), chance))
    return found


def _rank_in_row(block: Block, delta: Array) -> Array:
    """Return the rank of each magnitude within its row, from 0 (smallest) to 1; 0.5 in a row of one."""
    xp = block.xp
    length = delta.shape[-1]
    if length == 1:
        return xp.full_like(delta, 0.5)
    # By an array: by a number, PyTorch on a GPU multiplies with the reciprocal, and a mask could differ in an entry.
    return rank_in_rows(xp, xp.abs(delta)) / xp.full_like(delta, length - 1)


def _rank_by_table(block: Block, delta: Array, table: Array) -> Array:
    from weightsmith.kernels.select import selector

    magnitude = block.xp.abs(delta)
    return block.xp.astype(selector(magnitude).look_up(magnitude, table), delta.dtype)


def _della(
    block: Block,
    ranks: _Ranks,
    density: Sequence[float],
    epsilon: Sequence[float],
    *,
    rescale: bool,
    rescale_by: str,
) -> list[Array]:
    tables, scales = ranks
    kept = _della_kept(block, tables, density, epsilon)
    if not rescale:
        return [delta for delta, _ in kept]
    if rescale_by == "l1":
        return [scale * delta for scale, (delta, _) in zip(scales, kept, strict=True)]
    return [delta / chance for delta, chance in kept]


@method(
    base="required",
    minimum=1,
    statistic=_della_statistic,
    reads=_della_reads,
    scope="trim_scope",
    random=True,
    check=_chances_in_bounds,
    properties=("symmetric", "translates", "removable"),
    source=_DELLA,
    compat={"mergekit": {"rescale_by": "l1"}},
    example={"weight": 0.5, "density": 0.5},
)
def della(
    block: Block,
    ranks: _Ranks,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    epsilon: PerModel[Epsilon] = (0.15,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "expected",
    trim_scope: RankScope = "row",
    int8_mask: Int8Mask = False,
) -> Array:
    """Drop entries at random, small ones more often (MAGPRUNE), then the sign election of TIES.

    Magnitudes are ranked within each row; an entry of rank r, from 0 to 1, is kept with the chance
    ``density - epsilon + 2 epsilon r`` and divided by it. mergekit restores each tensor's sum of magnitudes
    instead (``rescale_by: l1``). A row is a slice along the first axis; over a tensor, a layer or the model,
    ranks are those of magnitudes cut to their leading 16 bits, equal ones sharing their mean rank.
    """
    deltas = _della(block, ranks, density, epsilon, rescale=rescale, rescale_by=rescale_by)
    return combine(block, deltas, weight, consensus=True, normalize=normalize, scale=lambda_)


@method(
    base="required",
    minimum=1,
    statistic=_della_statistic,
    reads=_della_reads,
    scope="trim_scope",
    random=True,
    check=_chances_in_bounds,
    properties=("symmetric", "translates", "removable"),
    source=f"{_DELLA}, without the election",
    compat={"mergekit": {"rescale_by": "l1"}},
    example={"weight": 0.5, "density": 0.5},
)
def della_linear(
    block: Block,
    ranks: _Ranks,
    *,
    weight: PerModel[Weight],
    density: PerModel[Density] = (1.0,),
    epsilon: PerModel[Epsilon] = (0.15,),
    lambda_: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: Rescale = True,
    rescale_by: RescaleBy = "expected",
    trim_scope: RankScope = "row",
    int8_mask: Int8Mask = False,
) -> Array:
    """Drop entries at random, small ones more often (MAGPRUNE), then task arithmetic.

    As ``della``, without the sign election: ``B + lambda sum_i w_i m_i d_i / p_i``.
    """
    deltas = _della(block, ranks, density, epsilon, rescale=rescale, rescale_by=rescale_by)
    return combine(block, deltas, weight, consensus=False, normalize=normalize, scale=lambda_)
