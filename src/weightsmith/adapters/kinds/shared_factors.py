"""Kinds whose random factors all layers share, and that train vectors between them: VeRA, RandLoRA."""

from __future__ import annotations

from weightsmith.adapters.change import Change, LowRank
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


def _check_shared(layer: Layer, *parts: str) -> None:
    for part in parts:
        if part not in layer.shared and part not in layer:
            raise layer.error(
                f"{part}, which all layers share, is not in the adapter's file: PEFT drew it with PyTorch's random "
                "numbers, which differ between machines. Load the adapter with PEFT, and save it with "
                "save_projection=True"
            )


def _check_vera(layer: Layer) -> None:
    _check_shared(layer, "vera_A", "vera_B")
    down, up = layer["vera_A"], layer["vera_B"]
    rank = layer.length("r")
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        raise layer.error(f"vera_A {list(down)} and vera_B {list(up)} do not fit {rank} numbers between them")
    if down[1] < layer.columns or up[0] < layer.rows:
        raise layer.error(f"vera_A {list(down)} and vera_B {list(up)} are smaller than its weight {list(layer.shape)}")


@parameterization(
    "VERA",
    "VeRA",
    forms=(form("out in", vera_lambda_b="out", vera_lambda_d="r"),),
    shared=("vera_A", "vera_B"),
    check=_check_vera,
    elements=lambda layer: layer.length("r") * (layer.rows + layer.columns),
    source="Kopiczko, Blankevoort and Asano, VeRA, ICLR 2024, arXiv:2310.11454",
)
def vera(layer: Layer) -> Change:
    """VeRA: ``W + diag(b) B diag(d) A``: A and B are random, and shared by all layers; there is no scale.

    They are as large as the largest layer needs; others take the first columns of A and the first rows of B. An adapter
    saved with ``save_projection=False`` lacks them: its seed gives them on the machine that it was trained on alone.
    """
    up = layer.array("vera_B")[: layer.rows] * layer.array("vera_lambda_b")[:, None] * layer.array("vera_lambda_d")
    return LowRank(up, layer.array("vera_A")[:, : layer.columns].copy())


def _check_randlora(layer: Layer) -> None:
    _check_shared(layer, "randlora_A", "randlora_B")
    down, up = layer["randlora_A"], layer["randlora_B"]
    rank, bases, small = layer.length("r"), layer.length("n"), layer.length("min")
    if small != min(layer.rows, layer.columns):
        raise layer.error(f"randlora_gamma has {small} columns, and the smaller side of {list(layer.shape)} is another")
    if len(down) != 3 or len(up) != 3 or down[:2] != (rank, 1) or up[2] != rank:
        raise layer.error(f"randlora_A {list(down)} and randlora_B {list(up)} do not fit rank {rank}")
    if layer.whole("r") != rank:
        raise layer.error(f"the adapter's config gives it rank {layer.whole('r')}, and its factors have {rank}")
    if down[2] < small or up[0] < max(layer.rows, layer.columns) or up[1] < bases:
        raise layer.error(
            f"randlora_A {list(down)} and randlora_B {list(up)} are smaller than {bases} bases of {list(layer.shape)} "
            "need"
        )


@parameterization(
    "RANDLORA",
    "RandLoRA",
    forms=(
        form(
            "out in",
            randlora_lambda="r n",
            randlora_gamma="n min",
            optional={"randlora_A": "r 1 least", "randlora_B": "most bases r"},
        ),
    ),
    shared=("randlora_A", "randlora_B"),
    settings=(
        Setting("r", "whole", 32, "the rank of each of the random bases"),
        Setting("randlora_alpha", "number", 640, "alpha: the change is scaled by alpha / r"),
    ),
    check=_check_randlora,
    elements=lambda layer: layer.length("r") * layer.length("n") * (layer.rows + layer.columns),
    source="Albert et al., RandLoRA, ICLR 2025, arXiv:2502.00987",
)
def randlora(layer: Layer) -> Change:
    """RandLoRA: ``W + s sum_j B_j (l_j . A . g_j)``: n random bases of rank r, so that the change has full rank.

    A ``[r, 1, ...]`` lies along the smaller side of W and B ``[..., n, r]`` along the larger one; both are random and
    shared. PEFT 0.21 flattens A's axes as (r, n) and B's as (n, r), so that its pairs are others than the formula's;
    what it computes is what is formed here. It saves A and B with every layer once more. As in VeRA, an adapter without
    them is refused.
    """
    trained, gamma = layer.array("randlora_lambda"), layer.array("randlora_gamma")
    rank, bases = trained.shape
    small, large = sorted((layer.rows, layer.columns))
    first: Array = trained[:, :, None] * layer.array("randlora_A")[:, :, :small] * gamma
    down = first.reshape(rank * bases, small)
    up = layer.array("randlora_B")[:large, :bases].reshape(large, bases * rank)
    factor = layer.number("randlora_alpha") / rank
    return LowRank(up * factor, down) if small == layer.columns else LowRank(down.T * factor, up.T.copy())
