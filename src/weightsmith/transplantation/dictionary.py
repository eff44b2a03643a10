"""The donor's rows of all anchors, in memory, and inner products with them.

Inner products of many rows at once are made in float32 by the machine's BLAS, with a bound of their error that holds
for any order of the sum. Whatever is chosen by them is then told from its rivals in float64, so that what is chosen
depends neither on the BLAS nor on how many rows it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.rows import tile_rows
from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import CheckpointError, MethodError
from weightsmith.kernels.pursuit import UNIT
from weightsmith.transplantation.combination import Progress
from weightsmith.transplantation.rows import Rows

# Columns of a product that a thread makes at a time, and rows that are read at a time.
_COLUMNS, _READ = 1024, 1 << 12
# Elements of rows that are summed by one product of matrices: without this the bound of the error is that of 4,096
# roundings where rows are that long, and several times as many atoms must be told apart in float64.
_SUMMED = 512
# Norms whose products are far from the ends of float32's range, as powers of two.
_RANGE = 40


@dataclass(frozen=True)
class Dictionary:
    """Rows of anchors.

    Attributes:
        rows: ``[S, d]`` float32, times ``2 ** -exponent``.
        norms: ``[S]`` float64, theirs.
        exponent: 0 but for rows whose squares would leave the range of float32.
    """

    rows: Array
    norms: Array
    exponent: int

    @classmethod
    def of(cls, donor: Rows, anchors: Array) -> Dictionary:
        """Read the rows of anchors.

        Raises:
            MethodError: if there are none.
            CheckpointError: if a row holds what is not finite, or does not exist.
        """
        if not len(anchors):
            raise MethodError("the two vocabularies share no token that could serve as an anchor")
        rows = np.empty((len(anchors), donor.shape[1]), np.float32)
        for start in range(0, len(anchors), _READ):
            rows[start : start + _READ] = donor.take(anchors[start : start + _READ])
        exponent = _exponent(
            float(max(np.abs(rows[start : start + _READ]).max() for start in range(0, len(rows), _READ)))
        )
        if exponent:
            np.ldexp(rows, -exponent, out=rows)
        return cls(rows, norms_of(rows), exponent)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def product_error(self) -> float:
        """Bound of the error of :meth:`products`, as a share of both norms: of every rounding, in whatever order."""
        width = self.rows.shape[1]
        return float((min(width, _SUMMED) + -(-width // _SUMMED) + 4) * UNIT * 1.001)

    def scaled(self, vectors: Array) -> Array:
        """Return rows of the donor in the scale of these, ``[n, d]`` float32.

        Raises:
            CheckpointError: if one is so much longer than every anchor that products with it leave float32's range.
        """
        scaled = np.ldexp(vectors, -self.exponent) if self.exponent else vectors
        if len(vectors) and not np.abs(scaled).max() < 2.0 ** (_RANGE + 20):
            raise CheckpointError(
                f"a row of the donor holds {np.abs(vectors).max():g}, and no anchor's row holds anything near it; "
                "the donor's embedding looks broken"
            )
        return scaled

    def inner(self, numbers: Array, vector: Array) -> Array:
        """Return inner products of a row with some anchors in float64: ``[n]``, each of which depends on no other."""
        return self._each(numbers, lambda rows: (rows * vector.astype(np.float64)).sum(1))

    def distances(self, numbers: Array, vector: Array) -> Array:
        """Return distances of a row from some anchors in float64: ``[n]``, exactly 0 between equal rows."""
        return self._each(numbers, lambda rows: np.sqrt(((rows - vector.astype(np.float64)) ** 2).sum(1)))

    def _each(self, numbers: Array, measure: Callable[[Array], Array]) -> Array:
        result = np.empty(len(numbers))
        step = tile_rows(self.rows.shape[1])
        for start in range(0, len(numbers), step):
            result[start : start + step] = measure(self.rows[numbers[start : start + step]])
        return result

    def products(self, vectors: Array, mapper: ThreadMapper) -> Array:
        """Return inner products of rows with all anchors: ``[n, S]`` float32, off by ``product_error`` at most.

        Args:
            vectors: ``[n, d]`` float32, in the scale of these.
            mapper: a pool that keeps linear algebra to one thread in each of its own.
        """
        result = np.empty((len(vectors), len(self)), np.float32)

        def fill(start: int) -> None:
            multiply(vectors, self.rows[start : start + _COLUMNS], result[:, start : start + _COLUMNS])

        for _ in mapper(fill, range(0, len(self), _COLUMNS)):
            pass
        return result


def _exponent(largest: float) -> int:
    """Return the power of two by which to divide, such that squares keep to the range of float32; 0 mostly."""
    power = math.frexp(largest)[1] if largest else 0
    return power if abs(power) > _RANGE else 0


def multiply(left: Array, right: Array, out: Array) -> None:
    """Make ``left right^T`` in float32, so many elements at a time that the bound of the error stays small.

    Args:
        left: ``[n, d]`` float32.
        right: ``[m, d]`` float32.
        out: ``[n, m]`` float32.
    """
    np.matmul(left[:, :_SUMMED], right[:, :_SUMMED].T, out=out)
    for start in range(_SUMMED, left.shape[1], _SUMMED):
        out += left[:, start : start + _SUMMED] @ right[:, start : start + _SUMMED].T


def norms_of(rows: Array) -> Array:
    """Return the norms of rows: ``[n]`` float64."""
    norms = np.empty(len(rows))
    step = tile_rows(rows.shape[1])
    for start in range(0, len(rows), step):
        norms[start : start + step] = np.sqrt((rows[start : start + step].astype(np.float64) ** 2).sum(1))
    return norms


def batches(
    donor: Rows, targets: Array, dictionary: Dictionary, size: int, progress: Progress | None
) -> Iterator[tuple[slice, Array]]:
    """Read targets some at a time, and tell of those that are finished.

    Yields:
        Which targets, and their rows ``[n, d]`` float32 in the dictionary's scale.
    """
    for start in range(0, len(targets), size):
        part = slice(start, min(start + size, len(targets)))
        yield part, dictionary.scaled(donor.take(targets[part]))
        if progress is not None:
            progress(part.stop - part.start)
