"""New rows weighted by how similar anchors are: WECHSEL's and FOCUS's weights.

Both papers measure similarity in a space of its own: WECHSEL in static word embeddings of two languages, aligned by a
dictionary, FOCUS in fastText embeddings trained on texts cut by the new tokenizer. A transplant has no texts, and the
donor's own rows are such a space, in which every new token and every anchor has its place.
"""

from __future__ import annotations

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError
from weightsmith.transplantation.combination import Combinations, Progress
from weightsmith.transplantation.dictionary import Dictionary, norms_of
from weightsmith.transplantation.nearest import check_count, left_of, nearest_of, of_each_target
from weightsmith.transplantation.rows import Rows

# Of WECHSEL's code and of its paper.
NEIGHBOURS, TEMPERATURE = 10, 0.1


def softmax_of_nearest(
    donor: Rows,
    anchors: Array,
    targets: Array,
    *,
    count: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Combinations:
    """Weight the ``count`` anchors of largest cosine by ``softmax(cosine / temperature)``.

    WECHSEL: Minixhofer, Paischer and Rekabsaz, NAACL 2022, arXiv:2112.06598, section 3; here in the donor's space.

    Args:
        donor: the donor's rows, ``[V, d]``.
        anchors: ``[S]``: rows of the donor to choose from.
        targets: ``[T]``: rows of the donor to rebuild.
        count: how many anchors.
        temperature: above 0; the smaller, the more the nearest one weighs.
        threads: how many threads to use; one per core by default. The result does not depend on it.
        progress: told of targets that are finished.

    Returns:
        Combinations with ``k = count``, nearest first; without anchors for a target that is zero, whose cosines say
        nothing (there the authors draw a random row).

    Raises:
        MethodError: if there are fewer anchors than that, or the temperature is not above 0.
        CheckpointError: if a row holds what is not finite.
    """
    check_count(count, len(anchors))
    if not temperature > 0:
        raise MethodError(f"expected a temperature above 0, found {temperature:g}")

    def rebuild(dictionary: Dictionary, vector: Array, products: Array) -> tuple[Array, Array, float]:
        if not vector.any():
            return np.empty(0, np.int64), np.empty(0), 0.0
        found, cosines = nearest_of(dictionary, vector, products, count, "cosine")
        weights = np.exp((cosines - cosines[0]) / temperature)
        weights /= weights.sum()
        return found, weights, left_of(dictionary.rows[found], weights, vector)

    return of_each_target(donor, anchors, targets, rebuild, threads, progress)


def sparsemax_of_all(
    donor: Rows,
    anchors: Array,
    targets: Array,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Combinations:
    """Weight all anchors by the sparsemax of their cosines.

    FOCUS: Dobler and de Melo, EMNLP 2023, arXiv:2305.14481, section 2; here in the donor's space.

    Args:
        donor: the donor's rows, ``[V, d]``.
        anchors: ``[S]``: rows of the donor to choose from.
        targets: ``[T]``: rows of the donor to rebuild.
        threads: how many threads to use; one per core by default. The result does not depend on it.
        progress: told of targets that are finished.

    Returns:
        Combinations with as many places as the target with most anchors needs, largest weight first; without anchors
        for a target that is zero.

    Raises:
        MethodError: if there are no anchors.
        CheckpointError: if a row holds what is not finite.
    """

    def rebuild(dictionary: Dictionary, vector: Array, products: Array) -> tuple[Array, Array, float]:
        if not vector.any():
            return np.empty(0, np.int64), np.empty(0), 0.0
        norms = float(norms_of(vector[None])[0]) * dictionary.norms
        cosines = np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)
        # The threshold moves by no more than the cosines do, so that no anchor below this has a weight.
        near = np.flatnonzero(cosines > threshold(cosines) - 2.01 * dictionary.product_error)
        exact = np.divide(dictionary.inner(near, vector), norms[near], out=np.zeros(len(near)), where=norms[near] > 0)
        weights = sparsemax(exact)
        order = np.argsort(-weights, kind="stable")[: np.count_nonzero(weights)]
        found, weights = near[order], weights[order]
        return found, weights, left_of(dictionary.rows[found], weights, vector)

    return of_each_target(donor, anchors, targets, rebuild, threads, progress)


def sparsemax(values: Array) -> Array:
    """Return the nearest point to ``values`` on the simplex: ``max(z - tau, 0)`` with tau such that they add up to 1.

    Martins and Astudillo, ICML 2016, arXiv:1602.02068.

    Args:
        values: ``[n]`` float64, finite, n at least 1.
    """
    weights: Array = np.maximum(values - threshold(values), 0)
    return weights


def threshold(values: Array) -> float:
    """Return sparsemax's tau, found from below: the mean excess of those above it, until none falls out (Michelot)."""
    above = values
    while True:
        tau = (float(above.sum()) - 1) / len(above)
        kept = above[above > tau]
        if len(kept) == len(above):
            return tau
        above = kept
