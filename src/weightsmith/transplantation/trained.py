"""Tokens that look as if training had never met them: they say nothing of where two models put a token.

After Land and Bartolo, "Fishing for Magikarp: Automatically Detecting Under-trained Tokens in Large Language Models"
(2024), arXiv:2405.05417, with the thresholds of mergekit-tokensurgeon (``--magikarp``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.rows import read_wide, tile_rows
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.tokenizer.matching import Numbers
from weightsmith.tokenizer.tokenizer import Tokenizer
from weightsmith.transplantation.recipe import Part
from weightsmith.transplantation.tables import Table
from weightsmith.transplantation.tokens import Mask

# Tokens that are there to be given a meaning later.
_RESERVED = re.compile(rb"unused_?token|reserved_special_token|\[unused\d+\]|<unused\d+>")
# The share of tokens that the tails are, and the least cosine that counts.
_TAIL, _LEAST = 0.01, 0.5


@dataclass(frozen=True, eq=False)
class Untrained:
    """Tokens that look untrained.

    Attributes:
        model: per number of the model's tokenizer whether its token does: ``[size]``, bool.
        donor: the same of the donor's.
    """

    model: Mask
    donor: Mask


def find_untrained(
    tables: Sequence[Table], spaces: Mapping[Part, Mapping[str, Tensor]], own: Tokenizer, new: Tokenizer
) -> Untrained:
    """Find the tokens of model and donor that look untrained, by what :func:`untrained` says of all their tables.

    Args:
        tables: the model's tables.
        spaces: the donor's, as embeddings and as head.
        own: the model's tokenizer.
        new: the donor's.

    Raises:
        CheckpointError: if a table cannot be read.
    """
    ours = [table.tensor for table in tables if not table.is_bias]
    heads = [table.tensor for table in tables if not table.is_bias and table.part == "head"]
    theirs = {id(tensor): tensor for part in spaces.values() for tensor in part.values()}
    apart = spaces["head"] is not spaces["embeddings"] and bool(spaces["head"])
    return Untrained(untrained(ours, own, untied=bool(heads)), untrained(list(theirs.values()), new, untied=apart))


def untrained(tables: Sequence[Tensor], tokenizer: Tokenizer, *, untied: bool) -> Mask:
    """Return which tokens look untrained: ``[size]``, bool.

    Known to be so are rows that no token has, and tokens that are named unused or reserved. Further tokens look so

    - in any table, whose row has a cosine with the mean row of those that are known, above 0.5 and above the 99th
      percentile of the cosines of all others;
    - in a model whose head is its own, whose embedding has a norm below the 1st percentile of all others.

    That tool takes percentiles of all rows, so that where many are unused none of the others looks so.

    Args:
        tables: the model's embeddings first, and its head.
        tokenizer: its tokenizer.
        untied: whether its head is its own: the norms of tied embeddings say nothing of training.

    Raises:
        CheckpointError: if a table cannot be read.
    """
    result = np.zeros(tokenizer.size, bool)
    named = [n for n, token in tokenizer.tokens.items() if _RESERVED.search(token.encode("utf-8", "replace"))]
    for place, tensor in enumerate(tables):
        rows = tensor.shape[0]
        known = np.ones(rows, bool)
        known[[number for number in tokenizer.tokens if number < rows]] = False
        known[[number for number in named if number < rows]] = True
        direction = _mean(tensor, np.flatnonzero(known))
        norms, cosines = _measured(tensor, direction)
        found, others = known.copy(), ~known
        if known.any() and others.any():
            found |= cosines > max(float(np.quantile(cosines[others], 1 - _TAIL)), _LEAST)
        if untied and place == 0 and others.any():
            found |= norms < np.quantile(norms[others], _TAIL)
        count = min(rows, tokenizer.size)
        result[:count] |= found[:count]
    return result


def _tiles(tensor: Tensor) -> Sequence[tuple[int, int]]:
    rows, width = tensor.shape
    step = tile_rows(width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _read(tensor: Tensor, start: int, stop: int) -> Array:
    width = tensor.shape[1]
    return read_wide(tensor, start * width, stop * width).reshape(stop - start, width)


def _mean(tensor: Tensor, numbers: Numbers) -> Array:
    total = np.zeros(tensor.shape[1])
    for start, stop in _tiles(tensor):
        begin, end = np.searchsorted(numbers, [start, stop])
        if begin < end:
            total += _read(tensor, start, stop)[numbers[begin:end] - start].sum(0)
    return total / max(len(numbers), 1)


def _measured(tensor: Tensor, direction: Array) -> tuple[Array, Array]:
    """Return the norm of every row, and its cosine with a direction, 0 with a row of zeros: ``[V]`` each."""
    norms, products = np.zeros(tensor.shape[0]), np.zeros(tensor.shape[0])
    for start, stop in _tiles(tensor):
        rows = _read(tensor, start, stop)
        norms[start:stop] = np.sqrt((rows * rows).sum(1))
        products[start:stop] = (rows * direction).sum(1)
    both = norms * np.sqrt((direction * direction).sum())
    return norms, np.divide(products, both, out=np.zeros(len(both)), where=both > 0)
