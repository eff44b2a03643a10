"""Kinds that add entrywise and Kronecker products of small factors (LyCORIS): LoHa, FedPara, LoKr."""

from __future__ import annotations

from itertools import product as pairs

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank, Rows
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.low_rank import RANK, check_rank
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

_ALPHA = Setting("alpha", "number", 8, "alpha: the change is scaled by alpha / r", patterns="alpha_pattern")
# An entrywise product of two products of rank r is a product of rank r^2; up to this one it is taken as that.
_LARGEST_RANK = 256

_HADAMARD = (
    form("out in", hada_w1_a="out r", hada_w1_b="r in", hada_w2_a="out r", hada_w2_b="r in"),
    form("out ...", hada_w1_a="out r", hada_w1_b="r columns", hada_w2_a="out r", hada_w2_b="r columns"),
    form(
        "out in h w",
        hada_w1_a="r out",
        hada_w1_b="r in",
        hada_t1="r r h w",
        hada_w2_a="r out",
        hada_w2_b="r in",
        hada_t2="r r h w",
    ),
    form(
        "out in k",
        hada_w1_a="r out",
        hada_w1_b="r in",
        hada_t1="r r k 1",
        hada_w2_a="r out",
        hada_w2_b="r in",
        hada_t2="r r k 1",
    ),
)


def _check_columns(layer: Layer) -> None:
    if layer.has("columns") and layer.length("columns") != layer.columns:
        raise layer.error(f"its factors have {layer.length('columns')} columns, and its weight {layer.columns}")


def _check_loha(layer: Layer) -> None:
    check_rank(layer, layer.length("r"))
    _check_columns(layer)


def _factors(layer: Layer, number: int) -> tuple[Array, Array]:
    """Return one of the products as factors ``[out, r]`` and ``[r, columns]``."""
    up, down = layer.array(f"hada_w{number}_a"), layer.array(f"hada_w{number}_b")
    core = f"hada_t{number}"
    if core not in layer:
        return up, down
    # FedPara's Proposition 3: T x_1 X x_2 Y, with a core over the kernel.
    return np.ascontiguousarray(up.T), _along(layer.array(core), down).reshape(len(up), -1)


def _along(core: Array, down: Array) -> Array:
    """Multiply the second axis of a core by a matrix: ``[r, r, ...]`` and ``[r, in]`` to ``[r, in, kernel]``."""
    product = np.tensordot(core.reshape(len(core), len(down), -1), down, axes=(1, 0))
    return product.transpose(0, 2, 1)


@parameterization(
    "LOHA",
    "LoHa",
    forms=_HADAMARD,
    settings=(RANK, _ALPHA),
    check=_check_loha,
    by_rows=True,
    source="Hyeon-Woo, Ye-Bin and Oh, FedPara, ICLR 2022, arXiv:2108.06098; Yeh et al., LyCORIS, ICLR 2024, "
    "arXiv:2309.14859",
)
def loha(layer: Layer) -> Change:
    """LoHa: ``W + s (A1 B1) . (A2 B2)``, entry by entry, with ``s = alpha / r``.

    The change's rank is up to r^2. Of convolutions the factors are those of the matrix ``[out, in x kernel]``, or, with
    ``use_effective_conv2d``, each product has a core over the kernel: ``T x_1 A x_2 B`` (FedPara, Proposition 3), of
    which A is stored transposed.
    """
    (first, below), (second, under) = _factors(layer, 1), _factors(layer, 2)
    rank = first.shape[1]
    first = first * (layer.number("alpha") / rank)
    if rank**2 <= min(_LARGEST_RANK, len(first), below.shape[1]):
        # (A1 B1) . (A2 B2) is the product of the factors' products, row by row and column by column.
        left = np.einsum("oi,oj->oij", first, second).reshape(len(first), -1)
        return LowRank(left, np.einsum("ic,jc->ijc", below, under).reshape(rank**2, -1))

    def delta(start: int, stop: int) -> Array:
        entrywise: Array = (first[start:stop] @ below) * (second[start:stop] @ under)
        return entrywise

    return Added(delta, [first, below, second, under])


_ADDED = Setting("added", "flag", False, "the product is added to the base's weight; else it takes its place")
_TANH = Setting("use_tanh", "flag", False, "each of the two products goes through tanh first")


@parameterization(
    "FEDPARA",
    "FedPara",
    forms=_HADAMARD,
    settings=(_ADDED, _TANH),
    check=_check_columns,
    by_rows=True,
    source="Hyeon-Woo, Ye-Bin and Oh, FedPara, ICLR 2022, arXiv:2108.06098, equation 2",
)
def fedpara(layer: Layer) -> Change:
    """FedPara: ``W = (X1 Y1^T) . (X2 Y2^T)``, the weight itself, or ``W0 + ...`` with ``added: true``.

    The layout is ours: names and shapes are those of LoHa (``hada_w1_a`` is X1, ``hada_w1_b`` is Y1 transposed), and
    there is no scale. As a change of a frozen base it is LoHa.
    """
    return _whole_product(layer, 0.0)


@parameterization(
    "PFEDPARA",
    "pFedPara",
    forms=_HADAMARD,
    settings=(_ADDED, _TANH),
    check=_check_columns,
    by_rows=True,
    source="Hyeon-Woo, Ye-Bin and Oh, FedPara, ICLR 2022, arXiv:2108.06098, section 2.3",
)
def pfedpara(layer: Layer) -> Change:
    """pFedPara: ``W = W1 . (W2 + 1)``: W1 is what all clients share, W2 what one keeps (inferred).

    The layout is FedPara's; W1 is the product of the parts with 1 in their names.
    """
    return _whole_product(layer, 1.0)


def _whole_product(layer: Layer, shift: float) -> Change:
    (first, below), (second, under) = _factors(layer, 1), _factors(layer, 2)
    bounded, added = layer.flag("use_tanh"), layer.flag("added")

    def rows(base: Array, start: int) -> Array:
        one, other = (left[start : start + len(base)] @ right for left, right in ((first, below), (second, under)))
        if bounded:
            one, other = np.tanh(one), np.tanh(other)
        product: Array = one * (other + shift)
        return base + product if added else product

    return Rows(rows, [first, below, second, under])


def _kronecker_forms() -> tuple[Form, ...]:
    outer = ({"lokr_w1": "a c"}, {"lokr_w1_a": "a r", "lokr_w1_b": "r c"})
    inner: tuple[tuple[str, dict[str, str]], ...] = (
        ("out in", {"lokr_w2": "b d"}),
        ("out in h w", {"lokr_w2": "b d h w"}),
        ("out in k", {"lokr_w2": "b d k"}),
        ("out ...", {"lokr_w2_a": "b r", "lokr_w2_b": "r dk"}),
        ("out in h w", {"lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r h w"}),
        ("out in k", {"lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r k 1"}),
    )
    return tuple(Form(weight, {**one, **other}) for one, (weight, other) in pairs(outer, inner))


def _check_lokr(layer: Layer) -> None:
    if layer.has("r"):
        check_rank(layer, layer.length("r"))
    if layer.whole("r") < 1:
        raise layer.error(f"the adapter's config gives it rank {layer.whole('r')}, by which alpha is divided")
    rows = layer.length("a") * layer.length("b")
    inner = layer.length("dk") if layer.has("dk") else layer.length("d")
    columns = layer.length("c") * inner
    wanted = layer.columns if layer.has("dk") else layer.shape[1]
    if rows != layer.rows or columns != wanted:
        raise layer.error(f"its Kronecker product is {rows} by {columns}, and its weight {layer.rows} by {wanted}")


@parameterization(
    "LOKR",
    "LoKr",
    forms=_kronecker_forms(),
    settings=(RANK, _ALPHA),
    check=_check_lokr,
    by_rows=True,
    source="Edalati et al., KronA, arXiv:2212.10650; Yeh et al., LyCORIS, ICLR 2024, arXiv:2309.14859",
)
def lokr(layer: Layer) -> Change:
    """LoKr: ``W + s (W1 kron W2)``, with ``s = alpha / r``; each of the two may itself be a product of rank r.

    With both whole, PEFT still divides by the ``r`` of the config. Of convolutions W2 holds the kernel: whole, as a
    product ``[b, r] [r, d x kernel]``, or with a core over the kernel. Where PEFT keeps W2 of a one-dimensional
    convolution whole, its ``torch.kron`` puts W1's axes within W2's, other than everywhere else; so does this.
    """
    outer = layer.array("lokr_w1") if "lokr_w1" in layer else layer.array("lokr_w1_a") @ layer.array("lokr_w1_b")
    outer = outer * (layer.number("alpha") / layer.whole("r"))
    if "lokr_w2" in layer:
        inner = layer.array("lokr_w2")
    elif "lokr_t2" in layer:
        up, down, core = layer.array("lokr_w2_a"), layer.array("lokr_w2_b"), layer.array("lokr_t2")
        inner = np.tensordot(up, _along(core, down), axes=(0, 0))
    else:
        inner = layer.array("lokr_w2_a") @ layer.array("lokr_w2_b")
    kernel_last = "lokr_w2" in layer and inner.ndim == 3
    flat = inner.reshape(len(inner), -1)

    def delta(start: int, stop: int) -> Array:
        places = np.arange(start, stop)
        if kernel_last:
            major, minor = inner[places // len(outer)], outer[places % len(outer)]
            product: Array = np.einsum("ndk,nc->ndck", major, minor)
        else:
            product = np.einsum("nc,nd->ncd", outer[places // len(flat)], flat[places % len(flat)])
        return product.reshape(stop - start, -1)

    return Added(delta, [outer, flat])
