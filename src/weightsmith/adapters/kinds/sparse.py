"""Kinds that add numbers at some places of a weight."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.low_rank import check_rank
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


class Scattered(Added):
    """Numbers are added at places; where a place is named twice, both are."""

    def __init__(self, places: Array, values: Array, columns: int) -> None:
        """Put the numbers in the order of their places.

        Args:
            places: flat places in the matrix ``[out, columns]``: int64 ``[n]``.
            values: the numbers: float64 ``[n]``.
            columns: of the matrix.
        """
        order = np.argsort(places, kind="stable")
        self._places, self._values, self._columns = places[order], values[order], columns
        super().__init__(self._rows, [self._places, self._values])

    def _rows(self, start: int, stop: int) -> Array:
        first, last = start * self._columns, stop * self._columns
        begin, end = np.searchsorted(self._places, (first, last))
        places, values = self._places[begin:end] - first, self._values[begin:end]
        return np.bincount(places, weights=values, minlength=last - first).reshape(-1, self._columns)


@parameterization(
    "SHIRA",
    "SHiRA",
    forms=(form("out in", shira_weight="k", shira_indices="2 k"),),
    places=("shira_indices",),
    by_rows=True,
    source="Bhardwaj et al., Sparse High Rank Adapters, NeurIPS 2024, arXiv:2406.13175",
)
def shira(layer: Layer) -> Scattered:
    """SHiRA: ``W + S``, where S holds ``shira_weight [k]`` at ``shira_indices [2, k]``, and zeros elsewhere.

    The indices are rows and columns. PEFT writes them as float32 on Windows. Its ``set_scale``, which weakens the
    adapter in memory, is not saved: fold it with a weight for that.
    """
    places = layer.integers("shira_indices", max(layer.shape))
    if (places[0] >= layer.rows).any() or (places[1] >= layer.columns).any():
        raise layer.error(f"shira_indices names places outside a weight {list(layer.shape)}")
    return Scattered(places[0] * layer.columns + places[1], layer.array("shira_weight"), layer.columns)


def _check_supertuning(layer: Layer) -> None:
    if "supertuning_lora_A" in layer:
        check_rank(layer, layer.length("r"))


_SUPER = {"supertuning_values": "k", "supertuning_indices": "k"}


@parameterization(
    "SUPERTUNING",
    "Super-Tuning",
    forms=(
        Form("out in", _SUPER),
        Form("out in", {**_SUPER, "supertuning_lora_A": "r in", "supertuning_lora_B": "out r"}),
    ),
    settings=(
        Setting("r", "whole", None, "the rank of a LoRA beside the sparse change (Supra), if there is one"),
        Setting("lora_alpha", "number", None, "alpha: that LoRA is scaled by alpha / r"),
    ),
    places=("supertuning_indices",),
    lacking="the places of the base's largest entries come in an order that ties leave open: save it with "
    "save_precomputed_indices=True in PEFT's SupertuningConfig",
    check=_check_supertuning,
    by_rows=True,
    source="Super-Tuning, 2026, arXiv:2607.09287",
)
def supertuning(layer: Layer) -> Added:
    """Super-Tuning: ``W + S``, where S holds ``supertuning_values [k]`` at flat places; with ``r``, plus a LoRA.

    The LoRA is ``(alpha / r) B A``; the paper calls both together Supra. PEFT rounds the values to the base's dtype
    before it adds them; here only the result is rounded.
    """
    places = layer.integers("supertuning_indices", layer.rows * layer.columns)
    sparse = Scattered(places, layer.array("supertuning_values"), layer.columns)
    if "supertuning_lora_A" not in layer:
        return sparse
    right = layer.array("supertuning_lora_A")
    left = layer.array("supertuning_lora_B") * (layer.number("lora_alpha") / len(right))
    return Added(lambda start, stop: sparse.delta(start, stop) + left[start:stop] @ right, [left, right])
