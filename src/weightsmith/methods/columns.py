"""Methods that weigh columns of a matrix by how far they moved and turned: WIDEN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from weightsmith.methods.block import Array, Block, Form, Scope, Statistic, Sweep
from weightsmith.methods.registry import Granularity, Param, method
from weightsmith.methods.statistics import totals

# Of each model: the scores of its columns, or of a tensor without columns the mean of its changes.
_Known = list[Any]


def _reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    return "elements" if len(form.shape) < 2 else "filters"


def _known(scope: Scope, *, ratio: float, score: float) -> Statistic[_Known]:
    form = scope.form
    if form is None or len(form.shape) < 2:
        changes = yield from totals(_changes)
        return [change / scope.size for change in changes]
    tokens = form.role == "embedding"
    found = yield Sweep(_along_rows if tokens else _along_columns, _beside if tokens else _plus)
    if not found:
        return []
    xp, (base, *others) = found[0]
    if tokens:
        base, *others = (xp.concat(parts) for parts in (base, *others))
    lengths = [xp.sqrt(squares) for squares in others[::2]]
    base = xp.sqrt(base)
    moved = [xp.abs(length - base) for length in lengths]
    turned = [_turned(xp, base * length, product) for length, product in zip(lengths, others[1::2], strict=True)]
    scores = [_scores(xp, [_ranks(xp, one) for one in which], None, ratio, score) for which in (moved, turned)]
    return [0.5 * (by_length + by_angle) for by_length, by_angle in zip(*scores, strict=True)]


def _changes(block: Block) -> list[Any]:
    xp = block.xp
    return [xp.sum(xp.astype(xp.abs(delta), xp.float64)) for delta in block.deltas]


def _sums(block: Block, axis: int) -> tuple[Any, list[Array]]:
    """Return along an axis the base's sum of squares, and each model's of squares and of products with the base."""
    xp = block.xp
    base = xp.astype(block.base, xp.float64)
    sums = [xp.sum(base * base, axis=axis)]
    for model in block.models:
        wide = xp.astype(model, xp.float64)
        sums += [xp.sum(wide * wide, axis=axis), xp.sum(wide * base, axis=axis)]
    return xp, sums


def _along_columns(block: Block) -> tuple[Any, list[Array]]:
    return _sums(block, 0)


def _along_rows(block: Block) -> tuple[Any, list[list[Array]]]:
    xp, sums = _sums(block, 1)
    return xp, [[one] for one in sums]


def _plus(one: tuple[Any, list[Array]], other: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
    return one[0], [a + b for a, b in zip(one[1], other[1], strict=True)]


# Lists joined end to end: the same sum.
_beside = _plus


def _turned(xp: Any, lengths: Array, products: Array) -> Array:
    """Return 1 - cos of the angle of every column; a column without length has no direction to turn from."""
    known = lengths > 0
    cosines = products / xp.where(known, lengths, xp.ones_like(lengths))
    return xp.where(known, 1.0 - cosines, xp.zeros_like(cosines))


def _ranks(xp: Any, values: Array) -> Array:
    """Return the rank of every value in ascending order, equal ones by position, from 0 to below 1."""
    order = xp.argsort(xp.argsort(values, stable=True), stable=True)
    return xp.astype(order, values.dtype) / values.shape[0]


def _scores(xp: Any, significance: list[Array], means: list[float] | None, ratio: float, score: float) -> list[Array]:
    """Return softmax over the models, and ``score`` where a significance is above ``ratio`` times its model's mean."""
    powers = [xp.exp(one) for one in significance]
    total = sum(powers[1:], powers[0])
    if means is None:
        means = [float(xp.mean(one)) for one in significance]
    return [
        xp.where(one > ratio * mean, xp.full_like(power, score), power / total)
        for one, power, mean in zip(significance, powers, means, strict=True)
    ]


@method(
    base="required",
    minimum=1,
    statistic=_known,
    reads=_reads,
    properties=("symmetric",),
    source="Yu et al., Extend model merging from fine-tuned to pre-trained large language models via weight "
    "disentanglement, 2024, arXiv:2408.03092",
    example={},
)
def widen(
    block: Block,
    known: _Known,
    *,
    ratio: Annotated[float, Param("how far above a model's mean rank a column scores in full", minimum=0)] = 1.0,
    score: Annotated[float, Param("score of such a column")] = 1.0,
) -> Array:
    """Add task vectors column by column, scored by how the column's length and direction changed.

    Of a matrix ``[out, in]``, every input column has a length and a direction. For each model, columns are ranked by
    the change of their length, and by 1 - cos of the angle they turned; a rank lies in [0, 1). Over the models, the
    ranks of a column go through a softmax; a column whose rank is above ``ratio`` times the model's mean rank scores
    ``score`` instead. With s the mean of the two scores: ``B + sum_i s_i (W_i - B)``, column by column. Vectors are
    scored entry by entry, by ``|W_i - B|`` in place of ranks. Ranks do not know how large a change is, so a model that
    was pre-trained further merges with fine-tunes whose changes are a hundredth of its own.

    As in the authors' code: an embedding's columns are its tokens (the rows as stored), the columns of a head are not;
    scores of a column do not sum to one, and with ratio 1 about half of every model's columns score 1. Convolutions,
    which neither paper nor code knows, are matrices of ``[out, everything else]``. A column without length, such as
    that of a padded token, has not turned; the code divides by zero there.
    """
    deltas = block.deltas
    xp = block.xp
    if block.base.ndim < 2:
        scores = _scores(xp, [xp.abs(delta) for delta in deltas], known, ratio, score)
    else:
        scores = [_spread(block, one) for one in known]
    parts = [one * delta for one, delta in zip(scores, deltas, strict=True)]
    return block.base + sum(parts[1:], parts[0])


def _spread(block: Block, scores: Array) -> Array:
    """Return the scores of a block's columns as they multiply it: ``[1, columns]``, of tokens ``[rows, 1]``."""
    rows, columns = block.base.shape
    scores = block.xp.astype(scores, block.base.dtype)
    if block.role != "embedding":
        return scores[None, :]
    first = block.start // columns
    return scores[first : first + rows, None]
