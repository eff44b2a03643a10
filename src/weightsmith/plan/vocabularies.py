"""Vocabularies of the models of a merge, and of its result: a row of an embedding is a token only where they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.architecture.config import is_head, row_counts, tied_source
from weightsmith.architecture.stacks import role
from weightsmith.architecture.vocabulary import is_position_table
from weightsmith.checkpoint.companions import read_companion
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import PlanError
from weightsmith.plan.slots import Model
from weightsmith.tokenizer.tokenizer import LARGEST, parse_tokenizer, shown_file, vocabulary_of


def token_tables(
    tensors: Mapping[str, Tensor], donor: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Return embedding or head -> the rows that it has in the donor, and those that it has in the result.

    Args:
        tensors: the result's tensors.
        donor: the tensors of the model that the config is from.
        config: that model's config; what did not change and has another length than it gives to tables is left out.
    """
    counts = set(row_counts(config))
    tables = {}
    for name, tensor in tensors.items():
        own = donor.get(name if name in donor else tied_source(name, donor) or name)
        if own is None or not tensor.shape or own.shape[1:] != tensor.shape[1:]:
            continue
        before, now = own.shape[0], tensor.shape[0]
        if before == now and before not in counts:
            continue
        kind = role(name)
        # Other layers of a head may have as many rows as there are tokens by chance, but do not change with them.
        table = kind == "embedding" or is_head(name) or (kind == "head" and before != now)
        if table and not is_position_table(name):
            tables[name] = before, now
    return tables


def check_vocabularies(models: Sequence[Model], tokenizer: Model, tensors: Mapping[str, Tensor]) -> list[str]:
    """Check that the result has a row for every token of its tokenizer, and return what a person should know.

    Args:
        models: all models of the merge, the donor first.
        tokenizer: the one whose tokenizer the result takes.
        tensors: the result's tensors.

    Raises:
        PlanError: if rows of tokens were lost: looking such a token up would fail.
        CheckpointError: if a tokenizer cannot be read.
    """
    highest, warnings = _compare(models)
    last = highest.get(tokenizer, -1)
    if last < 0:
        return warnings
    rows, own = token_rows(tensors), token_rows(tokenizer.checkpoint)
    if not rows:
        return warnings
    if last >= rows:
        text = f"the tokenizer of {tokenizer.reference} numbers tokens up to {last}"
        if own > last:
            raise PlanError(
                f"{text}, and the result has {rows} rows of embeddings, so that looking the last up would fail: take "
                "the tokenizer of a model without them (tokenizer_source), or keep their rows (on_shape_mismatch: pad)"
            )
        warnings.append(f"{text}, and its model has {own} rows of embeddings, the result {rows}: the rest has none")
    other = max(highest, key=lambda model: highest[model])
    if rows > own > last and highest[other] >= own:
        warnings.append(
            f"rows from {own} on are tokens of {other.reference} that the tokenizer of {tokenizer.reference} lacks; "
            f"tokenizer_source: {other.reference} takes the one that has them"
        )
    return warnings


def _compare(models: Sequence[Model]) -> tuple[dict[Model, int], list[str]]:
    """Return the highest number of a token in each model that has a tokenizer, and where models number differently.

    Merging the embeddings of such models mixes different tokens.
    """
    highest: dict[Model, int] = {}
    warnings: list[str] = []
    known: dict[bytes, int] = {}
    first: dict[str, int] | None = None
    owner = ""
    for model in models:
        file = model.checkpoint.companions.files.get("tokenizer.json")
        if file is None:
            continue
        text = read_companion(file, LARGEST)
        content = hashlib.blake2b(text).digest()
        if content in known:
            highest[model] = known[content]
            continue
        vocabulary = vocabulary_of(parse_tokenizer(text, shown_file(file, model.reference)))
        highest[model] = known[content] = max(vocabulary.values(), default=-1)
        if first is None:
            first, owner = vocabulary, model.reference
        elif differing := sum(vocabulary.get(token, -1) != place for token, place in first.items()):
            warnings.append(
                f"{model.reference} numbers {differing} of {owner}'s {len(first)} tokens differently or "
                "lacks them; rows of embeddings are merged by number, not by token, which tokenizer_source would do"
            )
    return highest, warnings


def token_rows(tensors: Mapping[str, Tensor]) -> int:
    """Return how many tokens have an embedding; 0 where there are no embeddings to count."""
    tables = (
        tensor.shape[0]
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and role(name) == "embedding" and not is_position_table(name)
    )
    return max(tables, default=0)
