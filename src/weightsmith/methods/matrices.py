"""Linear algebra that methods on whole matrices share.

Everything runs in the dtype of the matrix (float32, or float64 for files of float64) through the array namespace's own
LAPACK: ``gesdd`` in NumPy. What is not finite makes factors of NaN instead of an error, so that a broken tensor is seen
as one in the result.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from weightsmith.methods.block import Array, Form, Work
from weightsmith.methods.parameters import Param

Decomposition = Literal["exact", "randomized"]
HowDecomposed = Annotated[
    Decomposition, Param("by LAPACK, or by random projections: faster where few of many singular values are kept")
]

# Of the randomised decomposition: directions beyond the rank that is asked for, and passes that sharpen them. With
# two passes the error is within a few per cent of the least possible one even where singular values fall off slowly
# (Halko et al., 2011, section 10.4 and figure 7.4).
OVERSAMPLING, POWER_PASSES = 10, 2


def is_matrix(form: Form) -> bool:
    """Whether a tensor is a matrix that has columns and rows to speak of."""
    return len(form.shape) == 2 and min(form.shape) > 1


def svd(xp: Any, matrix: Array) -> tuple[Array, Array, Array]:
    """Return the thin singular value decomposition, singular values falling.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``, float32 or float64.

    Returns:
        U ``[m, k]``, s ``[k]`` and V transposed ``[k, n]``, with ``k = min(m, n)``, in the matrix's dtype; all NaN
        where the matrix has values that are not finite.
    """
    if not bool(xp.all(xp.isfinite(matrix))):
        k = min(matrix.shape)
        shapes = (matrix.shape[0], k), (k,), (k, matrix.shape[1])
        return _nans(xp, matrix, shapes[0]), _nans(xp, matrix, shapes[1]), _nans(xp, matrix, shapes[2])
    try:
        u, s, vt = xp.linalg.svd(matrix, full_matrices=False)
    except Exception:
        # The divide-and-conquer driver gives up on rare matrices; a wider dtype has always served it so far.
        u, s, vt = xp.linalg.svd(xp.astype(matrix, xp.float64), full_matrices=False)
    return xp.astype(u, matrix.dtype), xp.astype(s, matrix.dtype), xp.astype(vt, matrix.dtype)


def leading(xp: Any, matrix: Array, rank: int, how: Decomposition = "exact") -> tuple[Array, Array, Array]:
    """Return the first ``rank`` singular triples of a matrix.

    The randomised form is Halko, Martinsson and Tropp, SIAM Review 2011, arXiv:0909.4061, algorithms 4.4 and 5.1: ten
    directions of oversampling, two power passes. It projects on random signs, the same for all matrices of a size, so
    that its result depends on the matrix alone.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``, float32 or float64.
        rank: how many, at most ``min(m, n)``.
        how: ``exact`` or ``randomized``.

    Returns:
        U ``[m, rank]``, s ``[rank]`` and V transposed ``[rank, n]``, as :func:`svd` does.
    """
    m, n = matrix.shape
    width = rank + OVERSAMPLING
    if how == "exact" or width >= min(m, n) or not bool(xp.all(xp.isfinite(matrix))):
        u, s, vt = svd(xp, matrix)
        # Copies: a slice would keep all of what it is cut from.
        return u[:, :rank] * 1, s[:rank] * 1, vt[:rank, :] * 1
    basis = matrix @ _signs(xp, matrix, (n, width))
    for _ in range(POWER_PASSES):
        basis, _ = xp.linalg.qr(basis)
        basis, _ = xp.linalg.qr(xp.matrix_transpose(matrix) @ basis)
        basis = matrix @ basis
    basis, _ = xp.linalg.qr(basis)
    u, s, vt = svd(xp, xp.matrix_transpose(basis) @ matrix)
    return basis @ u[:, :rank], s[:rank] * 1, vt[:rank, :] * 1


def polar(xp: Any, matrix: Array) -> Array:
    """Return the matrix with orthonormal columns (or rows) that is nearest: ``P Q^T`` of its SVD ``P D Q^T``.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``.
    """
    u, _, vt = svd(xp, matrix)
    return u @ vt


def effective_rank(xp: Any, s: Array) -> float:
    """Return the exponential of the entropy of the normalised singular values.

    Roy and Vetterli, The effective rank, EUSIPCO 2007. From 1 (a single direction) to their number (all equal); 0
    where all are 0.

    Args:
        xp: the array namespace.
        s: singular values ``[k]``.
    """
    wide = xp.astype(s, xp.float64)
    total = float(xp.sum(wide))
    if not 0 < total < math.inf:
        return 0.0 if total == 0 else math.nan
    share = wide / total
    positive = share > 0
    safe = xp.where(positive, share, xp.ones_like(share))
    return math.exp(-float(xp.sum(xp.where(positive, share * xp.log(safe), xp.zeros_like(share)))))


def rank_reaching(xp: Any, s: Array, share: float, *, power: int) -> int:
    """Return how many leading singular values sum, in a power, to a share of all of them.

    Args:
        xp: the array namespace.
        s: singular values ``[k]``, falling.
        share: the share to reach, from 0 to 1.
        power: 1 for the nuclear norm, 2 for the energy.

    Returns:
        The least such number: at least 1 (0 for a share of 0), at most k.
    """
    if share <= 0:
        return 0
    sums = xp.cumulative_sum(xp.astype(s, xp.float64) ** power)
    total = float(sums[-1])
    if not math.isfinite(total):
        return int(s.shape[0])
    # Rounding may keep even the last sum below all of the total.
    below = int(xp.count_nonzero(sums < share * total * (1 - 1e-15)))
    return min(below + 1, int(s.shape[0]))


def svd_work(m: int, n: int) -> Work:
    """Return what the thin SVD of an ``[m, n]`` matrix costs, and holds beside the matrix.

    Operations: Golub and Van Loan, Matrix computations, table 8.6.1 (R-SVD with thin factors). Held: a copy, the
    factors, and LAPACK's workspace.
    """
    k = min(m, n)
    return Work(6.0 * m * n * k + 20.0 * k**3, m * n + m * k + k * n + 5 * k * k, 1)


def leading_work(m: int, n: int, rank: int, how: Decomposition) -> Work:
    """Return what :func:`leading` costs, and holds beside the matrix."""
    width = rank + OVERSAMPLING
    if how == "exact" or width >= min(m, n):
        return svd_work(m, n)
    inner = svd_work(width, n)
    products = (2 * POWER_PASSES + 2) * 2.0 * m * n * width
    return Work(products + inner.operations, 3 * (m + n) * width + inner.elements, 1)


def together(*parts: Work, elements: int = 0) -> Work:
    """Return what pieces of work cost one after the other, ``elements`` being held all the while."""
    return Work(
        sum(part.operations for part in parts),
        elements + max((part.elements for part in parts), default=0),
        sum(part.decompositions for part in parts),
    )


def _signs(xp: Any, like: Array, shape: tuple[int, int]) -> Array:
    import numpy as np
    from array_api_compat import device

    from weightsmith.kernels import philox

    drawn = philox.uniform((0, 0), 0, shape[0] * shape[1]).reshape(shape)
    signs = np.where(drawn < 0.5, np.float32(-1), np.float32(1))
    return xp.astype(xp.asarray(signs, device=device(like)), like.dtype)


def _nans(xp: Any, like: Array, shape: tuple[int, ...]) -> Array:
    from array_api_compat import device

    return xp.full(shape, math.nan, dtype=like.dtype, device=device(like))
