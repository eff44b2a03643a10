"""Products of two low-rank factors, taken apart and measured without being formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.checkpoint.tensor import Array

Triples = tuple[Array, Array, Array]
_EPS = float(np.finfo(np.float64).eps)


def triples(product: LowRank, count: Callable[[Array], int] | None = None) -> Triples:
    """Return the singular triples of a product of two factors.

    Both factors are orthogonalised (QR), and the small matrix between them is decomposed. Singular vectors have no sign
    of their own; here the largest entry of every left one is above 0.

    Args:
        product: factors ``[m, r]`` and ``[r, n]``, finite.
        count: returns how many of the singular values are wanted; all by default.

    Returns:
        U ``[m, k]``, V transposed ``[k, n]``, and between them s, falling: all ``min(r, m, n)`` of it.
    """
    if not product.rank:
        return product.left, np.zeros(0), product.right
    outer, upper = np.linalg.qr(product.left)
    inner, lower = np.linalg.qr(product.right.T)
    u, s, vt = np.linalg.svd(upper @ lower.T, full_matrices=False)
    wanted = len(s) if count is None else count(s)
    return with_signs(outer @ u[:, :wanted], s, vt[:wanted] @ inner.T)


def with_signs(u: Array, s: Array, vt: Array) -> Triples:
    """Return singular triples turned so that the largest entry of every left vector is above 0."""
    if not u.size:
        return u, s, vt
    peaks = np.take_along_axis(u, np.abs(u).argmax(0, keepdims=True), 0)[0]
    signs = np.where(peaks < 0, -1.0, 1.0)
    return u * signs, s, vt * signs[:, None]


def values(product: LowRank) -> Array:
    """Return the singular values of a product of two factors: ``[min(r, m, n)]``, falling."""
    if not product.rank:
        return np.zeros(0)
    found: Array = np.linalg.svd(triangle(product.left) @ triangle(product.right.T).T, compute_uv=False)
    return found


def triangle(matrix: Array) -> Array:
    """Return R of ``Q R``, Q's columns being orthonormal: ``[min(m, n), n]``."""
    found: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(found)


def rounding(product: LowRank) -> float:
    """Return what a singular value of a product may be by rounding alone, in float64.

    Where large terms cancel, it is the size of these that decides, not that of what is left.
    """
    rows, columns = len(product.left), product.right.shape[1]
    size = float(np.linalg.norm(product.left) * np.linalg.norm(product.right))
    return _EPS * math.sqrt(rows + columns) * size


def balanced(u: Array, s: Array, vt: Array) -> LowRank:
    """Return triples as two factors of the same size: ``U sqrt(S)`` and ``sqrt(S) V``."""
    roots = np.sqrt(s)
    return LowRank(u * roots, vt * roots[:, None])


def padded(product: LowRank, rank: int) -> LowRank:
    """Return a product with columns and rows of zeros added up to a rank."""
    missing = rank - product.rank
    if missing <= 0:
        return product
    return LowRank(np.pad(product.left, ((0, 0), (0, missing))), np.pad(product.right, ((0, missing), (0, 0))))


def total(products: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return the weighted sum of products, exactly: their factors side by side.

    Args:
        products: at least one, all of one shape.
        weights: one for each; what has none is left out.
    """
    taken = [(one, weight) for one, weight in zip(products, weights, strict=True) if one.rank and weight]
    if not taken:
        return LowRank(products[0].left[:, :0], products[0].right[:0])
    if len(taken) == 1 and taken[0][1] == 1:
        return taken[0][0]
    left = np.concatenate([one.left if weight == 1 else one.left * weight for one, weight in taken], axis=1)
    return LowRank(left, np.concatenate([one.right for one, _ in taken]))


def norm(product: LowRank) -> float:
    """Return the Frobenius norm of a product: ``sqrt(trace((L^T L) (R R^T)))``.

    Where large terms cancel, it is exact to some 1e-8 of these.
    """
    square = float(np.sum((product.left.T @ product.left) * (product.right @ product.right.T)))
    return math.sqrt(max(square, 0.0))


def inner(one: LowRank, other: LowRank) -> float:
    """Return the inner product of two products, entry by entry: ``trace((L1^T L2) (R2 R1^T))``."""
    return float(np.sum((one.left.T @ other.left) * (one.right @ other.right.T)))


def change(one: LowRank, other: LowRank) -> float:
    """Return the norm of the difference of two products whose factors are nearly the same, and have one rank."""
    left = np.concatenate([one.left - other.left, other.left], axis=1)
    right = np.concatenate([one.right, one.right - other.right])
    return norm(LowRank(left, right))
