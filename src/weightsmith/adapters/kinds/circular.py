"""Kinds that turn: circulant blocks, and rotations of pairs of outputs."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Rows, Whole
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


def _check_c3a(layer: Layer) -> None:
    stated, block = layer.number("block_size"), layer.length("b")
    if stated != block:
        raise layer.error(f"the adapter's config gives it blocks of {stated:g} (block_size), and its kernel of {block}")


@parameterization(
    "C3A",
    "C3A",
    forms=(form("m*b n*b", c3a_kernel="m n b"),),
    settings=(Setting("block_size", "whole", 256, "rows and columns of a block", patterns="block_size_pattern"),),
    check=_check_c3a,
    by_rows=True,
    source="Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, ACL 2025, arXiv:2407.19342",
)
def c3a(layer: Layer) -> Added:
    """C3A: ``W + C / in``, where C is made of circulant blocks: entry p, q of block i, j is ``k_ij[(q - p) mod b]``.

    PEFT multiplies by the Fourier transform of a kernel where its inverse would make the usual circular convolution, so
    rows shift to the right. PEFT divides by ``in``, the weight's columns, not by the block size.
    """
    kernel = layer.array("c3a_kernel") / layer.columns
    _, _, block = kernel.shape

    def rows(start: int, stop: int) -> Array:
        places = np.arange(start, stop)
        shifts = (np.arange(block) - places[:, None]) % block
        # Axes: row, block column, column within the block.
        chosen = np.take_along_axis(kernel[places // block], shifts[:, None, :], axis=2)
        return chosen.reshape(len(places), -1)

    return Added(rows, [kernel])


# Outputs of the largest group that is read beside a tile of rows; with larger ones a weight is worked on whole.
_STREAMED = 512
# Numbers for the angles of a group of g outputs, in halves of g.
_ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}


def _check_road(layer: Layer) -> None:
    variant, group, outputs, held = layer.text("variant"), layer.whole("group_size"), layer.rows, layer.length("n")
    if group <= 0 or group % 2 or outputs % group:
        raise layer.error(
            f"adapter_config.json has it rotate groups of {group} outputs (group_size), and {outputs} are there; "
            "groups are even, and none is left over"
        )
    wanted = _ROAD[str(variant)] * outputs // 2
    if held != wanted:
        raise layer.error(f"of {variant} it needs {wanted} angles for {outputs} outputs, and road_theta has {held}")


@parameterization(
    "ROAD",
    "RoAd",
    forms=(form("out in", road_theta="n", road_alpha="n"),),
    settings=(
        Setting("variant", "text", "road_1", "1, 2 or 4 angles and scales for a pair", choices=tuple(_ROAD)),
        Setting("group_size", "whole", 64, "outputs of a group, whose first half is paired with its second"),
    ),
    check=_check_road,
    changes_bias=lambda layer: True,
    bias=lambda layer, bias: _Rotation(layer).of(bias[:, None], 0)[:, 0],
    needs_bias=False,
    whole=lambda layer: layer.whole("group_size") > _STREAMED,
    by_rows=True,
    source="Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and "
    "Composability, NeurIPS 2024, arXiv:2409.00119",
)
def road(layer: Layer) -> Rows:
    """RoAd: ``R W`` and ``R b``: pairs of outputs are rotated and scaled.

    Output i of the first half of a group is paired with output j = i + g/2 of its second half: ``y_i = c_i x_i - s_i
    x_j`` and ``y_j = c_j x_j + s_j x_i``, with ``c = alpha cos(theta)`` and ``s = alpha sin(theta)``. ``road_1`` has
    one theta and alpha for a pair, so that R is a rotation with a scale; ``road_2`` has one for each output, ``road_4``
    one for each c and each s. The paper pairs neighbours (2i, 2i + 1); PEFT pairs halves of groups.
    """
    rotation = _Rotation(layer)
    group, outputs = layer.whole("group_size"), layer.rows
    if group > _STREAMED:
        return Whole(lambda base: rotation.of(base, 0), rotation.arrays)

    def rows(base: Array, start: int) -> Array:
        stop = start + len(base)
        # Whole groups: what is missing of the first and of the last is read too.
        first, last = start // group * group, min(-(-stop // group) * group, outputs)
        before, after = (layer.weight.rows(*ends) for ends in ((first, start), (stop, last)))
        groups = np.concatenate([before, base, after]) if first < start or stop < last else base
        return rotation.of(groups, first)[start - first : stop - first]

    return Rows(rows, rotation.arrays)


class _Rotation:
    """The matrix R: of every output a factor for itself and one for its partner."""

    def __init__(self, layer: Layer) -> None:
        variant, self._half = layer.text("variant"), layer.whole("group_size") // 2
        theta, alpha = layer.array("road_theta"), layer.array("road_alpha")
        # Axes: group, half of the outputs, output within the half.
        if variant == "road_1":
            theta, alpha = (np.repeat(one.reshape(-1, 1, self._half), 2, axis=1) for one in (theta, alpha))
        if variant == "road_4":
            # For each group all numbers of c come first, and then all of s.
            theta, alpha = (one.reshape(-1, 2, 2, self._half) for one in (theta, alpha))
            self._cosine = alpha[:, 0] * np.cos(theta[:, 0])
            self._sine = alpha[:, 1] * np.sin(theta[:, 1])
        else:
            theta, alpha = theta.reshape(-1, 2, self._half), alpha.reshape(-1, 2, self._half)
            self._cosine, self._sine = alpha * np.cos(theta), alpha * np.sin(theta)

    @property
    def arrays(self) -> list[Array]:
        return [self._cosine, self._sine]

    def of(self, matrix: Array, start: int) -> Array:
        """Multiply whole groups ``[n, columns]``, of which the first output is the one named."""
        pairs = matrix.reshape(-1, 2, self._half, matrix.shape[1])
        groups = slice(start // (2 * self._half), start // (2 * self._half) + len(pairs))
        cosine, sine = self._cosine[groups, ..., None], self._sine[groups, ..., None]
        turned = pairs * cosine
        turned[:, 0] -= pairs[:, 1] * sine[:, 0]
        turned[:, 1] += pairs[:, 0] * sine[:, 1]
        return np.asarray(turned.reshape(matrix.shape))
