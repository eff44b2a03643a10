"""Whether a mean of pruned models is denser than they are: what a person should know before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import is_float
from weightsmith.engine.expression import Computed, is_made
from weightsmith.engine.threads import ThreadMapper
from weightsmith.methods.sparse import PRUNED

# Stretches that are looked at of a matrix to see whether it may be pruned, and elements in each: enough that no part
# worth pruning lies between them.
_STRETCHES, _LENGTH = 16, 2048
# Elements that are counted at a time.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Densities:
    """Shares of entries that are not zero, of one matrix.

    Attributes:
        size: number of entries.
        models: number of entries that each model keeps.
        union: number of entries that any of them keeps: what the mean keeps.
    """

    size: int
    models: tuple[int, ...]
    union: int

    @property
    def pruned(self) -> bool:
        """Whether a model has pruned a part of it; one that is all zeros was begun so, and has no mask."""
        return self.size - min(filter(None, self.models), default=self.size) >= PRUNED * self.size

    @property
    def differ(self) -> bool:
        """Whether some model keeps what another does not."""
        return any(0 < count < self.union for count in self.models)


def masks_warning(tensors: Iterable[Tensor], threads: int) -> str | None:
    """Say how dense the mean of pruned models with different masks is; None where there is nothing to say.

    Means of files alone are looked at, by the method ``linear``. A few stretches of each matrix of the first and the
    last model tell whether it may be pruned; those that may be are counted, in all models: one more pass over these.

    Args:
        tensors: the tensors of a merge.
        threads: how many threads to use.

    Raises:
        CheckpointError: if an input cannot be read.
    """
    means = [tensor for tensor in tensors if _is_mean_of_matrices(tensor)]
    with ThreadMapper(threads) as mapper:
        may_be = [one for one, found in zip(means, mapper(_may_be_pruned, means), strict=True) if found]
        counted = [one for one in mapper(_count, may_be) if one.pruned]
    differing = [one for one in counted if one.differ]
    if not differing:
        return None
    size = sum(one.size for one in counted)
    models = [sum(counts) / size for counts in zip(*(one.models for one in counted), strict=True)]
    spread = " to ".join(dict.fromkeys(f"{share:.3g}" for share in (min(models), max(models))))
    return (
        f"the masks of the pruned models differ in {len(differing)} of {len(counted)} sparse matrices: the models keep "
        f"{spread} of their entries, the average {sum(one.union for one in counted) / size:.3g}; the method "
        "sparse_soup (average: --mask intersection, union or first) decides which to keep"
    )


def _is_mean_of_matrices(tensor: Tensor) -> bool:
    return (
        isinstance(tensor, Computed)
        and tensor.method.name == "linear"
        # A sum may be of task vectors, which are zero where nothing was trained.
        and tensor.parameters["normalize"]
        and sum(weight != 0 for weight in tensor.parameters["weight"]) > 1
        and len(tensor.shape) > 1
        and tensor.size > 0
        and all(is_float(one.dtype) and not is_made(one) and not one.whole for one in tensor.models)
    )


def _may_be_pruned(mean: Tensor) -> bool:
    assert isinstance(mean, Computed)
    # Half of the share that counts: a sample may miss some.
    return any(_sampled_zeros(one) >= PRUNED / 2 for one in (mean.models[0], mean.models[-1]))


def _sampled_zeros(tensor: Tensor) -> float:
    """Return the share of exact zeros in stretches from all over a tensor."""
    seen = zeros = 0
    for start, stop in _stretches(tensor.size):
        values = tensor.read(start, stop)
        seen += stop - start
        zeros += values.size - int(np.count_nonzero(values))
    return zeros / seen


def _stretches(size: int) -> Iterator[tuple[int, int]]:
    if size <= _STRETCHES * _LENGTH:
        yield 0, size
        return
    step = size / _STRETCHES
    for i in range(_STRETCHES):
        # Moved by multiples of the golden section: in step with no period that rows or heads have.
        start = int((i + (i * 0.6180339887498949) % 1.0 * (1 - _LENGTH / step)) * step)
        yield start, min(start + _LENGTH, size)


def _count(mean: Tensor) -> Densities:
    assert isinstance(mean, Computed)
    # Of no weight, of no mask.
    inputs = [model for model, weight in zip(mean.models, mean.parameters["weight"], strict=True) if weight]
    models, union = [0] * len(inputs), 0
    for start in range(0, mean.size, _BLOCK):
        stop = min(start + _BLOCK, mean.size)
        any_keeps = np.zeros(stop - start, bool)
        for i, one in enumerate(inputs):
            keeps = one.read(start, stop) != 0
            models[i] += int(np.count_nonzero(keeps))
            any_keeps |= keeps
        union += int(np.count_nonzero(any_keeps))
    return Densities(mean.size, tuple(models), union)
