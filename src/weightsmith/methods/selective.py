"""Methods that let a part of one model into another."""

from __future__ import annotations

from typing import Annotated

from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.registry import Param, method
from weightsmith.methods.statistics import largest


@method(
    base="required",
    minimum=1,
    maximum=1,
    properties=("idempotent", "translates"),
    source="alchemonaut, QuartetAnemoi-70B model card, 2024; mergekit (nearswap)",
    example={"t": 0.001},
)
def nearswap(
    block: Block,
    *,
    t: Annotated[float, Param("largest change of an entry, in the weights' own unit", minimum=0)],
) -> Array:
    """The base, moved towards the model by at most t in every entry.

    With s = min(t / |W - B|, 1): ``s W + (1-s) B``, which is ``B + clip(W - B, -t, t)``. Entries closer
    than t are taken from the model. t is absolute, so its effect depends on each tensor's scale.
    """
    xp, (delta,) = block.xp, block.deltas
    # Not base + delta where that is the model: the sum is rounded, the model is exact.
    return xp.where(xp.abs(delta) <= t, block.models[0], block.base + xp.clip(delta, -t, t))


def _importance(block: Block) -> Array:
    """``|W - B| * KL(softmax(W) || softmax(B))``, the divergence taken over each vector along the last axis."""
    xp = block.xp
    model, base = (xp.astype(part, xp.float64) for part in (block.models[0], block.base))
    p, q = _softmax(xp, model) + 1e-8, _softmax(xp, base) + 1e-8
    divergence = xp.sum(p * xp.log(p / q), axis=-1, keepdims=True)
    # Not negative but for rounding, and selection by rank needs it so.
    divergence = xp.where(divergence > 0, divergence, xp.zeros_like(divergence))
    return xp.abs(model - base) * divergence


def _softmax(xp: object, values: Array) -> Array:
    shifted = xp.exp(values - xp.max(values, axis=-1, keepdims=True))  # type: ignore[attr-defined]
    return shifted / xp.sum(shifted, axis=-1, keepdims=True)  # type: ignore[attr-defined]


def _threshold(scope: Scope) -> Statistic[float]:
    """Median + 1.5 times the interquartile range of the importances, exact quantiles without interpolation."""
    ranks = [scope.size - int((scope.size - 1) * quantile) for quantile in (0.25, 0.5, 0.75)]

    def thrice(block: Block) -> list[Array]:
        return [_importance(block)] * 3

    lower, median, upper = [cut.value for cut in (yield from largest(thrice, ranks, scope))]
    return median + 1.5 * (upper - lower)


@method(
    base="required",
    minimum=1,
    maximum=1,
    reads="rows",
    statistic=_threshold,
    selects=True,
    properties=("idempotent",),
    source="Arcee AI, mergekit (arcee_fusion), 2025; no paper",
)
def arcee_fusion(block: Block, threshold: float) -> Array:
    """The base, with those entries of the model whose change matters most.

    Importance is ``|W - B|`` times the divergence ``KL(softmax(W) || softmax(B))`` of the entry's vector
    along the last axis (1e-8 is added to both distributions). Entries at or above median + 1.5 times the
    interquartile range of the tensor's importances are taken from the model. Quantiles are exact; mergekit
    samples a million entries of larger tensors at random.
    """
    xp = block.xp
    # A NaN has no importance; it is taken, so that a broken model does not look whole.
    taken = (_importance(block) >= threshold) | xp.isnan(block.models[0])
    return xp.where(taken, block.models[0], block.base)
