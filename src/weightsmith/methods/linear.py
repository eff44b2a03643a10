"""Weighted means, what they are made of, and a single model as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block
from weightsmith.methods.registry import Continuation, Param, PerModel, method

# Of a mean that is no extrapolation.
Share = Annotated[float, Param("share of this model", minimum=0)]


def weights_have_a_sum(parameters: Mapping[str, Any]) -> None:
    """Refuse weights that sum to zero, but for rounding, where they are to be divided by their sum."""
    choice = next((name for name in ("normalize", "normalize_weights") if name in parameters), None)
    weights = parameters["weight"]
    normalised = choice is None or parameters[choice]
    if normalised and abs(math.fsum(weights)) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
        way_out = "give at least one model a weight" if choice is None else f"set {choice}: false"
        raise MethodError(f"the weights sum to zero, so they cannot be normalised; {way_out}")


def shares_of(weight: Sequence[float]) -> list[float]:
    """Return weights divided by their sum."""
    total = math.fsum(weight)
    return [one / total for one in weight]


def weighted_sum(coefficients: Sequence[float], vectors: Sequence[Array]) -> Array:
    """Return the sum of vectors times their coefficients."""
    result = coefficients[0] * vectors[0]
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        result = result + coefficient * vector
    return result


def with_a_say(weight: Sequence[float], models: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return the models whose weight is not 0, and the others."""
    pairs = list(zip(weight, models, strict=True))
    return [model for one, model in pairs if one], [model for one, model in pairs if not one]


def not_finite_where(silent: Sequence[Array], result: Array) -> Array:
    """Return a result, NaN where models that have no say in it are not finite: a broken input shows, as everywhere."""
    for model in silent:
        result = result + 0.0 * model
    return result


@method(
    minimum=1,
    check=weights_have_a_sum,
    # The mean of a mean of n and of another is that of n + 1, if the first counts n times.
    continues=Continuation(
        ("weight",), lambda _, given, models: {"weight": math.fsum(given["weight"]) if given["normalize"] else 1.0}
    ),
    properties=("idempotent", "symmetric", "removable", "translates"),
    also=("model_soup", "uniform_soup", "weighted_soup", "fedavg"),
    source="Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482 (uniform soup: equal weights); McMahan et al., "
    "Communication-efficient learning of deep networks, AISTATS 2017, arXiv:1602.05629 (FedAvg)",
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
    weights (``weight: 1``) it is the uniform soup, with the number of each client's examples FedAvg. FedAvg's code
    averages integer counters too; here they are carried from one model.
    """
    return weighted_sum(shares_of(weight) if normalize else weight, block.models)


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
