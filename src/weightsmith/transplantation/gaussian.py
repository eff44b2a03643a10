"""New rows that know nothing of their tokens: the mean of the known rows, or drawn around it.

They are what a better way is to be held against. Numbers come from the counter-based generator, keyed by the seed and
the token, so that a token's row depends neither on which other tokens are new nor on their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.rows import tile_rows
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError
from weightsmith.kernels.philox import key_of, normal
from weightsmith.transplantation.rows import Rows

# Rows that are read at a time. Sums depend on it in their last digits, so it is part of a result.
_READ = 1024


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of rows.

    Attributes:
        mean: ``[d]`` float64.
        spread: ``[d]`` float64, the standard deviation of each element on its own; or ``[d, d]``, the symmetric root
            of the covariance.
    """

    mean: Array
    spread: Array

    @classmethod
    def of(cls, rows: Rows, numbers: Array, *, covariance: bool = False) -> Gaussian:
        """Measure rows: their mean, and what they are spread by (with denominator n).

        Args:
            rows: the matrix.
            numbers: ``[n]``: which of its rows.
            covariance: whether to measure the covariance of the elements, ``[d, d]`` in float64, rather than the
                variance of each. The root also exists where there are fewer rows than elements.

        Raises:
            MethodError: if there are no rows.
            CheckpointError: if one holds what is not finite.
        """
        width = rows.shape[1]
        mean = mean_of(rows, numbers)
        squares = np.zeros((width, width) if covariance else width)
        for wide in wide_tiles(rows, numbers):
            wide -= mean
            squares += wide.T @ wide if covariance else (wide**2).sum(0)
        squares /= len(numbers)
        return cls(mean, _root(squares) if covariance else np.sqrt(squares))

    def draw(self, seed: int, tokens: Sequence[object], scale: float = 1.0) -> Array:
        """Draw a row for each token: ``[n, d]`` float64.

        With the covariance of a model's rows this is Hewitt's way ("Initializing New Word Embeddings for Pretrained
        Language Models", 2021), who multiplies the covariance by 1e-5 (from memory): ``scale`` is the root of that.
        mergekit-tokensurgeon draws with the covariance itself. With the elements' own deviations it is what WECHSEL and
        FOCUS give to tokens of which they know nothing.

        Args:
            seed: the seed.
            tokens: what names each token, its text or its id.
            scale: what deviations from the mean are multiplied by.
        """
        result = np.empty((len(tokens), len(self.mean)))
        step = tile_rows(len(self.mean))
        for start in range(0, len(tokens), step):
            # A product of matrices sums in an order of its own for every number of rows: a tile has always as many.
            drawn = np.zeros((step, len(self.mean)))
            part = tokens[start : start + step]
            for place, token in enumerate(part):
                drawn[place] = normal(key_of("transplant", seed, token), 0, len(self.mean))
            moved = drawn * self.spread if self.spread.ndim == 1 else drawn @ self.spread
            result[start : start + len(part)] = self.mean + scale * moved[: len(part)]
        return result


def mean_of(rows: Rows, numbers: Array) -> Array:
    """Return the mean of rows: ``[d]`` float64.

    Raises:
        MethodError: if there are no rows.
        CheckpointError: if one holds what is not finite.
    """
    if not len(numbers):
        raise MethodError("there are no rows to take a mean of")
    total = np.zeros(rows.shape[1])
    for wide in wide_tiles(rows, numbers):
        total += wide.sum(0)
    return total / len(numbers)


def wide_tiles(rows: Rows, numbers: Array) -> Iterator[Array]:
    """Yield rows in float64, some at a time: as many for every matrix."""
    for start in range(0, len(numbers), _READ):
        yield rows.take(numbers[start : start + _READ]).astype(np.float64)


def _root(squares: Array) -> Array:
    """Return the symmetric root: unlike a triangular one it exists for every covariance, and is unique."""
    values, vectors = np.linalg.eigh(squares)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root
