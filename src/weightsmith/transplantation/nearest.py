"""The anchors nearest to a row, told apart in float64, and what is done with one row after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError
from weightsmith.transplantation.combination import Combinations, Progress
from weightsmith.transplantation.dictionary import Dictionary, batches, norms_of
from weightsmith.transplantation.rows import Rows

Metric = Literal["cosine", "euclidean"]
# Given the anchors, a row and its inner products with them: numbers of anchors, weights and residual.
Rebuild = Callable[[Dictionary, Array, Array], tuple[Array, Array, float]]
# Bytes of inner products that are held at a time, and targets at most.
_BATCH_BYTES, _BATCH = 100_000_000, 1024


def nearest_of(
    dictionary: Dictionary, vector: Array, products: Array, count: int, metric: Metric
) -> tuple[Array, Array]:
    """Return the anchors nearest to a row, nearest first; of equal ones the first.

    Args:
        dictionary: the anchors' rows.
        vector: ``[d]`` float32, in the dictionary's scale.
        products: ``[S]`` float32: its inner products with the anchors, as the dictionary makes them.
        count: how many, at most as many as there are.
        metric: ``cosine``, the largest cosine first (0 with a row of zeros), or ``euclidean``, the least distance.

    Returns:
        Numbers of anchors ``[count]``, and their cosines, or their distances in the dictionary's scale: float64.
    """
    norms = dictionary.norms
    size = float(norms_of(vector[None])[0])
    off = dictionary.product_error * size * norms * 1.001
    upper, lower = _scores(products + off, norms, metric), _scores(products - off, norms, metric)
    found = np.arange(len(norms))
    if count < len(norms):
        found = np.flatnonzero(upper >= np.partition(lower, len(lower) - count)[len(lower) - count])
    if metric == "cosine":
        both = size * norms[found]
        values = np.divide(dictionary.inner(found, vector), both, out=np.zeros(len(found)), where=both > 0)
        order = np.argsort(-values, kind="stable")[:count]
    else:
        # Of a difference, not of squares: two rows that are alike are at a distance of 0.
        values = dictionary.distances(found, vector)
        order = np.argsort(values, kind="stable")[:count]
    return found[order], values[order]


def _scores(products: Array, norms: Array, metric: Metric) -> Array:
    """Return what is larger for nearer anchors: the cosine times the row's norm, or ``2 <t, d> - ||d||^2``."""
    if metric == "cosine":
        return np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)
    scores: Array = 2 * products - norms**2
    return scores


def check_count(count: int, anchors: int) -> None:
    """Check that there are as many anchors as are to be chosen for each token.

    Raises:
        MethodError: if not.
    """
    if not 1 <= count <= anchors:
        raise MethodError(
            f"{count:,} anchors are to be chosen for each token, and the vocabularies share {anchors:,}: expected 1 to "
            f"{anchors:,}"
        )


def left_of(rows: Array, weights: Array, vector: Array) -> float:
    """Return ``||t - sum_i w_i d_i|| / ||t||``; 0 for a row of zeros.

    Args:
        rows: ``[k, d]``.
        weights: ``[k]`` float64.
        vector: ``[d]``.
    """
    wide = vector.astype(np.float64)
    size = float(np.sqrt((wide**2).sum()))
    return float(np.sqrt(((wide - (weights[:, None] * rows).sum(0)) ** 2).sum())) / size if size else 0.0


def of_each_target(
    donor: Rows, anchors: Array, targets: Array, rebuild: Rebuild, threads: int | None, progress: Progress | None
) -> Combinations:
    """Rebuild targets one by one, with the inner products of many made at once.

    Args:
        donor: the donor's rows.
        anchors: ``[S]``.
        targets: ``[T]``.
        rebuild: given the anchors, a row and its inner products with them, returns numbers of anchors, their weights
            and the residual.
        threads: how many threads to use; one per core by default.
        progress: told of targets that are finished.
    """
    dictionary = Dictionary.of(donor, anchors)
    size = int(min(max(_BATCH_BYTES // (4 * len(dictionary)), 1), _BATCH))
    parts: list[tuple[Array, Array]] = []
    residual = np.zeros(len(targets))
    with ThreadMapper(threads or default_threads(), matrices=True) as mapper:
        for part, vectors in batches(donor, targets, dictionary, size, progress):
            products = dictionary.products(vectors, mapper)
            made = mapper(lambda pair: rebuild(dictionary, *pair), zip(vectors, products, strict=True))
            for place, (numbers, weights, left) in enumerate(made, part.start):
                parts.append((numbers.astype(np.int32), weights))
                residual[place] = left
    return Combinations.padded(parts, residual)
