"""Kinds that change some entries of the base's weights, or the weights of some layers."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank, Rows
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.sparse import Scattered
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.rows import read_wide, tile_rows
from weightsmith.checkpoint.tensor import Array
from weightsmith.kernels.convert import narrow

_FORMS = (
    form("out ...", sparse_values="n", sparse_indices="n"),
    form("out ...", sparse_values="n", sparse_mask="out ..."),
)
_PLACES = ("sparse_indices", "sparse_mask")


def _masked(layer: Layer) -> bool:
    """Whether a mask as large as the weight is read."""
    return "sparse_mask" in layer


_REPLACING = Setting("sparse_replace", "flag", False, "values take the place of the base's, and are not added to them")


@parameterization(
    "LIFT",
    "LIFT",
    forms=_FORMS,
    settings=(_REPLACING,),
    places=_PLACES,
    whole=_masked,
    source="Liu et al., LIFT the Veil for the Truth: Principal Weights, ICML 2025, arXiv:2506.00772; the authors' "
    "repository zihanghliu/LIFT",
)
def lift(layer: Layer) -> Change:
    """LIFT: entries are added at the places where the base's best approximation of low rank is largest.

    ``sparse_values`` ``[n]`` at ``sparse_indices`` (counted row by row through the weight ``[out, in]``) or, in that
    order, where ``sparse_mask`` is 1. Training recomputes its mask from time to time: the places must be all that any
    mask held, and so they are stored. The authors save whole fine-tuned models; subtract the base for this.
    """
    return _sparse(layer)


@parameterization(
    "FISH",
    "FISH masks",
    forms=_FORMS,
    settings=(_REPLACING,),
    places=_PLACES,
    whole=_masked,
    source="Sung et al., Training Neural Networks with Fixed Sparse Masks, NeurIPS 2021, arXiv:2111.09839; the "
    "authors' repository varunnair18/FISH",
)
def fish(layer: Layer) -> Change:
    """FISH: entries are added where the Fisher information is largest, over the whole model.

    Laid out as LIFT's. The mask comes from data, so it must be in the file. The classifier, which is always trained
    whole, and biases go beside it under their own names. The authors save whole fine-tuned models.
    """
    return _sparse(layer)


@parameterization(
    "SARA",
    "SaRA",
    forms=(*_FORMS, form("out ...", sparse_values="n")),
    settings=(
        Setting("sparse_replace", "flag", True, _REPLACING.about),
        Setting("threshold", "number", None, "entries of the base below it are the trained ones, where no places are"),
    ),
    places=_PLACES,
    whole=_masked,
    by_rows=True,
    source="Hu et al., SaRA: Progressive Sparse Low-Rank Adaptation, ICLR 2025, arXiv:2409.06633; the authors' "
    "repository sjtuplayer/SaRA",
)
def sara(layer: Layer) -> Change:
    """SaRA: entries of the base below a threshold are replaced by trained ones.

    Laid out as LIFT's, but values take the base's place. Without places, they are where ``|W| < threshold`` (both in
    the base's dtype), row by row as the base stores them, which is how the authors save them; there must be as many.
    The authors' files name tensors by number, in the order of the model's parameters: give them the layers' names.
    """
    return _sparse(layer)


def _sparse(layer: Layer) -> Change:
    values = layer.array("sparse_values")
    if "sparse_indices" in layer:
        places = layer.integers("sparse_indices", layer.rows * layer.columns)
    elif "sparse_mask" in layer:
        places = np.flatnonzero(layer.integers("sparse_mask", 2))
    else:
        places = _below(layer, layer.number("threshold"))
    if len(places) != len(values):
        raise layer.error(f"it holds {len(values)} values for {len(places)} places")
    order = np.argsort(places, kind="stable")
    places, values = places[order], values[order]
    if (places[1:] == places[:-1]).any():
        raise layer.error(f"sparse_indices holds {places[:-1][places[1:] == places[:-1]][0]} twice")
    width = layer.columns
    if not layer.flag("sparse_replace"):
        return Scattered(places, values, width)

    def replaced(base: Array, start: int) -> Array:
        changed = base.reshape(-1).copy()
        first, last = np.searchsorted(places, (start * width, (start + len(base)) * width))
        changed[places[first:last] - start * width] = values[first:last]
        return changed.reshape(base.shape)

    return Rows(replaced, [places, values])


def _below(layer: Layer, threshold: float) -> Array:
    """Return the places of entries that are smaller than a threshold, in the order in which the base stores them."""
    weight = layer.weight
    limit = float(narrow(np.array([threshold]), weight.tensor.dtype)[0])
    found = [np.flatnonzero(np.abs(tile.reshape(-1)) < limit) + start * layer.columns for start, tile in weight.tiles()]
    places = np.concatenate(found)
    if weight.transposed:
        rows, columns = np.divmod(places, layer.columns)
        places = places[np.argsort(columns * layer.rows + rows)]
    return places


@parameterization(
    "TAPS",
    "TAPS",
    forms=(
        form("out ...", taps_delta="out ...", taps_score="1", optional={"taps_delta_bias": "out"}),
        form("out ...", taps_delta="out ...", taps_score="", optional={"taps_delta_bias": "out"}),
    ),
    settings=(Setting("threshold", "number", 0.1, "layers whose score is not below it are changed"),),
    changes_bias=lambda layer: "taps_delta_bias" in layer,
    bias=lambda layer, bias: bias + layer.array("taps_delta_bias") * _active(layer),
    source="Wallingford et al., Task Adaptive Parameter Sharing for Multi-Task Learning, CVPR 2022, arXiv:2203.16708",
)
def taps(layer: Layer) -> Change:
    """TAPS: ``W + D`` in layers whose score is at least the threshold, W in the others.

    D is as large as W and is read as it is needed. The threshold is from memory of the paper; set what was trained
    with. Norms and the head, which every task has of its own, go beside it under their own names.
    """
    if not _active(layer):
        return LowRank(np.zeros((layer.rows, 0)), np.zeros((0, layer.columns)))
    delta, width = layer.parts["taps_delta"], layer.columns
    return Added(
        lambda start, stop: read_wide(delta, start * width, stop * width).reshape(stop - start, width),
        [],
    )


def _active(layer: Layer) -> bool:
    return float(layer.array("taps_score").reshape(())) >= layer.number("threshold")


_SNELL = ("klora", "snell", "mixk", "snella")
_MIXED = {"snell_alpha": "1", "snell_beta": "1", "snell_gamma": "1"}


def _check_snell(layer: Layer) -> None:
    model, share = layer.text("tuning_model"), layer.number("init_thres")
    if not 0 <= share <= 1:
        raise layer.error(f"adapter_config.json gives init_thres as {share:g}, and it is a share, from 0 to 1")
    if not layer.number("norm_p") > 0:
        raise layer.error(f"adapter_config.json gives norm_p as {layer.number('norm_p'):g}, which is no norm")
    if (model in ("mixk", "snella")) != ("snell_alpha" in layer):
        raise layer.error(
            f"tuning_model is {model}, and alpha, beta and gamma {'are' if 'snell_alpha' in layer else 'are not'} there"
        )


@parameterization(
    "SNELL",
    "SNELL and SNELLA",
    forms=(
        form("out in", In_Qs="h in q", Out_Qs="h out q", optional={"shared_coeff_fc": "h 1 1"}),
        Form("out in", {"In_Qs": "h in q", "Out_Qs": "h out q", **_MIXED}, {"shared_coeff_fc": "h 1 1"}),
    ),
    settings=(
        Setting("tuning_model", "text", "snell", "the authors' name of the variant", choices=_SNELL),
        Setting("init_thres", "number", 0.0, "the share of entries that are dropped", patterns="init_thres_pattern"),
        Setting("norm_p", "number", 2.0, "which norm distances are measured in"),
    ),
    renames={
        r"\.learnable\.(alpha|beta|gamma)$": r".snell_\1",
        r"\.additional_(\w+)\.learnable\.": r".\1.",
        r"\.additional_(\w+)\.snell_": r".\1.snell_",
    },
    check=_check_snell,
    # The change is made whole, though the base is not needed for it.
    elements=lambda layer: layer.rows * layer.columns,
    source="Shen et al., SNELL, NeurIPS 2024, arXiv:2411.01800, and SNELLA, arXiv:2510.24037; the authors' "
    "repository ssfgunner/SNELL",
)
def snell(layer: Layer) -> Change:
    """SNELL: ``W + sparse(D)``, with ``D[o, i] = sum_h c_h ||Out_Qs[h, o] - In_Qs[h, i]||``, a distance as kernel.

    ``c_h = 0.1 (-1)^h`` unless ``shared_coeff_fc`` says otherwise. In the variants mixk and snella, D becomes
    ``D + alpha softmax(D / gamma) + beta``, the softmax over outputs. In snell and snella, D is then made sparse: with
    t the ``init_thres`` quantile of ``|D|``, entries above t become ``D |D|``, and the others 0. That is the
    authors' code, whose papers keep D itself. A snell of threshold 0 is a klora there: D as it is. SNELLA gives each
    layer a threshold of its own, which is not among its tensors: state it in ``init_thres_pattern``.

    Names are those of the authors' files. Their distances are formed in float32 by matrix products, which is less exact
    than here; an entry that lies at the threshold may fall on the other side.
    """
    model = layer.text("tuning_model")
    delta = _distances(layer)
    if "snell_alpha" in layer:
        alpha, beta, gamma = (float(layer.array(f"snell_{name}")[0]) for name in ("alpha", "beta", "gamma"))
        powers = delta / gamma
        powers = np.exp(powers - powers.max(axis=0))
        delta = delta + alpha * powers / powers.sum(axis=0) + beta
    share = layer.number("init_thres")
    if model == "snella" or (model == "snell" and share):
        sizes = np.abs(delta)
        delta = np.where(sizes > _quantile(sizes, share), delta * sizes, 0.0)
    return Added(lambda start, stop: delta[start:stop], [delta])


def _distances(layer: Layer) -> Array:
    inputs, outputs = layer.array("In_Qs"), layer.array("Out_Qs")
    power = layer.number("norm_p")
    factors = 0.1 * (-1.0) ** np.arange(len(inputs))
    if "shared_coeff_fc" in layer:
        factors = layer.array("shared_coeff_fc").reshape(-1)
    result = np.zeros((layer.rows, layer.columns))
    step = tile_rows(layer.columns)
    for start in range(0, layer.rows, step):
        tile = result[start : start + step]
        for factor, own, other in zip(factors, inputs, outputs[:, start : start + step], strict=True):
            sums = np.zeros_like(tile)
            for one, two in zip(own.T, other.T, strict=True):
                sums += np.abs(two[:, None] - one) ** power
            tile += factor * sums ** (1 / power)
    return result


def _quantile(sizes: Array, share: float) -> float:
    """Return a quantile, between neighbours in proportion; its rank is rounded as the authors' float32 rounds it."""
    rank = min(float(np.float32(share) * np.float32(sizes.size - 1)), sizes.size - 1)
    lower = math.floor(rank)
    upper = min(lower + 1, sizes.size - 1)
    low, high = np.partition(sizes.reshape(-1), (lower, upper))[[lower, upper]]
    return float(low + (high - low) * (rank - lower))
