"""Methods that change the singular values of task matrices and keep their singular vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Form, Work
from weightsmith.methods.deltas import Lambda, Normalize, Weight, joined
from weightsmith.methods.matrices import (
    Decomposition,
    HowDecomposed,
    effective_rank,
    rank_reaching,
    reweighted,
    reweighted_work,
    sides,
    spectrum,
    spectrum_work,
    times,
    together,
)
from weightsmith.methods.registry import Param, PerModel, method
from weightsmith.methods.task_matrices import (
    Convolutions,
    Embeddings,
    Tolerance,
    as_matrix,
    is_whole,
    reads_matrices,
    sum_of,
    sum_work,
    takes_apart,
    taking_part,
    task_matrices,
    with_base,
)

Rank = Annotated[int | None, Param("singular values to look for, where the rank of adapters is known", minimum=1)]


def _filter_work(
    parameters: Mapping[str, Any], form: Form, *, rank: int | None, how: Decomposition = "exact"
) -> Work | None:
    """What it costs to take every task matrix apart and put it together again."""
    count = len(taking_part(parameters["weight"])) if "weight" in parameters else 1
    if not count or not takes_apart(parameters, form):
        return None
    (m, n), item = sides(form.shape), form.itemsize
    one = together(
        spectrum_work(m, n, item, rank=rank, how=how), reweighted_work(m, n, rank or min(m, n), item), elements=m * n
    )
    return together(times(count, one), Work(0, 2 * m * n), elements=m * n)


def _filtered(
    block: Block,
    weight: Sequence[float],
    factors: Callable[[Array], Array],
    *,
    rank: int | None = None,
    how: Decomposition = "exact",
) -> Array | None:
    """Sum weighted task matrices, the singular values of each multiplied by factors ``[c]`` and others dropped."""
    xp, total = block.xp, None
    for w, matrix in task_matrices(block, weight):
        found = spectrum(xp, matrix, rank, how)
        part = reweighted(xp, matrix, found, w * factors(found.values if rank is None else found.values[:rank]))
        del matrix, found
        if total is None:
            total = part
        else:
            total += part
        del part
    return total


def _needs_a_rank(parameters: Mapping[str, Any]) -> None:
    if parameters["svd"] == "randomized" and parameters["rank"] is None:
        raise MethodError(
            "svd: randomized finds the first singular values, and which of them are kept depends on all: give the "
            "rank, or use svd: exact"
        )


def _star_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    return _filter_work(parameters, form, rank=_rank_within(parameters["rank"], form), how=parameters["svd"])


def _rank_within(rank: int | None, form: Form) -> int | None:
    return None if rank is None or len(form.shape) < 2 else min(rank, *sides(form.shape))


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_star_work,
    check=_needs_a_rank,
    properties=("symmetric", "translates", "removable"),
    source="Lee et al., STAR: spectral truncation and rescale, NAACL 2025, arXiv:2502.10339; checked against the "
    "authors' code",
    example={"weight": 1.0},
)
def star(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    eta: Annotated[float, Param("per cent of the nuclear norm that is kept", minimum=0, maximum=100)] = 40.0,
    lambda_: Lambda = 1.0,
    normalize: Normalize = True,
    rank: Rank = None,
    embeddings: Embeddings = True,
    convolutions: Convolutions = False,
    svd: HowDecomposed = "exact",
) -> Array:
    """STAR: drop the small singular values of every task matrix and scale the others up, then average.

    Of each task matrix as few leading singular values are kept as sum to eta per cent of all, its nuclear norm, and
    multiplied by the ratio of the two sums, so that the nuclear norm stays. ``W = B + lambda sum_t w_t d_t' / sum_t
    w_t``; the paper has equal weights, no lambda, and eta 40.

    The paper merges adapters, whose task vectors are all matrices; vectors are averaged here. As in the authors' code,
    where the rank of adapters is known no more singular values than that need be found (rank), and random projections
    find them (``svd: randomized``); the nuclear norm is then theirs.
    """
    if not is_whole(block):
        total = joined(block.xp, block.deltas, weight, consensus=False, normalize=normalize)
        return block.base + lambda_ * total
    xp = block.xp

    def factors(values: Array) -> Array:
        kept = rank_reaching(xp, values, eta / 100, power=1)
        most = xp.sum(values[:kept])
        # No value, no factor; NaN stays NaN.
        scale = xp.where(most == 0, xp.zeros_like(most), xp.sum(values) / xp.where(most == 0, most + 1, most))
        return scale * xp.ones_like(values[:kept])

    most = None if rank is None else min(rank, *sides(block.shape))
    change = _filtered(block, weight, factors, rank=most, how=svd)
    divisor = sum(weight) if normalize and abs(sum(weight)) >= 1e-8 else 1.0
    return with_base(block, lambda_ / divisor, change)


def _timber_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    return _filter_work(parameters, form, rank=None)


@method(
    base="required",
    minimum=1,
    maximum=1,
    reads=reads_matrices,
    work=_timber_work,
    properties=("translates",),
    source="Wu et al., Timber: training-free instruct model refining with base via effective rank, 2025, "
    "arXiv:2509.23595; checked against the authors' code; the default of gamma from a summary of the paper",
)
def timber(
    block: Block,
    *,
    gamma: Annotated[float, Param("factor on singular values beyond the effective rank", minimum=0)] = 0.2,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = True,
    convolutions: Convolutions = True,
) -> Array:
    """Timber: damp the singular values of a fine-tune's change beyond its effective rank.

    With ``d = W_1 - B = U S V^T``, p the singular values divided by their sum, and ``k = ceil(exp(-sum p log p))``, the
    values beyond the k-th are multiplied by gamma; 0 drops them. ``W = B + lambda d'``. Made for an instruct model and
    its base. Embeddings, heads and convolutions (as [out, all others]) are treated alike; tensors of one axis keep the
    model's values. The authors' code asks for gamma; 0.2 is reported as the best.
    """
    if not is_whole(block):
        return block.base + lambda_ * block.deltas[0]
    xp = block.xp
    matrix = as_matrix(xp, block.deltas[0])
    found = spectrum(xp, matrix)
    kept = _effective(xp, found.values)
    change = reweighted(xp, matrix, found, (1.0 - gamma) * xp.ones_like(found.values[:kept]))
    return with_base(block, lambda_, change + gamma * matrix)


def _effective(xp: Any, values: Array) -> int:
    """Return the effective rank as a number of singular values: all of them where they are not finite."""
    found = effective_rank(xp, values)
    # Rounding lifts the rank of equal values above their number.
    return int(values.shape[0]) if math.isnan(found) else min(math.ceil(found - 1e-9), int(values.shape[0]))


Keep = Annotated[
    Literal["energy", "rank", "effective_rank"], Param("how many singular values are kept follows from this")
]


def _low_rank_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    rank = _rank_within(parameters["rank"], form) if parameters["keep"] == "rank" else None
    return _filter_work(parameters, form, rank=rank, how=parameters["svd"])


def _rank_goes_with_keep(parameters: Mapping[str, Any]) -> None:
    if (parameters["keep"] == "rank") != (parameters["rank"] is not None):
        raise MethodError("keep: rank and a rank go together: give both, or neither")
    _needs_a_rank(parameters)


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_low_rank_work,
    check=_rank_goes_with_keep,
    also=("lore_adapt",),
    properties=("symmetric", "translates", "removable"),
    source="Eckart and Young, 1936; by energy: Fleshman and Van Durme, RE-Adapt (LoRE-Adapt), EMNLP 2024, "
    "arXiv:2405.15007, no code published",
    example={"weight": 0.5},
)
def low_rank(
    block: Block,
    *,
    weight: PerModel[Weight],
    keep: Keep = "energy",
    energy: Annotated[float, Param("share of the sum of squares that is kept", minimum=0, maximum=1)] = 0.5,
    rank: Annotated[int | None, Param("singular values to keep, with keep: rank", minimum=1)] = None,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = True,
    convolutions: Convolutions = False,
    svd: HowDecomposed = "exact",
) -> Array:
    """Task arithmetic with task matrices of low rank.

    ``B + lambda sum_i w_i d_i'``, where of each task matrix the leading singular triples are kept: as few as reach a
    share of the energy ``sum s^2``, a number of them, or its effective rank (rounded up). Other tensors take part as
    they are. The nearest matrix of that rank, in any unitarily invariant norm.

    LoRE-Adapt is ``keep: energy`` with ``energy: 0.5``, on the difference between an instruct model and its base; an
    adapter that was trained on the base is added as another model. ``svd: randomized`` serves ``keep: rank``.
    """
    if not is_whole(block):
        return block.base + lambda_ * joined(block.xp, block.deltas, weight, consensus=False, normalize=False)
    xp = block.xp
    most = None if rank is None else min(rank, *sides(block.shape))

    def factors(values: Array) -> Array:
        if keep == "rank":
            return xp.ones_like(values)
        count = rank_reaching(xp, values, energy, power=2) if keep == "energy" else _effective(xp, values)
        return xp.ones_like(values[:count])

    return with_base(block, lambda_, _filtered(block, weight, factors, rank=most, how=svd))


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=sum_work,
    properties=("symmetric", "translates", "removable"),
    source="Skorobogat et al., Subspace-boosted model merging, 2025, arXiv:2506.16506; checked against two public "
    "ports, the authors' own code was not to be had",
    example={"weight": 1.0},
)
def subspace_boosting(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    beta: Annotated[
        float, Param("share of the sum of singular values at which the floor lies", minimum=0, maximum=1)
    ] = 0.01,
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = False,
    convolutions: Convolutions = False,
    tolerance: Tolerance = None,
) -> Array:
    """Subspace boosting: the sum of task matrices with its small singular values raised to a floor.

    With ``sum_t w_t d_t = U S V^T``, the floor is the first singular value at which the running sum, from the largest,
    reaches a share beta of the whole; smaller ones are raised to it, and ``W = B + lambda U max(S, floor) V^T``. Other
    tensors get ``B + lambda sum_t w_t d_t``.

    With the usual beta of 0.01 the floor is one of the first singular values, and nearly the whole spectrum is raised
    to about the largest: choose lambda accordingly. Attention and MLP matrices are boosted, embeddings and heads are
    not. Directions of singular value zero (tolerance) stay at zero; those that LAPACK would choose mean nothing.
    """
    if not is_whole(block):
        return block.base + lambda_ * joined(block.xp, block.deltas, weight, consensus=False, normalize=False)
    xp, total = block.xp, sum_of(block, weight)
    if total is None:
        return with_base(block, lambda_, None)
    found = spectrum(xp, total)
    rank = found.rank(xp, tolerance)
    place = max(rank_reaching(xp, found.values, beta, power=1), 1) - 1
    values = found.values[:rank]
    floor = found.values[place]
    factors = xp.where(values < floor, floor, values) / values
    return with_base(block, lambda_, reweighted(xp, total, found, factors))
