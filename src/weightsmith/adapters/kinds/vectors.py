"""Kinds that train vectors alone, between random factors that stay as they were drawn."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.checkpoint.tensor import Array

_DRAWN = "it was drawn at random, by a generator that this software does not have"
# A tensor network of more modes than these has modes of length 2 in any real layer.
_MODES = 6


def _check_uora(layer: Layer) -> None:
    layer.require(f"{_DRAWN}, and parts of it were drawn again in training", "uora_A", "uora_B")
    rank, down, up = layer.length("r"), layer["uora_A"], layer["uora_B"]
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        raise layer.error(
            f"uora_A {list(down)} and uora_B {list(up)} do not fit uora_lambda_d [{rank}]; needed are [{rank}, in] and "
            f"[out, {rank}]"
        )
    if down[1] < layer.columns or up[0] < layer.rows:
        raise layer.error(
            f"uora_A {list(down)} and uora_B {list(up)} are too small for a layer of {layer.columns} inputs and "
            f"{layer.rows} outputs"
        )


@parameterization(
    "UORA",
    "UORA",
    forms=(
        form(
            "out in",
            uora_lambda_b="out",
            uora_lambda_d="r",
            optional={"uora_A": "r a", "uora_B": "b r"},
        ),
    ),
    shared=("uora_A", "uora_B"),
    check=_check_uora,
    source="Zhang et al., UORA: Uniform Orthogonal Reinitialization Adaptation, ACL 2025, arXiv:2505.20154",
)
def uora(layer: Layer) -> Change:
    """UORA: ``W + diag(b) B diag(d) A``, with trained vectors b ``[out]`` and d ``[r]``, as in VeRA.

    A and B are random and frozen, and shared by all layers, of which each uses the first inputs and outputs. In
    training some of their rows and columns are drawn again, so that a seed does not give them back: they must be in the
    file, once (``base_model.uora_A``) or for each layer. Inferred: the paper's abstract and VeRA; names are VeRA's.
    """
    down, up = layer.array("uora_A")[:, : layer.columns], layer.array("uora_B")[: layer.rows]
    left = layer.array("uora_lambda_b")[:, None] * up * layer.array("uora_lambda_d")
    return LowRank(left, np.ascontiguousarray(down))


_FACTORS = tuple(f"tera_factor_{mode}" for mode in range(1, _MODES + 1))
_DIAGONALS = tuple(f"tera_diagonal_{mode}" for mode in range(1, _MODES + 1))


def _modes(layer: Layer) -> int:
    return sum(part in layer for part in _DIAGONALS)


def _check_tera(layer: Layer) -> None:
    modes = _modes(layer)
    layer.require("the vectors of a network are counted from 1 on", *_DIAGONALS[:modes])
    layer.require(_DRAWN, "tera_core", *_FACTORS[:modes])
    core = layer["tera_core"]
    ranks = tuple(layer[part][0] for part in _DIAGONALS[:modes])
    shapes = [layer[part] for part in _FACTORS[:modes]]
    if core != ranks or any(len(shape) != 2 or shape[1] != rank for shape, rank in zip(shapes, ranks, strict=True)):
        raise layer.error(
            f"tera_core {list(core)}, factors {[list(shape) for shape in shapes]} and diagonals {list(ranks)} do not "
            "fit one another; needed are a core [r1, r2, ...], factors [n, r] and diagonals [r] for each of its axes"
        )
    if math.prod(shape[0] for shape in shapes) != layer.rows * layer.columns:
        raise layer.error(
            f"factors {[list(shape) for shape in shapes]} give {math.prod(shape[0] for shape in shapes)} entries, and "
            f"the weight is {list(layer.shape)}"
        )


@parameterization(
    "TERA",
    "TeRA",
    forms=(
        form(
            "out in",
            tera_diagonal_1="r1",
            optional={
                "tera_core": "...",
                **{part: f"r{mode}" for mode, part in enumerate(_DIAGONALS[1:], 2)},
                **{part: f"n{mode} r{mode}" for mode, part in enumerate(_FACTORS, 1)},
            },
        ),
    ),
    shared=("tera_core", *_FACTORS),
    check=_check_tera,
    # The change is made whole, though the base is not needed for it.
    elements=lambda layer: layer.rows * layer.columns,
    source="Gu et al., TeRA: Vector-based Random Tensor Network for High-Rank Adaptation, arXiv:2509.03234 "
    "(from the abstract)",
)
def tera(layer: Layer) -> Change:
    """TeRA: ``W + reshape(G x1 (U1 diag(d1)) x2 (U2 diag(d2)) ...)``, a Tucker network of which the diagonals train.

    The core G ``[r1, r2, ...]`` and the factors U ``[n, r]`` are random and frozen, shared by layers of equal shape;
    they must be in the file, for each layer or, if all layers are of one shape, once (``base_model.tera_core``). The
    result, whose lengths n multiply to ``out * in``, is laid out row by row. Up to 6 modes. Inferred from the abstract:
    the paper's reshaping and the tensors' names are not known.
    """
    modes = _modes(layer)
    network = layer.array("tera_core")
    factors = [layer.array(_FACTORS[mode]) * layer.array(_DIAGONALS[mode]) for mode in range(modes)]
    # Modes that shrink go first, so that nothing on the way is larger than the core and the result.
    for mode in sorted(range(modes), key=lambda mode: factors[mode].shape[0] / factors[mode].shape[1]):
        network = np.moveaxis(np.tensordot(factors[mode], network, axes=(1, mode)), 0, mode)
    delta: Array = np.ascontiguousarray(network).reshape(layer.rows, layer.columns)
    return Added(lambda start, stop: delta[start:stop], [delta])
