"""The tensors of a model that have a row for every token, and what each is called in the donor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith import dtypes
from weightsmith.architecture.config import is_head, tied_embeddings
from weightsmith.architecture.vocabulary import is_head_bias, vocabulary_tensors
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import PlanError
from weightsmith.tokenizer.matching import Numbers
from weightsmith.transplantation.recipe import Part
from weightsmith.transplantation.rows import Rows


@dataclass(frozen=True, eq=False)
class Table:
    """A tensor of the model that has a row for every token.

    Attributes:
        tensor: the tensor: ``[V, d]``; a bias ``[V]`` or ``[1, V]``.
        axis: which axis counts tokens.
        part: whether it is made as embeddings are, or as the head. A head that is tied is embeddings.
        is_bias: whether it is the head's bias.
    """

    tensor: Tensor
    axis: int
    part: Part
    is_bias: bool

    @property
    def rows(self) -> int:
        """How many tokens it has rows for."""
        return self.tensor.shape[self.axis]

    @property
    def width(self) -> int:
        """How many elements belong to a token: 1 in a bias."""
        return self.tensor.size // max(self.rows, 1)

    def take(self, numbers: Numbers) -> Array:
        """Read rows: ``[n, width]``, float32.

        Args:
            numbers: the tokens': ``[n]``.

        Raises:
            CheckpointError: if a row is not finite.
        """
        return self.all_rows().take(numbers)

    def all_rows(self) -> Rows:
        """Return its rows by number: ``[V, width]``."""
        return Rows(self.tensor.numpy().reshape(-1, 1) if self.is_bias else self.tensor)


def find_tables(model: Checkpoint, tokens: int) -> list[Table]:
    """Return a model's embeddings, head and head's bias.

    Args:
        model: the model.
        tokens: how many rows its tokenizer needs.

    Raises:
        PlanError: if it has none, or one is no matrix of floating numbers.
    """
    tied = tied_embeddings(model.config)
    tables = []
    for name, axis in vocabulary_tensors(model, model.config, tokens).items():
        tensor = model[name]
        check_floating(model, tensor)
        bias = is_head_bias(name)
        part: Part = "head" if (bias or is_head(name)) and not tied else "embeddings"
        tables.append(Table(tensor, axis, part, bias))
    if all(table.is_bias or is_head(table.tensor.name) for table in tables):
        raise PlanError(
            f"{model.name} has no embeddings of tokens that could be made anew: expected a matrix with "
            f"{_expected(model.config, tokens)}, such as model.embed_tokens.weight"
        )
    return tables


def donor_tables(donor: Checkpoint, tokens: int) -> dict[Part, dict[str, Tensor]]:
    """Return where a donor's tokens lie: name -> matrix, those that serve as embeddings and those that serve as head.

    A donor whose head is tied to its embeddings, or that has none, is searched in its embeddings for both.

    Args:
        donor: the donor.
        tokens: how many rows its tokenizer needs.

    Raises:
        PlanError: if one is no matrix of floating numbers.
    """
    found = {name: donor[name] for name in vocabulary_tensors(donor, donor.config, tokens) if not is_head_bias(name)}
    for tensor in found.values():
        check_floating(donor, tensor)
    embeddings = {name: tensor for name, tensor in found.items() if not is_head(name)}
    heads = {name: tensor for name, tensor in found.items() if is_head(name)}
    if tied_embeddings(donor.config) or not heads:
        heads = embeddings
    return {"embeddings": embeddings or heads, "head": heads}


def donor_of(name: str, tables: Mapping[str, Tensor]) -> Tensor | None:
    """Return the donor's matrix for a table of the model: that of its name, or else the first."""
    return tables.get(name) or next(iter(tables.values()), None)


def check_floating(owner: Checkpoint, tensor: Tensor) -> None:
    """Refuse a table whose elements are codes.

    Raises:
        PlanError: if its dtype is no floating one.
    """
    if not dtypes.is_float(tensor.dtype):
        raise PlanError(
            f"{owner.name}: {tensor.name} is {dtypes.name_of(tensor.dtype)}: quantised codes, not rows that can be "
            "computed with; take the model that it was made from"
        )


def _expected(config: Mapping[str, Any], tokens: int) -> str:
    rows = config.get("vocab_size")
    return f"{rows:,} rows, the vocab_size of its config" if type(rows) is int else f"at least {tokens:,} rows"
