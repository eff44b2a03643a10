"""Linear algebra that methods on whole matrices share.

Singular vectors come from LAPACK through the array namespace, and what follows from them is computed in float64 and
rounded once to the matrix's own dtype. Of a float32 matrix A the symmetric driver (``syevd``) is given ``A A^T`` in
float64, formed from the shorter side: products of float32 are exact there, so that what is lost lies 10^-8 below the
largest singular value, a sixth of float32's own unit and a thirtieth of what a decomposition in float32 loses
(measured; docs/performance.md), in less than half the time and two thirds of the memory that ``gesdd`` takes. Of a
float64 matrix ``gesdd`` takes the triangular factor apart.

What is not finite makes factors of NaN instead of an error, so that a broken tensor is seen as one in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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
# Columns that are held in float64 at a time. Sums depend on it in their last digits, so it is part of a result.
_WIDTH = 1024
# Random numbers that are drawn at a time.
_DRAWN = 1 << 20
# Singular values up to this share of the largest are what rounding leaves of zero: 16 units of float32 where the
# decompositions leave a quarter (and ones in float32, those of other tools, eight), and 500 units of float64 where
# they leave six at a length of 2048.
_ROUNDING = {4: 2e-6, 8: 1e-13}


def is_matrix(form: Form, *, convolutions: bool = False) -> bool:
    """Whether a tensor is a matrix that has columns and rows to speak of.

    Args:
        form: what is known of the tensor.
        convolutions: whether tensors of more axes count too, as matrices ``[first axis, all others]``.
    """
    if len(form.shape) < 2 or (len(form.shape) > 2 and not convolutions):
        return False
    return min(sides(form.shape)) > 1


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the lengths of the sides of the matrix ``[first axis, all others]``."""
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix and the singular vectors of one side.

    Attributes:
        values: ``[r]``, float64, falling.
        vectors: ``[k, r]``, float64, orthonormal columns. They rise as LAPACK gives them: the last belongs to the
            first value.
        dtype: of the matrix, float32 or float64.
    """

    values: Array
    vectors: Array
    dtype: Any

    def rank(self, xp: Any, tolerance: float | None = None, *, beside: float = 0.0) -> int:
        """Return how many singular values are not zero; all of them where they are not finite.

        Args:
            xp: the array namespace.
            tolerance: those up to this share of the largest count as zero; by default those that rounding leaves.
            beside: the largest is to be no less than this: of a difference, what it is a difference of.
        """
        most = max(float(self.values[0]), beside)
        if not math.isfinite(most):
            return int(self.values.shape[0])
        share = _ROUNDING[self.dtype.itemsize] if tolerance is None else tolerance
        return int(xp.count_nonzero(self.values > share * most))

    def leading(self, count: int) -> Array:
        """Return the vectors of the first ``count`` values: ``[k, count]``; they rise."""
        return self.vectors[:, self.vectors.shape[1] - count :]


def spectrum(xp: Any, matrix: Array, rank: int | None = None, how: Decomposition = "exact") -> Spectrum:
    """Return the singular values of a matrix and the singular vectors of its shorter side (of equal ones the left).

    The randomised form is Halko, Martinsson and Tropp, SIAM Review 2011, arXiv:0909.4061, algorithms 4.4 and 5.1: ten
    directions of oversampling, two power passes. It projects on random signs, the same for all matrices of a size, so
    that its result depends on the matrix alone.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``, float32 or float64.
        rank: how many singular values are wanted; all by default.
        how: ``exact`` or ``randomized``; the latter pays where the rank is small.

    Returns:
        A spectrum with ``k = min(m, n)``, and with ``r = rank`` if randomised, otherwise ``r = k``.
    """
    wide = _wide(xp, matrix)
    width = wide.shape[0] if rank is None else rank + OVERSAMPLING
    if how == "exact" or rank is None or width >= wide.shape[0] or not bool(xp.all(xp.isfinite(matrix))):
        return side_by_side(xp, [wide])
    basis = _sketch(xp, wide, width)
    inner = side_by_side(xp, [xp.matrix_transpose(basis) @ wide])
    return Spectrum(inner.values[:rank], xp.astype(basis, xp.float64) @ inner.leading(rank), inner.dtype)


def _sketch(xp: Any, wide: Array, width: int) -> Array:
    """Return orthonormal columns ``[k, width]`` that nearly span the leading left singular vectors."""
    transposed = xp.matrix_transpose(wide)
    basis = wide @ _signs(xp, wide, (wide.shape[1], width))
    for _ in range(POWER_PASSES):
        basis, _ = xp.linalg.qr(basis)
        basis, _ = xp.linalg.qr(transposed @ basis)
        basis = wide @ basis
    basis, _ = xp.linalg.qr(basis)
    return basis


def side_by_side(xp: Any, matrices: Iterable[Array]) -> Spectrum:
    """Return singular values and left singular vectors of ``[A_1 | A_2 | ...]``, which is never formed.

    Of float32 matrices ``sum_t A_t A_t^T`` is gathered in float64; of float64 ones the triangular factor, a QR
    decomposition at a time.

    Args:
        xp: the array namespace.
        matrices: ``[k, n_t]``, at least one, all of one dtype; gone through once, and one is held at a time.

    Returns:
        A spectrum with ``r = k``; in float64, ``r = sum_t n_t`` where that is less.
    """
    gathered, dtype = None, xp.float64
    for matrix in matrices:
        dtype = matrix.dtype
        gather = _triangle if dtype == xp.float64 else _add_products
        gathered = gather(xp, gathered, matrix)
        del matrix
    if dtype == xp.float64:
        u, s, _ = svd(xp, xp.matrix_transpose(gathered))
        return Spectrum(s, xp.flip(u, axis=1), dtype)
    return Spectrum(*_of_products(xp, gathered), dtype)


def joint_basis(
    xp: Any, matrices: Iterable[Array], count: int, shape: tuple[int, int], tolerance: float | None
) -> tuple[Array, Array]:
    """Return the left singular vectors of ``[A_1 | A_2 | ...]`` and its singular values, those of zero left out.

    Where all columns together are fewer than the rows they are laid side by side, which takes less than what would be
    gathered of them otherwise.

    Args:
        xp: the array namespace.
        matrices: ``[k, l]`` each, float32 or float64; gone through once, and one is held at a time.
        count: how many there are, at least one.
        shape: k and l.
        tolerance: singular values up to this share of the largest are zero; None for those of rounding.

    Returns:
        ``[k, r]`` and ``[r]`` in the matrices' dtype, values falling.
    """
    k, length = shape
    if count * length >= k:
        found = side_by_side(xp, matrices)
        rank = found.rank(xp, tolerance)
        vectors = xp.flip(found.leading(rank), axis=1)
        return xp.astype(vectors, found.dtype), xp.astype(found.values[:rank], found.dtype)
    beside = None
    for i, matrix in enumerate(matrices):
        if beside is None:
            beside = empty(xp, (k, count * length), matrix)
        beside[:, i * length : (i + 1) * length] = matrix
        del matrix
    found = spectrum(xp, beside)
    vectors, values, _ = triples(xp, beside, found, found.rank(xp, tolerance))
    return vectors, values


def _add_products(xp: Any, total: Array | None, matrix: Array) -> Array:
    for start in range(0, matrix.shape[1], _WIDTH):
        part = xp.astype(matrix[:, start : start + _WIDTH], xp.float64)
        # BLAS sees that this is symmetric, and computes half of it.
        products = part @ xp.matrix_transpose(part)
        if total is None:
            total = products
        else:
            total += products
    return total


def _of_products(xp: Any, products: Array) -> tuple[Array, Array]:
    if not bool(xp.isfinite(xp.sum(products))):
        return _nans(xp, products, (products.shape[0],)), _nans(xp, products, products.shape)
    try:
        squares, vectors = xp.linalg.eigh(products)
    except Exception:
        # Divide and conquer gives up on rare matrices; the other driver then serves.
        vectors, squares, _ = xp.linalg.svd(products)
        squares, vectors = xp.flip(squares), xp.flip(vectors, axis=1)
    return xp.flip(xp.sqrt(xp.where(squares > 0, squares, xp.zeros_like(squares)))), vectors


def _triangle(xp: Any, before: Array | None, matrix: Array) -> Array:
    """Return ``[n, k]`` with the inner products of what was gathered and the matrix together, n no greater than k."""
    rows = xp.matrix_transpose(matrix)
    if before is not None:
        rows = xp.concat([before, rows])
    if rows.shape[0] <= rows.shape[1] or not bool(xp.all(xp.isfinite(rows))):
        return rows
    return xp.linalg.qr(rows)[1]


def svd(xp: Any, matrix: Array) -> tuple[Array, Array, Array]:
    """Return the thin singular value decomposition by ``gesdd``, singular values falling.

    NumPy computes it in float64 whatever the matrix's dtype.

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
    u, s, vt = xp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def reweighted(xp: Any, matrix: Array, found: Spectrum, factors: Array) -> Array:
    """Return a matrix with its leading singular values multiplied by factors, and without the others.

    ``U diag(f) U^T A`` for left vectors U, ``A V diag(f) V^T`` for right ones: the vectors of the longer side, and with
    them any division by a small singular value, are not needed.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``.
        found: its spectrum.
        factors: ``[c]``, float64, for the first c singular values.
    """
    result = empty(xp, matrix.shape, matrix)
    source, target = _wide(xp, matrix), _wide(xp, result)
    vectors = found.leading(factors.shape[0])
    rising = xp.flip(factors)[:, None]
    for start in range(0, source.shape[1], _WIDTH):
        part = xp.astype(source[:, start : start + _WIDTH], xp.float64)
        part = vectors @ (rising * (xp.matrix_transpose(vectors) @ part))
        target[:, start : start + _WIDTH] = xp.astype(part, matrix.dtype)
    return result


def triples(xp: Any, matrix: Array, found: Spectrum, count: int) -> tuple[Array, Array, Array]:
    """Return the first singular triples of a matrix, singular values falling.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``.
        found: its spectrum.
        count: how many; none of these values may be zero but for rounding, for that has no direction.

    Returns:
        U ``[m, count]``, s ``[count]`` and V transposed ``[count, n]``, in the matrix's dtype.
    """
    source = _wide(xp, matrix)
    near = xp.flip(found.leading(count), axis=1)
    values = found.values[:count]
    far = empty(xp, (count, source.shape[1]), matrix)
    onto = xp.matrix_transpose(near / values)
    for start in range(0, source.shape[1], _WIDTH):
        part = onto @ xp.astype(source[:, start : start + _WIDTH], xp.float64)
        far[:, start : start + _WIDTH] = xp.astype(part, matrix.dtype)
    near, values = xp.astype(near, matrix.dtype), xp.astype(values, matrix.dtype)
    if matrix.shape[0] <= matrix.shape[1]:
        return near, values, far
    return xp.matrix_transpose(far), values, xp.matrix_transpose(near)


def leading(xp: Any, matrix: Array, rank: int, how: Decomposition = "exact") -> tuple[Array, Array, Array]:
    """Return the first singular triples of a matrix, exactly as many as are asked for.

    Where singular values are zero but for rounding they are zero here, and so are the vectors of the longer side.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``, float32 or float64.
        rank: how many, at most ``min(m, n)``.
        how: ``exact`` or ``randomized``; see :func:`spectrum`.

    Returns:
        U ``[m, rank]``, s ``[rank]`` and V transposed ``[rank, n]``, in the matrix's dtype, values falling.
    """
    return leading_of(xp, matrix, spectrum(xp, matrix, rank, how), rank)


def leading_of(xp: Any, matrix: Array, found: Spectrum, rank: int) -> tuple[Array, Array, Array]:
    """Return what :func:`leading` does, of a matrix whose spectrum is known already."""
    values = found.values[:rank]
    zero = xp.arange(rank, device=_device(values)) >= found.rank(xp)
    safe = xp.where(zero, xp.full_like(values, math.inf), values)
    left, _, right = triples(xp, matrix, Spectrum(safe, found.leading(rank), found.dtype), rank)
    return left, xp.astype(xp.where(zero, xp.zeros_like(values), values), matrix.dtype), right


def polar(xp: Any, matrix: Array, tolerance: float | None = None) -> Array:
    """Return the polar factor: ``P Q^T`` of the SVD ``P D Q^T``, the nearest matrix of orthonormal columns or rows.

    Of a matrix without full rank it is the factor between the spaces that the matrix has, as with the pseudo-inverse:
    in all others it is not defined, and what LAPACK gives there is its own choice.

    Args:
        xp: the array namespace.
        matrix: ``[m, n]``.
        tolerance: singular values up to this share of the largest count as zero; by default those of rounding.
    """
    found = spectrum(xp, matrix)
    return reweighted(xp, matrix, found, 1.0 / found.values[: found.rank(xp, tolerance)])


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


def spectrum_work(m: int, n: int, itemsize: int, *, rank: int | None = None, how: Decomposition = "exact") -> Work:
    """Return what :func:`spectrum` costs, and holds beside the matrix.

    Operations: Golub and Van Loan, Matrix computations, sections 5.2 (QR), 8.3 (symmetric QR with vectors) and table
    8.6.1 (SVD). Held: the gathered matrix, NumPy's copy of it, LAPACK's workspace, the vectors, and stretches in
    float64; measured.

    Args:
        m: the matrix's first side.
        n: its second side.
        itemsize: bytes of its elements.
        rank: of :func:`spectrum`.
        how: of :func:`spectrum`.
    """
    k, length = min(m, n), max(m, n)
    if how == "randomized" and rank is not None and rank + OVERSAMPLING < k:
        width = rank + OVERSAMPLING
        inner = spectrum_work(width, length, itemsize)
        products = (2 * POWER_PASSES + 2) * 2.0 * k * length * width
        # NumPy's QR makes float64 of what it is given, and copies it.
        held = 4 * (k + length) * width * 8 // itemsize
        return together(Work(products, held), inner)
    if itemsize == 8:
        # Of a longer matrix, the QR decomposition and its copies; then those of a square one.
        held = max(4 * k * length if length > k else 0, 8 * k * k)
        return Work(4.0 * k * k * length + 22.0 * k**3, held, 1)
    return Work(1.0 * k * k * length + 9.0 * k**3, 2 * (5 * k * k + 3 * k * _WIDTH), 1)


def joint_basis_work(k: int, length: int, count: int, itemsize: int) -> Work:
    """Return what :func:`joint_basis` of ``count`` matrices ``[k, length]`` costs, and all that it holds."""
    if count * length < k:
        whole = k * count * length
        found = spectrum_work(k, count * length, itemsize)
        return together(found, triples_work(k, count * length, count * length, itemsize), elements=whole)
    found = spectrum_work(k, length if length > k else k, itemsize)
    more = (count - 1) * (4.0 if itemsize == 8 else 1.0) * k * k * length
    return together(found, Work(more, 0), elements=k * length)


def reweighted_work(m: int, n: int, rank: int, itemsize: int) -> Work:
    """Return what :func:`reweighted` costs, and holds: the spectrum, stretches in float64, and its result."""
    k = min(m, n)
    return Work(4.0 * rank * m * n, m * n + (k * k + 3 * k * _WIDTH) * 8 // itemsize)


def triples_work(m: int, n: int, rank: int, itemsize: int) -> Work:
    """Return what :func:`triples` costs, and holds: the spectrum, stretches in float64, and its result."""
    k = min(m, n)
    return Work(2.0 * rank * m * n, (m + n) * rank + (k * k + 2 * k * rank + 3 * k * _WIDTH) * 8 // itemsize)


def leading_work(m: int, n: int, rank: int, how: Decomposition, itemsize: int = 4) -> Work:
    """Return what :func:`leading` costs, and holds beside the matrix."""
    return together(spectrum_work(m, n, itemsize, rank=rank, how=how), triples_work(m, n, rank, itemsize))


def together(*parts: Work, elements: int = 0) -> Work:
    """Return what pieces of work cost one after the other, ``elements`` being held all the while."""
    return Work(
        sum(part.operations for part in parts),
        elements + max((part.elements for part in parts), default=0),
        sum(part.decompositions for part in parts),
    )


def times(count: int, work: Work) -> Work:
    """Return what a piece of work costs that is done so many times."""
    return Work(count * work.operations, work.elements, count * work.decompositions)


def _wide(xp: Any, matrix: Array) -> Array:
    """Return the matrix or, where it has more rows than columns, its transpose; no copy."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else xp.matrix_transpose(matrix)


def _signs(xp: Any, like: Array, shape: tuple[int, int]) -> Array:
    import numpy as np

    from weightsmith.kernels import philox

    size = shape[0] * shape[1]
    signs = np.empty(size, np.float32)
    # The generator takes ten times the room of its numbers.
    for start in range(0, size, _DRAWN):
        stop = min(start + _DRAWN, size)
        signs[start:stop] = np.where(philox.uniform((0, 0), start, stop) < 0.5, np.float32(-1), np.float32(1))
    return xp.astype(xp.asarray(signs.reshape(shape), device=_device(like)), like.dtype)


def _nans(xp: Any, like: Array, shape: tuple[int, ...]) -> Array:
    return xp.full(shape, math.nan, dtype=like.dtype, device=_device(like))


def empty(xp: Any, shape: tuple[int, ...], like: Array) -> Array:
    """Return an array of the dtype and on the device of another, whose values are to be written."""
    return xp.empty(shape, dtype=like.dtype, device=_device(like))


def _device(array: Array) -> Any:
    from array_api_compat import device

    return device(array)
