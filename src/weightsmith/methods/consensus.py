"""Methods that weigh entries by how the models' changes to them relate: SCE and RAM."""

from __future__ import annotations

import math
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.deltas import Int8Mask, added, elect, shared_out
from weightsmith.methods.registry import Param, TrimScope, method
from weightsmith.methods.statistics import Cut, largest, totals


def _variance(block: Block) -> Array:
    mean = added(block.deltas) / len(block.deltas)
    squares = [(delta - mean) * (delta - mean) for delta in block.deltas]
    return added(squares) / len(squares)


def _selection(scope: Scope, *, select_topk: float) -> Statistic[tuple[Cut | None, list[float]]]:
    """Return the boundary of the selected entries, and each model's mean squared selected change."""
    cut: Cut | None = None
    if select_topk < 1.0:
        (varying,) = yield from totals(lambda block: [block.xp.count_nonzero(_variance(block))])
        (cut,) = yield from largest(lambda block: [_variance(block)], [int(varying * select_topk)], scope)
    energies = yield from totals(lambda block: [_energy(block, delta) for delta in _selected(block, cut)])
    return cut, [energy / scope.size for energy in energies]


def _energy(block: Block, delta: Array) -> Any:
    wide = block.xp.astype(delta, block.xp.float64)
    return block.xp.sum(wide * wide)


def _selected(block: Block, cut: Cut | None) -> list[Array]:
    if cut is None:
        return list(block.deltas)
    kept = cut.keeps(_variance(block), block)
    return [delta * kept for delta in block.deltas]


@method(
    base="required",
    minimum=1,
    statistic=_selection,
    selects=True,
    properties=("idempotent", "symmetric", "translates"),
    source="Wan et al., FuseChat, 2024, arXiv:2408.07990, section 3.3 (select, calculate, erase)",
    compat={"mergekit": {"uniform_below": 1e-6}},
    example={"select_topk": 0.5},
)
def sce(
    block: Block,
    selection: tuple[Cut | None, list[float]],
    *,
    select_topk: Annotated[float, Param("share of the varying entries that is kept", minimum=0, maximum=1)] = 1.0,
    uniform_below: Annotated[
        float, Param("sum of mean squared changes below which models weigh the same", minimum=0)
    ] = 0.0,
    int8_mask: Int8Mask = False,
) -> Array:
    """Select entries that vary, weigh models by the size of their changes, erase minority signs.

    Select: of the entries whose task vectors vary between models, the select_topk share with the largest
    variance. Calculate: model i weighs ``mean(d_i^2)`` over the tensor, divided by the sum over models. Erase:
    entries whose sign differs from that of the plain sum. Result: ``B + sum w d / sum w`` over what is left.
    Where the models' changes sum to less than uniform_below, weights are equal; mergekit's 1e-6 is met by
    ordinary fine-tunes.
    """
    cut, energies = selection
    total = sum(energies)
    # A total that is not finite comes from a NaN or an overflow; it must not spread over the tensor.
    even = not 0 < total < math.inf or total < uniform_below
    shares = [1.0 / len(energies) if even else energy / total for energy in energies]
    deltas = _selected(block, cut)
    agreeing = elect(block.xp, deltas)
    weighted = [share * delta * mask for share, delta, mask in zip(shares, deltas, agreeing, strict=True)]
    return block.base + shared_out(block.xp, added(weighted), shares, agreeing)


Epsilon = Annotated[float, Param("smaller changes count as none", minimum=0)]


def _active(block: Block, epsilon: float) -> tuple[list[Array], Array]:
    """Return where each model changes the base, as 0 and 1, and how many do."""
    dtype = block.models[0].dtype
    active = [block.xp.astype(block.xp.abs(delta) > epsilon, dtype) for delta in block.deltas]
    return active, added(active)


@method(
    base="required",
    minimum=1,
    properties=("idempotent", "symmetric", "translates"),
    source="Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv:2601.13572 (RAM); "
    "inferred from mergekit's form",
)
def ram(block: Block, *, epsilon: Epsilon = 1e-5) -> Array:
    """Changes of one model alone in full, changes of several averaged.

    A model is active in an entry where ``|W_i - B| > epsilon``. The result is the base plus the mean of the
    active models' changes, and the base where none is active.
    """
    active, count = _active(block, epsilon)
    changes = [delta * mask for delta, mask in zip(block.deltas, active, strict=True)]
    return block.base + added(changes) / block.xp.where(count == 0, block.xp.ones_like(count), count)


def _overlaps(scope: Scope, *, epsilon: float) -> Statistic[list[float]]:
    """Return for each model the number of its entries that it shares over that of those it has alone."""

    def counts(block: Block) -> list[Any]:
        active, count = _active(block, epsilon)
        return [
            block.xp.count_nonzero(mask * (count > 1 if shared else count == 1))
            for mask in active
            for shared in (True, False)
        ]

    found = yield from totals(counts)
    return [shared / alone if alone else 0.0 for shared, alone in zip(found[::2], found[1::2], strict=True)]


@method(
    base="required",
    minimum=1,
    statistic=_overlaps,
    scope="count_scope",
    properties=("idempotent", "symmetric", "translates"),
    source="Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv:2601.13572 (RAM+); "
    "inferred from mergekit's form",
    compat={"mergekit": {"count_scope": "tensor"}},
)
def ramplus_tl(
    block: Block,
    overlaps: list[float],
    *,
    r: Annotated[float, Param("strength of the rescaling", minimum=0)] = 0.1,
    alpha: Annotated[float, Param("largest ratio that counts", minimum=0)] = 0.2,
    epsilon: Epsilon = 1e-5,
    count_scope: Annotated[TrimScope, Param("what shared and own entries are counted over")] = "model",
) -> Array:
    """RAM, with each model's own changes enlarged by how much it shares with others.

    Entries that model i alone changes are multiplied by ``1 + r min(shared_i / own_i, alpha)``; the numbers
    of shared and own entries are counted over the whole model, as in the paper (mergekit: per tensor).
    """
    active, count = _active(block, epsilon)
    xp = block.xp
    alone = xp.astype(count == 1, block.models[0].dtype)
    total = xp.zeros_like(block.base)
    for delta, mask, overlap in zip(block.deltas, active, overlaps, strict=True):
        factor = r * max(0.0, min(overlap, alpha))
        total = total + delta * mask * (1.0 + factor * alone)
    return block.base + total / xp.where(count == 0, xp.ones_like(count), count)
