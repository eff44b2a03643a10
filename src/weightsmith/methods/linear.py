"""Weighted means, and a single model as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block
from weightsmith.methods.registry import Continuation, Param, PerModel, method


def weights_have_a_sum(parameters: Mapping[str, Any]) -> None:
    """Refuse weights that sum to zero, but for rounding, where they are to be divided by their sum."""
    normalised = parameters.get("normalize", parameters.get("normalize_weights", False))
    weights = parameters["weight"]
    if normalised and abs(math.fsum(weights)) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
        raise MethodError("the weights sum to zero, so they cannot be normalised; set normalize: false")


@method(
    minimum=1,
    check=weights_have_a_sum,
    # The mean of a mean of n and of another is that of n + 1, if the first counts n times.
    continues=Continuation(
        ("weight",), lambda _, given, models: {"weight": math.fsum(given["weight"]) if given["normalize"] else 1.0}
    ),
    properties=("idempotent", "symmetric", "removable", "translates"),
    source="Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482 (uniform soup: equal weights)",
    example={"weight": 1.0},
)
def linear(
    block: Block,
    *,
    weight: PerModel[Annotated[float, Param("share of this model")]],
    normalize: Annotated[bool, Param("divide by the sum of the weights")] = True,
) -> Array:
    """Weighted mean of the models.

    ``sum_i w_i W_i / sum_i w_i``; without normalize, ``sum_i w_i W_i``. Weights may be negative. With equal
    weights it is the uniform soup.
    """
    total = sum(weight) if normalize else 1.0
    result = (weight[0] / total) * block.models[0]
    for share, model in zip(weight[1:], block.models[1:], strict=True):
        result = result + (share / total) * model
    return result


@method(
    minimum=1,
    maximum=1,
    properties=("idempotent",),
    carries=lambda parameters: parameters["scale"][0] in (None, 1.0),
    source="mergekit (passthrough)",
)
def passthrough(
    block: Block,
    *,
    scale: PerModel[Annotated[float | None, Param("factor on the weights")]] = (None,),
) -> Array:
    """One model as it is, perhaps scaled; with slices, layers of several models stacked.

    ``scale * W``. Layers that slices pick are renumbered, and the config's layer count follows.
    """
    return block.models[0] if scale[0] is None else scale[0] * block.models[0]
