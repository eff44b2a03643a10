"""The mean of pruned models, whose zeros stay zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.linear import shares_of, weighted_sum, weights_have_a_sum
from weightsmith.methods.registry import Param, PerModel, method
from weightsmith.methods.statistics import totals

Mask = Literal["intersection", "union", "first"]
# Exact zeros of a matrix that nobody pruned: rows that pad a vocabulary, and what is too small for eight bits (of
# normal weights with deviation 0.02, 4 % round to zero in float8_e4m3fn). Nobody prunes so little.
PRUNED = 0.05


def _pruned(scope: Scope, *, min_zeros: float) -> Statistic[tuple[bool, ...]]:
    """Return, for each model, whether this is a matrix of which it has pruned a part."""
    if scope.form is None or len(scope.form.shape) < 2:
        return (False,) * scope.models
    kept = yield from totals(lambda block: [block.xp.count_nonzero(model != 0) for model in block.models])
    return tuple(scope.size - count >= min_zeros * scope.size for count in kept)


def _check(parameters: Mapping[str, Any]) -> None:
    weights_have_a_sum(parameters)
    if parameters["mask"] == "first" and not parameters["weight"][0]:
        raise MethodError("mask: first takes the mask of a model of weight 0; put another first")


@method(
    minimum=1,
    statistic=_pruned,
    check=_check,
    properties=("idempotent", "symmetric", "removable"),
    source="Zimmer et al., Sparse model soups: a recipe for improved pruning via model averaging, ICLR 2024, "
    "arXiv:2306.16788 (equal masks); what becomes of masks that differ as defined here",
)
def sparse_soup(
    block: Block,
    pruned: tuple[bool, ...],
    *,
    weight: PerModel[Annotated[float, Param("share of this model")]] = (1.0,),
    mask: Annotated[Mask, Param("which entries the result keeps, where the models' masks differ")] = "intersection",
    min_zeros: Annotated[
        float, Param("share of exact zeros from which on a matrix is taken as pruned", minimum=0, maximum=1)
    ] = PRUNED,
) -> Array:
    """Weighted mean of pruned models, masked: the sparse model soup.

    ``M * sum_i w_i W_i / sum_i w_i``. A model's mask is 0 where a pruned matrix of it is exactly zero, and 1 elsewhere.
    M is what all models keep (``intersection``), what any keeps (``union``: the plain mean), or what the first one
    keeps (``first``). Models of weight 0 have no mask.

    Copies of one pruned model that were trained further have one mask, and then ``linear`` keeps it as well: a mean of
    zeros is zero. Where masks differ, a plain mean is denser than its models. The paper prunes the mean again to the
    target; here the masks decide. A matrix is pruned if at least ``min_zeros`` of it are exact zeros; biases and norms
    never are. To know it, inputs are read twice.
    """
    xp = block.xp
    mean = weighted_sum(shares_of(weight), block.models)
    kept = [
        model != 0 if by_zeros else None
        for model, by_zeros, one in zip(block.models, pruned, weight, strict=True)
        if one
    ]
    chosen = _chosen(kept, mask)
    return mean if chosen is None else xp.where(chosen, mean, xp.zeros_like(mean))


def _chosen(kept: Sequence[Array | None], mask: Mask) -> Array | None:
    """Return what the result keeps, None for all; None of a model stands for all too."""
    if mask == "first":
        return kept[0]
    masks = [one for one in kept if one is not None]
    if not masks or (mask == "union" and len(masks) < len(kept)):
        return None
    chosen = masks[0]
    for one in masks[1:]:
        chosen = chosen | one if mask == "union" else chosen & one
    return chosen
