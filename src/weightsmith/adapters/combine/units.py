"""Methods on the ranks of adapters, one row of A and one column of B each, and on the coordinates of a common basis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine.registry import products
from weightsmith.adapters.combine.stack import Stack
from weightsmith.adapters.factors import triangle
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError
from weightsmith.kernels import philox
from weightsmith.methods.deltas import Density, Lambda, Normalize, joined, kept_of
from weightsmith.methods.parameters import Param

# -- LoRA-LEGO --------------------------------------------------------------------------------------------------------


def _lego_rank(ranks: Sequence[int], parameters: Mapping[str, Any]) -> int:
    return min(parameters["clusters"] or max(ranks), sum(ranks))


@products(
    "lego",
    own_rank=True,
    rank=_lego_rank,
    source="Zhao et al., Merging LoRAs like playing LEGO, 2024, arXiv:2409.16167; the two factors inferred",
)
def lego(
    stack: Stack,
    *,
    clusters: Annotated[int | None, Param("how many clusters, and so the rank; also --rank", minimum=1)] = None,
    keep_norm: Annotated[bool, Param("give every centre the mean norm of its members")] = True,
    keep_variance: Annotated[bool, Param("scale the result by sqrt(mean rank / clusters)")] = True,
    balance: Annotated[
        bool, Param("give a row of A and its column of B the same norm before they are compared")
    ] = False,
    restarts: Annotated[int, Param("how many times clustering is begun anew; the best is taken", minimum=1)] = 4,
) -> LowRank:
    """LoRA-LEGO: the ranks of all adapters are clustered, and each cluster's mean becomes one rank of the result.

    A rank is the pair of a row of A and a column of B, as one vector ``[a ; b]``, with scale and weight in b. All ranks
    of a layer's adapters are put into k clusters (k-means), whose centres are the result's rows and columns. Two
    corrections: means are shorter than what they are means of (keep_norm: a centre is scaled to the mean norm of its
    members), and more or fewer ranks give another variance (keep_variance: the result is scaled by ``sqrt(r / k)``).

    As many clusters as ranks, without corrections, give the sum of all adapters; copies of one adapter give that
    adapter where k is its rank. By default k is the largest rank. k-means++ draws from a generator that depends on seed
    and layer alone, so the result is the same everywhere. That ``[a ; b]`` and ``[-a ; -b]`` are the same rank is not
    resolved, as in the paper; ``balance`` is ours.
    """
    taken = list(stack.taking_part())
    if not taken:
        return stack.sum()
    rights = np.concatenate([part.right for _, part, _ in taken])
    lefts = np.concatenate([part.left.T * weight for _, part, weight in taken])
    if balance:
        ups, downs = (np.linalg.norm(side, axis=1) for side in (lefts, rights))
        ratio = np.sqrt(np.divide(ups, downs, out=np.ones_like(ups), where=(ups > 0) & (downs > 0)))
        lefts, rights = lefts / ratio[:, None], rights * ratio[:, None]
    count = len(lefts)
    wanted = min(clusters or max(part.rank for _, part, _ in taken), count)
    # Distances between vectors and to means of vectors follow from inner products alone.
    gram = lefts @ lefts.T + rights @ rights.T
    labels = cluster(gram, wanted, key=(stack.seed, "lego", stack.module), restarts=restarts)
    members = np.zeros((wanted, count))
    members[labels, np.arange(count)] = 1.0
    means = members / members.sum(axis=1, keepdims=True)
    if keep_norm:
        own = np.sqrt(np.einsum("ij,jk,ik->i", means, gram, means).clip(0))
        wished = means @ np.sqrt(np.diag(gram))
        means = means * np.divide(wished, own, out=np.ones_like(own), where=own > 0)[:, None]
    scale = math.sqrt(np.mean([part.rank for _, part, _ in taken]) / wanted) if keep_variance else 1.0
    return LowRank((means @ lefts).T * scale, means @ rights)


def cluster(gram: Array, count: int, *, key: tuple[object, ...], restarts: int) -> Array:
    """Put vectors into clusters by k-means, from their inner products.

    Args:
        gram: inner products, ``[n, n]``, float64.
        count: how many clusters, at most n; none is left empty.
        key: what random numbers depend on.
        restarts: how often it is begun anew; the clusters with the least sum of squared distances are taken.

    Returns:
        The cluster of every vector: ``[n]`` integers.
    """
    size = len(gram)
    if count >= size:
        return np.arange(size)
    best, least = np.zeros(size, np.int64), math.inf
    for restart in range(restarts):
        labels = _lloyd(gram, _spread(gram, count, philox.key_of(*key, restart)))
        distance = float(_distances(gram, labels, count)[np.arange(size), labels].sum())
        if distance < least * (1 - 1e-12):
            best, least = labels, distance
    return best


def _spread(gram: Array, count: int, key: tuple[int, int]) -> Array:
    """Choose first centres, each with a chance that grows with its squared distance from those before (k-means++)."""
    size = len(gram)
    drawn = philox.uniform(key, 0, count).astype(np.float64)
    squares = np.diag(gram)
    chosen = [min(int(drawn[0] * size), size - 1)]
    nearest = np.full(size, math.inf)
    for number in range(1, count):
        last = chosen[-1]
        nearest = np.minimum(nearest, (squares - 2 * gram[:, last] + squares[last]).clip(0))
        nearest[chosen] = 0
        sums = np.cumsum(nearest)
        if sums[-1] > 0:
            place = int(np.searchsorted(sums, drawn[number] * sums[-1], side="right"))
            place = min(place, size - 1)
        else:
            place = 0
        if place in chosen:
            place = next(other for other in range(size) if other not in chosen)
        chosen.append(place)
    return np.asarray(chosen)


def _lloyd(gram: Array, centres: Array, passes: int = 200) -> Array:
    """Move every vector to its nearest mean until none moves."""
    count = len(centres)
    squares = np.diag(gram)
    apart = squares[:, None] - 2 * gram[:, centres] + squares[centres]
    labels: Array = apart.argmin(axis=1)
    labels[centres] = np.arange(count)
    for _ in range(passes):
        apart = _distances(gram, labels, count)
        moved = apart.argmin(axis=1)
        for empty in sorted(set(range(count)) - set(moved.tolist())):
            # The vector that is farthest from its mean, of a cluster that has others, becomes a mean of its own.
            sizes = np.bincount(moved, minlength=count)
            own = np.where(sizes[moved] > 1, apart[np.arange(len(gram)), moved], -math.inf)
            moved[int(own.argmax())] = empty
        if np.array_equal(moved, labels):
            break
        labels = moved
    return labels


def _distances(gram: Array, labels: Array, count: int) -> Array:
    """Return the squared distances of vectors from the means of clusters: ``[n, count]``."""
    members = np.zeros((len(gram), count))
    members[np.arange(len(gram)), labels] = 1.0
    members /= np.maximum(members.sum(axis=0), 1.0)
    towards = gram @ members
    found: Array = np.diag(gram)[:, None] - 2 * towards + np.einsum("ik,ik->k", members, towards)
    return found


# -- CoPA-Merging -----------------------------------------------------------------------------------------------------


def _copa_rank(ranks: Sequence[int], _: Mapping[str, Any]) -> int:
    return max(ranks)


@products(
    "copa",
    rank=_copa_rank,
    source="Zeng et al., Parameter efficient merging for multimodal large language models with complementary parameter "
    "adaptation (RobustMerge), NeurIPS 2025, arXiv:2502.17159; checked against the authors' code",
)
def copa(
    stack: Stack,
    *,
    density: Annotated[
        float, Param("share of the entries of A and of B that is kept", minimum=0, maximum=1, exclusive=True)
    ] = 0.2,
    clamp: Annotated[
        float, Param("share of the ranks, those scaled up most, that keep factors of their own", minimum=0, maximum=1)
    ] = 0.2,
    factor: Annotated[float, Param("what every adapter is multiplied with, in A and in B")] = 2.0,
    form: Annotated[Literal["code", "plain"], Param("the authors' code, or A averaged and no factor")] = "code",
) -> LowRank:
    """CoPA-Merging (RobustMerge): prune A and B, scale up B for what A lost, and normalise across tasks.

    Of A and of B, the entries largest in magnitude are kept. Rank by rank, ``s = sum |A| / sum |A kept|`` says how much
    was lost; it is raised to its own ``1 - clamp`` quantile over the task's ranks. Then ``A = 2 sum_t A_t`` and
    ``B = 2 sum_t s_t B_t / sum_t s_t``. Both the 2 and that A is summed and not averaged are those of the authors' code
    (``form: code``); ``form: plain`` takes the mean of A and no factor. Weights multiply B. All adapters must have one
    rank, because ranks are added place by place, and it is the ranks' order in the files that decides which.
    """
    taken = list(stack.taking_part())
    if not taken:
        return stack.sum()
    if len({part.rank for _, part, _ in taken}) > 1:
        ranks = ", ".join(str(part.rank) for _, part, _ in taken)
        raise MethodError(f"{stack.module}: the method 'copa' adds ranks place by place, and the adapters have {ranks}")
    down: Array = np.zeros_like(taken[0][1].right)
    up: Array = np.zeros_like(taken[0][1].left)
    scales = np.zeros(taken[0][1].rank)
    for _, part, weight in taken:
        kept = _largest(part.right, density)
        all_of, left_of = np.abs(part.right).sum(axis=1), np.abs(kept).sum(axis=1)
        # A row of which nothing is kept has no say, whatever it is multiplied with.
        scale = np.divide(all_of, left_of, out=np.ones_like(all_of), where=left_of > 0)
        ordered = np.sort(scale)
        scale = np.maximum(scale, ordered[min(int(len(ordered) * (1 - clamp)), len(ordered) - 1)])
        down += kept
        up += _largest(part.left, density) * scale * weight
        scales += scale
    if form == "plain":
        return LowRank(up / scales, down / len(taken))
    return LowRank(up * (factor / scales), down * factor)


def _largest(matrix: Array, share: float) -> Array:
    """Return a matrix with all but the largest entries zero; the code counts the entry at the boundary to them."""
    sizes = np.abs(matrix).reshape(-1)
    place = max(int(matrix.size * (1 - share)), 1) - 1
    least = np.partition(sizes, place)[place]
    return np.where(np.abs(matrix) >= least, matrix, 0.0)


# -- KnOTS ------------------------------------------------------------------------------------------------------------


@products(
    "knots",
    source="Stoica et al., Model merging with SVD to tie the knots, ICLR 2025, arXiv:2410.19735; checked against the "
    "authors' code",
)
def knots(
    stack: Stack,
    *,
    density: Density = 0.2,
    lambda_: Lambda = 1.0,
    elect: Annotated[bool, Param("only entries of the elected sign count, as in TIES; otherwise all do")] = True,
    normalize: Normalize = True,
    concatenate: Annotated[
        Literal["in", "out"], Param("the axis along which deltas are laid side by side; the other gives the basis")
    ] = "in",
    coordinates: Annotated[
        Literal["scaled", "unscaled"], Param("merge S V_t, as the authors' code does, or V_t, as their paper has it")
    ] = "scaled",
) -> LowRank:
    """KnOTS: TIES on the coordinates of the deltas in a common basis, found through the factors.

    With ``[d_1 | ... | d_T] = U S [V_1^T | ... | V_T^T]``, every delta has coordinates ``S V_t^T = U^T d_t``. Each is
    trimmed to the density share of its entries largest in magnitude, a sign is elected for every entry, and those that
    agree are averaged: the result is ``lambda U merged``. The factors B are orthogonalised side by side, and the basis
    comes from what is between them and the A: neither a delta nor the concatenation is formed, and the result's rank is
    the basis's. The numbers are those of the method ``knots`` on models.
    """
    taken = list(stack.taking_part())
    if not taken:
        return stack.sum()
    flips = concatenate == "out"
    pairs = [(part.right.T, part.left.T) if flips else (part.left, part.right) for _, part, _ in taken]
    outer, upper = np.linalg.qr(np.concatenate([left for left, _ in pairs], axis=1))
    stops = np.cumsum([left.shape[1] for left, _ in pairs])[:-1]
    # Each delta is outer @ core @ right.
    cores = np.split(upper, stops, axis=1)
    inner = [core @ triangle(right.T).T for core, (_, right) in zip(cores, pairs, strict=True)]
    u, s, _ = np.linalg.svd(np.concatenate(inner, axis=1), full_matrices=False)
    kept = s > s.max(initial=0.0) * np.finfo(np.float64).eps * max(
        len(outer), sum(right.shape[1] for _, right in pairs)
    )
    u, s = u[:, kept], s[kept]
    found = [u.T @ core @ right for core, (_, right) in zip(cores, pairs, strict=True)]
    if coordinates == "unscaled":
        found = [one / s[:, None] for one in found]
    trimmed = [one * (np.abs(one) >= _threshold(one, density)) for one in found]
    merged = joined(xp, trimmed, [weight for *_, weight in taken], consensus=elect, normalize=normalize)
    if coordinates == "unscaled":
        merged = merged * s[:, None]
    left, right = outer @ u, lambda_ * merged
    return LowRank(right.T, left.T) if flips else LowRank(left, right)


def _threshold(values: Array, share: float) -> float:
    kept = kept_of(values.size, share)
    if share >= 1 or not kept:
        return 0.0 if kept else math.inf
    return float(np.partition(np.abs(values).reshape(-1), values.size - kept)[values.size - kept])
