"""The plane through three models: the lengths and the angle of its sides, from one pass over the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.curves.positions import Plane
from weightsmith.engine.backend import SWEEP
from weightsmith.engine.evaluate import Evaluator, blocks
from weightsmith.engine.expression import Computed
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import CheckpointError, PlanError
from weightsmith.plan.merged import LazyCheckpoint

# The sine of the least angle between B - A and C - A that makes a plane: below it, what is left of C - A at right
# angles to B - A may be no more than the rounding of the weights.
_LEAST_SINE = 1e-4
_FLOAT64 = np.dtype(np.float64)


def plane_through(merged: LazyCheckpoint, names: Sequence[str], *, threads: int | None = None) -> Plane:
    """Measure the plane through three models. Memory does not depend on their size.

    Args:
        merged: a merge of A, B and C, in this order: the tensors that it computes are those that count.
        names: how the three are called.
        threads: how many threads to use; by default one per core.

    Raises:
        CheckpointError: if a weight is NaN or infinite.
        PlanError: if two of the models have the same weights, or all three lie on one line.
    """
    along, product, other = _products(merged, names, threads or default_threads())
    a, b, c = names
    for length, one, two in ((along, a, b), (other, a, c), (along + other - 2 * product, b, c)):
        if length <= 0:
            raise PlanError(f"{one} and {two} have the same weights: three different models span a plane")
    length = math.sqrt(along)
    across = product / length
    # At right angles by subtraction, which cancels for a small angle: 1e-4 leaves eight digits.
    height = math.sqrt(max(other - across * across, 0.0))
    if height < _LEAST_SINE * math.sqrt(other):
        raise PlanError(
            f"{a}, {b} and {c} lie on one line ({c} is {across / length:.4g} of the way from {a} to {b}), which "
            "spans no plane; take a model that is not a mixture of the two, or --shape line"
        )
    return Plane(length, across, height)


def _products(merged: LazyCheckpoint, names: Sequence[str], threads: int) -> tuple[float, float, float]:
    """Return ``<u, u>``, ``<u, w>`` and ``<w, w>`` for ``u = B - A`` and ``w = C - A``, summed in float64."""
    tensors = [tensor for tensor in merged.values() if isinstance(tensor, Computed)]
    stretches = [(tensor, start, stop) for tensor in tensors for start, stop in blocks(tensor.size, 1, 4 * SWEEP)]

    def visit(stretch: tuple[Computed, int, int]) -> tuple[float, float, float]:
        tensor, start, stop = stretch
        first, *others = (
            _values(tensor.name, part, name, start, stop) for part, name in zip(tensor.models, names, strict=True)
        )
        u, w = (one - first for one in others)
        return float(u @ u), float(u @ w), float(w @ w)

    with ThreadMapper(threads) as mapper:
        sums = list(mapper(visit, stretches))
    one, two, three = (math.fsum(part[i] for part in sums) for i in range(3))
    return one, two, three


def _values(name: str, tensor: Tensor, model: str, start: int, stop: int) -> Array:
    values = np.asarray(Evaluator().values(tensor, start, stop, _FLOAT64))
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{name} of {model} has values that are NaN or infinite, which have no distances; mend the model"
        )
    return values
