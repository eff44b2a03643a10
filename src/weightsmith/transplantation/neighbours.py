"""New rows as mixtures of the anchors nearest to them in the donor's space.

The baselines of mergekit-tokensurgeon's ``common_interpolation``, with its three schemes of weights. Neighbours are
told apart in float64, and of two at one distance the first anchor is the nearer one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.transplantation.combination import Combinations, Progress
from weightsmith.transplantation.dictionary import Dictionary
from weightsmith.transplantation.nearest import Metric, check_count, left_of, nearest_of, of_each_target
from weightsmith.transplantation.rows import Rows

Scheme = Literal["distance", "barycentric", "least_squares"]
# How many neighbours, in that tool.
NEIGHBOURS = 64
# Distances up to this share of a row's norm are none: the rounding of float32, in which it was written.
_SAME = 2.0**-22
# Directions of neighbours with singular values up to the root of this share of the largest are not told from rounding.
_SINGULAR = 1e-12


def nearest_neighbours(
    donor: Rows,
    anchors: Array,
    targets: Array,
    *,
    count: int = NEIGHBOURS,
    metric: Metric = "euclidean",
    scheme: Scheme = "distance",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Combinations:
    """Rebuild targets from the anchors nearest to them.

    The weights of neighbours ``d_1 .. d_k`` of a row t are

    - ``distance``: ``1 / ||t - d_i||``, or for cosines the cosine itself, 0 if it is negative; divided by their sum. A
      neighbour that is the row itself has all the weight, as in the limit (that tool bounds the distance by 1e-6).
    - ``barycentric``: the minimiser of ``||t - sum_i w_i d_i||`` with ``sum_i w_i = 1``, as in locally linear embedding
      (Roweis and Saul, Science 2000).
    - ``least_squares``: the minimiser without that condition.

    Where a minimiser is not unique it is the least one.

    Args:
        donor: the donor's rows, ``[V, d]``.
        anchors: ``[S]``: rows of the donor to choose from.
        targets: ``[T]``: rows of the donor to rebuild.
        count: how many neighbours; 1 for the nearest anchor itself.
        metric: nearest by ``euclidean`` distance or by ``cosine``.
        scheme: see above.
        threads: how many threads to use; one per core by default. The result does not depend on it.
        progress: told of targets that are finished.

    Returns:
        Combinations with ``k = count``, nearest first.

    Raises:
        MethodError: if there are fewer anchors than neighbours.
        CheckpointError: if a row holds what is not finite.
    """
    check_count(count, len(anchors))

    def rebuild(dictionary: Dictionary, vector: Array, products: Array) -> tuple[Array, Array, float]:
        found, values = nearest_of(dictionary, vector, products, count, metric)
        rows, wide = dictionary.rows[found].astype(np.float64), vector.astype(np.float64)
        if scheme == "distance":
            size = float(np.sqrt((wide**2).sum()))
            weights = _by_cosine(values) if metric == "cosine" else _by_distance(values, size)
        elif scheme == "barycentric":
            weights = _barycentric(rows, wide)
        else:
            weights = _solve(rows @ rows.T, rows @ wide)
        return found, weights, left_of(rows, weights, wide)

    return of_each_target(donor, anchors, targets, rebuild, threads, progress)


def _by_distance(distances: Array, size: float) -> Array:
    same = distances <= _SAME * size
    weights = same.astype(np.float64) if same.any() else 1 / distances
    shares: Array = weights / weights.sum()
    return shares


def _by_cosine(cosines: Array) -> Array:
    weights = np.maximum(cosines, 0)
    total = weights.sum()
    return weights / total if total > 0 else weights


def _barycentric(rows: Array, vector: Array) -> Array:
    # With weights that add up to 1, t - sum w d = sum w (t - d): least where C w = lambda 1, and then scaled.
    apart = vector - rows
    products = apart @ apart.T
    scale = float(np.trace(products)) / len(rows) or 1.0
    system = np.ones((len(rows) + 1, len(rows) + 1))
    system[:-1, :-1], system[-1, -1] = products / scale, 0
    right = np.zeros(len(rows) + 1)
    right[-1] = 1
    return _solve(system, right)[:-1]


def _solve(system: Array, right: Array) -> Array:
    """Return the least solution of a symmetric system, in the sense of least squares."""
    values, vectors = np.linalg.eigh(system)
    kept = np.abs(values) > _SINGULAR * np.abs(values).max()
    solution: Array = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept])
    return solution
