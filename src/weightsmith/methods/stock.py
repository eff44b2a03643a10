"""Model Stock: how far to trust the mean of fine-tunes follows from the angle between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Form, Scope, Statistic
from weightsmith.methods.registry import Granularity, Param, method
from weightsmith.methods.statistics import gram


def _reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    return "rows" if parameters["filter_wise"] else "elements"


def _products(scope: Scope, *, filter_wise: bool) -> Statistic[list[list[float]] | None]:
    return None if filter_wise else (yield from gram(lambda block: block.deltas))


@method(
    base="required",
    minimum=2,
    statistic=_products,
    reads=_reads,
    properties=("idempotent", "symmetric", "translates"),
    source="Jang et al., Model Stock, ECCV 2024, arXiv:2403.19522, eq. 3; for three and more models the mean "
    "cosine over pairs, mergekit's reading",
    compat={"mergekit": {"clamp": False, "norm_floor": 1e-6}},
)
def model_stock(
    block: Block,
    products: list[list[float]] | None,
    *,
    filter_wise: Annotated[bool, Param("an angle for every vector along the last axis")] = False,
    clamp: Annotated[bool, Param("keep t in [0, 1]")] = True,
    norm_floor: Annotated[float, Param("least product of two task vectors' norms", minimum=0)] = 0.0,
) -> Array:
    """Between the base and the mean of the models, by the angle between task vectors.

    With c the mean cosine over pairs of N task vectors, ``t = N c / (1 + (N-1) c)`` and
    ``t mean_i(W_i) + (1-t) B``. t is kept in [0, 1]: for opposing task vectors the formula extrapolates
    without bound. A task vector of zero has cosine 0.
    """
    if products is not None:
        t = _ratio(_mean_cosine(products, norm_floor), len(block.models), clamp=clamp)
    else:
        t = _ratio_by_row(block, clamp=clamp, norm_floor=norm_floor)
    mean = block.models[0]
    for model in block.models[1:]:
        mean = mean + model
    mean = mean / len(block.models)
    return t * mean + (1.0 - t) * block.base


def _mean_cosine(products: list[list[float]], floor: float) -> float:
    cosines = []
    for i in range(len(products)):
        for j in range(i):
            norms = max(math.sqrt(products[i][i] * products[j][j]), floor)
            cosines.append(max(-1.0, min(1.0, products[i][j] / norms)) if norms > 0 else 0.0)
    return math.fsum(cosines) / len(cosines)


def _ratio(cosine: float, count: int, *, clamp: bool) -> float:
    denominator = 1.0 + (count - 1) * cosine
    if abs(denominator) < 1e-6:
        return 0.0
    t = count * cosine / denominator
    return max(0.0, min(1.0, t)) if clamp else t


def _ratio_by_row(block: Block, *, clamp: bool, norm_floor: float) -> Array:
    xp, count = block.xp, len(block.models)
    wide = [xp.astype(delta, xp.float64) for delta in block.deltas]
    norms = [xp.sqrt(xp.sum(delta * delta, axis=-1, keepdims=True)) for delta in wide]
    total = xp.zeros_like(norms[0])
    for i in range(count):
        for j in range(i):
            product = norms[i] * norms[j]
            product = xp.where(product < norm_floor, xp.full_like(product, norm_floor), product)
            safe = xp.where(product > 0, product, xp.ones_like(product))
            total = total + xp.clip(xp.sum(wide[i] * wide[j], axis=-1, keepdims=True) / safe, -1.0, 1.0)
    cosine = total / (count * (count - 1) / 2)
    denominator = 1.0 + (count - 1) * cosine
    vanishing = xp.abs(denominator) < 1e-6
    t = count * cosine / xp.where(vanishing, xp.ones_like(denominator), denominator)
    t = xp.where(vanishing, xp.zeros_like(t), t)
    return xp.astype(xp.clip(t, 0.0, 1.0) if clamp else t, block.models[0].dtype)
