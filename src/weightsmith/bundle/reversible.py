"""A few basis models and coefficients: Reversible Model Merging, on task vectors and on low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import ClassVar, Literal

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.factors import triples, with_signs
from weightsmith.adapters.folded import FoldedTensor
from weightsmith.bundle.description import Entry
from weightsmith.bundle.identical import identical
from weightsmith.bundle.kind import Group, Kind, Made, Stored, Survey, shared_name, task_name
from weightsmith.bundle.matrices import FactoredTensor, Piece, dense_change, for_each_task, is_matrix, wide
from weightsmith.bundle.tiles import TILE, Values, tile_starts
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.kernels.convert import narrow, widen
from weightsmith.methods.matrices import Decomposition, leading

BASIS, COEFFICIENTS, LEFT, RIGHT = "basis", "coefficients", "left", "right"
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Reversible(Kind):
    """Reversible Model Merging (RMM): p basis models, from which each task is a linear combination.

    For every tensor, with the task vectors ``d_1 … d_n`` as the columns of X: the eigenvectors V of the p largest
    eigenvalues of the Gram matrix ``X^T X`` give the basis ``Z = X V`` and the coefficients V, so that
    ``d_i ~ sum_k V_ik Z_k``. No other p basis models leave a smaller squared error, which is the sum of the other
    eigenvalues; p = n leaves none but that of rounding the basis. Only sums over the tensors are needed, one n x n
    matrix for each, so models of any size are read a tile at a time.

    With ``rank``, the same is done on low-rank weights. Every matrix's task vector is ``A B`` of that rank: a LoRA's
    own factors where the model is an adapter on the base, and a truncated SVD otherwise. A LoRA's product is never
    formed: its factors are orthogonalised (QR) and the small matrix between them is decomposed. Factors can be turned
    into each other in endless ways with the same product, so all are brought to one form first: ``A = U sqrt(S)``,
    ``B = sqrt(S) V``, with the largest entry of each column of U above 0. That is ours. A and B have bases and
    coefficients of their own. Tensors that are no matrices are kept whole for each task.

    Alipour and Amiri, Towards Reversible Model Merging for Low-rank Weights, 2025, arXiv:2510.14163. No code was
    published that we know of, and we had the abstract and summaries by others alone, so this is *inferred*. They tell
    of closed-form bases for the rows of A and the columns of B, each position with coefficients of its own, and of a
    share (p (r + n) + r) / (r n) of the adapters' size, which fits a stored mean: ``coefficients: position`` with
    ``centre: true``. It makes things smaller only where n and r are well above p. By default a matrix has one set of
    coefficients, which is what "a few models and linear combinations" says, and takes p / n of the adapters' size.

    Attributes:
        basis: p, how many basis models; as many as tasks, at most. 2 by default, after the abstract ("an equivalent of
            holding two or more models").
        centre: whether the mean is stored beside the basis, and the basis is one of the differences from it.
        rank: r, to work on low-rank weights instead of task vectors.
        coefficients: with ``rank``: ``layer``, one set for a matrix; or ``position``, one for every row of A and every
            column of B.
        decomposition: of task vectors that are not LoRAs: ``exact`` (LAPACK) or ``randomized``.
    """

    name: ClassVar[str] = "rmm"
    summary: ClassVar[str] = "p basis models; per task p coefficients per tensor, or factors with a rank given"

    basis: int = 2
    centre: bool = False
    rank: int | None = None
    coefficients: Literal["layer", "position"] = "layer"
    decomposition: Decomposition = "exact"

    def __post_init__(self) -> None:
        self._check_count("basis")
        self._check_flag("centre")
        if self.rank is not None:
            self._check_count("rank")
        self._check_choice("coefficients", "layer", "position")
        self._check_choice("decomposition", "exact", "randomized")
        if self.rank is None and self.coefficients == "position":
            raise self._wrong("coefficients", "positions are those of low-rank factors: give a rank, too")

    @property
    def uses_matrices(self) -> bool:
        """See :attr:`Kind.uses_matrices`."""
        return True

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`; for task vectors, every model is read once for the Gram matrices."""
        if self.rank is not None:
            taken = [group for group in groups if is_matrix(group)]
            factors = [_Factors(group, self, survey.threads) for group in taken]
            return Made(taken, [tensor for one in factors for tensor in one.tensors()])
        grams = _grams(groups, survey)
        return Made(
            groups, [one for group, gram in zip(groups, grams, strict=True) for one in self._of_group(group, gram)]
        )

    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """See :meth:`Kind.restore`."""
        if self.rank is not None:
            return self._restore_factors(entry, base, stored)
        basis = stored.shared(BASIS, (None, *entry.shape))
        count = basis.shape[0] - self.centre
        return CombinedTensor(entry, base, basis, stored.own(COEFFICIENTS, (count,), _FLOAT64), stored)

    def basis_of(self, gram: Array) -> Array:
        """Return the coefficients of the basis that fits a Gram matrix best.

        Args:
            gram: inner products of the models, ``[..., n, n]``, float64.

        Returns:
            V: ``[..., n, p]``, or fewer columns where there are fewer models.
        """
        count = gram.shape[-1]
        if self.centre:
            # That of the differences from the mean.
            gram = (
                gram - gram.mean(-1, keepdims=True) - gram.mean(-2, keepdims=True) + gram.mean((-1, -2), keepdims=True)
            )
        _, vectors = np.linalg.eigh(gram)
        kept = vectors[..., ::-1][..., : min(self.basis, count - self.centre)]
        # Eigenvectors have no sign of their own.
        largest = np.take_along_axis(kept, np.abs(kept).argmax(-2, keepdims=True), -2)
        return np.where(largest < 0, -kept, kept)

    def weights_of(self, coefficients: Array) -> Array:
        """Return how the stored models are combined from those that were given.

        Args:
            coefficients: V, ``[..., n, p]``.

        Returns:
            ``[..., q, n]``: with a mean, it comes first, and the others leave it out.
        """
        weights = np.swapaxes(coefficients, -1, -2)
        if not self.centre:
            return weights
        count = coefficients.shape[-2]
        mean = np.full((*weights.shape[:-2], 1, count), 1 / count)
        return np.concatenate([mean, weights - weights.mean(-1, keepdims=True)], axis=-2)

    def _of_group(self, group: Group, gram: Array) -> list[Tensor]:
        coefficients = self.basis_of(gram)
        weights = self.weights_of(coefficients)

        def combined(start: int, stop: int) -> Array:
            found = np.zeros(stop - start)
            for row in range(start // group.size, -(-stop // group.size)):
                first, last = max(start - row * group.size, 0), min(stop - row * group.size, group.size)
                place = found[row * group.size + first - start : row * group.size + last - start]
                for weight, change in zip(weights[row], group.changes(first, last), strict=True):
                    place += weight * change
            return found

        basis = Values(shared_name(BASIS, group.name), (len(weights), *group.shape), group.dtype, combined)
        return [
            basis,
            *(_constant(task_name(t, COEFFICIENTS, group.name), coefficients[i]) for i, t in enumerate(group.models)),
        ]

    def _restore_factors(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        if len(entry.shape) != 2:
            raise stored.fail(f"it is {list(entry.shape)}, and factors are those of a matrix")
        rows, columns = entry.shape
        left = stored.shared(LEFT, (None, rows, None))
        count, rank = left.shape[0], left.shape[2]
        right = stored.shared(RIGHT, (count, columns, rank))
        shapes: list[tuple[int, ...]] = [(count - self.centre,)] * 2
        if self.coefficients == "position":
            shapes = [(rows, count - self.centre), (columns, count - self.centre)]
        dtype = _FLOAT64 if self.coefficients == "layer" else None
        own = stored.own(LEFT, shapes[0], dtype), stored.own(RIGHT, shapes[1], dtype)

        def factors() -> tuple[Array, Array]:
            a, b = (
                self._combine(wide(basis), wide(numbers), stored)
                for basis, numbers in zip((left, right), own, strict=True)
            )
            return a, np.ascontiguousarray(b.T)

        return FactoredTensor(stored.name, entry, base, factors)

    def _combine(self, basis: Array, coefficients: Array, stored: Stored) -> Array:
        """Return one task's factor, ``[positions, rank]``, of a basis ``[q, positions, rank]``."""
        if not np.isfinite(coefficients).all():
            raise stored.fail("a coefficient is NaN or infinite")
        found = basis[0] if self.centre else np.zeros(basis.shape[1:])
        for k in range(coefficients.shape[-1]):
            found = found + coefficients[..., k, None] * basis[k + self.centre]
        return found


def _constant(name: str, numbers: Array) -> Values:
    flat = np.ascontiguousarray(numbers).reshape(-1)
    return Values(name, numbers.shape, _FLOAT64, lambda start, stop: flat[start:stop])


def _grams(groups: Sequence[Group], survey: Survey) -> list[Array]:
    """Return for each group the inner products of its task vectors: ``[n, n]`` float64."""
    pieces = [(number, start) for number, group in enumerate(groups) for start in tile_starts(group.size)]

    def products(piece: tuple[int, int]) -> Array:
        group = groups[piece[0]]
        changes = np.stack(group.changes(piece[1], min(piece[1] + TILE, group.size))).astype(np.float64)
        found: Array = changes @ changes.T
        return found

    def nbytes(piece: tuple[int, int]) -> int:
        group = groups[piece[0]]
        return min(TILE, group.size - piece[1]) * sum(one.dtype.itemsize for one in group.models.values())

    parts: list[list[Array]] = [[] for _ in groups]
    for (number, _), found in zip(pieces, survey.run(products, pieces, nbytes), strict=True):
        parts[number].append(found)
    return [_sum(found) for found in parts]


def _sum(matrices: Sequence[Array]) -> Array:
    flat = [math.fsum(column) for column in zip(*(matrix.reshape(-1) for matrix in matrices), strict=True)]
    return np.asarray(flat).reshape(matrices[0].shape)


class _Factors:
    """The low-rank factors of the task vectors of one matrix, and the basis they have in common."""

    def __init__(self, group: Group, kind: Reversible, threads: int) -> None:
        self._group = group
        self._kind = kind
        self._threads = threads
        products = [product for one in group.models.values() if (product := _product_of(one)) is not None]
        # Ranks that no adapter has would be stored as zeros.
        most = max(one.rank for one in products) if len(products) == len(group.models) else min(group.shape)
        self._rank = min(kind.rank or 1, most, *group.shape)

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the bundle that hold them."""
        group, kind = self._group, self._kind
        count = len(group.models)
        components = min(kind.basis, count - kind.centre)
        tensors: list[Tensor] = []
        for which, (field, positions) in enumerate(zip((LEFT, RIGHT), group.shape, strict=True)):
            shape = (components + kind.centre, positions, self._rank)
            tensors.append(Piece(shared_name(field, group.name), shape, group.dtype, self, itemgetter(2 * which)))
            by_position = kind.coefficients == "position"
            own = (positions, components) if by_position else (components,)
            dtype: DType = group.dtype if by_position else _FLOAT64
            tensors += [
                Piece(task_name(task, field, group.name), own, dtype, self, _row(2 * which + 1, i))
                for i, task in enumerate(group.models)
            ]
        return tensors

    def make(self) -> tuple[Array, ...]:
        """Return basis and coefficients of the left factors, and of the right ones.

        The bases are ``[q, positions, rank]``, the coefficients ``[n, …]``.
        """
        found = for_each_task(self._group, self._rank, self._kind.decomposition, self._threads, self._apart)
        made: list[Array] = []
        for side in (0, 1):
            # [positions, n, rank]
            factors = np.stack([found[task][side] for task in self._group.models], axis=1)
            grams = np.einsum("xir,xjr->xij", factors, factors)
            by_position = self._kind.coefficients == "position"
            coefficients = self._kind.basis_of(grams if by_position else grams.sum(0))
            weights = self._kind.weights_of(coefficients)
            basis = np.einsum("xqn,xnr->qxr" if by_position else "qn,xnr->qxr", weights, factors)
            made += [basis, np.moveaxis(coefficients, -2, 0)]
        return tuple(map(np.ascontiguousarray, made))

    def _apart(self, task: str) -> tuple[Array, ...]:
        """Return A and B transposed, ``[m, rank]`` and ``[n, rank]`` of float64, in the form that is common to all."""
        tensor = self._group.models[task]
        u: Array
        product = _product_of(tensor)
        if product is not None and isinstance(tensor, FoldedTensor) and identical(tensor.base, self._group.base):
            u, s, vt = triples(product)
        else:
            dense = dense_change(self._group, task)
            u, s, vt = with_signs(*leading(xp, dense, self._rank, self._kind.decomposition))
        u, s, vt = u[:, : self._rank], np.sqrt(s[: self._rank].astype(np.float64)), vt[: self._rank]
        left, right = u * s, vt.T * s
        missing = self._rank - left.shape[1]
        return np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, 0), (0, missing)))


def _product_of(tensor: Tensor) -> LowRank | None:
    """Return what an adapter adds to a tensor, if it is a product of two factors."""
    return tensor.low_rank() if isinstance(tensor, FoldedTensor) else None


def _row(which: int, row: int) -> Callable[[tuple[Array, ...]], Array]:
    """Return what picks a row of one of several arrays."""
    return lambda made: made[which][row]


class CombinedTensor(Tensor):
    """A base's tensor with a linear combination of others added."""

    def __init__(self, entry: Entry, base: Tensor, basis: Tensor, coefficients: Tensor, stored: Stored) -> None:
        self.name = stored.name
        self.shape = entry.shape
        self.dtype = entry.dtype
        self._base = base
        self._basis = basis
        self._coefficients = coefficients
        self._stored = stored

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; summed in float64, and rounded to the dtype of the arithmetic and then once more."""
        total = widen(self._base.read(start, stop), _FLOAT64)
        for row, weight in enumerate(self._weights):
            first = row * self._base.size
            total = total + weight * widen(self._basis.read(first + start, first + stop), _FLOAT64)
        return narrow(total, self.dtype)

    @cached_property
    def _weights(self) -> Array:
        """What each of the stored tensors is multiplied with: 1 the mean, if there is one."""
        found = self._coefficients.numpy()
        if not np.isfinite(found).all():
            raise self._stored.fail("a coefficient is NaN or infinite")
        return np.concatenate([np.ones(self._basis.shape[0] - len(found)), found])
