"""What methods on whole matrices share: which tensors they take apart, and the task matrices of a block.

A model of weight 0 takes no part in them, and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Form, Work
from weightsmith.methods.deltas import joined
from weightsmith.methods.matrices import (
    is_matrix,
    reweighted_work,
    sides,
    spectrum_work,
    together,
)
from weightsmith.methods.registry import Granularity, Param

Embeddings = Annotated[bool, Param("take embeddings and output heads apart as well")]
Convolutions = Annotated[bool, Param("take convolutions apart as well, as matrices [out, all others]")]
Tolerance = Annotated[
    float | None,
    Param("singular values up to this share of the largest count as zero; none: what rounding leaves", minimum=0),
]


def takes_apart(parameters: Mapping[str, Any], form: Form) -> bool:
    """Whether a tensor is treated as a matrix, with parameters ``embeddings`` and ``convolutions``."""
    if form.role in ("embedding", "head") and not parameters["embeddings"]:
        return False
    return is_matrix(form, convolutions=parameters["convolutions"])


def reads_matrices(parameters: Mapping[str, Any], form: Form) -> Granularity:
    """What methods read that take some tensors apart and stream others."""
    return "tensor" if takes_apart(parameters, form) else "elements"


def as_matrix(xp: Any, tensor: Array) -> Array:
    """Return a tensor as the matrix ``[first axis, all others]``."""
    return tensor if len(tensor.shape) == 2 else xp.reshape(tensor, (tensor.shape[0], -1))


def taking_part(weight: Sequence[float]) -> list[int]:
    """Return the indices of models whose weight is not zero."""
    return [i for i, w in enumerate(weight) if w != 0]


def is_whole(block: Block) -> bool:
    """Whether a block is a tensor that is taken apart, rather than a stretch of one."""
    return len(block.shape) > 1


def task_matrices(block: Block, weight: Sequence[float]) -> Iterator[tuple[float, Array]]:
    """Yield the weight and the task matrix of every model that takes part; one is held at a time."""
    for i in taking_part(weight):
        yield weight[i], as_matrix(block.xp, block.deltas[i])


def sum_of(block: Block, weight: Sequence[float]) -> Array | None:
    """Return the weighted sum of the task matrices, or None where no model takes part."""
    total = None
    for w, matrix in task_matrices(block, weight):
        if total is None:
            total = w * matrix
        else:
            total += w * matrix
        del matrix
    return total


def with_base(block: Block, scale: float, change: Array | None) -> Array:
    """Return the base plus a change ``[out, all others]`` times a factor; the base where there is no change."""
    if change is None:
        return block.base * 1
    return block.base + scale * block.xp.reshape(change, block.shape)


def with_mean(block: Block, weight: Sequence[float], scale: float) -> Array:
    """Return the base plus the mean of weighted task vectors: what becomes of tensors that are no matrices."""
    total = joined(block.xp, block.deltas, weight, consensus=False, normalize=False)
    return block.base + (scale / max(len(taking_part(weight)), 1)) * total


def sum_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    """Return what it costs to take the sum of the task matrices apart and put it together again."""
    if not takes_apart(parameters, form):
        return None
    (m, n), item = sides(form.shape), form.itemsize
    return together(
        spectrum_work(m, n, item), reweighted_work(m, n, min(m, n), item), Work(0, 2 * m * n), elements=m * n
    )
