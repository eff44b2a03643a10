"""Merges that make the singular vectors of task matrices orthogonal to each other: TSV-Merge and isotropic merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from weightsmith.methods.block import Array, Block, Form, Work
from weightsmith.methods.deltas import Lambda, Weight
from weightsmith.methods.matrices import (
    Decomposition,
    HowDecomposed,
    empty,
    polar,
    reweighted,
    reweighted_work,
    sides,
    spectrum,
    spectrum_work,
    times,
    together,
    triples,
    triples_work,
)
from weightsmith.methods.registry import Param, PerModel, method
from weightsmith.methods.task_matrices import (
    Convolutions,
    Embeddings,
    Tolerance,
    is_whole,
    reads_matrices,
    sum_of,
    sum_work,
    takes_apart,
    taking_part,
    task_matrices,
    with_base,
    with_mean,
)

MeanOver = Annotated[
    Literal["all", "rank"], Param("the mean is over min(out, in) singular values, or over those that are not zero")
]


class _Triples:
    """Singular triples of several matrices of one shape, gathered side by side.

    Attributes:
        count: how many there are.
    """

    def __init__(self, xp: Any, most: int) -> None:
        """Start with none; ``most`` is the greatest number that may come."""
        self._xp = xp
        self._most = most
        self._left: Array = None
        self._right: Array = None
        self._values: list[Array] = []
        self.count = 0

    def add(self, left: Array, values: Array, right: Array) -> None:
        """Take ``[m, r]``, ``[r]`` and ``[r, n]``."""
        if self._left is None:
            self._left = empty(self._xp, (left.shape[0], self._most), left)
            self._right = empty(self._xp, (self._most, right.shape[1]), right)
        stop = self.count + values.shape[0]
        self._left[:, self.count : stop] = left
        self._right[self.count : stop, :] = right
        self._values.append(values)
        self.count = stop

    @property
    def left(self) -> Array:
        """The left vectors, where they are gathered: ``[m, count]``."""
        return self._left[:, : self.count]

    @property
    def largest(self) -> float:
        """The first value of the first matrix; 0 where it has none."""
        return float(self._values[0][0]) if self._values[0].shape[0] else 0.0

    def orthogonal(self) -> tuple[Array, Array, Array]:
        """Return left vectors and right vectors each replaced by their polar factor, and the values between them.

        The triples are let go of.
        """
        left, right, values = self._left[:, : self.count], self._right[: self.count, :], self._values
        self._left = self._right = None
        left = polar(self._xp, left)
        right = polar(self._xp, right)
        return left, self._xp.concat(values), right


def _orthogonal_work(m: int, n: int, count: int, itemsize: int) -> Work:
    """What it costs to make m-long and n-long vectors orthogonal and multiply them; they are held meanwhile."""
    one, other = sorted((m, n))
    parts = [
        part
        for side in (one, other)
        for part in (spectrum_work(side, count, itemsize), reweighted_work(side, count, min(side, count), itemsize))
    ]
    return together(*parts, Work(2.0 * m * n * count, (m + n) * count + 2 * m * n), elements=(m + n) * count)


def _share_of_each(k: int, models: int) -> int:
    # At least one: the authors' code rounds down, and loses the tensor where models outnumber directions.
    return max(k // models, 1)


def _tsv_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    count = len(taking_part(parameters["weight"]))
    if not count or not takes_apart(parameters, form):
        return None
    (m, n), item = sides(form.shape), form.itemsize
    rank = _share_of_each(min(m, n), count)
    one = together(
        spectrum_work(m, n, item, rank=rank, how=parameters["svd"]), triples_work(m, n, rank, item), elements=m * n
    )
    vectors = (m + n) * rank * count
    return together(together(times(count, one), elements=vectors), _orthogonal_work(m, n, rank * count, item))


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_tsv_work,
    also=("tsv_merge", "tsvm"),
    properties=("symmetric", "translates", "removable"),
    source="Gargiulo et al., Task singular vectors, CVPR 2025, arXiv:2412.00081, algorithm 1; checked against the "
    "authors' code",
    example={"weight": 1.0},
)
def tsv(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
    embeddings: Embeddings = True,
    convolutions: Convolutions = False,
    tolerance: Tolerance = None,
    svd: HowDecomposed = "exact",
) -> Array:
    """TSV-Merge: the leading singular vectors of every task matrix, made orthogonal to each other.

    Of each of T task matrices ``d_t = U_t S_t V_t^T`` the first ``min(out, in) / T`` triples are kept (rounded down, at
    least one). All U_t side by side are replaced by the nearest matrix with orthonormal columns, the polar factor
    ``U*``, all V_t likewise, and ``W = B + lambda U* S V*^T``. Tensors that are no matrices get ``B + lambda mean_t
    d_t``. A weight multiplies its task vector. lambda is searched from 0.1 to 3.0 in the paper; 1 is its value
    without data.

    The authors take embeddings apart too, and leave out ``text_projection``, which none of their fine-tunes changes;
    ports to language models leave out embeddings and heads (``embeddings: false``). Directions of singular value zero
    (tolerance) take no part. In the authors' code they do: vectors that stand for nothing then push the others aside,
    and task matrices of low rank merge to what the rounding decides. Where task vectors share directions (copies of a
    model), those are not split by ones that neither has.
    """
    if not is_whole(block):
        return with_mean(block, weight, lambda_)
    xp, count = block.xp, len(taking_part(weight))
    rank = _share_of_each(min(sides(block.shape)), max(count, 1))
    gathered = _Triples(xp, rank * count)
    for w, matrix in task_matrices(block, weight):
        left, values, right = _first_triples(xp, matrix, rank, tolerance, svd)
        gathered.add(left, w * values, right)
        del matrix, left, right
    return with_base(block, lambda_, _joined(gathered))


def _first_triples(
    xp: Any,
    matrix: Array,
    rank: int,
    tolerance: float | None,
    how: Decomposition = "exact",
    *,
    beside: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Return the first triples, without those whose value is zero."""
    found = spectrum(xp, matrix, rank, how)
    return triples(xp, matrix, found, min(rank, found.rank(xp, tolerance, beside=beside)))


def _joined(gathered: _Triples) -> Array | None:
    if not gathered.count:
        return None
    left, values, right = gathered.orthogonal()
    return left @ (values[:, None] * right)


_ISO = "Marczak et al., No task left behind: isotropic model merging, ICML 2025, arXiv:2502.04959"


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=sum_work,
    properties=("symmetric", "translates", "removable"),
    source=f"{_ISO}, algorithm 1; checked against the authors' code",
    example={"weight": 1.0},
)
def iso_c(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
    mean_over: MeanOver = "all",
    embeddings: Embeddings = True,
    convolutions: Convolutions = False,
    tolerance: Tolerance = None,
) -> Array:
    """Isotropic merging in the common subspace: the sum of task matrices with all singular values made equal.

    With ``sum_t w_t d_t = U S V^T``, ``W = B + lambda mean(S) U V^T``. Tensors that are no matrices get ``B + lambda
    mean_t w_t d_t``. lambda is searched from 0.1 to 3.0 in the paper, and matters: the ports that leave it at 1
    compare something else.

    Where the sum has not full rank (adapters, rows that no model changes), U and V are not defined beyond it, and
    what a decomposition puts there would get full weight. Such directions (tolerance) stay at zero here, and the mean
    is, as published, over all min(out, in) values; ``mean_over: rank`` takes it over those that are there (ours).
    Adapters that were folded into bfloat16 have rounding in every direction: give a tolerance, 0.01 say. Without one
    the rounding counts.
    """
    if not is_whole(block):
        return with_mean(block, weight, lambda_)
    xp, total = block.xp, sum_of(block, weight)
    if total is None:
        return with_base(block, lambda_, None)
    found = spectrum(xp, total)
    rank = found.rank(xp, tolerance)
    flat = xp.sum(found.values[:rank]) / _counted(mean_over, rank, min(total.shape))
    return with_base(block, lambda_, reweighted(xp, total, found, flat / found.values[:rank]))


def _counted(mean_over: str, rank: int, everything: int) -> int:
    return max(rank, 1) if mean_over == "rank" else everything


def _shares_of_cts(k: int, models: int, fraction: float) -> tuple[int, int]:
    """Return how many common directions there are, and how many of each task: in all no more than k."""
    common = int(k * fraction)
    # Python rounds halves to even, as the authors' code does; theirs may ask for more directions than there are.
    own = min(round((k - common) / models), k // models)
    return k - own * models, own


def _iso_cts_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    count = len(taking_part(parameters["weight"]))
    if not count or not takes_apart(parameters, form):
        return None
    (m, n), item = sides(form.shape), form.itemsize
    k = min(m, n)
    common, own = _shares_of_cts(k, count, parameters["common_space_fraction"])
    first = together(spectrum_work(m, n, item), triples_work(m, n, common, item), elements=m * n)
    one = together(
        Work(4.0 * common * m * n, m * n),
        spectrum_work(m, n, item, rank=own, how=parameters["svd"]),
        triples_work(m, n, own, item),
        elements=m * n,
    )
    each = together(times(count, one), elements=(m + n) * k) if own else Work(0, 0)
    return together(first, each, _orthogonal_work(m, n, k, item))


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_iso_cts_work,
    properties=("symmetric", "translates", "removable"),
    source=f"{_ISO}, algorithm 2; checked against the authors' code",
    example={"weight": 1.0},
)
def iso_cts(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    lambda_: Lambda = 1.0,
    common_space_fraction: Annotated[
        float, Param("share of the directions that is common to the tasks", minimum=0, maximum=1)
    ] = 0.8,
    mean_over: MeanOver = "all",
    embeddings: Embeddings = True,
    convolutions: Convolutions = False,
    tolerance: Tolerance = None,
    svd: HowDecomposed = "exact",
) -> Array:
    """Isotropic merging in common and task-specific subspaces.

    Of k = min(out, in) directions, about ``common_space_fraction k`` are the first singular triples of ``sum_t d_t``,
    with left vectors U_c; the rest is divided among the T tasks, so that it divides evenly. Each task gives the first
    triples of what is left of it outside the common space, ``d_t - U_c U_c^T d_t``. All left vectors side by side are
    replaced by their polar factor U*, right vectors likewise, all singular values by their mean:
    ``W = B + lambda mean(S) U* V*^T``. Tensors that are no matrices get ``B + lambda mean_t d_t``. With a fraction of
    1 this is ``iso_c``.

    Weights, tolerance, mean_over and lambda are as in ``iso_c``. ``svd: randomized`` speeds up the tasks' own parts.
    """
    if not is_whole(block):
        return with_mean(block, weight, lambda_)
    xp, count, k = block.xp, len(taking_part(weight)), min(sides(block.shape))
    if not count:
        return with_base(block, lambda_, None)
    common, own = _shares_of_cts(k, count, common_space_fraction)
    gathered = _Triples(xp, k)
    total = sum_of(block, weight)
    gathered.add(*_first_triples(xp, total, common, tolerance))
    del total
    if own:
        space, most = gathered.left, gathered.largest
        for w, matrix in task_matrices(block, weight):
            matrix = w * matrix
            matrix -= space @ (xp.matrix_transpose(space) @ matrix)
            # What rounding leaves of a task within the common space is no direction of its own.
            gathered.add(*_first_triples(xp, matrix, own, tolerance, svd, beside=most))
            del matrix
        del space
    if not gathered.count:
        return with_base(block, lambda_, None)
    divisor = _counted(mean_over, gathered.count, k)
    left, values, right = gathered.orthogonal()
    flat = xp.sum(values) / divisor
    return with_base(block, lambda_, left @ (flat * right))
