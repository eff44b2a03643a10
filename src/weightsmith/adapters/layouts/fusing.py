"""One matrix of a model's publisher, and the several of diffusers: an adapter on the one said as adapters on them.

Of ``W + s B A`` the rows of W that become a matrix of their own take the same rows of B, and all of A. The other way
round, the factors of several matrices stand along the diagonal of one, so that nothing is rounded, and no matrix sees
the factors of another; kohya's converters do the same. What was put together so is known again by its zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.naming import Cut, Rule
from weightsmith.adapters.layouts.network import Entry
from weightsmith.adapters.layouts.tensors import Made, block_diagonal, rows, stacked
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, shown

_DOWN, _UP = "lora_A.weight", "lora_B.weight"
# The parts of a module, by kind, that have a row for each row of the weight; the others belong to all rows.
_BY_ROWS = {"LORA": (_UP, "lora_B.bias", p.MAGNITUDE), "LOHA": ("hada_w1_a", "hada_w2_a")}
# Flux's feed-forward part is this many times as wide as its stream.
_FEED_FORWARD = 4


def split(owner: str, entry: Entry, rule: Rule, names: Sequence[str], ranks: Sequence[int] | None) -> list[Entry]:
    """Return an adapter on a publisher's matrix as adapters on those of diffusers.

    Args:
        owner: the adapter's name.
        entry: what it holds for the matrix.
        rule: how the matrix is divided.
        names: diffusers' names for what it becomes, as many as the rule has parts.
        ranks: the rank of each, where the file tells it, 0 for one that it does not change; else it is looked for.

    Raises:
        CheckpointError: if it cannot be divided so.
    """
    kind = entry.kind or ""
    if rule.cut == "whole":
        return [_with(entry, names[0], entry.parts, entry.alpha)]
    by_rows = _BY_ROWS.get(kind)
    if by_rows is None or "hada_t1" in entry.parts:
        raise CheckpointError(
            f"{owner}: {shown(entry.origin)} is {kind or 'a change of the whole'}, and diffusers has {len(names)} "
            f"matrices for this one, or other rows; name a base under the model's own names"
        )
    height, width = _sides(entry)
    heights = _heights(rule.cut, height, width, len(names))
    if heights is None:
        raise CheckpointError(
            f"{owner}: {shown(entry.origin)} changes {height} rows of {width} columns, which do not divide into "
            f"{', '.join(names)}"
        )
    if rule.cut in ("swapped", "swapped if last"):
        parts = dict(entry.parts)
        if len(heights) == 2:
            parts |= {part: _swapped(parts[part]) for part in by_rows if part in parts}
        return [_with(entry, names[0], parts, entry.alpha)]
    shares = _shares(entry, heights, ranks) if kind == "LORA" else None
    found = []
    row = 0
    for i, (name, own) in enumerate(zip(names, heights, strict=True)):
        columns = slice(None) if shares is None else shares[i]
        row += own
        if columns is None:
            continue
        parts = dict(entry.parts)
        for part in by_rows:
            if part in parts:
                parts[part] = rows(parts[part], row - own, row, columns if part == _UP else slice(None))
        alpha = entry.alpha
        if shares is not None:
            parts[_DOWN] = rows(parts[_DOWN], columns.start, columns.stop)
            rank = entry.parts[_DOWN].shape[0]
            alpha = None if alpha is None else alpha * (columns.stop - columns.start) / rank
        found.append(_with(entry, name, parts, alpha))
    return found


def fuse(owner: str, rule: Rule, name: str, held: Mapping[int, Entry], height: int | None) -> tuple[Entry, list[int]]:
    """Return adapters on diffusers' matrices as one on the publisher's, and the rank that each has in it.

    Args:
        owner: the adapter's name.
        rule: how the publisher's matrix is divided.
        name: the publisher's name.
        held: which part of the rule -> what the adapter holds for it.
        height: how many rows the publisher's matrix has, if that is known.

    Raises:
        CheckpointError: if no one adapter equals them.
    """
    entries = list(held.values())
    first = entries[0]
    origins = ", ".join(entry.origin or entry.module for entry in entries)
    if rule.cut == "whole":
        return _with(first, name, first.parts, first.alpha), []
    if {entry.kind for entry in entries} != {"LORA"}:
        raise CheckpointError(
            f"{owner}: {origins} become one matrix in this layout, or other rows, which LoRA can say, and {first.kind} "
            "cannot"
        )
    if rule.cut in ("swapped", "swapped if last"):
        parts = dict(first.parts)
        own, width = _sides(first)
        if rule.cut == "swapped" or own == 2 * width:
            parts |= {part: _swapped(parts[part]) for part in _BY_ROWS["LORA"] if part in parts}
        return _with(first, name, parts, first.alpha), []
    scales = {entry.scale for entry in entries}
    dtypes_held = {tensor.dtype for entry in entries for part, tensor in entry.parts.items() if part in (_DOWN, _UP)}
    if len(scales) > 1 or len(dtypes_held) > 1:
        raise CheckpointError(
            f"{owner}: {origins} become one matrix in this layout, and have different scales or dtypes"
        )
    blocks: list[Tensor | int] = []
    width = first.parts[_DOWN].shape[1]
    for i in range(len(rule.parts)):
        blocks.append(held[i].parts[_UP] if i in held else _missing(rule.cut, i, width, held, height))
    odd = [part for entry in entries for part in entry.parts if part not in (_DOWN, _UP, p.MAGNITUDE)]
    magnitudes = [entry.parts[p.MAGNITUDE] for entry in entries if p.MAGNITUDE in entry.parts]
    if odd or len(magnitudes) not in (0, len(rule.parts)):
        raise CheckpointError(
            f"{owner}: {origins} become one matrix in this layout, and {odd[0] if odd else p.MAGNITUDE} of some is no "
            "part of it"
        )
    ordered = [held[i] for i in sorted(held)]
    parts = {_DOWN: stacked([entry.parts[_DOWN] for entry in ordered]), _UP: block_diagonal(blocks)}
    if magnitudes:
        parts[p.MAGNITUDE] = stacked([entry.parts[p.MAGNITUDE] for entry in ordered])
    ranks = [held[i].parts[_DOWN].shape[0] if i in held else 0 for i in range(len(rule.parts))]
    # In this order, so that whole numbers stay whole.
    alpha = None if first.alpha is None else first.alpha * sum(ranks) / first.parts[_DOWN].shape[0]
    return _with(first, name, parts, alpha), ranks


def _with(entry: Entry, module: str, parts: Mapping[str, Tensor], alpha: float | None) -> Entry:
    return Entry(entry.component, module, dict(parts), alpha, entry.origin)


def _sides(entry: Entry) -> tuple[int, int]:
    """Return the height of the weight, and its width."""
    if entry.kind == "LOHA":
        return entry.parts["hada_w1_a"].shape[0], entry.parts["hada_w1_b"].shape[1]
    return entry.parts[_UP].shape[0], entry.parts[_DOWN].shape[1]


def _heights(cut: Cut, height: int, width: int, count: int) -> list[int] | None:
    """Return the heights of the parts; of one whose rows stay as they are, its own."""
    if cut == "thirds":
        return [height // count] * count if height % count == 0 else None
    if cut == "squares":
        rest = height - (count - 1) * width
        return [width] * (count - 1) + [rest] if rest > 0 else None
    if cut == "swapped" or height == 2 * width:
        return [height // 2] * 2 if height % 2 == 0 else None
    return [height]


def _missing(cut: Cut, part: int, width: int, held: Mapping[int, Entry], height: int | None) -> int:
    """Return the height of a matrix that is not changed."""
    if cut == "thirds":
        return height // 3 if height is not None else next(iter(held.values())).parts[_UP].shape[0]
    if part < 3:
        return width
    return height - 3 * width if height is not None else _FEED_FORWARD * width


def _swapped(tensor: Tensor) -> Tensor:
    half = tensor.shape[0] // 2
    return Made(tensor.name, tensor.shape, tensor.dtype, lambda: np.roll(tensor.numpy(), half, axis=0))


def _shares(entry: Entry, heights: Sequence[int], ranks: Sequence[int] | None) -> list[slice | None] | None:
    """Return the columns of B that each matrix has to itself, None for one without; None where all share them."""
    up = entry.parts[_UP].numpy()
    rank, count = up.shape[1], len(heights)
    if ranks is not None and len(ranks) == count and sum(ranks) == rank and min(ranks) >= 0:
        candidates = [list(ranks)]
    else:
        candidates = [[rank // count] * count] if rank % count == 0 and rank else []
    for candidate in candidates:
        found, row, column = True, 0, 0
        for height, own in zip(heights, candidate, strict=True):
            block = up[row : row + height]
            found = found and not block[:, :column].any() and not block[:, column + own :].any()
            row, column = row + height, column + own
        # Zeros everywhere are a LoRA before its training, of which nothing can be told.
        if found and (ranks is not None or up.any()):
            starts = np.cumsum([0, *candidate]).tolist()
            return [slice(start, stop) if stop > start else None for start, stop in pairwise(starts)]
    return None
