"""Which tensors of a model have a row for every token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weightsmith.architecture.config import is_head, row_counts
from weightsmith.architecture.stacks import role
from weightsmith.checkpoint.tensor import Tensor

# The largest number of which a person may ask for a multiple of rows: far above what any device gains from.
MOST_PADDING = 1 << 20
# Tables that are looked up by position, not by token.
_POSITIONS = re.compile(r"(^|[._/])(wpe|pos|position\w*|\w*pos(ition)?_emb\w*|embed_positions|token_type\w*)([._/]|$)")
# What is added to the chances of tokens.
_BIAS = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output_layer|cls\.predictions(\.decoder)?|vocab_projector|proj_out"
    r"|generator_lm_head|pred_layer\.proj)\.bias$|(^|\.)final_logits_bias$"
)


def is_position_table(name: str) -> bool:
    """Whether embeddings are those of positions or kinds of text rather than of tokens."""
    return _POSITIONS.search(name) is not None


def is_head_bias(name: str) -> bool:
    """Whether a tensor is what a model adds to the chances of tokens."""
    return _BIAS.search(name) is not None


def is_token_table(name: str) -> bool:
    """Whether a matrix of this name has a row for every token: embeddings, or a head."""
    return is_head(name) or (role(name) == "embedding" and not is_position_table(name))


def vocabulary_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """Return embeddings, head and the head's bias -> the axis that counts tokens.

    Args:
        tensors: a model's tensors.
        config: its config; embeddings of another length than it gives to vocabularies are those of something else.
        tokens: how many rows the model's tokenizer needs: what tells where the config says nothing.
    """
    counts = set(row_counts(config))

    def fits(rows: int) -> bool:
        return rows in counts if counts else rows >= tokens

    found = {}
    for name, tensor in tensors.items():
        shape = tensor.shape
        if is_head_bias(name) and shape and fits(shape[-1]):
            # BART's is [1, vocabulary].
            found[name] = len(shape) - 1
        elif len(shape) == 2 and fits(shape[0]) and is_token_table(name):
            found[name] = 0
    return found
