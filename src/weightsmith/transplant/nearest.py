"""The anchors nearest to a row, told apart in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.transplant.dictionary import Dictionary, inner

Metric = Literal["cosine", "euclidean"]


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
    size = float(np.sqrt(inner(vector[None], vector)[0]))
    off = dictionary.product_error * size * norms * 1.001
    upper, lower = _scores(products + off, norms, metric), _scores(products - off, norms, metric)
    found = np.arange(len(norms))
    if count < len(norms):
        found = np.flatnonzero(upper >= np.partition(lower, len(lower) - count)[len(lower) - count])
    rows = dictionary.rows[found]
    if metric == "cosine":
        both = size * norms[found]
        values = np.divide(inner(rows, vector), both, out=np.zeros(len(found)), where=both > 0)
        order = np.argsort(-values, kind="stable")[:count]
    else:
        # Of a difference, not of squares: two rows that are alike are at a distance of 0.
        values = np.sqrt(((rows - vector.astype(np.float64)) ** 2).sum(1))
        order = np.argsort(values, kind="stable")[:count]
    return found[order], values[order]


def _scores(products: Array, norms: Array, metric: Metric) -> Array:
    """Return what is larger for nearer anchors: the cosine times the row's norm, or ``2 <t, d> - ||d||^2``."""
    if metric == "cosine":
        return np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)
    scores: Array = 2 * products - norms**2
    return scores
