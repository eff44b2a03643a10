"""Kinds that add a product of two factors, which are put together in other ways than LoRA's."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.low_rank import check_rank
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.adapters.torch_random import normals
from weightsmith.checkpoint.tensor import Array

# DeLoRA's norms are no smaller than this.
_LEAST_NORM = 1e-4


def _check_rank(layer: Layer) -> None:
    check_rank(layer, layer.length("r"))


@parameterization(
    "DELORA",
    "DeLoRA",
    forms=(form("out in", delora_A="r in", delora_B="out r", delora_lambda="1", delora_w_norm="in"),),
    settings=(Setting("r", "whole", 8, "the rank", patterns="rank_pattern"),),
    check=_check_rank,
    source="Bini et al., DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, ICLR 2025, arXiv:2503.18225",
)
def delora(layer: Layer) -> LowRank:
    """DeLoRA: ``W + (lambda / r) B Xi A diag(n)``, with ``Xi = diag(1 / (||b_i|| ||a_i||))``.

    Each of the r products has norm 1 before ``lambda / r`` bounds it: ``a_i`` are A's rows and ``b_i`` B's columns,
    whose norms count as 1e-4 at least. ``n``, the norms of the base's columns when training began, is in the file. The
    paper scales by the norm of the whole base, PEFT by those of its columns.
    """
    down, up = layer.array("delora_A"), layer.array("delora_B")
    norms = [np.maximum(np.linalg.norm(factor, axis=axis), _LEAST_NORM) for factor, axis in ((down, 1), (up, 0))]
    strength = layer.array("delora_lambda") / len(down)
    return LowRank(up * (strength / (norms[0] * norms[1])), down * layer.array("delora_w_norm"))


def _check_gralora(layer: Layer) -> None:
    _check_rank(layer)
    blocks, general = layer.length("k"), layer.length("h") if "gralora_A_general" in layer else 0
    if layer.whole("gralora_k") != blocks:
        raise layer.error(
            f"the adapter's config gives it {layer.number('gralora_k'):g} blocks (gralora_k), and it has {blocks}"
        )
    if layer.whole("hybrid_r") != general:
        raise layer.error(
            f"the adapter's config gives its plain LoRA rank {layer.number('hybrid_r'):g} (hybrid_r), and it has "
            f"{general}"
        )
    if layer.length("r") % blocks:
        raise layer.error(f"its rank {layer.length('r')} is no multiple of its {blocks} blocks")


_GRALORA = {"gralora_A": "k i r", "gralora_B": "k r o"}


@parameterization(
    "GRALORA",
    "GraLoRA",
    forms=(
        Form("k*o k*i", _GRALORA),
        Form("k*o k*i", {**_GRALORA, "gralora_A_general": "h k*i", "gralora_B_general": "k*o h"}),
    ),
    settings=(
        Setting("r", "whole", 32, "the rank of the blocks together"),
        Setting("hybrid_r", "whole", 0, "the rank of a plain LoRA beside the blocks"),
        Setting("alpha", "number", 64, "the change is scaled by alpha / (r + hybrid_r)"),
        Setting("gralora_k", "whole", 2, "blocks to a side"),
    ),
    check=_check_gralora,
    elements=lambda layer: layer.length("k") * sum(part.size for part in layer.parts.values()),
    source="Jung et al., GraLoRA: Granular Low-Rank Adaptation, NeurIPS 2025, arXiv:2505.20355",
)
def gralora(layer: Layer) -> LowRank:
    """GraLoRA: the weight in k by k blocks, each with a LoRA of rank ``r / k``: ``W_pq + s B_pq A_pq``.

    The scale is ``s = alpha / (r + hybrid_r)``. ``gralora_A [k, in / k, r]`` holds what block column q reads, and
    ``gralora_B [k, r, out / k]`` what block row p writes; of the r of each, ``A_pq`` is the p-th part of ``A_q``, and
    ``B_pq`` the q-th part of ``B_p``. The whole change has rank ``k r`` at most. With ``hybrid_r`` a plain LoRA is
    added, with the same scale.
    """
    down, up = layer.array("gralora_A"), layer.array("gralora_B")
    blocks, inner, rank = down.shape
    outer, share = up.shape[2], rank // blocks
    # Axes: what writes, what reads, the rank of one block.
    left = np.zeros((blocks, outer, blocks, blocks, share))
    right = np.zeros((blocks, blocks, share, blocks, inner))
    for writer in range(blocks):
        left[writer, :, writer] = up[writer].reshape(blocks, share, outer).transpose(2, 0, 1)
        for reader in range(blocks):
            right[writer, reader, :, reader] = down[reader][:, writer * share : (writer + 1) * share].T
    left = left.reshape(blocks * outer, blocks * rank)
    right = right.reshape(blocks * rank, blocks * inner)
    general = 0
    if "gralora_A_general" in layer:
        general = layer.length("h")
        left = np.concatenate([left, layer.array("gralora_B_general")], axis=1)
        right = np.concatenate([right, layer.array("gralora_A_general")])
    return LowRank(left * (layer.number("alpha") / (rank + general)), right)


_BANK = "vblora_vector_bank"


def _check_vblora(layer: Layer) -> None:
    _check_rank(layer)
    if "vblora_logits_A" in layer:
        chosen, vectors = layer.whole("topk"), layer.length("n")
        if not 0 < chosen <= vectors:
            raise layer.error(f"adapter_config.json has it mix {chosen} vectors (topk), and {_BANK} holds {vectors}")
    elif layer.length("k") != layer.length("w") + 1:
        raise layer.error(f"it mixes {layer.length('k')} vectors with {layer.length('w')} weights, and needs one less")


@parameterization(
    "VBLORA",
    "VB-LoRA",
    forms=(
        form("o*v i*v", vblora_logits_A="r i n", vblora_logits_B="o r n", shared={_BANK: "n v"}),
        form(
            "o*v i*v",
            vblora_logits_A_topk_indices="r i k",
            vblora_logits_A_topk_weights="r i w",
            vblora_logits_B_topk_indices="o r k",
            vblora_logits_B_topk_weights="o r w",
            shared={_BANK: "n v"},
        ),
    ),
    shared=(_BANK,),
    settings=(
        Setting("r", "whole", 4, "the rank"),
        Setting("topk", "whole", 2, "how many vectors each piece of a factor is mixed of"),
    ),
    places=("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"),
    may_be_empty=True,
    check=_check_vblora,
    elements=lambda layer: layer.length("r") * (layer.rows + layer.columns),
    source="Li et al., VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, NeurIPS 2024, "
    "arXiv:2405.15179",
)
def vblora(layer: Layer) -> LowRank:
    """VB-LoRA: ``W + B A``, whose factors are made of pieces, each a mixture of vectors of one bank for all layers.

    A piece mixes the ``topk`` vectors with the largest logits, by the softmax of those logits. A file saved with
    ``save_only_topk_weights`` holds their places and all but the last of their weights, which sum to 1. There is no
    scale.
    """
    bank = layer.array(_BANK)

    def pieces(side: str) -> Array:
        name = f"vblora_logits_{side}"
        if name in layer:
            return _mixed(layer.array(name), bank, layer.whole("topk"))
        places, weights = layer.integers(f"{name}_topk_indices", len(bank)), layer.array(f"{name}_topk_weights")
        weights = np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)
        return np.asarray(np.einsum("abk,abkv->abv", weights, bank[places]))

    down, up = pieces("A"), pieces("B")
    rank = len(down)
    return LowRank(up.transpose(0, 2, 1).reshape(-1, rank), down.reshape(rank, -1))


def _mixed(logits: Array, bank: Array, chosen: int) -> Array:
    """Mix the vectors of the largest logits: ``[a, b, vectors]`` to ``[a, b, length]``."""
    places = np.argsort(-logits, axis=-1, kind="stable")[..., :chosen]
    top = np.take_along_axis(logits, places, axis=-1)
    weights = np.exp(top - top[..., :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("abk,abkv->abv", weights, bank[places]))


@parameterization(
    "UNILORA",
    "Uni-LoRA",
    forms=(
        form(
            "out in",
            unilora_indices_A="r in",
            unilora_indices_B="out r",
            unilora_scales_A="r in",
            unilora_scales_B="out r",
            shared={"unilora_theta_d": "d"},
        ),
    ),
    shared=("unilora_theta_d",),
    settings=(Setting("r", "whole", 4, "the rank"),),
    places=("unilora_indices_A", "unilora_indices_B"),
    lacking="which entries of unilora_theta_d a layer takes is drawn in the order of the model's code, which no file "
    "tells: save it with save_indices=True in PEFT's UniLoraConfig",
    check=_check_rank,
    source="Li et al., Uni-LoRA: One Vector is All You Need, NeurIPS 2025, arXiv:2506.00799",
)
def unilora(layer: Layer) -> LowRank:
    """Uni-LoRA: ``W + B A``, every entry of both factors being one of a single vector for all layers, times a scale.

    The scale of an entry is ``1 / sqrt(n)`` for a number that n entries of all layers share. Places and scales are
    folded from the file, which has them with ``save_indices`` alone.
    """
    vector = layer.array("unilora_theta_d")

    def factor(side: str) -> Array:
        places = layer.integers(f"unilora_indices_{side}", len(vector))
        return np.asarray(vector[places] * layer.array(f"unilora_scales_{side}"))

    return LowRank(factor("B"), factor("A"))


def _check_pvera(layer: Layer) -> None:
    _check_rank(layer)
    most_rows, most_columns = layer.length("most_out"), layer.length("most_in")
    if layer.length("out") > most_rows or layer.columns > most_columns:
        raise layer.error(
            f"pvera_A and pvera_B are made for weights up to [{most_rows}, {most_columns}], and it is "
            f"{list(layer.shape)}"
        )


@parameterization(
    "PVERA",
    "PVeRA",
    forms=(
        form(
            "out in",
            pvera_lambda_b="out",
            pvera_lambda_d="2*r",
            shared={"pvera_A": "2*r most_in", "pvera_B": "most_out r"},
        ),
    ),
    shared=("pvera_A", "pvera_B"),
    settings=(Setting("r", "whole", 256, "the rank"),),
    refuses={"sample_at_inference": "it draws from a distribution for every input (sample_at_inference)"},
    lacking="PyTorch draws its random projections anew, and they are not the same everywhere: save it with "
    "save_projection=True in PEFT's PveraConfig",
    check=_check_pvera,
    elements=lambda layer: layer.length("r") * (layer.rows + layer.columns),
    source="PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv:2512.07703",
)
def pvera(layer: Layer) -> LowRank:
    """PVeRA at inference: ``W + diag(b) B diag(d) A``, with random A and B that all layers share.

    The layer takes the first ``in`` columns of A and ``out`` rows of B. The adapter learns a distribution: the first
    half of ``pvera_lambda_d`` and of A's rows give its mean, which is folded; the second half gives its variance, which
    training alone draws from.
    """
    rank = layer.length("r")
    strengths = layer.array("pvera_lambda_d")[:rank]
    down = layer.array("pvera_A")[:rank, : layer.columns] * strengths[:, None]
    return LowRank(layer.array("pvera_lambda_b")[:, None] * layer.array("pvera_B")[: layer.rows], down)


# Numbers by which a projection is known again; of fewer than twice as many PyTorch draws the last anew.
_KNOWN = 16
# How far, in standard deviations, they may be from those that PyTorch draws: files may hold them in bfloat16.
_AS_DRAWN = 0.03


def _check_tinylora(layer: Layer) -> None:
    rank, stated = layer.length("r"), layer.number("r")
    if rank != min(stated, *layer.shape):
        raise layer.error(f"the adapter's config gives it rank {stated:g}, and its factors have {rank}")
    vectors = _tinylora_groups(layer)
    named = {name for name in layer.shared if name.startswith("tinylora_v.")}
    if named != {f"tinylora_v.{group}" for group in range(vectors)}:
        raise layer.error(
            f"{layer.siblings} layers with a weight_tying of {layer.number('weight_tying'):g} share {vectors} vectors, "
            f"tinylora_v.0 to tinylora_v.{vectors - 1}, and the file has {len(named)}"
        )
    for name in named:
        if layer.shared[name].shape != (layer.length("u"),):
            raise layer.error(f"{name} is {list(layer.shared[name].shape)}, and needed is [{layer.length('u')}]")


def _tinylora_groups(layer: Layer) -> int:
    """Return how many groups the layers are in."""
    return max(1, round(layer.siblings * (1 - layer.number("weight_tying"))))


@lru_cache(maxsize=8)
def _drawn(count: int, seed: int, layers: int) -> Array:
    """Return the first numbers of every layer's projection, with a deviation of 1: ``[layers, numbers]``."""
    length = count if count < 2 * _KNOWN else _KNOWN
    return np.stack([normals(length, seed + layer) for layer in range(layers)])


def _tinylora_group(layer: Layer, projection: Array) -> int:
    """Return which of the shared vectors is a layer's: by its place in the model, which its projection's seed tells."""
    groups = _tinylora_groups(layer)
    if groups == 1:
        return 0
    drawn = _drawn(projection.size, layer.whole("projection_seed"), layer.siblings)
    held = projection.reshape(-1)[: drawn.shape[1]] * np.sqrt(projection.shape[1])
    far = np.abs(drawn - held).max(axis=1)
    place = int(np.argmin(far))
    if not far[place] < _AS_DRAWN:
        raise layer.error(
            f"its tinylora_P is none that PyTorch draws from projection_seed {layer.whole('projection_seed')} for "
            f"{layer.siblings} layers, by which alone a file tells which of {groups} vectors is a layer's"
        )
    return min(place // max(1, layer.siblings // groups), groups - 1)


@parameterization(
    "TINYLORA",
    "TinyLoRA",
    forms=(form("out in", tinylora_A="r in", tinylora_B="out r", tinylora_P="u r r"),),
    shared=("tinylora_v",),
    settings=(
        Setting("r", "whole", 2, "the rank, or the weight's shorter side where that is less"),
        Setting("weight_tying", "number", 0.0, "how many layers share a vector: 0 for none, 1 for all"),
        Setting("projection_seed", "whole", 42, "the seed of the first layer's projection; the next layers count up"),
    ),
    lacking="without its projections it does not tell which layer uses which vector: save it with save_projection=True "
    "in PEFT's TinyLoraConfig",
    check=_check_tinylora,
    source="Learning to Reason in 13 Parameters, 2026, arXiv:2602.04118",
)
def tinylora(layer: Layer) -> LowRank:
    """TinyLoRA: ``W + B (sum_i v_i P_i) A``: A and B are the base's own singular directions, P random and fixed.

    All but the vector v is in the file for every layer; v is one of those that groups of layers share, and the file
    does not say whose is which. It follows from a layer's place in the model, and that from its P, which PyTorch drew
    with the seed ``projection_seed`` + place: it is known again by its numbers.
    """
    projection = layer.array("tinylora_P")
    vector = layer.array(f"tinylora_v.{_tinylora_group(layer, projection)}")
    return LowRank(layer.array("tinylora_B") @ np.tensordot(vector, projection, 1), layer.array("tinylora_A"))
