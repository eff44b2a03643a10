"""Kinds that put a branch of two linear maps before, beside or behind a layer."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Change, LowRank, Rows
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

_PARALLEL = {"hydra_par_A": "rp in", "hydra_par_B": "out rp"}
_PARALLEL_BIAS = {"hydra_par_A.bias": "rp", "hydra_par_B.bias": "out"}
_SEQUENTIAL = {"hydra_seq_A": "rs out", "hydra_seq_B": "out rs"}
_SEQUENTIAL_BIAS = {"hydra_seq_A.bias": "rs", "hydra_seq_B.bias": "out"}
_HYDRA_SCALES = {"hydra_par_scale": "1", "hydra_seq_scale": "1"}


def _hydra_bias(layer: Layer, bias: Array) -> Array:
    total = bias.copy()
    for branch, through in (("hydra_par", np.zeros(layer.columns)), ("hydra_seq", bias)):
        if f"{branch}_B" not in layer:
            continue
        middle = layer.array(f"{branch}_A") @ through
        if f"{branch}_A.bias" in layer:
            middle = middle + layer.array(f"{branch}_A.bias")
        added = layer.array(f"{branch}_B") @ middle
        if f"{branch}_B.bias" in layer:
            added = added + layer.array(f"{branch}_B.bias")
        total += _hydra_scale(layer, branch) * added
    return total


def _hydra_scale(layer: Layer, branch: str) -> float:
    part = f"{branch}_scale"
    return float(layer.array(part)[0]) if part in layer else layer.number("scale")


@parameterization(
    "HYDRA",
    "Hydra",
    forms=(
        Form("out in", _PARALLEL | _SEQUENTIAL, _PARALLEL_BIAS | _SEQUENTIAL_BIAS | _HYDRA_SCALES),
        Form("out in", _PARALLEL, _PARALLEL_BIAS | _HYDRA_SCALES),
        Form("out in", _SEQUENTIAL, _SEQUENTIAL_BIAS | _HYDRA_SCALES),
    ),
    settings=(Setting("scale", "number", 1.0, "what both branches are multiplied by, their biases too"),),
    aliases={
        f"adapter_{branch}.{author}_proj{end}": f"hydra_{branch}_{ours}{end}"
        for branch in ("par", "seq")
        for author, ours in (("down", "A"), ("up", "B"))
        for end in ("", ".bias")
    }
    | {f"adapter_{branch}.scale": f"hydra_{branch}_scale" for branch in ("par", "seq")},
    renames={
        r"\.mlp\.hydra_mlp_(par|seq)\.": r".mlp.fc2.adapter_\1.",
        r"\.attn\.hydra_proj_(par|seq)\.": r".attn.proj.adapter_\1.",
        r"\.mlp\.ad_lin\.(linear\.)?": ".mlp.c_proj.",
        r"\.hydra_(par|seq)\.hydra_([AB])\b": r".dense.hydra_\1_\2",
    },
    changes_bias=lambda layer: True,
    bias=_hydra_bias,
    by_rows=True,
    source="Kim et al., Hydra: Multi-head Low-rank Adaptation, Neural Networks 2024, arXiv:2309.06922; the authors' "
    "repository extremebird/Hydra",
)
def hydra(layer: Layer) -> Change:
    """Hydra: ``(I + s B_s A_s) W + s B_p A_p``, a branch behind the layer and one beside it; either may be missing.

    The bias becomes ``b + s (B_s (A_s b + c_s) + e_s) + s (B_p c_p + e_p)``, where c and e are the biases of a branch's
    A and B, which the vision code has and the language code has not. The released vision merge takes the MLP's
    weight by mistake for what it writes to the attention's; here each goes into its own layer. Names of all three parts
    of the authors' code are understood (CLIP, VTAB-1k, GLUE).
    """
    parallel = []
    if "hydra_par_B" in layer:
        parallel = [(layer.array("hydra_par_B") * _hydra_scale(layer, "hydra_par"), layer.array("hydra_par_A"))]
    if "hydra_seq_B" not in layer:
        return LowRank(*parallel[0])
    down, up = layer.array("hydra_seq_A"), layer.array("hydra_seq_B") * _hydra_scale(layer, "hydra_seq")
    return _with_products(layer, [(up, _through(layer, down)), *parallel])


def _through(layer: Layer, down: Array) -> Array:
    """Return ``A W`` for A ``[r, out]``, reading the base in tiles: ``[r, in]``."""
    total = np.zeros((len(down), layer.columns))
    for start, tile in layer.weight.tiles():
        total += down[:, start : start + len(tile)] @ tile
    return total


def _with_products(layer: Layer, products: list[tuple[Array, Array]]) -> Change:
    """Return a sum of products that is added, and was made from the base: no product that stands for itself."""
    product = LowRank(
        np.concatenate([left for left, _ in products], 1), np.concatenate([right for _, right in products])
    )
    return Rows(product.rows, [product.left, product.right])


_BEFORE, _AFTER, _BESIDE = "before", "after", "parallel"
_LINEAR = ("linear", "identity", "none")


def _insertion(layer: Layer) -> str:
    said = layer.text("insertion") or (_BESIDE if layer.flag("use_parallel_adapter") else None)
    down, up = layer["adapter_down"][1], layer["adapter_up"][0]
    sides = {_BEFORE: (layer.columns, layer.columns), _AFTER: (layer.rows,) * 2, _BESIDE: (layer.columns, layer.rows)}
    fit = [way for way, lengths in sides.items() if lengths == (down, up)]
    if said in fit:
        return str(said)
    if said is None and len(fit) == 1:
        return fit[0]
    what = f"adapter_down [r, {down}] and adapter_up [{up}, r] on a weight {list(layer.shape)}"
    if said is None and fit:
        raise layer.error(f"{what} may stand {', '.join(fit)}: give insertion in adapter_config.json as one of them")
    raise layer.error(f"{what} fit no place" if said is None else f"{what} do not stand as config says: {said}")


def _check_bottleneck(layer: Layer) -> None:
    function = layer.text("non_linearity")
    if function not in _LINEAR:
        raise layer.error(
            f"a non-linear function, {function}, stands between its projections, so no plain weights equal it; only "
            f"{', '.join(_LINEAR)} fold (non_linearity in adapter_config.json)"
        )
    _insertion(layer)


def _bottleneck_moves_bias(layer: Layer) -> bool:
    return _insertion(layer) == _AFTER or "adapter_down.bias" in layer or "adapter_up.bias" in layer


def _bottleneck_bias(layer: Layer, bias: Array) -> Array:
    way = _insertion(layer)
    down, up = layer.array("adapter_down"), layer.array("adapter_up")
    middle = down @ bias if way == _AFTER else np.zeros(len(down))
    if "adapter_down.bias" in layer:
        middle = middle + layer.array("adapter_down.bias")
    added = up @ middle
    if "adapter_up.bias" in layer:
        added = added + layer.array("adapter_up.bias")
    added *= _bottleneck_scale(layer)
    if way != _BEFORE:
        return bias + added
    moved = [tile @ added for _, tile in layer.weight.tiles()]
    return bias + np.concatenate(moved)


def _bottleneck_scale(layer: Layer) -> float:
    return float(layer.array("adapter_scaling")[0]) if "adapter_scaling" in layer else layer.number("scaling")


@parameterization(
    "BOTTLENECK",
    "Bottleneck adapters without a non-linear function",
    forms=(
        form(
            "out in",
            adapter_down="r a",
            adapter_up="b r",
            optional={"adapter_down.bias": "r", "adapter_up.bias": "b", "adapter_scaling": "1"},
        ),
    ),
    settings=(
        Setting("non_linearity", "text", "tanh", "what stands between the projections; only linear and identity fold"),
        Setting("scaling", "number", 1.0, "what the branch is multiplied by, where adapter_scaling is not there"),
        Setting("use_parallel_adapter", "flag", False, "the branch stands beside the layer"),
        Setting("insertion", "text", None, "where the branch stands", choices=(_BEFORE, _AFTER, _BESIDE)),
    ),
    check=_check_bottleneck,
    changes_bias=_bottleneck_moves_bias,
    bias=_bottleneck_bias,
    by_rows=True,
    source="Houlsby et al., ICML 2019, arXiv:1902.00751; He et al., ICLR 2022, arXiv:2110.04366; layout of "
    "AGI-Edgerunners/LLM-Adapters",
)
def bottleneck(layer: Layer) -> Change:
    """Bottleneck: ``(I + s Up Down) W``, ``W (I + s Up Down)`` or ``W + s Up Down``, if nothing in it is non-linear.

    The first stands after the layer, the second before it, the third is parallel; the bias changes with it. Shapes tell
    which it is, or ``insertion``. With any function between Down and Up (tanh, if the config says nothing), as in
    AdaptFormer, AdapterTune and VL-Adapter, no plain weights equal it, and it is refused.
    """
    down, up = layer.array("adapter_down"), layer.array("adapter_up") * _bottleneck_scale(layer)
    way = _insertion(layer)
    if way == _BESIDE:
        return LowRank(up, down)
    if way == _AFTER:
        return _with_products(layer, [(up, _through(layer, down))])
    return Rows(lambda base, _: base + (base @ up) @ down, [up, down])
