"""Models that arrive one after the other: each is merged into what the earlier ones became."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Form, Scope, Statistic, Work
from weightsmith.methods.matrices import is_matrix, spectrum, spectrum_work, times, together, triples, triples_work
from weightsmith.methods.registry import Continuation, Granularity, Param, TrimScope, method
from weightsmith.methods.statistics import totals


def _projects(form: Form) -> bool:
    return is_matrix(form) and form.role != "embedding"


def _reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    return "tensor" if _projects(form) else "elements"


def _work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    if not _projects(form):
        return None
    m, n = form.shape
    k = min(m, n)
    # Into the space of the singular vectors and back.
    products = Work(8.0 * m * n * k, k * (m + n) + 2 * m * n)
    apart = together(spectrum_work(m, n, form.itemsize), triples_work(m, n, k, form.itemsize))
    # For the lengths, and for the result.
    return times(2 * (models - 1), together(apart, products, elements=2 * m * n)) if models > 1 else None


def _update(block: Block, alpha: float, previous_lambda: float) -> Array:
    """Return the merged update before its length is set: what the base is to be changed by, ``lambda_T`` times over."""
    merged = previous_lambda * block.deltas[0]
    for delta in block.deltas[1:]:
        merged = merged + (delta if merged.ndim < 2 else _outside(block.xp, merged, delta, alpha))
    return merged


def _outside(xp: Any, merged: Array, delta: Array, alpha: float) -> Array:
    """Return what of a task vector lies outside the dominant subspace of the merged update, and off its diagonal.

    With the full bases U and V, P = U^T delta V loses its diagonal and its leading block. Written as what is taken
    away, that needs the thin bases alone.
    """
    found = spectrum(xp, merged)
    total = float(xp.sum(found.values))
    if not 0 < total < math.inf:
        # No earlier update: nothing to keep clear of. What is not finite makes all of it so.
        return delta + total
    share = xp.cumulative_sum(found.values) / total
    # Directions of no length are arbitrary: taking anything away along them would be, too.
    u, _, vt = triples(xp, merged, found, found.rank(xp))
    # Where no share lies above alpha, the first index "above" it is 0, as in the authors' code; 1 may round to more.
    dominant = int(xp.count_nonzero(share <= alpha + 1e-12)) % share.shape[0]
    inside = xp.matrix_transpose(u) @ delta
    diagonal = xp.sum(inside * vt, axis=1)
    block = inside[:dominant, :] @ xp.matrix_transpose(vt[:dominant, :])
    rest = slice(dominant, None)
    return delta - (u[:, :dominant] @ (block @ vt[:dominant, :]) + (u[:, rest] * diagonal[rest][None, :]) @ vt[rest, :])


def _lengths(
    scope: Scope, *, alpha: float, previous_lambda: float, seen: int, mean_norm: float | None
) -> Statistic[tuple[float, float]]:
    """Return the length of the update, and the mean length of all task vectors seen."""

    def squares(block: Block) -> list[Any]:
        xp = block.xp
        found = [_square(xp, _update(block, alpha, previous_lambda))]
        # Of models merged before, only their mean length is known.
        return found + [_square(xp, delta) for delta in (block.deltas if mean_norm is None else block.deltas[1:])]

    update, *own = yield from totals(squares)
    norms = [math.sqrt(square) for square in own]
    if mean_norm is not None:
        norms.append(seen * mean_norm)
    return math.sqrt(update), math.fsum(norms) / (seen + scope.models - 1)


def _square(xp: Any, values: Array) -> Any:
    wide = xp.astype(values, xp.float64)
    return xp.sum(wide * wide)


def _state_is_complete(parameters: Mapping[str, Any]) -> None:
    if parameters["seen"] > 1 and parameters["mean_norm"] is None:
        raise MethodError(
            "with seen above 1 the first model is a merge, and mean_norm must say the mean length of the task vectors "
            "in it; 'weightsmith merge --onto' takes both from the merge's manifest"
        )


def _state(lengths: tuple[float, float], parameters: Mapping[str, Any], models: int) -> Mapping[str, float]:
    update, mean = lengths
    return {
        "seen": parameters["seen"] + models - 1,
        "mean_norm": mean,
        "previous_lambda": update / mean if mean > 0 else 1.0,
    }


@method(
    base="required",
    minimum=1,
    statistic=_lengths,
    reads=_reads,
    work=_work,
    scope="norm_scope",
    check=_state_is_complete,
    continues=Continuation(("seen", "mean_norm", "previous_lambda"), _state),
    properties=("translates",),
    source="Tang et al., Merging models on the fly without retraining: a sequential approach to scalable continual "
    "model merging (OPCM), NeurIPS 2025, arXiv:2501.09522; what is projected away as in the authors' code",
    example={},
)
def opcm(
    block: Block,
    lengths: tuple[float, float],
    *,
    alpha: Annotated[
        float, Param("share of the singular values' sum that makes the dominant subspace", minimum=0, maximum=1)
    ] = 0.5,
    norm_scope: Annotated[TrimScope, Param("what the lengths of task vectors are taken over")] = "model",
    previous_lambda: Annotated[
        float, Param("what undoes the scaling of the first model, if it is a merge", minimum=0, exclusive=True)
    ] = 1.0,
    seen: Annotated[int, Param("number of models in the first model, if it is a merge", minimum=1)] = 1,
    mean_norm: Annotated[
        float | None, Param("mean length of the task vectors in the first model, if it is a merge", minimum=0)
    ] = None,
) -> Array:
    """Merge models one after the other, each projected clear of what the earlier ones changed.

    With D the update so far (at first ``D = W_1 - B``) and its singular vectors U and V, the task vector d of the next
    model becomes ``U P V^T``, where ``P = U^T d V`` has lost its diagonal and its block within the dominant subspace:
    the leading singular values up to the share alpha of their sum. ``D <- D + U P V^T``; the two are orthogonal. In
    the end D is scaled to the mean length of the task vectors, lengths being taken over the whole model, and added to
    the base. Vectors, embeddings and convolutions are added without projection. The order of the models matters; the
    authors shuffle it.

    Memory does not grow with the number of models, and a merge can be gone on with: ``weightsmith merge --onto MERGED``
    reads previous_lambda, seen and mean_norm from the manifest of a merge. Two merges in a row then give what one
    would, but for the rounding of the stored weights.

    The prose of the paper removes what is within the dominant subspace; its code, followed here, removes the block
    within it and the whole diagonal, and keeps the blocks that lead from it to the rest. Directions in which the update
    has no length are left alone; in the code they depend on the machine. The singular value decompositions are made
    twice: for the lengths, and for the result.
    """
    update, mean = lengths
    scale = mean / update if update > 0 else 1.0
    return block.base + scale * _update(block, alpha, previous_lambda)


@method(
    minimum=1,
    properties=("idempotent", "translates"),
    also=("momentum", "exponential_moving_average"),
    continues=Continuation(),
    source="Stojanovski et al., Momentum-based weight interpolation of strong zero-shot models for continual learning, "
    "2022, arXiv:2211.03186; over checkpoints instead of steps",
    example={"momentum": 0.5},
)
def ema(
    block: Block,
    *,
    momentum: Annotated[float, Param("share of the average so far that stays at each update", minimum=0, maximum=1)],
    interval: Annotated[int, Param("updates that lie between two models", minimum=1)] = 1,
) -> Array:
    """Exponential moving average of models in their order.

    ``A <- tau A + (1 - tau) W_i`` for every further model in turn, with ``tau = momentum ** interval``, from
    ``A = W_1``. In the paper that is the pre-trained model, and the average is updated at every step of training; over
    checkpoints that lie interval updates apart this is the same but for what lies between them. The momentum is
    searched for in the paper, near 1. A later model goes onto the result: ``weightsmith merge --onto``.
    """
    stays = momentum**interval
    average = block.models[0]
    for model in block.models[1:]:
        average = stays * average + (1.0 - stays) * model
    return average


@method(
    base="required",
    minimum=1,
    maximum=1,
    random=True,
    properties=("translates",),
    source="Yuan et al., iterative model merging (IMM) against forgetting on self-generated reasoning data; average of "
    "the original model and the DARE-masked one, as in the authors' command; the paper was not read",
    example={},
)
def imm(
    block: Block,
    *,
    drop: Annotated[
        float, Param("chance with which an entry of the task vector is dropped", minimum=0, maximum=1)
    ] = 0.2,
    share: Annotated[float, Param("share of the fine-tuned model", minimum=0, maximum=1)] = 0.5,
) -> Array:
    """One merge of an iterative loop: the original model averaged with a thinned fine-tune of it.

    ``B + share * m d / (1 - drop)``: entries of the task vector d are dropped at random, the rest rescaled (DARE), and
    the result averaged with the original model. In the loop the merged model writes the data that the next fine-tune is
    trained on; the base stays the original model, not the last merge. Another seed for each round gives other masks.
    """
    (delta,) = block.deltas
    if drop < 1:
        delta = delta * (block.draw(0) >= drop) / (1.0 - drop)
    else:
        delta = delta * 0.0
    return block.base + share * delta
