"""KnOTS: task matrices in a basis that they share, merged there entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from weightsmith.methods.block import Array, Block, Form, Scope, Statistic, Work
from weightsmith.methods.deltas import (
    Density,
    Lambda,
    Normalize,
    Scoped,
    Trim,
    Weight,
    joined,
    keeping,
    kept_of,
    largest_share,
)
from weightsmith.methods.matrices import empty, joint_basis, joint_basis_work, sides, times, together
from weightsmith.methods.registry import Param, PerModel, method
from weightsmith.methods.statistics import Cut, boundaries
from weightsmith.methods.task_matrices import (
    Convolutions,
    Embeddings,
    Tolerance,
    as_matrix,
    is_whole,
    reads_matrices,
    takes_apart,
    taking_part,
    with_base,
)

Concatenate = Annotated[
    Literal["in", "out"], Param("the axis along which task matrices are laid side by side; the other gives the basis")
]
Coordinates = Annotated[
    Literal["scaled", "unscaled"], Param("merge S V_t, as the authors' code does, or V_t, as their paper has it")
]
Elect = Annotated[bool, Param("only entries of the elected sign count, as in TIES; otherwise all do")]
_KNOTS = "Stoica et al., Model merging with SVD to tie the knots, ICLR 2025, arXiv:2410.19735"


class _Aligned:
    """The task matrices of a block in their common basis, each computed when it is asked for.

    Attributes:
        rank: of all task matrices side by side: how many rows their coordinates have.
        columns: how many columns the coordinates have.
        size: how many coordinates each model has.
    """

    def __init__(
        self,
        block: Block,
        models: Sequence[int],
        *,
        concatenate: str,
        coordinates: str,
        tolerance: float | None,
    ) -> None:
        """Find the basis.

        Args:
            block: a whole tensor.
            models: indices of the models that take part, at least one.
            concatenate: parameter of the method.
            coordinates: parameter of the method.
            tolerance: parameter of the method.
        """
        self._block = block
        self._models = models
        self._flips = concatenate == "out"
        self.columns = sides(block.shape)[0 if self._flips else 1]
        side = sides(block.shape)[1 if self._flips else 0]
        self._basis, values = joint_basis(
            block.xp, (self._task(i) for i in models), len(models), (side, self.columns), tolerance
        )
        self._scale = values[:, None] if coordinates == "unscaled" else None
        self.rank = values.shape[0]
        self.size = self.rank * self.columns

    def turned(self, tensor: Array) -> Array:
        """Return a tensor as the matrix that the basis is on the left of."""
        matrix = as_matrix(self._block.xp, tensor)
        return self._block.xp.matrix_transpose(matrix) if self._flips else matrix

    def _task(self, model: int) -> Array:
        return self.turned(self._block.deltas[model])

    def stretches(self) -> Iterator[slice]:
        """Yield the columns that are worked on at a time: of all models together, no more than two matrices have.

        Products differ in their last digits with the columns that they are taken over: so these are always the same.
        """
        width = -(-self.columns // -(-len(self._models) // 2))
        for start in range(0, self.columns, width):
            yield slice(start, min(start + width, self.columns))

    def _of(self, task: Array, columns: slice) -> Array:
        found = self._block.xp.matrix_transpose(self._basis) @ task[:, columns]
        return found if self._scale is None else found / self._scale

    def _in(self, columns: slice, model: int) -> Array:
        return self._of(self._task(model), columns)

    def coordinates(self, model: int) -> Iterator[Array]:
        """Yield a model's coordinates, stretch by stretch: ``[rank, columns of the stretch]``."""
        task = self._task(model)
        for columns in self.stretches():
            yield self._of(task, columns)

    def merged(self, merge: Callable[[Callable[[int], Array], slice], Array]) -> Array:
        """Return what coordinates become, as a matrix in the tensor's own axes.

        Args:
            merge: is given a function from a model to its coordinates in some columns, and these columns.
        """
        xp = self._block.xp
        result = empty(xp, sides(self._block.shape), self._basis)
        target = self.turned(result)
        for columns in self.stretches():
            found = merge(partial(self._in, columns), columns)
            target[:, columns] = self._basis @ (found if self._scale is None else self._scale * found)
        return result


def _threshold(xp: Any, aligned: _Aligned, model: int, share: float) -> float:
    """Return the least magnitude that belongs to the share of a model's coordinates that are largest."""
    kept = kept_of(aligned.size, share)
    if share >= 1 or kept == 0:
        return 0.0 if kept else math.inf
    parts = [xp.reshape(xp.abs(part), (-1,)) for part in aligned.coordinates(model)]
    ordered = xp.concat(parts)
    del parts
    ordered = xp.sort(ordered, stable=False)
    return float(ordered[aligned.size - kept])


def _absolute(xp: Any, values: Callable[[int], Iterator[Array]], model: int) -> Iterator[Array]:
    return map(xp.abs, values(model))


def _boundaries(
    scope: Scope,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    concatenate: str,
    coordinates: str,
    tolerance: float | None,
    embeddings: bool,
    convolutions: bool,
    trim_scope: str,
) -> Statistic[Trim | None]:
    """Find what is trimmed away; None for a single matrix, of which it is found when it is taken apart."""
    if all(share >= 1 for share in density):
        return keeping([Cut(-1.0, -1)] * len(density))
    if trim_scope == "tensor":
        given = {"embeddings": embeddings, "convolutions": convolutions}
        if scope.form is not None and takes_apart(given, scope.form):
            return None
        return (yield from largest_share(scope, density))
    models = taking_part(weight)
    if not models:
        return keeping([Cut(-1.0, -1)] * len(density))

    def magnitudes(block: Block) -> tuple[int, list[Callable[[], Iterator[Array]]]]:
        if is_whole(block):
            aligned = _Aligned(block, models, concatenate=concatenate, coordinates=coordinates, tolerance=tolerance)
            return aligned.size, [partial(_absolute, block.xp, aligned.coordinates, i) for i in models]
        return math.prod(block.shape), [
            partial(_absolute, block.xp, lambda i: iter([block.deltas[i]]), i) for i in models
        ]

    found = yield from boundaries(magnitudes, lambda size: [kept_of(size, density[i]) for i in models])
    cuts = dict(zip(models, found, strict=True))
    return keeping([cuts.get(i, Cut(math.inf, -1)) for i in range(len(weight))])


def _work(parameters: Mapping[str, Any], form: Form, passes: int) -> Work | None:
    """Return the cost of the basis and of going through the coordinates some times."""
    count = len(taking_part(parameters["weight"]))
    if not count or not takes_apart(parameters, form):
        return None
    k, length = sides(form.shape) if parameters["concatenate"] == "in" else sides(form.shape)[::-1]
    task, item = k * length, form.itemsize
    basis = joint_basis_work(k, length, count, item)
    # Of each of two matrices' worth of coordinates: these, weighted ones, masks, and what is divided by.
    through = Work(2.0 * (passes * count + 1) * k * task, k * k + 2 * task + 7 * task)
    return together(basis, through)


def _knots_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    trims = any(share < 1 for share in parameters["density"])
    work = _work(parameters, form, 1 + trims)
    if work is None or not trims or parameters["trim_scope"] == "tensor":
        return work
    # Sixteen bits of the boundary are found at a time, and matrices are taken apart for each.
    return times(1 + form.itemsize // 2, work)


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_knots_work,
    statistic=_boundaries,
    scope="trim_scope",
    selects=True,
    also=("knots_ties",),
    properties=("symmetric", "translates", "removable"),
    source=f"{_KNOTS}; checked against the authors' code",
    example={"weight": 1.0, "density": 0.4},
)
def knots(
    block: Block,
    trim: Trim | None,
    *,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (0.2,),
    lambda_: Lambda = 1.0,
    elect: Elect = True,
    normalize: Normalize = True,
    trim_scope: Scoped = "tensor",
    concatenate: Concatenate = "in",
    coordinates: Coordinates = "scaled",
    embeddings: Embeddings = False,
    convolutions: Convolutions = True,
    tolerance: Tolerance = None,
) -> Array:
    """KnOTS: TIES on the coordinates of task matrices in a common basis.

    With ``[d_1 | ... | d_T] = U S [V_1^T | ... | V_T^T]``, every task matrix has coordinates ``S V_t^T = U^T d_t``.
    Each is trimmed to the density share of its entries largest in magnitude, a sign is elected for every entry, those
    that agree are averaged (TIES), and ``W = B + lambda U merged``. Without trimming and election the basis drops out,
    and this is task arithmetic at the price of a decomposition. Made for adapters, whose task vectors have little in
    common entry by entry; works on any. The concatenation is never formed, nor are more than two matrices' worth of
    coordinates held.

    The paper's figures have lambda searched (0.6 for eight image tasks), density 0.2, and trim over the whole model:
    ``trim_scope: model``. That takes every matrix apart three times, so that the default is the tensor. Entries are
    counted in the coordinates: where the rank is less than the side, there are fewer than weights. The paper writes the
    merge of V_t, its code merges S V_t and so do its numbers; the latter is the default (coordinates). Task matrices
    may be laid side by side along their outputs instead (``concatenate: out``), and that is cheaper where a matrix has
    more rows than columns. Other tensors, embeddings and heads are merged by TIES as they are; the paper leaves them
    out, for adapters have none. Its code makes a bias a further column of its matrix; here it is a tensor of its own.
    """
    models = taking_part(weight)
    if not is_whole(block) or not models:
        deltas = block.deltas if trim is None else trim.apply(block)
        return block.base + lambda_ * joined(block.xp, deltas, weight, consensus=elect, normalize=normalize)
    xp = block.xp
    aligned = _Aligned(block, models, concatenate=concatenate, coordinates=coordinates, tolerance=tolerance)
    if not aligned.size:
        return with_base(block, lambda_, None)
    if trim is None:
        least = {i: _threshold(xp, aligned, i, density[i]) for i in models}
    else:
        least = {i: trim.outer[i].value for i in models}

    def merge(coordinates_of: Callable[[int], Array], columns: slice) -> Array:
        parts = []
        for i in models:
            part = coordinates_of(i)
            parts.append(part * (xp.abs(part) >= least[i]))
        return joined(xp, parts, [weight[i] for i in models], consensus=elect, normalize=normalize)

    return with_base(block, lambda_, aligned.merged(merge))


def _knots_dare_work(parameters: Mapping[str, Any], form: Form, models: int) -> Work | None:
    return _work(parameters, form, 1)


@method(
    base="required",
    minimum=1,
    reads=reads_matrices,
    work=_knots_dare_work,
    random=True,
    also=("knots_dare_ties",),
    properties=("symmetric", "translates", "removable"),
    source=f"{_KNOTS}, with DARE, arXiv:2311.03099; checked against the authors' code but for its random numbers",
    example={"weight": 1.0, "density": 0.4},
)
def knots_dare(
    block: Block,
    *,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Annotated[float, Param("chance with which a coordinate is kept", minimum=0, maximum=1)]] = (0.2,),
    lambda_: Lambda = 1.0,
    rescale: Annotated[bool, Param("divide what is kept by its chance")] = True,
    elect: Elect = True,
    normalize: Normalize = True,
    concatenate: Concatenate = "in",
    coordinates: Coordinates = "scaled",
    embeddings: Embeddings = False,
    convolutions: Convolutions = True,
    tolerance: Tolerance = None,
) -> Array:
    """KnOTS: DARE on the coordinates of task matrices in a common basis, then the sign election of TIES.

    As ``knots``, but coordinates are not trimmed: each is kept with the chance density, and divided by it. The paper's
    language models have density 0.2 and lambda 0.4. Without election (``elect: false``, ``normalize: false``) this is
    DARE in the basis. Masks depend on seed, tensor, model name and position in the coordinates alone.
    """
    models = taking_part(weight)
    xp = block.xp

    def thinned(i: int, part: Array, drawn: Array) -> Array:
        part = part * (drawn < density[i])
        return part / density[i] if rescale and density[i] > 0 else part

    if not is_whole(block) or not models:
        deltas = [thinned(i, delta, block.draw(i)) for i, delta in enumerate(block.deltas)]
        return block.base + lambda_ * joined(xp, deltas, weight, consensus=elect, normalize=normalize)
    aligned = _Aligned(block, models, concatenate=concatenate, coordinates=coordinates, tolerance=tolerance)
    if not aligned.size:
        return with_base(block, lambda_, None)

    def merge(coordinates_of: Callable[[int], Array], columns: slice) -> Array:
        parts = []
        for i in models:
            drawn = aligned.turned(block.draw(i))[: aligned.rank, columns]
            parts.append(thinned(i, coordinates_of(i), drawn))
        return joined(xp, parts, [weight[i] for i in models], consensus=elect, normalize=normalize)

    return with_base(block, lambda_, aligned.merged(merge))
