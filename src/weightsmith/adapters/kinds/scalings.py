"""Kinds that multiply rows or columns by trained numbers: (IA)^3."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Change, Rows, Scaled
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting


def _feeds_forward(layer: Layer) -> bool:
    """Whether the inputs are scaled, and not the outputs."""
    if layer.has("n"):
        return layer.among("feedforward_modules")
    return layer["ia3_l"][0] == 1 and (layer["ia3_l"][1] != 1 or layer.among("feedforward_modules"))


def _check(layer: Layer) -> None:
    if not layer.has("n"):
        return
    number, inputs = layer.length("n"), layer.shape[1]
    if not _feeds_forward(layer):
        if number != layer.rows:
            raise layer.error(
                f"ia3_l has {number} numbers for {layer.rows} outputs (feedforward_modules does not name it)"
            )
    elif number % inputs or layer.rows % (number // inputs):
        raise layer.error(f"ia3_l has {number} numbers, and its weight {list(layer.shape)} no such number of inputs")


@parameterization(
    "IA3",
    "(IA)^3",
    forms=(
        form("out in", ia3_l="out 1"),
        form("out in", ia3_l="1 in"),
        form("out in h w", ia3_l="1 n 1 1"),
        form("out in d h w", ia3_l="1 n 1 1 1"),
    ),
    settings=(
        Setting("feedforward_modules", "modules", None, "modules whose inputs are scaled; of others it is the outputs"),
    ),
    check=_check,
    changes_bias=lambda layer: not _feeds_forward(layer),
    bias=lambda layer, bias: bias * layer.array("ia3_l").reshape(-1),
    needs_bias=False,
    source="Liu et al., Few-shot parameter-efficient fine-tuning is better and cheaper, NeurIPS 2022, arXiv:2205.05638",
)
def ia3(layer: Layer) -> Change:
    """(IA)^3: outputs times l, ``diag(l) W`` and ``l b``; or, of feed-forward layers, inputs times l, ``W diag(l)``.

    Of linear layers the shape of ``ia3_l`` tells which; of convolutions ``feedforward_modules`` does. The inputs of a
    convolution in groups are those of its groups one after the other.
    """
    vector = layer.array("ia3_l").reshape(-1)
    if not _feeds_forward(layer):
        return Scaled(rows=vector)
    kernel = layer.columns // layer.shape[1]
    groups = len(vector) // layer.shape[1]
    if groups == 1:
        return Scaled(columns=np.repeat(vector, kernel))
    columns = np.repeat(vector.reshape(groups, -1), kernel, axis=1)
    share = layer.rows // groups
    return Rows(lambda base, start: base * columns[np.arange(start, start + len(base)) // share], [columns])
