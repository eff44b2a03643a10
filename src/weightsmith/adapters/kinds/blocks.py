"""Kinds that work on a weight in square blocks: MiSS and its former self, Bone, with Bat and mini."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank, Rows
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

_START = Setting("init_weights", "word", "true", "which form: `true` is MiSS (Bone), `bat` Bat, `mini` fewer columns")
_SOURCE = "Kang and Yin, MiSS (earlier Bone and DiSHA), arXiv:2409.15371"


def _check(layer: Layer) -> None:
    start = layer.text("init_weights")
    if layer.has("rows"):
        if start != "bat":
            raise layer.error(
                "it holds a block for every block of rows (Bat), and init_weights in its config is not bat"
            )
        size, blocks = layer.length("r"), layer.length("rows")
        if blocks * size != layer.rows or layer.columns % size:
            raise layer.error(f"{blocks} blocks of side {size} do not divide its weight {list(layer.shape)}")
        return
    rank, width = layer.length("r"), layer.length("m")
    if start == "bat" or rank > layer.columns:
        raise layer.error(f"its block is {[rank, width]}, which init_weights: {start} does not fit")
    if layer.rows % width or (width != layer.rows and start != "mini"):
        raise layer.error(
            f"its block has {width} columns, and its weight {layer.rows} rows: only with init_weights: mini may it "
            "have less, and then a divisor"
        )


def _elements(layer: Layer) -> int:
    rank = layer.length("r")
    return min(rank, layer.rows // 2) * (layer.rows + layer.columns) if layer.has("m") else layer.rows * rank


@parameterization(
    "BONE",
    "Bone",
    forms=(form("out in", miss_block="rows r r"), form("out in", miss_block="r m")),
    aliases={"bone_block": "miss_block"},
    settings=(_START,),
    check=_check,
    elements=_elements,
    by_rows=True,
    source=_SOURCE,
)
@parameterization(
    "MISS",
    "MiSS",
    forms=(form("out in", miss_block="rows r r"), form("out in", miss_block="r m")),
    settings=(_START,),
    check=_check,
    elements=_elements,
    by_rows=True,
    source=_SOURCE,
)
def miss(layer: Layer) -> Change:
    """MiSS, called Bone in older PEFT: one matrix M ``[r, out]``, added to every r columns of W, transposed.

    Inputs that are r apart share their change, so that it has rank r; the last columns take the first rows of M where r
    does not divide them. There is no scale. With ``init_weights: mini`` M is ``[r, m]``, repeated along the outputs.

    With ``init_weights: bat``, M is a matrix B_p ``[r, r]`` for every r rows, and each block of W in them becomes
    ``W_pq + W_pq B_p + B_p``: the only one of these that depends on the base.
    """
    block = layer.array("miss_block")
    if block.ndim == 3:
        return _bat(block)
    rank, width = block.shape
    slots, columns = np.arange(layer.columns) % rank, np.ascontiguousarray(block.T)
    if 2 * rank <= min(layer.rows, layer.columns):
        return LowRank(columns[np.arange(layer.rows) % width], (slots == np.arange(rank)[:, None]).astype(np.float64))
    return Added(lambda start, stop: columns[np.arange(start, stop) % width][:, slots], [columns])


def _bat(blocks: Array) -> Change:
    size = blocks.shape[-1]

    def rows(base: Array, start: int) -> Array:
        changed = np.empty_like(base)
        stop = start + len(base)
        for number in range(start // size, -(-stop // size)):
            first, last = max(start, number * size), min(stop, (number + 1) * size)
            parts = base[first - start : last - start].reshape(last - first, -1, size)
            block = blocks[number]
            mixed = parts + parts @ block + block[first - number * size : last - number * size, None]
            changed[first - start : last - start] = mixed.reshape(last - first, -1)
        return changed

    return Rows(rows, [blocks])
