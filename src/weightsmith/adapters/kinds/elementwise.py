"""Kinds that multiply the base's entries, one by one or all by one number."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Change, LowRank, Rows
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


@parameterization(
    "HUT",
    "HUT",
    forms=(form("out in", hut_A="out r", hut_B="r in"),),
    settings=(Setting("hut_residual", "flag", True, "1 is added to the product: start from A B = 0"),),
    by_rows=True,
    source="HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation, "
    "arXiv:2409.13501 (from its abstract)",
)
def hut(layer: Layer) -> Change:
    """HUT: ``W * (1 + A B)``, entry by entry, with A ``[out, r]`` and B ``[r, in]``.

    Entries of the base that are 0 stay 0. Inferred from the abstract: without ``hut_residual`` it is ``W * (A B)``,
    for products that start as ones. The tensors' names are ours.
    """
    product = LowRank(layer.array("hut_A"), layer.array("hut_B"))
    one = float(layer.flag("hut_residual"))

    def rows(base: Array, start: int) -> Array:
        return base * (one + product.delta(start, start + len(base)))

    return Rows(rows, [product.left, product.right])


@parameterization(
    "MAP",
    "MAP",
    forms=(
        form("out in", lora_A="r in", lora_B="out r", map_alpha="1", map_beta="1"),
        form("out in", lora_A="r in", lora_B="out r", map_alpha="", map_beta=""),
    ),
    by_rows=True,
    source="MAP: Revisiting Weight Decomposition for Low-Rank Adaptation, arXiv:2505.23094 "
    "(from the abstract and summaries)",
)
def map_(layer: Layer) -> Change:
    """MAP: ``a W / ||W|| + b (B A) / ||B A||``, with one Frobenius norm per matrix and two trained numbers, a and b.

    ``map_alpha`` is a, which starts as ``||W||``; ``map_beta`` is b. A scale of the increment would have no effect. An
    increment of zeros, as at the start, has no direction and adds nothing. Inferred: the paper's start of b and the
    names of the tensors are not known.
    """
    product = LowRank(layer.array("lora_B"), layer.array("lora_A"))
    squares = math.fsum(float(np.einsum("ij,ij->", tile, tile)) for _, tile in layer.weight.tiles())
    own, added = math.sqrt(squares), _product_norm(product)
    keep = float(layer.array("map_alpha").reshape(())) / own if own else 1.0
    add = float(layer.array("map_beta").reshape(())) / added if added else 0.0

    def rows(base: Array, start: int) -> Array:
        return keep * base + add * product.delta(start, start + len(base))

    return Rows(rows, [product.left, product.right])


def _product_norm(product: LowRank) -> float:
    """Return the Frobenius norm of a product that is never formed: that of the triangles of its factors."""
    left: Array = np.linalg.qr(product.left).R
    right: Array = np.linalg.qr(product.right.T).R
    return float(np.linalg.norm(left @ right.T))
