"""Kinds that train some rows or columns of the base's weights."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Change, Rows, Whole
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

ROW_ORDER, COLUMN_ORDER = "s2_row_order", "s2_column_order"


def _check_paca(layer: Layer) -> None:
    rank = layer.length("r")
    layer.require("which columns were trained was drawn at random", "paca_indices")
    if layer.number("r") != rank:
        raise layer.error(f"the adapter's config gives it rank {layer.number('r'):g}, and it has {rank} columns")


@parameterization(
    "PACA",
    "PaCA",
    forms=(form("out in", paca_w="out r", optional={"paca_indices": "r"}),),
    settings=(
        Setting("r", "whole", 8, "how many columns", patterns="rank_pattern"),
        Setting("paca_alpha", "number", 8, "the columns are stored divided by alpha / r", patterns="alpha_pattern"),
    ),
    places=("paca_indices",),
    check=_check_paca,
    by_rows=True,
    source="Woo et al., PaCA: Partial Connection Adaptation, ICLR 2025; the authors' repository WooSunghyeon/paca",
)
def paca(layer: Layer) -> Change:
    """PaCA: columns ``paca_indices`` of the weight become ``paca_w * alpha / r``, and do not depend on the base.

    Names and settings are those of the authors' files. Their layer writes trained columns into the weight it computes
    with every other step only; this is their merge, which takes the columns as they were saved.
    """
    rank = layer.length("r")
    places = layer.integers("paca_indices", layer.columns)
    columns = layer.array("paca_w") * (layer.number("paca_alpha") / rank)

    def rows(base: Array, start: int) -> Array:
        changed = base.copy()
        changed[:, places] = columns[start : start + len(base)]
        return changed

    return Rows(rows, [columns])


def _check_s2ft(layer: Layer) -> None:
    permuted = layer.flag("s2_permuted")
    if not permuted and "s2" not in layer:
        raise layer.error(
            "it holds an order and no trained rows or columns; to take a fine-tuned model back to its base's order, "
            "set s2_permuted in adapter_config.json, and name that model as the base"
        )
    part, side = (ROW_ORDER, layer.rows) if ROW_ORDER in layer else (COLUMN_ORDER, layer.columns)
    units = layer.length("units")
    if side % units:
        raise layer.error(f"{part} orders {units} units, which do not divide {side}")
    if "s2" in layer and layer.length("n") > side:
        raise layer.error(f"s2 has {layer.length('n')} rows or columns, and the weight has {side}")


@parameterization(
    "S2FT",
    "S2FT",
    forms=(
        form("out in", s2="n in", s2_row_order="units", optional={"s2_start": "1"}),
        form("out in", s2="out n", s2_column_order="units", optional={"s2_start": "1"}),
        form("out in", s2_row_order="units"),
        form("out in", s2_column_order="units"),
    ),
    settings=(
        Setting("s2_permuted", "flag", False, "the base is a model that S2FT has permuted: its order is restored"),
        Setting("s2_permuted_bias", "flag", False, "with s2_permuted: biases were permuted with their rows"),
    ),
    places=(ROW_ORDER, COLUMN_ORDER, "s2_start"),
    check=_check_s2ft,
    whole=lambda layer: layer.flag("s2_permuted") and ROW_ORDER in layer,
    changes_bias=lambda layer: layer.flag("s2_permuted") and layer.flag("s2_permuted_bias") and ROW_ORDER in layer,
    bias=lambda layer, bias: bias[np.argsort(_order(layer, ROW_ORDER, layer.rows))],
    source="Yang et al., S2FT: LLM Fine-tuning by Structured Sparsity, NeurIPS 2024, arXiv:2412.06289; the authors' "
    "repository Infini-AI-Lab/S2FT, and its copy in zihanghliu/LIFT",
)
def s2ft(layer: Layer) -> Change:
    """S2FT: rows or columns are added to the base in the base's own order.

    S2FT brings chosen heads (rows of q, k, v, columns of o) and channels (rows of gate and up, columns of down) to the
    front of a block's weights, trains slices there, and never moves them back: ``W_trained - W`` means nothing until
    the order is undone. The file must hold that order for every weight: ``s2_row_order`` or ``s2_column_order``, at
    place i the number of the head or channel that stands at place i after the move. A head is ``out / units`` rows.

    - Trained slices on the base as it was: ``s2``, added to rows (or columns) ``s2_start`` on of the permuted weight
      (0 if it is not there), goes to the rows that stood there.
    - A fine-tuned model (``s2_permuted``): it is named as the base, the file holds orders alone (or also s2, if it was
      not fused), and every weight is taken back to the base's order. A bias goes with its rows only if
      ``s2_permuted_bias`` says that training moved it; the authors' code does not, and is for layers without.

    Each weight's order is its own: with grouped queries, k and v have one of as many units as key-value heads, and q
    and o of as many as they were permuted by. The authors' code takes q by key-value heads and an order of all heads,
    which is right for plain multi-head attention alone.
    """
    by_rows = ROW_ORDER in layer
    side = layer.rows if by_rows else layer.columns
    order = _order(layer, ROW_ORDER if by_rows else COLUMN_ORDER, side)
    start = int(layer.integers("s2_start", side)[0]) if "s2_start" in layer else 0
    trained = layer.array("s2") if "s2" in layer else None
    count = 0 if trained is None else layer.length("n")
    if start + count > side:
        raise layer.error(f"s2 begins at {start} and has {count} rows or columns, and the weight has {side}")
    if not layer.flag("s2_permuted"):
        assert trained is not None
        return _added(trained, order[start : start + count], layer, by_rows=by_rows)
    arrays = [] if trained is None else [trained]

    def restored_rows(base: Array) -> Array:
        changed = np.empty_like(base)
        changed[order] = base
        if trained is not None:
            changed[order[start : start + count]] += trained
        return changed

    def restored_columns(base: Array, first: int) -> Array:
        changed = np.empty_like(base)
        changed[:, order] = base
        if trained is not None:
            changed[:, order[start : start + count]] += trained[first : first + len(base)]
        return changed

    return Whole(restored_rows, arrays) if by_rows else Rows(restored_columns, arrays)


def _order(layer: Layer, part: str, side: int) -> Array:
    """Return which row or column of the base stands at each place of the permuted weight: ``[side]``."""
    units = layer.length("units")
    order = layer.integers(part, units)
    if len(np.unique(order)) != units:
        raise layer.error(f"{part} is no order of {units} units: some come twice")
    width = side // units
    return (order[:, None] * width + np.arange(width)).reshape(-1)


def _added(trained: Array, places: Array, layer: Layer, *, by_rows: bool) -> Change:
    slots = np.full(layer.rows if by_rows else layer.columns, -1)
    slots[places] = np.arange(len(places))

    def rows(start: int, stop: int) -> Array:
        delta = np.zeros((stop - start, layer.columns))
        if by_rows:
            here = slots[start:stop]
            delta[here >= 0] = trained[here[here >= 0]]
        else:
            delta[:, places] = trained[start:stop]
        return delta

    return Added(rows, [trained, slots])
