"""Kinds made of structured matrices: rotations in blocks, tensor rings, Kronecker products."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Added, Change, Rows, Whole
from weightsmith.adapters.forms import Shape, form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

# Further ones are lost in rounding, for any rotation that a series is good for.
_MOST_TERMS = 64
_PERMUTATIONS = "the permutations were drawn at random, and again at every merge in training"


def _check_poet(layer: Layer) -> None:
    layer.require(_PERMUTATIONS, "perm_in", "perm_out")
    terms = layer.whole("neumann_terms")
    if not 0 <= terms <= _MOST_TERMS:
        raise layer.error(f"adapter_config.json gives neumann_terms as {terms}; 0 to {_MOST_TERMS} make sense")
    joint = "oft_R" in layer
    lengths = {"oft_R": layer.rows + layer.columns} if joint else {"oft_R_out": layer.rows, "oft_R_in": layer.columns}
    for part, length in lengths.items():
        count, side = layer[part][0], _side(layer, part)
        if count * side != length or (joint and layer.rows % side):
            raise layer.error(f"{part} holds {count} blocks of side {side}, and the weight is {list(layer.shape)}")


def _side(layer: Layer, part: str) -> int:
    """Return the side of the skew-symmetric blocks of which a part holds the upper triangles."""
    entries = layer[part][1]
    side = (1 + math.isqrt(1 + 8 * entries)) // 2
    if side * (side - 1) // 2 != entries:
        raise layer.error(f"{part} has {entries} entries a block, which are no upper triangle of a square")
    return side


# The inverses and the places of the triangles are buffers of the authors' layer that say nothing new.
_ORDERS = {
    "perm_in": "in",
    "perm_out": "out",
    "perm_in_inv": "in",
    "perm_out_inv": "out",
    "rows": "e",
    "cols": "e",
}


@parameterization(
    "POET",
    "POET",
    forms=(
        form("out in", oft_R="n t", optional=_ORDERS),
        form("out in", oft_R_out="n1 t1", oft_R_in="n2 t2", optional=_ORDERS),
    ),
    settings=(
        Setting(
            "neumann_terms", "whole", 5, "terms of the series that stands for the inverse; 0 for the inverse itself"
        ),
        Setting("poet_transposed", "flag", False, "rotations are taken transposed, in the layout of two tensors too"),
        Setting("poet_permuted", "flag", False, "the base holds weights as POET's layers do, in permuted order"),
    ),
    places=tuple(_ORDERS),
    check=_check_poet,
    whole=True,
    source="Qiu et al., Reparameterized LLM Training via Orthogonal Equivalence Transformation, NeurIPS 2025, "
    "arXiv:2506.08001; the authors' repository Sphere-AI-Lab/poet",
)
def poet(layer: Layer) -> Change:
    """POET's orthogonal equivalence: ``P_out R_out P_out' W P_in R_in P_in'``, with block-diagonal rotations R.

    Each block is ``I + 2 (Q + Q^2 + ...)``, the Neumann series of Cayley's ``(I + Q)(I - Q)^-1`` with
    ``neumann_terms`` terms in all (5 in the authors' code: up to ``2 Q^4``), for a skew-symmetric Q whose upper
    triangle is stored, row by row. The series is orthogonal only nearly: it is what was trained, and what is folded.

    Two layouts, both the authors': ``oft_R_out`` and ``oft_R_in`` as above, and ``oft_R`` with the output's blocks
    first and then the input's, whose layer takes both rotations transposed: ``P_out R_out' P_out' W P_in R_in' P_in'``.
    ``perm_in`` and ``perm_out`` must be there, and row i of ``P x`` is row ``perm[i]`` of x. POET's own checkpoints of
    the second layout hold W already permuted: say ``poet_permuted``. (A later POETLinear of theirs has the first
    layout and takes the rotations transposed: say ``poet_transposed`` as well.) Biases stay, as in the first layout and
    in all merges; the forward pass of POETLinear rotates them too, which is for layers without.
    """
    terms = layer.whole("neumann_terms")
    if "oft_R" in layer:
        blocks = _rotations(layer.array("oft_R"), _side(layer, "oft_R"), terms)
        count = layer.rows // blocks.shape[1]
        out_blocks, in_blocks = blocks[:count], blocks[count:]
    else:
        out_blocks = _rotations(layer.array("oft_R_out"), _side(layer, "oft_R_out"), terms)
        in_blocks = _rotations(layer.array("oft_R_in"), _side(layer, "oft_R_in"), terms)
    if "oft_R" in layer or layer.flag("poet_transposed"):
        out_blocks, in_blocks = np.swapaxes(out_blocks, 1, 2), np.swapaxes(in_blocks, 1, 2)
    out_order, in_order = _permutation(layer, "perm_out", layer.rows), _permutation(layer, "perm_in", layer.columns)
    permuted = layer.flag("poet_permuted")

    def changed(base: Array) -> Array:
        # Permuted, place order[i] of the weight stands for row i.
        inner = base if permuted else base[np.argsort(out_order)][:, np.argsort(in_order)]
        rows, columns = inner.shape
        inner = np.matmul(out_blocks, inner.reshape(len(out_blocks), -1, columns)).reshape(rows, columns)
        split = inner.reshape(rows, len(in_blocks), -1)
        inner = np.einsum("onk,nkj->onj", split, in_blocks, optimize=True).reshape(rows, columns)
        result: Array = inner[out_order][:, in_order]
        return result

    return Whole(changed, [out_blocks, in_blocks])


def _permutation(layer: Layer, part: str, length: int) -> Array:
    order = layer.integers(part, length)
    if len(np.unique(order)) != length:
        raise layer.error(f"{part} is no order of {length}: some come twice")
    return order


def _rotations(triangles: Array, side: int, terms: int) -> Array:
    """Return Cayley's rotations of skew-symmetric matrices, or the start of their series: ``[blocks, side, side]``."""
    skew = np.zeros((len(triangles), side, side))
    rows, columns = np.triu_indices(side, 1)
    skew[:, rows, columns] = triangles
    skew -= np.swapaxes(skew, 1, 2)
    one = np.eye(side)
    if terms == 0:
        # I - Q is never singular: a skew-symmetric matrix has imaginary eigenvalues alone.
        return np.swapaxes(np.linalg.solve(np.swapaxes(one - skew, 1, 2), np.swapaxes(one + skew, 1, 2)), 1, 2)
    total, power = np.broadcast_to(one, skew.shape).copy(), one
    for _ in range(terms - 1):
        power = power @ skew
        total += 2 * power
    return total


_CORES = 6
# Elements on the way through the cores, at most: in times the largest rank.
_WORK = 1 << 26


def _cores(layer: Layer, stem: str) -> list[str]:
    return [part for number in range(1, _CORES + 1) if (part := f"{stem}_{number}") in layer]


def _check_tlora(layer: Layer) -> None:
    shapes: dict[str, list[Shape]] = {}
    for stem, side in (("tlora_A", layer.columns), ("tlora_B", layer.rows), ("tlora_C", layer.columns)):
        parts = _cores(layer, stem)
        layer.require("cores are counted from 1 on", *(f"{stem}_{number}" for number in range(1, len(parts) + 1)))
        shapes[stem] = [layer[part] for part in parts]
        found = math.prod(shape[0] for shape in shapes[stem])
        if parts and found != side:
            raise layer.error(f"the cores of {stem} have sides whose product is {found}, and {side} is needed")
    if bool(shapes["tlora_B"]) != bool(shapes["tlora_C"]):
        layer.require("a residual has cores for its rows and for its columns", "tlora_B_1", "tlora_C_1")
    for ring, name in ((shapes["tlora_A"], "tlora_A"), (shapes["tlora_B"] + shapes["tlora_C"], "tlora_B and tlora_C")):
        ranks = [shape[-2:] for shape in ring]
        if any(before[1] != after[0] for before, after in zip(ranks, ranks[1:] + ranks[:1], strict=True)):
            raise layer.error(f"the ring of {name} is open: its ranks are {[list(pair) for pair in ranks]}")
        if ring and layer.columns * max(map(max, ranks)) > _WORK:
            raise layer.error(f"the cores of {name} have ranks too large to multiply out: {[one for one, _ in ranks]}")


def _ring(stem: str, shape: str, first: int) -> dict[str, str]:
    return {f"{stem}_{number}": shape.format(before=number - 1, this=number) for number in range(first, _CORES + 1)}


_TRANSFORM, _ROW_CORES, _COLUMN_CORES = (
    "i{this} i{this} t{before} t{this}",
    "o{this} b{before} b{this}",
    "p{this} c{before} c{this}",
)


@parameterization(
    "TLORA",
    "TLoRA",
    forms=(
        form(
            "out in",
            tlora_A_1="i1 i1 t0 t1",
            optional=_ring("tlora_A", _TRANSFORM, 2)
            | _ring("tlora_B", _ROW_CORES, 1)
            | _ring("tlora_C", _COLUMN_CORES, 1),
        ),
        form(
            "out in",
            tlora_B_1="o1 b0 b1",
            tlora_C_1="p1 c0 c1",
            optional=_ring("tlora_B", _ROW_CORES, 2) | _ring("tlora_C", _COLUMN_CORES, 2),
        ),
    ),
    check=_check_tlora,
    by_rows=True,
    source="Tao et al., Transformed Low-rank Adaptation via Tensor Decomposition, ICCV 2025, arXiv:2501.08727",
)
def tlora(layer: Layer) -> Change:
    """TLoRA: ``W T + R``, a full-rank transform T ``[in, in]`` that is a tensor-ring matrix, and a tensor ring R.

    T has at ``(i_1 ... i_D, j_1 ... j_D)`` the entry ``trace(A_1[i_1, j_1] A_2[i_2, j_2] ... A_D[i_D, j_D])``, and R
    ``trace(B_1[i_1] ... B_D[i_D] C_1[j_1] ... C_D[j_D])``, the first index the fastest, as in the paper. Cores are
    ``tlora_A_1`` ``[i, i, r, r']``, ..., ``tlora_B_1`` ``[o, r, r']``, ... for rows and ``tlora_C_1`` ``[p, r, r']``,
    ... for columns, up to 6 of each; without A, T is the identity, and without B and C, R is zero. Inferred: formulas
    are the paper's, the names of the tensors are ours.
    """
    # With the first index fastest, the last core stands for the slowest; a trace is that of the transposed product.
    transform = [layer.array(part).transpose(3, 0, 1, 2) for part in reversed(_cores(layer, "tlora_A"))]
    residual = [layer.array(part).transpose(2, 0, 1)[:, None, :, :] for part in reversed(_cores(layer, "tlora_C"))]
    residual += [layer.array(part).transpose(2, 0, 1)[:, :, None, :] for part in reversed(_cores(layer, "tlora_B"))]
    arrays = [*transform, *residual]
    step = max(_WORK // (8 * layer.columns * max(core.shape[3] for core in arrays)), 1)

    def rows(base: Array, start: int) -> Array:
        pieces = []
        for first in range(0, len(base), step):
            piece = base[first : first + step]
            which = np.arange(start + first, start + first + len(piece))
            changed = _times_ring(piece, transform) if transform else piece
            pieces.append(changed + _ring_rows(which, residual) if residual else changed)
        return np.concatenate(pieces)

    return Rows(rows, arrays)


def _times_ring(tile: Array, cores: list[Array]) -> Array:
    """Multiply rows ``[n, in]`` by the matrix of a ring, one index at a time; the matrix is never formed."""
    total = np.zeros_like(tile)
    for outer in range(cores[0].shape[0]):
        # [n, columns that are done, rank, columns that are left]
        state = tile[:, None, None, :]
        for number, core in enumerate(cores):
            core = core[outer : outer + 1] if number == 0 else core
            core = core[..., outer : outer + 1] if number == len(cores) - 1 else core
            n, done, rank, left = state.shape
            split = state.reshape(n, done, rank, core.shape[1], left // core.shape[1])
            state = np.einsum("ndril,rijs->ndjsl", split, core, optimize=True)
            state = state.reshape(n, done * core.shape[2], core.shape[3], -1)
        total += state.reshape(tile.shape)
    return total


def _ring_rows(which: Array, cores: list[Array]) -> Array:
    """Return some rows of the matrix of a ring: ``[n, in]``."""
    indices = np.unravel_index(which, [core.shape[1] for core in cores])
    total: Array = np.zeros(1)
    for outer in range(cores[0].shape[0]):
        state = np.ones((len(which), 1, 1))
        for number, (core, index) in enumerate(zip(cores, indices, strict=True)):
            core = core[outer : outer + 1] if number == 0 else core
            core = core[..., outer : outer + 1] if number == len(cores) - 1 else core
            state = np.einsum("ncr,rnps->ncps", state, core[:, index], optimize=True)
            state = state.reshape(len(which), -1, core.shape[3])
        total = total + state[:, :, 0]
    return total


_RULES = {"kada_rule": "t a c", "kada_rule_left": "t a s", "kada_rule_right": "t s c"}


def _check_kadaptation(layer: Layer) -> None:
    whole = "kada_rule" in layer or "kada_rule" in layer.shared
    if not whole:
        layer.require("it is trained, and shared by layers", "kada_rule_left", "kada_rule_right")
    terms = layer.length("t")
    rules = ["kada_rule"] if whole else ["kada_rule_left", "kada_rule_right"]
    shapes = [layer[rule] for rule in rules]
    fits = all(len(shape) == 3 and shape[0] == terms for shape in shapes)
    fits = fits and (whole or shapes[0][2] == shapes[1][1])
    sides = (shapes[0][1] * layer.length("p"), shapes[-1][2] * layer.length("q")) if fits else None
    if sides != (layer.columns, layer.rows):
        held = {part: list(layer[part]) for part in (*rules, "kada_left", "kada_right")}
        raise layer.error(f"{held} do not make a matrix of {layer.columns} inputs and {layer.rows} outputs")


@parameterization(
    "KADAPTATION",
    "KAdaptation",
    forms=(form("out in", kada_left="t p r", kada_right="t r q", optional=_RULES | {"kada_bias": "out"}),),
    shared=tuple(_RULES),
    settings=(Setting("scale", "number", 1.0, "what the update is multiplied by, its bias not"),),
    check=_check_kadaptation,
    changes_bias=lambda layer: "kada_bias" in layer,
    bias=lambda layer, bias: bias + layer.array("kada_bias"),
    source="He et al., Parameter-efficient Model Adaptation for Vision Transformers, AAAI 2023, arXiv:2203.16329; the "
    "authors' repository eric-ai-lab/PEViT",
)
def kadaptation(layer: Layer) -> Change:
    """KAdaptation: ``W + s (sum_i A_i (x) u_i v_i)'``, Kronecker products of small matrices and low-rank ones.

    As in the authors' layer, which computes ``x H``, the sum H is ``[in, out]``: ``kada_left`` holds u
    ``[t, p, r]``, ``kada_right`` v ``[t, r, q]``, and A ``[t, a, c]`` is ``kada_rule`` or the product of
    ``kada_rule_left`` and ``kada_rule_right``, for each layer or once for all; ``a p = in``, ``c q = out``.
    ``kada_bias`` is added to the bias. The authors' scale is ``5 alpha / r``, and must be given; their released layer
    uses the query's u and v for the value as well, so give the value's layer the query's. They keep q, k and v in one
    weight, on which an adapter for one of them has no place: split it first.
    """
    left, right = layer.array("kada_left"), layer.array("kada_right")
    if "kada_rule" in layer or "kada_rule" in layer.shared:
        rule = layer.array("kada_rule")
    else:
        rule = layer.array("kada_rule_left") @ layer.array("kada_rule_right")
    factor, inner = layer.number("scale"), right.shape[2]

    def delta(start: int, stop: int) -> Array:
        big, small = np.divmod(np.arange(start, stop), inner)
        own = np.einsum("tpr,trn->tpn", left, right[:, :, small], optimize=True)
        result: Array = factor * np.einsum("tan,tpn->nap", rule[:, :, big], own, optimize=True)
        return result.reshape(stop - start, -1)

    return Added(delta, [left, right, rule])
