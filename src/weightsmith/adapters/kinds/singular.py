"""Kinds that live in the base's own singular vectors, or in its own rows and columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weightsmith.adapters.change import Change, LowRank, Rows, Whole
from weightsmith.adapters.forms import form
from weightsmith.adapters.kinds.low_rank import ALPHA, MAGNITUDE, RANK, STABILISED, check_rank, scale
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.norms import with_norms
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

_OWN_SVD = (
    "a decomposition made anew has vectors of other signs than the one that it was trained with, and under a "
    "randomised solver other vectors"
)
# What float32 leaves open of a singular value, relative to the largest one.
_EPSILON = float(np.finfo(np.float32).eps)
# The largest share of a change, by its Frobenius norm, that a decomposition made anew may leave open.
_DOUBT = 0.01


def _check_edora(layer: Layer) -> None:
    layer.require(_OWN_SVD, "lora_A", "lora_B")
    check_rank(layer, layer.length("r"))


@parameterization(
    "EDORA",
    "EDoRA and LoRA-XS",
    forms=(
        form(
            "out in",
            lora_latent_mapping="r r",
            optional={"lora_A": "r in", "lora_B": "out r", MAGNITUDE: "out"},
        ),
    ),
    settings=(RANK, ALPHA, STABILISED),
    renames={r"[._](default_)?lora_latent_mapping\b": ".lora_latent_mapping"},
    check=_check_edora,
    by_rows=True,
    source="Nasiri and Garraghan, EDoRA, arXiv:2501.12067; the authors' repository Hamid-Nasiri/EDoRA; "
    "Balazy et al., LoRA-XS, arXiv:2405.17604",
)
def edora(layer: Layer) -> Change:
    """EDoRA: ``m (W + s B R A) / ||W + s B R A||`` by rows, where R ``[r, r]`` and m ``[out]`` are trained.

    A ``[r, in]`` and B ``[out, r]`` are the base's truncated singular value decomposition and stay frozen; which of
    them takes the singular values makes no difference, as both must be in the file. ``s = alpha / r``, as in LoRA.
    Without a magnitude it is LoRA-XS: ``W + s B R A``.

    The authors' files are LoRA's with the extra tensor ``<module>_lora_latent_mapping.weight``, and their configs say
    LORA: write EDORA there.
    """
    down, up = layer.array("lora_A"), layer.array("lora_B")
    product = LowRank(up @ layer.array("lora_latent_mapping") * scale(layer, len(down)), down)
    return with_norms(product, layer.array(MAGNITUDE)) if MAGNITUDE in layer else product


def _check_svft(layer: Layer) -> None:
    if ("svft_u" in layer) != ("svft_v" in layer) or ("svft_u" in layer) != ("svft_s_pre" in layer):
        layer.require(_OWN_SVD, "svft_u", "svft_v", "svft_s_pre")


@parameterization(
    "SVFT",
    "SVFT",
    forms=(
        form(
            "out in",
            svft_s="n",
            svft_s_row="n",
            svft_s_col="n",
            optional={
                "svft_u": "out k",
                "svft_v": "k in",
                "svft_s_pre": "k",
                "svft_s_pre_row": "k",
                "svft_s_pre_col": "k",
                "svft_gate": "1",
            },
        ),
    ),
    renames={r"\.svft_layer\.": ".svft_"},
    places=("svft_s_row", "svft_s_col", "svft_s_pre_row", "svft_s_pre_col"),
    check=_check_svft,
    whole=lambda layer: "svft_u" not in layer,
    by_rows=True,
    source="Lingam et al., SVFT, NeurIPS 2024, arXiv:2405.19597; the authors' repository VijayLingam95/SVFT",
)
def svft(layer: Layer) -> Change:
    """SVFT: ``U (S + g M) V``, with U, S, V the base's singular value decomposition and M a sparse trained matrix.

    M's entries are ``svft_s`` at rows ``svft_s_row`` and columns ``svft_s_col``: of a band, at random, or of the most
    alike vectors; a place that comes twice counts with the sum. g is the sigmoid of ``svft_gate``, or 1 where there is
    none. With fewer vectors than the base has, the rest of the base is dropped, as in the authors' layer.

    A file without ``svft_u``, ``svft_s_pre`` and ``svft_v`` is folded only if M is diagonal: its diagonal does not
    depend on the signs of the vectors, and they are found anew from the base, if its singular values lie far enough
    apart.
    """
    entries = layer.array("svft_s")
    if "svft_gate" in layer:
        # Without overflow, whatever the gate.
        entries = entries * 0.5 * (1 + np.tanh(0.5 * layer.array("svft_gate")))
    rank = layer.length("k") if "svft_u" in layer else min(layer.rows, layer.columns)
    rows, columns = layer.integers("svft_s_row", rank), layer.integers("svft_s_col", rank)
    if "svft_u" not in layer:
        if not np.array_equal(rows, columns):
            layer.require(f"{_OWN_SVD}, which entries off the diagonal depend on", "svft_u", "svft_v", "svft_s_pre")
        moved = np.zeros(rank)
        np.add.at(moved, rows, entries)
        return _along_own_vectors(layer, lambda _: moved)
    middle = np.zeros((rank, rank))
    np.add.at(middle, (rows, columns), entries)
    own = layer.array("svft_s_pre")
    if "svft_s_pre_row" in layer and "svft_s_pre_col" in layer:
        places = layer.integers("svft_s_pre_row", rank), layer.integers("svft_s_pre_col", rank)
    else:
        places = np.arange(rank), np.arange(rank)
    np.add.at(middle, places, own)
    return _instead(layer.array("svft_u") @ middle, layer.array("svft_v"))


def _check_vectorfit(layer: Layer) -> None:
    if ("vectorfit_u" in layer) != ("vectorfit_v" in layer):
        layer.require(_OWN_SVD, "vectorfit_u", "vectorfit_v")
    if "vectorfit_u" not in layer and layer.length("k") != min(layer.rows, layer.columns):
        raise layer.error(
            f"it has {layer.length('k')} singular values, and the base's weight has {min(layer.rows, layer.columns)}; "
            "store vectorfit_u and vectorfit_v beside them"
        )


_VECTORS = {"vectorfit_u": "out k", "vectorfit_v": "k in", "vectorfit_bias": "out"}


@parameterization(
    "VECTORFIT",
    "VectorFit",
    forms=(
        form("out in", vectorfit_sigma="k", optional=_VECTORS),
        form("out in", vectorfit_delta="k", optional=_VECTORS),
    ),
    check=_check_vectorfit,
    whole=lambda layer: "vectorfit_u" not in layer,
    changes_bias=lambda layer: "vectorfit_bias" in layer,
    bias=lambda layer, bias: bias + layer.array("vectorfit_bias"),
    by_rows=True,
    source="Hegde et al., VectorFit, arXiv:2503.19530 (from the paper and its readme: no code is released)",
)
def vectorfit(layer: Layer) -> Change:
    """VectorFit: ``U diag(sigma) V``, where only the singular values and the bias are trained.

    The file holds the trained values, ``vectorfit_sigma``, largest first as the base has them, or by how much they
    moved, ``vectorfit_delta``; ``vectorfit_bias`` is added to the bias. A diagonal does not depend on the signs of U
    and V: where ``vectorfit_u`` and ``vectorfit_v`` are not in the file they are found anew from the base, and the
    adapter is refused if singular values lie too close together for that. The tensors' names are ours (inferred:
    nothing is released).
    """
    if "vectorfit_u" in layer:
        up, down = layer.array("vectorfit_u"), layer.array("vectorfit_v")
        if "vectorfit_delta" in layer:
            return LowRank(up * layer.array("vectorfit_delta"), down)
        return _instead(up * layer.array("vectorfit_sigma"), down)
    if "vectorfit_delta" in layer:
        moved = layer.array("vectorfit_delta")
        return _along_own_vectors(layer, lambda _: moved)
    values = layer.array("vectorfit_sigma")
    return _along_own_vectors(layer, lambda own: values - own)


def _check_pmss(layer: Layer) -> None:
    layer.require("how the skeleton was chosen is not part of the file", "pmss_rows", "pmss_columns")


@parameterization(
    "PMSS",
    "PMSS",
    forms=(form("out in", pmss_U="c r", optional={"pmss_rows": "r", "pmss_columns": "c"}),),
    settings=(Setting("scaling", "number", 1.0, "what the update is multiplied by"),),
    places=("pmss_rows", "pmss_columns"),
    check=_check_pmss,
    by_rows=True,
    source="Wang et al., PMSS: Pretrained Matrices Skeleton Selection, arXiv:2409.16722",
)
def pmss(layer: Layer) -> Change:
    """PMSS: ``W + s C U R``, where ``C = W[:, columns]`` and ``R = W[rows, :]`` are the base's own and frozen.

    U ``[c, r]`` is trained. C and R come from the base, which must be the one that was trained on. Inferred: the
    formula is the paper's, the scale and the tensors' names are not known (no code is released).
    """
    rows = layer.integers("pmss_rows", layer.rows).reshape(-1)
    columns = layer.integers("pmss_columns", layer.columns).reshape(-1)
    skeleton = np.empty((len(rows), layer.columns))
    for start, tile in layer.weight.tiles():
        here = (rows >= start) & (rows < start + len(tile))
        skeleton[here] = tile[rows[here] - start]
    right = layer.number("scaling") * layer.array("pmss_U") @ skeleton
    return Rows(lambda base, _: base + base[:, columns] @ right, [right])


def _instead(left: Array, right: Array) -> Change:
    """Return a product that takes the base's place."""
    return Rows(lambda base, start: left[start : start + len(base)] @ right, [left, right])


def _along_own_vectors(layer: Layer, moves: Callable[[Array], Array]) -> Change:
    """Return ``W + U diag(moves(S)) V`` for the base's own decomposition ``W = U diag(S) V``, made anew."""

    def changed(base: Array) -> Array:
        try:
            up, values, down = np.linalg.svd(base, full_matrices=False)
        except np.linalg.LinAlgError:
            raise layer.error("the base's weight has no singular values: it holds NaN or infinite values") from None
        moved = moves(values)
        doubt = _doubt(values, moved)
        if doubt > _DOUBT:
            raise layer.error(
                f"the base's singular values lie so close together that vectors found anew leave {doubt:.0%} of the "
                f"change open; store the vectors that it was trained with beside the rest"
            )
        result: Array = base + (up * moved) @ down
        return result

    return Whole(changed)


def _doubt(values: Array, moved: Array) -> float:
    """Return which share of a change is open, as float32 does not tell apart the vectors of neighbouring values."""
    norm = float(np.linalg.norm(moved))
    if not norm or len(values) < 2:
        return 0.0
    gaps = values[:-1] - values[1:]
    noise = _EPSILON * values[0]
    mixed = np.divide(noise, gaps, out=np.ones_like(gaps), where=gaps > noise)
    return float(np.linalg.norm(np.diff(moved) * mixed)) / norm
