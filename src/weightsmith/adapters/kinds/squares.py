"""Kinds that multiply by a square matrix, between fixed ways of shortening the input and lengthening the output."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

# Type -> whether inputs, and whether outputs, go to the square's sides in turn (else in groups that stand together).
_IN_TURN = {1: (True, True), 2: (False, False), 3: (False, True), 4: (True, False)}
_ROTATED = 6


def _check(layer: Layer) -> None:
    kind, side = layer.whole("mora_type"), layer.length("s")
    if kind not in _IN_TURN and kind != _ROTATED:
        raise layer.error(
            f"adapter_config.json gives mora_type as {kind}, of which nothing is known; known are 1, 2, 3, 4 and 6"
        )
    if kind == _ROTATED and side % 2:
        raise layer.error(f"lora_A has side {side}, and rotations (mora_type 6) need an even one")
    if (kind == _ROTATED or _IN_TURN[kind][0]) and -layer.columns % side > layer.columns:
        raise layer.error(
            f"lora_A has side {side}, and the layer's {layer.columns} inputs, taken once more, do not fill it"
        )


@parameterization(
    "MORA",
    "MoRA",
    forms=(form("out in", lora_A="s s", optional={"lora_B": "s s"}),),
    settings=(Setting("mora_type", "whole", 1, "how inputs are shortened and outputs lengthened: 1, 2, 3, 4 or 6"),),
    check=_check,
    variant=("LORA", "use_mora"),
    source="Jiang et al., MoRA: High-Rank Updating for PEFT, arXiv:2405.12130; the authors' repository kongds/MoRA",
)
def mora(layer: Layer) -> Change:
    """MoRA: ``W + expand(M compress)``, with one square matrix M ``[s, s]`` and nothing else to train.

    Input i and output o belong to sides of the square, by ``mora_type``:

    - 1 (sharing): i to ``i mod s``, o to ``o mod s``. Inputs that the last turn lacks are taken from the first ones
      again, and not as zeros.
    - 2 (grouping): neighbours in s groups of nearly equal length, on both sides; the longer groups come first.
    - 3: inputs as in 2, outputs as in 1. 4: inputs as in 1, outputs as in 2.
    - 6 (rotations): inputs are cut into pieces of length s (the last one filled as in 1), piece g is rotated as RoPE
      does at position g (base 10000), M is applied to each, and the results stand side by side, cut to the outputs or
      repeated.

    There is no scale: alpha does not count. Types 1 to 4 add a matrix of rank s, at most. The authors' configs say
    LORA with ``use_mora``; their files hold M twice, as lora_A and lora_B, which are one parameter.
    """
    square = layer.array("lora_A")
    if "lora_B" in layer and not np.array_equal(square, layer.array("lora_B")):
        raise layer.error("lora_A and lora_B differ, and MoRA has one square matrix that goes by both names")
    kind = layer.whole("mora_type")
    if kind == _ROTATED:
        return _rotated(square, layer.columns)
    side = len(square)
    inputs_in_turn, outputs_in_turn = _IN_TURN[kind]
    wide = square[:, _sides(layer.columns, side, in_turn=inputs_in_turn)]
    if inputs_in_turn:
        filled = -layer.columns % side
        wide[:, :filled] += square[:, side - filled :]
    sides = _sides(layer.rows, side, in_turn=outputs_in_turn)
    return _Repeated(wide, sides)


class _Repeated(LowRank):
    """Rows of a matrix, each several times."""

    def __init__(self, matrix: Array, which: Array) -> None:
        chosen = np.zeros((len(which), len(matrix)))
        chosen[np.arange(len(which)), which] = 1
        super().__init__(chosen, matrix)
        self._which = which

    def delta(self, start: int, stop: int) -> Array:
        """See :meth:`Added.delta`."""
        rows: Array = self.right[self._which[start:stop]]
        return rows


def _sides(length: int, side: int, *, in_turn: bool) -> Array:
    """Return to which side of the square each of as many features belongs."""
    if in_turn:
        return np.arange(length) % side
    counts = np.full(side, length // side)
    counts[: length % side] += 1
    return np.repeat(np.arange(side), counts)


def _rotated(square: Array, columns: int) -> Change:
    side = len(square)
    pieces = -(-columns // side)
    angles = np.outer(np.arange(pieces), 10000.0 ** (-np.arange(0, side, 2) / side))
    cosines, sines = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)
    # RoPE gives x cos + (-x2, x1) sin for x = (x1, x2); M's columns take over what it does to the input.
    turned = np.concatenate([square[:, side // 2 :], -square[:, : side // 2]], axis=1)

    def delta(start: int, stop: int) -> Array:
        piece, line = np.divmod(np.arange(start, stop) % (pieces * side), side)
        block = square[line] * cosines[piece] + turned[line] * sines[piece]
        places = (piece[:, None] * side + np.arange(side)) % columns
        result = np.zeros((stop - start, columns))
        # In the last piece a column may come twice.
        np.add.at(result, (np.arange(stop - start)[:, None], places), block)
        return result

    return Added(delta, [square, turned, cosines, sines])
