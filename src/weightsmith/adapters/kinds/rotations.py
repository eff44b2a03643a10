"""Kinds that rotate the inputs of a layer by orthogonal matrices: OFT, BOFT, HRA."""

from __future__ import annotations

import math

import numpy as np

from weightsmith.adapters.change import Change, Rows
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

# The version of PEFT from which on the last term of the Neumann series is taken once.
_SERIES_CHANGED = (0, 18)
_MOST_TERMS = 100


def _block_size(entries: int) -> int | None:
    """Return the b of which ``b (b - 1) / 2`` entries lie above the diagonal, or None if there is none."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else None


def _rotation(layer: Layer) -> str:
    return "oft_R" if "oft_R" in layer else "oft_embedding_R"


def _check_oft(layer: Layer) -> None:
    blocks, entries = layer[_rotation(layer)]
    size = _block_size(entries)
    if size is None:
        raise layer.error(
            f"{_rotation(layer)} is {[blocks, entries]}: {entries} is no number of entries above a diagonal"
        )
    if layer.text("oft_block_size") is None:
        raise layer.error(
            "its config has no oft_block_size: PEFT before 0.14 stored other matrices; train it again, or fold it with "
            "PEFT 0.13"
        )
    whole, rest = divmod(layer.columns, size)
    if rest or not (blocks == whole or (blocks == 1 and layer.flag("block_share"))):
        raise layer.error(
            f"{_rotation(layer)} holds {blocks} blocks of side {size}, and {layer.columns} inputs are to be rotated"
        )
    if not 1 <= layer.whole("num_cayley_neumann_terms") <= _MOST_TERMS:
        raise layer.error(
            f"its config gives num_cayley_neumann_terms as {layer.whole('num_cayley_neumann_terms')}; 1 to "
            f"{_MOST_TERMS} are known"
        )
    if len(layer.shape) == 4 and layer.shape[2:] != (1, 1):
        raise layer.error(
            f"it is a convolution with a kernel of {layer.shape[2]} x {layer.shape[3]}: PEFT trains its rotation on "
            "overlapping patches that it sums up again, and no kernel of that size equals that"
        )


@parameterization(
    "OFT",
    "OFT",
    forms=(
        form("out in", oft_R="blocks entries"),
        form("out in h w", oft_R="blocks entries"),
        form("v d", oft_embedding_R="blocks entries"),
    ),
    settings=(
        Setting(
            "oft_block_size", "whole", None, "the side of the blocks; shapes tell it, but PEFT before 0.14 has none"
        ),
        Setting("block_share", "flag", False, "one block serves for all"),
        Setting("coft", "flag", False, "blocks keep close to the identity (COFT)"),
        Setting("eps", "number", 6e-5, "how close, of all blocks together"),
        Setting("use_cayley_neumann", "flag", True, "the inverse in the Cayley transform is a Neumann series, cut off"),
        Setting("num_cayley_neumann_terms", "whole", 5, "how many terms it has"),
        Setting("peft_version", "text", None, "which PEFT wrote it: before 0.18 the series was another"),
    ),
    check=_check_oft,
    by_rows=True,
    may_be_empty=True,
    source="Qiu et al., OFT, NeurIPS 2023, arXiv:2306.07280; Qiu et al., OFTv2, arXiv:2506.19847",
)
def oft(layer: Layer) -> Change:
    """OFT: ``W R^T``, R block-diagonal and orthogonal; of embeddings ``W R``.

    A block is the Cayley transform ``(I - Q)(I + Q)^-1`` of a skew-symmetric Q, whose entries above the diagonal are
    stored. (That is PEFT's, with the sign that it has; the Neumann series is of ``(I + Q)(I - Q)^-1``, its inverse.)
    With ``use_cayley_neumann`` it is ``I + 2 Q + 2 Q^2 + ... + Q^(n-1)``, which is not quite orthogonal; PEFT before
    0.18 took the last term twice as well, and adapters that it wrote are folded so. With ``coft`` each Q whose norm is
    more than ``eps / sqrt(blocks)`` is shortened to that. Of convolutions only those with a kernel of 1 x 1 fold: PEFT
    trains larger ones on overlapping patches, which it sums up again.
    """
    part = _rotation(layer)
    entries = layer.array(part)
    size = _block_size(entries.shape[1])
    assert size is not None
    skew = np.zeros((len(entries), size, size))
    above = np.triu_indices(size, 1)
    skew[:, above[0], above[1]] = entries
    skew -= skew.transpose(0, 2, 1)
    if layer.flag("coft"):
        bound = layer.number("eps") / math.sqrt(len(skew))
        norms = np.sqrt(np.einsum("bij,bij->b", skew, skew))[:, None, None]
        skew *= np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)
    turns = _series(layer, skew) if layer.flag("use_cayley_neumann") else _cayley(skew)
    # Rows are multiplied by the blocks from the right.
    right = turns if part == "oft_embedding_R" else np.ascontiguousarray(turns.transpose(0, 2, 1))

    def rows(base: Array, _: int) -> Array:
        parts = base.reshape(len(base), -1, 1, size)
        rotated: Array = parts @ right
        return rotated.reshape(base.shape)

    return Rows(rows, [right])


def _cayley(skew: Array) -> Array:
    """Return ``(I - Q)(I + Q)^-1`` of skew-symmetric matrices ``[blocks, n, n]``."""
    eye = np.eye(skew.shape[-1])
    # Both commute, so that it is the solution of (I + Q) X = I - Q as well.
    solved: Array = np.linalg.solve(eye + skew, eye - skew)
    return solved


def _series(layer: Layer, skew: Array) -> Array:
    terms = layer.whole("num_cayley_neumann_terms")
    version = (layer.text("peft_version") or "0").partition("@")[0].split(".")[:2]
    numbers = [int(one) if one.isdecimal() and len(one) < 9 else 0 for one in version]
    doubled = tuple(numbers) < _SERIES_CHANGED
    # Since PEFT 0.18 the last power is taken once, and three terms give the same as four.
    last = [2] * (terms - 1) if doubled or terms < 3 else [2] * (max(terms, 4) - 2) + [1]
    total = np.eye(skew.shape[-1]) + np.zeros_like(skew)
    power = np.eye(skew.shape[-1])
    for factor in last:
        power = power @ skew
        total += factor * power
    return total


def _check_boft(layer: Layer) -> None:
    blocks, size, factors = layer.length("blocks"), layer.length("size"), layer.length("factors")
    if blocks * size != layer.columns:
        raise layer.error(f"boft_R holds {blocks} blocks of side {size}, and {layer.columns} inputs are to be rotated")
    if len(layer.shape) == 4 and layer.shape[2] != layer.shape[3]:
        raise layer.error(f"its kernel is {layer.shape[2]} x {layer.shape[3]}; BOFT is known of square ones alone")
    if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
        raise layer.error(f"{factors} butterfly factors do not fit {blocks} blocks of side {size}")


@parameterization(
    "BOFT",
    "BOFT",
    forms=(
        form("out in", boft_R="factors blocks size size", boft_s="out 1"),
        form("out in h w", boft_R="factors blocks size size", boft_s="1 out"),
    ),
    check=_check_boft,
    by_rows=True,
    source="Liu et al., BOFT, ICLR 2024, arXiv:2311.06243",
)
def boft(layer: Layer) -> Change:
    """BOFT: ``diag(s) W (B_m ... B_1)^T``, each B a block-diagonal orthogonal matrix between butterfly permutations.

    A block is the Cayley transform of ``(R - R^T) / 2``. Factor i has blocks of another permutation of the inputs, so
    that their product mixes them all; with one factor (all that PEFT trains without its CUDA extension) it is OFT with
    a scale for each output. Biases are not scaled.
    """
    raw = layer.array("boft_R")
    factors, blocks, size, _ = raw.shape
    turns = _cayley((raw - raw.transpose(0, 1, 3, 2)).reshape(-1, size, size) / 2).reshape(raw.shape)
    scale = layer.array("boft_s").reshape(-1)
    width = layer.columns
    orders = [_butterfly(width, blocks >> i, size // 2) if factors > 1 else np.arange(width) for i in range(factors)]

    def rows(base: Array, start: int) -> Array:
        changed = base
        for turn, order in zip(turns, orders, strict=True):
            # P D P^T, on rows: entries are put where P^T takes them, turned, and taken back.
            placed = np.empty_like(changed)
            placed[:, order] = changed
            turned = placed.reshape(len(base), blocks, 1, size) @ turn.transpose(0, 2, 1)
            changed = turned.reshape(base.shape)[:, order]
        return changed * scale[start : start + len(base), None]

    return Rows(rows, [turns, scale])


def _butterfly(width: int, blocks: int, half: int) -> Array:
    """Return the order in which a butterfly factor takes its inputs: ``[width]``, int64.

    Within each of so many blocks, pieces of length ``half`` at even places come first, those at odd places after them.
    """
    length = width // blocks
    pieces = np.arange(length).reshape(-1, half)
    inside = np.concatenate([pieces[::2], pieces[1::2]]).reshape(-1)
    order: Array = (np.arange(0, width, length)[:, None] + inside).reshape(-1)
    return order


def _check_hra(layer: Layer) -> None:
    inputs, rank = layer["hra_u"]
    if inputs != layer.columns:
        raise layer.error(f"hra_u has {inputs} rows, and {layer.columns} inputs are to be reflected")
    if layer.whole("r") != rank:
        raise layer.error(f"the adapter's config gives it rank {layer.whole('r')}, and hra_u has {rank} columns")
    if len(layer.shape) == 4 and layer.shape[2] != layer.shape[3]:
        raise layer.error(f"its kernel is {layer.shape[2]} x {layer.shape[3]}; HRA is known of square ones alone")
    if layer.flag("apply_GS") and rank > inputs:
        raise layer.error(f"{rank} directions of length {inputs} cannot be made orthogonal (apply_GS)")


# What is left of a direction, after the earlier ones were taken out, below which it is rounding.
_DEPENDENT = 1e-6


@parameterization(
    "HRA",
    "HRA",
    forms=(form("out in", hra_u="in r"), form("out ...", hra_u="columns r")),
    settings=(
        Setting("r", "whole", 8, "how many reflections", patterns="rank_pattern"),
        Setting("apply_GS", "flag", False, "directions are made orthogonal first (Gram-Schmidt)"),
    ),
    check=_check_hra,
    by_rows=True,
    source="Yuan, Liu and Xu, Bridging the gap between low-rank and orthogonal adaptation via Householder reflection "
    "adaptation, NeurIPS 2024, arXiv:2405.17484",
)
def hra(layer: Layer) -> Change:
    """HRA: ``W H_1 H_2 ... H_r``, Householder reflections ``H_i = I - 2 u_i u_i^T`` with ``u_i`` of length one.

    With ``apply_GS`` the directions are made orthogonal first, so that it is ``W (I - 2 U U^T)``. Directions that
    depend on earlier ones, as those of an untrained adapter do, have no such form; they are refused.
    """
    columns = layer.array("hra_u")
    directions: list[Array] = []
    for i in range(columns.shape[1]):
        one = columns[:, i]
        length = float(np.linalg.norm(one))
        if layer.flag("apply_GS"):
            for earlier in directions:
                one = one - (earlier @ one) * earlier
        left = float(np.linalg.norm(one))
        if not 0 < length < math.inf or left <= _DEPENDENT * length:
            what = "a mixture of the columns before it" if 0 < length < math.inf else "zero or not finite"
            raise layer.error(f"column {i} of hra_u is {what}, and gives no direction to reflect in")
        directions.append(one / left)

    def rows(base: Array, _: int) -> Array:
        changed = base.copy()
        for one in directions:
            changed -= np.outer(2 * (changed @ one), one)
        return changed

    return Rows(rows, directions)
