"""Kinds that add a product of two low-rank factors, and those that scale its rows afterwards."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Change, LowRank, Rows, Whole
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

RANK = Setting("r", "whole", 8, "the rank", patterns="rank_pattern")
ALPHA = Setting("lora_alpha", "number", 8, "alpha: the change is scaled by alpha / r", patterns="alpha_pattern")
STABILISED = Setting("use_rslora", "flag", False, "the change is scaled by alpha / sqrt(r) (Kalajdzievski, 2023)")
MAGNITUDE = "lora_magnitude_vector"


def check_rank(layer: Layer, rank: int) -> None:
    """Check that a layer's factors have the rank that its config gives them."""
    stated = layer.number("r")
    if stated != rank:
        raise layer.error(f"the adapter's config gives it rank {stated:g}, and its factors have {rank}")


def scale(layer: Layer, rank: int) -> float:
    """Return s: ``alpha / r``, or ``alpha / sqrt(r)`` where it is rank-stabilised."""
    return layer.number("lora_alpha") / (math.sqrt(rank) if layer.flag("use_rslora") else rank)


def _check(layer: Layer) -> None:
    check_rank(layer, layer.length("r"))
    if layer.flag("use_dora") != (MAGNITUDE in layer):
        has, lacks = ("a magnitude", "does not say so") if MAGNITUDE in layer else ("no magnitude", "says so")
        raise layer.error(f"it has {has}, and the adapter's config {lacks} (use_dora)")


@parameterization(
    "LORA",
    "LoRA",
    forms=(
        form(
            "out in",
            lora_A="r in",
            lora_B="out r",
            optional={MAGNITUDE: "out", "lora_B.bias": "out"},
        ),
        form(
            "out in h w",
            lora_A="r in h w",
            lora_B="out r 1 1",
            optional={MAGNITUDE: "1 out 1 1", "lora_B.bias": "out"},
        ),
        form("out in k", lora_A="r in k", lora_B="out r 1", optional={MAGNITUDE: "1 out 1"}),
        form(
            "out in d h w",
            lora_A="r in d h w",
            lora_B="out r 1 1 1",
            optional={MAGNITUDE: "1 out 1 1 1", "lora_B.bias": "out"},
        ),
        form("v d", lora_embedding_A="r v", lora_embedding_B="d r", optional={MAGNITUDE: "d"}),
    ),
    settings=(
        RANK,
        ALPHA,
        STABILISED,
        Setting("use_dora", "flag", False, "rows are brought to trained norms (DoRA)"),
    ),
    refuses={
        "alora_invocation_tokens": "it acts on some tokens alone (aLoRA), so no plain weights equal it",
        "layer_replication": "its layers are copies of the base's; build them first, with slices in a recipe",
    },
    changes_bias=lambda layer: "lora_B.bias" in layer,
    bias=lambda layer, bias: bias + scale(layer, layer.length("r")) * layer.array("lora_B.bias"),
    check=_check,
    whole=lambda layer: "lora_embedding_A" in layer and MAGNITUDE in layer,
    source="Hu et al., LoRA, ICLR 2022, arXiv:2106.09685; Liu et al., DoRA, ICML 2024, arXiv:2402.09353",
)
def lora(layer: Layer) -> Change:
    """LoRA: ``W + s B A``, with ``s = alpha / r``, or ``alpha / sqrt(r)`` if rank-stabilised.

    With ``use_dora`` each row is brought to a trained norm: ``m (W + s B A) / ||W + s B A||``, the norm over a row,
    that is over all inputs of an output. Of convolutions A is a kernel and B a pointwise one; of embeddings the factors
    are stored transposed, and the norm is over a column: over all tokens.
    """
    if "lora_embedding_A" in layer:
        down, up = layer.array("lora_embedding_A"), layer.array("lora_embedding_B")
        table = LowRank(np.ascontiguousarray(down.T) * scale(layer, len(down)), np.ascontiguousarray(up.T))
        return _with_column_norms(table, layer.array(MAGNITUDE)) if MAGNITUDE in layer else table
    down, up = layer.array("lora_A"), layer.array("lora_B")
    rank = len(down)
    product = LowRank(up.reshape(-1, rank) * scale(layer, rank), down.reshape(rank, -1))
    return with_norms(product, layer.array(MAGNITUDE).reshape(-1)) if MAGNITUDE in layer else product


def _with_column_norms(product: LowRank, magnitude: Array) -> Change:
    """Return a product that is added, after which every column is brought to a norm: ``[columns]``."""

    def whole(base: Array) -> Array:
        changed = product.rows(base, 0)
        norms = np.sqrt(np.einsum("ij,ij->j", changed, changed))
        changed *= np.divide(magnitude, norms, out=np.ones(len(norms)), where=norms > 0)
        return changed

    return Whole(whole, [product.left, product.right, magnitude])


def with_norms(product: LowRank, magnitude: Array) -> Change:
    """Return a product that is added, after which every row is brought to a norm: ``[out]``."""

    def rows(base: Array, start: int) -> Array:
        changed = product.rows(base, start)
        norms = np.sqrt(np.einsum("ij,ij->i", changed, changed))
        # A row of zeros has no direction; it stays as it is, whatever its magnitude.
        factors = np.divide(magnitude[start : start + len(base)], norms, out=np.ones(len(base)), where=norms > 0)
        changed *= factors[:, None]
        return changed

    return Rows(rows, [product.left, product.right, magnitude])
