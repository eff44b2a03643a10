"""Interpolation along arcs instead of chords.

Everything here is a combination of the inputs whose coefficients follow from their inner products alone. So one
sweep gives the Gram matrix in float64, and one more makes the result: no vector is ever held whole, and angles
keep their digits whatever the dtype of the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.methods.block import Array, Block, Form, Scope, Statistic
from weightsmith.methods.linear import Share, shares_of, weighted_sum, weights_have_a_sum
from weightsmith.methods.registry import Granularity, Param, PerModel, method
from weightsmith.methods.statistics import gram

Gram = list[list[float]]
Weight = Annotated[float, Param("share of this model")]

# Below this length a vector has no direction (mergekit's bound for slerp).
_NO_LENGTH = 1e-8
# Beyond this cosine SLERP takes the straight line, as everywhere in the field.
_PARALLEL = 0.9995
# Below this sine opposed vectors are so but for the rounding of float32.
_OPPOSED = 1e-3
# A sum of unit vectors shorter than this is rounding: inner products hold 16 digits, lengths half as many.
_CANCELLED = 1e-7


def _with_base(scope: Scope) -> Statistic[Gram]:
    return (yield from gram(lambda block: (block.base, *block.models)))


def _task_vectors(scope: Scope) -> Statistic[Gram]:
    return (yield from gram(lambda block: block.deltas))


def slerp_coefficients(products: Gram, t: float) -> tuple[float, float]:
    """Return the factors of two vectors, from their Gram matrix ``[2][2]``, at ``t`` between them."""
    lengths = [math.sqrt(products[i][i]) for i in range(2)]
    scale = math.prod(length if length > _NO_LENGTH else 1.0 for length in lengths)
    cosine = max(-1.0, min(1.0, products[0][1] / scale))
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@method(
    base="required",
    minimum=1,
    maximum=1,
    statistic=_with_base,
    properties=("idempotent",),
    source="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; per tensor as in mergekit",
    example={"t": 0.4},
)
def slerp(
    block: Block,
    products: Gram,
    *,
    t: Annotated[float, Param("0 is the base, 1 the model")],
) -> Array:
    """Spherical interpolation between the base and one model.

    Each tensor is one vector; with the angle a between base B and model W,
    ``[sin((1-t) a) B + sin(t a) W] / sin a``, on vectors of their own length. Where |cos a| > 0.9995 the
    straight line is taken: fine-tunes of one base are mostly that close, and there it is ``linear``.
    """
    return weighted_sum(slerp_coefficients(products, t), (block.base, *block.models))


def _nuslerp_reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    if parameters["nuslerp_flatten"]:
        return "elements"
    return "tensor" if parameters["nuslerp_row_wise"] else "rows"


def _nuslerp_statistic(scope: Scope, *, nuslerp_flatten: bool) -> Statistic[Gram | None]:
    return (yield from _task_vectors(scope)) if nuslerp_flatten else None


@method(
    base="optional",
    minimum=2,
    maximum=2,
    statistic=_nuslerp_statistic,
    reads=_nuslerp_reads,
    properties=("idempotent", "symmetric", "removable", "translates"),
    source="mergekit (nuslerp)",
    example={"weight": 1.0},
)
def nuslerp(
    block: Block,
    products: Gram | None,
    *,
    weight: PerModel[Weight],
    nuslerp_flatten: Annotated[bool, Param("treat a tensor as one vector")] = True,
    nuslerp_row_wise: Annotated[
        bool, Param("without flatten: vectors along the first axis instead of the last")
    ] = False,
) -> Array:
    """Spherical interpolation of two models, or of their task vectors where there is a base.

    ``t = w_2 / (w_1 + w_2)``, 0.5 where the sum vanishes. Only the ratio of the weights counts. Without
    flatten every vector along the last axis turns by its own angle (with row_wise, along the first). Where
    vectors are parallel, or opposed to within a thousandth of a radian, the straight line is taken.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    one, other = block.deltas
    if products is None:
        axis = 0 if nuslerp_row_wise else -1
        result = _slerp_vectors(block.xp, one, other, t, axis)
    else:
        result = weighted_sum(_arc(products, t), (one, other))
    return result if block.base is None else block.base + result


def _arc(products: Gram, t: float) -> tuple[float, float]:
    """Return the factors of two vectors.

    The straight line only where they are parallel to the last digit, or opposed: there the arc has no plane,
    and between vectors of unequal length it would grow without bound.
    """
    lengths = [math.sqrt(products[i][i]) or 1.0 for i in range(2)]
    cosine = max(-1.0, min(1.0, products[0][1] / (lengths[0] * lengths[1])))
    # The sine of this very angle: then what rounding does to it falls out of the quotients.
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine < (1e-8 if cosine > 0 else _OPPOSED):
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def _slerp_vectors(xp: Any, one: Array, other: Array, t: float, axis: int) -> Array:
    if one.ndim == 0:
        return (1.0 - t) * one + t * other
    wide_one, wide_other = xp.astype(one, xp.float64), xp.astype(other, xp.float64)

    def dot(left: Array, right: Array) -> Array:
        return xp.sum(left * right, axis=axis, keepdims=True)

    lengths = xp.sqrt(dot(wide_one, wide_one)) * xp.sqrt(dot(wide_other, wide_other))
    cosine = dot(wide_one, wide_other) / xp.where(lengths == 0, xp.ones_like(lengths), lengths)
    cosine = xp.clip(cosine, -1.0, 1.0)
    angle = xp.acos(cosine)
    sine = xp.sin(angle)
    straight = (sine < 1e-8) | ((sine < _OPPOSED) & (cosine < 0))
    safe = xp.where(straight, xp.ones_like(sine), sine)
    first = xp.where(straight, xp.full_like(sine, 1.0 - t), xp.sin((1.0 - t) * angle) / safe)
    second = xp.where(straight, xp.full_like(sine, t), xp.sin(t * angle) / safe)
    return xp.astype(first * wide_one + second * wide_other, one.dtype)


def _unit_gram(products: Gram, smallest: float) -> tuple[list[float], Gram]:
    """Return the lengths of vectors, and the inner products of their directions (0 for one without)."""
    lengths = [math.sqrt(max(products[i][i], 0.0)) for i in range(len(products))]
    scale = [1.0 / length if length > smallest else 0.0 for length in lengths]
    return lengths, [[products[i][j] * scale[i] * scale[j] for j in range(len(products))] for i in range(len(products))]


def _dot(one: Sequence[float], products: Gram, other: Sequence[float]) -> float:
    return math.fsum(one[i] * products[i][j] * other[j] for i in range(len(one)) for j in range(len(other)))


def _length(vector: Sequence[float], products: Gram) -> float:
    return math.sqrt(max(_dot(vector, products, vector), 0.0))


def _tangents(point: Sequence[float], products: Gram, *, project: bool, smallest: float) -> list[list[float]]:
    """Return, in coefficients of the directions, every direction seen from a point on the sphere.

    The logarithm ``a / sin a (u - cos a m)`` keeps distances; the plain projection ``u - cos a m`` does not. What is
    opposed to the point lies in no direction from it.
    """
    found = []
    for i in range(len(products)):
        unit = [1.0 if j == i else 0.0 for j in range(len(products))]
        cosine = max(-1.0, min(1.0, _dot(unit, products, point)))
        angle = math.acos(cosine)
        sine = math.sin(angle)
        nowhere = angle < smallest or sine <= 0.0 or (cosine < 0.0 and sine < _OPPOSED)
        if products[i][i] == 0.0 or (nowhere and not project):
            found.append([0.0] * len(products))
            continue
        factor = 1.0 if project else angle / sine
        found.append([factor * (u - cosine * p) for u, p in zip(unit, point, strict=True)])
    return found


def _step(point: Sequence[float], tangent: Sequence[float], products: Gram) -> list[float]:
    """Walk from a point on the sphere along a tangent by its length."""
    length = _length(tangent, products)
    if length == 0.0:
        return list(point)
    return [math.cos(length) * p + math.sin(length) / length * v for p, v in zip(point, tangent, strict=True)]


@method(
    base="optional",
    minimum=1,
    statistic=_task_vectors,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable", "translates"),
    source="mergekit (multislerp), by Allan Goddard; with the logarithm of the sphere",
    compat={"mergekit": {"tangent": "projection"}},
    example={"weight": 1.0},
)
def multislerp(
    block: Block,
    products: Gram,
    *,
    weight: PerModel[Weight],
    normalize_weights: Annotated[bool, Param("divide the weights by their sum")] = True,
    eps: Annotated[float, Param("shorter vectors have no direction", minimum=0)] = 1e-8,
    tangent: Annotated[Literal["log", "projection"], Param("how directions are seen from their mean")] = "log",
) -> Array:
    """Barycentre of several models on the sphere, in one step from their mean direction.

    With directions u_i and m = sum w_i u_i, normalised: every u_i is taken to the tangent space at m
    (logarithm), averaged there with the weights, taken back (exponential), and given the mean length
    ``sum w_i |x_i|``. With a base, on task vectors. mergekit projects instead of taking the logarithm, and
    then the weighted sum of the tangents is zero by construction and the result is m itself
    (``tangent: projection``). Where there is no mean direction (vectors of zero, directions that cancel) the
    result is the weighted sum.
    """
    shares = [w / sum(weight) for w in weight] if normalize_weights else list(weight)
    lengths, directions = _unit_gram(products, eps)
    length = math.fsum(w * x for w, x in zip(shares, lengths, strict=True))
    size = _length(shares, directions)
    # Not "<=": the length is NaN where an input is not finite, which the straight sum keeps in its place.
    if not size > max(eps, _CANCELLED) * math.fsum(map(abs, shares)):
        coefficients = shares
    else:
        mean = [w / size for w in shares]
        tangents = _tangents(mean, directions, project=tangent == "projection", smallest=eps)
        step = [math.fsum(w * v[j] for w, v in zip(shares, tangents, strict=True)) for j in range(len(shares))]
        point = _step(mean, step, directions)
        coefficients = [length * p / x if x > eps else 0.0 for p, x in zip(point, lengths, strict=True)]
    result = weighted_sum(coefficients, block.deltas)
    return result if block.base is None else block.base + result


def _karcher_reads(parameters: Mapping[str, Any], form: Form) -> Granularity:
    return "rows" if parameters["filter_wise"] else "elements"


def _karcher_statistic(scope: Scope, *, filter_wise: bool) -> Statistic[Gram | None]:
    return None if filter_wise else (yield from _task_vectors(scope))


@method(
    minimum=1,
    statistic=_karcher_statistic,
    reads=_karcher_reads,
    check=weights_have_a_sum,
    properties=("idempotent", "symmetric", "removable"),
    source="Karcher, Riemannian center of mass, Comm. Pure Appl. Math. 1977; per tensor as in mergekit",
)
def karcher(
    block: Block,
    products: Gram | None,
    *,
    weight: PerModel[Share] = (1.0,),
    filter_wise: Annotated[bool, Param("a mean for every vector along the last axis")] = False,
    max_iter: Annotated[int, Param("most steps", minimum=1)] = 10,
    tol: Annotated[float, Param("stop when a step is shorter, in radians", minimum=0)] = 1e-5,
) -> Array:
    """Mean direction of the models on the sphere, with their mean length.

    From the normalised mean of the directions, steps along the mean of the logarithms until they are shorter
    than tol. Both means are weighted; only the ratio of the weights counts. The iteration runs on coefficients of the
    inputs in float64; mergekit runs it on tensors in the files' dtype, which in bfloat16 loses small angles, and knows
    equal weights alone. Zero tensors count in the length alone. Where directions cancel, the result is the plain mean.
    With filter_wise all this holds for every vector along the last axis by itself.
    """
    shares = shares_of(weight)
    if products is None:
        return _karcher_of_vectors(block.xp, block.models, shares, max_iter, tol)
    lengths, directions = _unit_gram(products, 0.0)
    start = [share if length > 0 else 0.0 for share, length in zip(shares, lengths, strict=True)]
    living = math.fsum(start)
    size = _length(start, directions)
    mean = math.fsum(share * length for share, length in zip(shares, lengths, strict=True))
    # As above, NaN included.
    if not size > _CANCELLED * living:
        return weighted_sum(shares, block.models)
    point = [s / size for s in start]
    for _ in range(max_iter):
        tangents = _tangents(point, directions, project=False, smallest=tol)
        step = [
            math.fsum(s * part for s, part in zip(start, column, strict=True)) / living
            for column in zip(*tangents, strict=True)
        ]
        if _length(step, directions) < tol:
            break
        point = _step(point, step, directions)
        size = _length(point, directions)
        point = [p / size for p in point]
    return weighted_sum([mean * p / x if x > 0 else 0.0 for p, x in zip(point, lengths, strict=True)], block.models)


def _karcher_of_vectors(xp: Any, models: Sequence[Array], shares: Sequence[float], max_iter: int, tol: float) -> Array:
    """Return the weighted Karcher mean of every row ``[r, c]``: the same iteration, all rows at once."""
    count = range(len(models))
    vectors = [xp.astype(model, xp.float64) for model in models]
    products = [[xp.sum(vectors[i] * vectors[j], axis=-1, keepdims=True) for j in range(i + 1)] for i in count]
    lengths = [xp.sqrt(products[i][i]) for i in count]
    zero, one = xp.zeros_like(lengths[0]), xp.ones_like(lengths[0])
    scale = [xp.where(length > 0, 1.0 / xp.where(length > 0, length, one), zero) for length in lengths]
    directions = [[products[max(i, j)][min(i, j)] * scale[i] * scale[j] for j in count] for i in count]

    def along(point: Sequence[Array]) -> list[Array]:
        return [sum((directions[i][j] * point[j] for j in count), zero) for i in count]

    def size_of(point: Sequence[Array]) -> Array:
        square = sum((part * other for part, other in zip(point, along(point), strict=True)), zero)
        return xp.sqrt(xp.where(square < 0, zero, square))

    start = [xp.where(length > 0, share * one, zero) for share, length in zip(shares, lengths, strict=True)]
    living = sum(start, zero)
    size = size_of(start)
    turned = size > _CANCELLED * living
    point = [s / xp.where(turned, size, one) for s in start]
    pulling = [s / xp.where(turned, living, one) for s in start]
    for _ in range(max_iter):
        cosines = [xp.clip(cosine, -1.0, 1.0) for cosine in along(point)]
        angles = [xp.acos(cosine) for cosine in cosines]
        sines = [xp.sin(angle) for angle in angles]
        somewhere = [
            (angle >= tol) & (sine > 0) & ((cosine > 0) | (sine >= _OPPOSED))
            for cosine, angle, sine in zip(cosines, angles, sines, strict=True)
        ]
        pulls = [
            share * xp.where(known, angle / xp.where(known, sine, one), zero)
            for share, known, angle, sine in zip(pulling, somewhere, angles, sines, strict=True)
        ]
        back = sum((pull * cosine for pull, cosine in zip(pulls, cosines, strict=True)), zero)
        step = [pull - back * p for pull, p in zip(pulls, point, strict=True)]
        size = size_of(step)
        moving = turned & (size > 0) & (size >= tol)
        sine = xp.sin(size) / xp.where(moving, size, one)
        moved = [xp.cos(size) * p + sine * s for p, s in zip(point, step, strict=True)]
        size = size_of(moved)
        point = [xp.where(moving, m / xp.where(moving, size, one), p) for m, p in zip(moved, point, strict=True)]
    mean = sum((share * length for share, length in zip(shares, lengths, strict=True)), zero)
    factors = [
        xp.where(turned, mean * p * inverse, share * one)
        for share, p, inverse in zip(shares, point, scale, strict=True)
    ]
    return xp.astype(weighted_sum(factors, vectors), models[0].dtype)
