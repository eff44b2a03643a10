"""Kinds that add a product of two low-rank factors, and those that scale its rows afterwards."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank, Scaled, Whole
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer, Weight
from weightsmith.adapters.norms import ratio, row_norms, with_norms
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

RANK = Setting("r", "whole", 8, "the rank", patterns="rank_pattern")
ALPHA = Setting("lora_alpha", "number", 8, "alpha: the change is scaled by alpha / r", patterns="alpha_pattern")
STABILISED = Setting("use_rslora", "flag", False, "the change is scaled by alpha / sqrt(r) (Kalajdzievski, 2023)")
MAGNITUDE = "lora_magnitude_vector"
_DIAGONAL = "lora_diag"
_EMBEDDING = "lora_embedding_A"
# Starts that take the part out of the base that the factors hold at first, and can be found again from the base alone.
_RESIDUAL = ("pissa", "olora")
_UNKNOWN_RESIDUAL = {
    "pissa_niter": "found from random directions that no file holds",
    "corda": "found from activations that the adapter does not hold",
    "lora_ga": "found from gradients that the adapter does not hold",
    "loftq": "what a quantised base lost",
}


def check_rank(layer: Layer, rank: int) -> None:
    """Check that a layer's factors have the rank that its config gives them."""
    stated = layer.number("r")
    if stated != rank:
        raise layer.error(f"the adapter's config gives it rank {stated:g}, and its factors have {rank}")


def scale(layer: Layer, rank: int) -> float:
    """Return s: ``alpha / r``, or ``alpha / sqrt(r)`` where it is rank-stabilised."""
    return layer.number("lora_alpha") / (math.sqrt(rank) if layer.flag("use_rslora") else rank)


def _check(layer: Layer) -> None:
    _check_start(layer)
    if layer.flag("use_dora") != (MAGNITUDE in layer):
        has, lacks = ("a magnitude", "does not say so") if MAGNITUDE in layer else ("no magnitude", "says so")
        raise layer.error(f"it has {has}, and the adapter's config {lacks} (use_dora)")
    if layer.has("er"):
        _check_experts(layer)
        return
    if layer.has("part"):
        _check_blocks(layer)
        return
    check_rank(layer, layer.length("r"))
    if layer.flag("kasa_config") != (_DIAGONAL in layer):
        has, lacks = ("singular values", "is not KaSA's") if _DIAGONAL in layer else ("no singular values", "is KaSA's")
        raise layer.error(f"it has {has} ({_DIAGONAL}), and the adapter's config {lacks} (kasa_config)")
    if _DIAGONAL in layer and layer.length("r") >= min(layer.rows, layer.columns):
        raise layer.error(f"KaSA takes {layer.length('r')} singular values out of {list(layer.shape)}: all of them")


def _check_start(layer: Layer) -> None:
    start = str(layer.text("init_lora_weights")).lower()
    for name, reason in _UNKNOWN_RESIDUAL.items():
        if start.startswith(name):
            raise layer.error(
                f"the adapter was trained on its base less a start ({start}) that is {reason}; fold it into that base "
                "(the residual model, saved beside it) with init_lora_weights: true in adapter_config.json, or convert "
                "it with PEFT (save_pretrained's path_initial_model_for_weight_conversion)"
            )
    plain = "lora_A" in layer and len(layer["lora_A"]) == 2 and not layer.has("er") and MAGNITUDE not in layer
    if start in _RESIDUAL and not plain:
        raise layer.error(f"init_lora_weights: {start} is known of linear layers without DoRA alone")


def _check_experts(layer: Layer) -> None:
    count, rank = layer.length("e"), layer.whole("r")
    if layer.length("er") != count * rank:
        raise layer.error(
            f"the adapter's config gives it rank {rank}, and its factors have {layer.length('er')}, which is not that "
            f"of {count} experts"
        )


def _check_blocks(layer: Layer) -> None:
    """Check factors of which one is block-diagonal, and stored without its zeros."""
    (rank, part), (rows, block) = layer["lora_A"], layer["lora_B"]
    check_rank(layer, rank)
    if rank > min(layer.rows, layer.columns):
        raise layer.error(f"its rank is {rank}, and its weight {list(layer.shape)}")
    wide, deep = layer.columns // part, rank // block
    whole = wide * part == layer.columns and deep * block == rank and rank % max(wide, 1) == rows % max(deep, 1) == 0
    if not whole or 1 not in (wide, deep):
        raise layer.error(
            f"lora_A {[rank, part]} and lora_B {[rows, block]} are no factors of {list(layer.shape)} of which one is "
            "block-diagonal"
        )


@parameterization(
    "LORA",
    "LoRA",
    forms=(
        form("out in", lora_A="r part", lora_B="out block", when="use_bdlora"),
        form(
            "out in",
            lora_A="r in",
            lora_B="out r",
            optional={MAGNITUDE: "out", "lora_B.bias": "out", _DIAGONAL: "r"},
        ),
        form(
            "out in h w",
            lora_A="r in h w",
            lora_B="out r 1 1",
            optional={MAGNITUDE: "1 out 1 1", "lora_B.bias": "out"},
        ),
        form("out in k", lora_A="r in k", lora_B="out r 1", optional={MAGNITUDE: "1 out 1", "lora_B.bias": "out"}),
        form(
            "out in d h w",
            lora_A="r in d h w",
            lora_B="out r 1 1 1",
            optional={MAGNITUDE: "1 out 1 1 1", "lora_B.bias": "out"},
        ),
        form("v d", lora_embedding_A="r v", lora_embedding_B="d r", optional={MAGNITUDE: "d"}),
        form("e out in", lora_A="er in", lora_B="out er", when="target_parameters"),
    ),
    settings=(
        RANK,
        ALPHA,
        STABILISED,
        Setting("use_dora", "flag", False, "rows are brought to trained norms (DoRA)"),
        Setting("init_lora_weights", "word", "true", "how training began: `pissa` and `olora` took part of the base"),
        Setting("kasa_config", "set", False, "KaSA: the base loses its r smallest singular values"),
        Setting("use_bdlora", "set", False, "BD-LoRA: one of the factors is block-diagonal"),
    ),
    refuses={
        "alora_invocation_tokens": "it acts on some tokens alone (aLoRA), so no plain weights equal it",
        "arrow_config": "a router mixes its experts anew for every token (Arrow)",
        "use_qalora": "its base is quantised in groups (GPTQ), and is trained with them (QALoRA)",
    },
    changes_bias=lambda layer: "lora_B.bias" in layer,
    bias=lambda layer, bias: bias + scale(layer, layer.length("r")) * layer.array("lora_B.bias"),
    check=_check,
    whole=lambda layer: _DIAGONAL in layer or str(layer.text("init_lora_weights")).lower() in _RESIDUAL,
    ignored=("lora_monteclora_sampler", "lora_velora_embed"),
    source="Hu et al., LoRA, ICLR 2022, arXiv:2106.09685; Liu et al., DoRA, ICML 2024, arXiv:2402.09353; Wang et al., "
    "KaSA, arXiv:2412.06071",
)
def lora(layer: Layer) -> Change:
    """LoRA: ``W + s B A``, with ``s = alpha / r``, or ``alpha / sqrt(r)`` if rank-stabilised.

    Of convolutions A is a kernel and B a pointwise one. PEFT lets A read all channels of a convolution in groups: no
    kernel in groups equals that, and its shapes are refused. (PEFT's A has no dilation; a dilated layer computes
    something else in PEFT than its weights folded.) Of embeddings the factors are stored transposed.

    With ``use_dora`` each row is brought to a trained norm: ``m (W + s B A) / ||W + s B A||``, the norm over a row,
    that is over all inputs of an output; of embeddings PEFT takes it over all tokens, a number for every column.

    ``target_parameters`` names parameters that are no module's weight, such as those of experts, ``[experts, out, in]``
    or ``[experts, in, out]``: expert e has rows ``e r`` to ``(e + 1) r`` of A, and every (number of experts)-th column
    of B from column e on. Which parameter a factor is for, and which axis is the input, follow from shapes.

    A base that lost its first factors when training began is formed again: with ``init_lora_weights: pissa``, it is W
    without its r largest singular values, and with ``olora``, without s times the part within its first r columns:
    ``W - s B0 A0 + s B A``. That is what PEFT does when it loads such an adapter. Other such starts are refused.

    With ``layer_replication`` the base's layers are stacked by ranges first; each of the new ones is changed by itself.

    KaSA takes the r smallest singular values out of W and adds ``s B diag(d) A``; BD-LoRA stores one factor, that is
    block-diagonal, as its blocks alone. VeLoRA and MonteCLoRA change training alone, and MiCA, EVA and orthogonal
    starts leave the base as it is.
    """
    if layer.has("er"):
        return _of_experts(layer)
    if _EMBEDDING in layer:
        down, up = layer.array(_EMBEDDING), layer.array("lora_embedding_B")
        product = LowRank(np.ascontiguousarray(down.T) * scale(layer, len(down)), np.ascontiguousarray(up.T))
        return _embeddings_with_norms(layer, product) if MAGNITUDE in layer else product
    down, up = layer.array("lora_A"), layer.array("lora_B")
    rank = len(down)
    if layer.has("part"):
        down, up = _full(down, layer.columns // down.shape[1]), _full(up, rank // up.shape[1])
    left = up.reshape(-1, rank) * scale(layer, rank)
    if _DIAGONAL in layer:
        return _without_least(layer, LowRank(left * layer.array(_DIAGONAL), down), rank)
    product = LowRank(left, down.reshape(rank, -1))
    if MAGNITUDE in layer:
        return with_norms(product, layer.array(MAGNITUDE).reshape(-1), layer.weight if layer.has_weight else None)
    start = str(layer.text("init_lora_weights")).lower()
    return _without_start(layer, product, start) if start in _RESIDUAL else product


def _full(blocks: Array, count: int) -> Array:
    """Return a block-diagonal matrix for its n blocks, one below the other: ``[rows, columns]``."""
    rows, columns = blocks.shape
    full = np.zeros((rows, columns * count))
    height = rows // count
    for i in range(count):
        full[i * height : (i + 1) * height, i * columns : (i + 1) * columns] = blocks[i * height : (i + 1) * height]
    return full


def factors_of_experts(layer: Layer) -> tuple[Array, Array]:
    """Return the factors of a change of experts: ``[experts, out, rank]``, scaled, and ``[experts, rank, in]``."""
    count, rank = layer.length("e"), layer.whole("r")
    down = layer.array("lora_A").reshape(count, rank, -1)
    up = layer.array("lora_B")
    return np.ascontiguousarray(up.reshape(len(up), rank, count).transpose(2, 0, 1)) * scale(layer, rank), down


def _of_experts(layer: Layer) -> Change:
    up, down = factors_of_experts(layer)
    left, right = (down.transpose(0, 2, 1), up.transpose(0, 2, 1)) if layer.weight.transposed else (up, down)

    def delta(start: int, stop: int) -> Array:
        product: Array = left[start:stop] @ right[start:stop]
        return product.reshape(stop - start, -1)

    return Added(delta, [down, up])


def _svd(layer: Layer, matrix: Array) -> tuple[Array, Array, Array]:
    """Return singular vectors and values, of a base that has them."""
    if not np.isfinite(matrix).all():
        raise layer.error("its weight in the base holds numbers that are not finite")
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _without_least(layer: Layer, product: LowRank, count: int) -> Change:
    """Return a product that is added, after the base lost its smallest singular values."""

    def whole(base: Array) -> Array:
        left, values, right = _svd(layer, base)
        least: Array = (left[:, -count:] * values[-count:]) @ right[-count:]
        return base - least + product.delta(0, len(base))

    return Whole(whole, [product.left, product.right])


def _without_start(layer: Layer, product: LowRank, start: str) -> Change:
    """Return a product that is added, after the base lost what its factors held at first.

    Signs of singular vectors, and of a basis, cancel in what is lost.
    """
    rank = product.rank

    def whole(base: Array) -> Array:
        if start == "pissa":
            left, values, right = _svd(layer, base)
            lost: Array = (left[:, :rank] * values[:rank]) @ right[:rank]
        else:
            # W = Q R, of which PEFT takes s Q_r R_r out: s times the part of W within its first r columns.
            basis = np.linalg.qr(base[:, :rank])[0]
            lost = scale(layer, rank) * (basis @ (basis.T @ base))
        return base - lost + product.delta(0, len(base))

    return Whole(whole, [product.left, product.right])


def _embeddings_with_norms(layer: Layer, product: LowRank) -> Change:
    """Return DoRA of embeddings: every column ``[v]`` is brought to a norm."""
    columns = Weight(layer.weight.tensor, transposed=not layer.weight.transposed)
    norms = row_norms(columns, product.turned())
    return Scaled(product, columns=ratio(layer.array(MAGNITUDE), norms))


_INITIAL = Setting("init_r", "whole", 12, "the rank at first, by which the change is divided")


def _check_adalora(layer: Layer) -> None:
    initial, rank = layer.whole("init_r"), layer.length("r")
    if rank > initial or initial < 1 or (rank < initial and not layer.flag("rank_pattern")):
        raise layer.error(
            f"the adapter's config gives it rank {initial} at first, and no rank_pattern that takes some away, and its "
            f"factors have {rank}"
        )
    if layer.has("columns") and layer.length("columns") != layer.columns:
        raise layer.error(f"lora_A has {layer.length('columns')} columns, and its weight {layer.columns}")


@parameterization(
    "ADALORA",
    "AdaLoRA",
    forms=(
        form("out in", lora_A="r in", lora_E="r 1", lora_B="out r"),
        form("out in h w", lora_A="r columns", lora_E="r 1", lora_B="out r"),
    ),
    settings=(
        _INITIAL,
        replace(ALPHA, about="alpha: the change is scaled by alpha / init_r", patterns=None),
        Setting("rank_pattern", "set", False, "which singular values are left, by layer"),
    ),
    check=_check_adalora,
    may_be_empty=True,
    source="Zhang et al., AdaLoRA, ICLR 2023, arXiv:2303.10512",
)
def adalora(layer: Layer) -> Change:
    """AdaLoRA: ``W + s P diag(l) Q``, with ``s = alpha / (init_r + 1e-5)``.

    As training takes singular values away, the scale stays that of the first rank: PEFT divides by ``init_r``
    whatever is left, adds 1e-5 to it, and saves the rows that its ``rank_pattern`` keeps alone; a layer may have none.
    An alpha of 0 or less stands for the rank itself.
    """
    columns = layer.array("lora_A") * layer.array("lora_E")
    left = layer.array("lora_B")
    alpha = layer.number("lora_alpha")
    factor = (alpha if alpha > 0 else left.shape[1]) / (layer.whole("init_r") + 1e-5)
    return LowRank(left * factor, columns)
