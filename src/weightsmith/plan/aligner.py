"""Models seen with the rows of their embeddings, heads and biases in the order of one vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weightsmith import dtypes
from weightsmith.architecture.config import alias_source, is_head, tied_embeddings, tied_source
from weightsmith.architecture.stacks import role
from weightsmith.architecture.vocabulary import is_head_bias, is_position_table
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.gathered import AVERAGE, MEAN, ZERO, Origins, gathered
from weightsmith.checkpoint.tensor import ArrayTensor, Tensor
from weightsmith.errors import PlanError
from weightsmith.plan.evaluated import Rearranger
from weightsmith.plan.slots import Model
from weightsmith.plan.token_rows import TokenRows, Vocabulary, only_own, renumbered


class Aligner:
    """Makes the models of one merge anew, with rows in the result's order.

    Attributes:
        untied: heads that were made for models that tie theirs to the embeddings.
    """

    def __init__(
        self, vocabularies: Sequence[Vocabulary], rows: TokenRows, padded: int, rearranger: Rearranger
    ) -> None:
        """Work on the models of one merge.

        Args:
            vocabularies: the models with tokens.
            rows: where their rows come from.
            padded: how many rows the result has; those behind ``rows`` are means of all rows before them.
            rearranger: makes the tensors.

        Raises:
            PlanError: if a model has tables of tokens of several lengths.
        """
        self.untied: set[str] = set()
        self._vocabularies = vocabularies
        self._rows = rows
        self._padded = padded
        self._rearranger = rearranger
        for number, vocabulary in enumerate(vocabularies):
            if not self._unchanged(number):
                _check_lengths(vocabulary)

    def view(self, number: int) -> Model | None:
        """Return a model with rows in the result's order; None if it has them so."""
        vocabulary = self._vocabularies[number]
        if self._unchanged(number):
            return None
        made: dict[str, Tensor] = {}
        origins, used = renumbered(self._rows.origins(number))
        for name in (*vocabulary.tables, *self._heads(number)):
            own = self._counterpart(vocabulary, name, number)
            tensors = [self._counterpart(self._vocabularies[other], name, number) for other in used]
            self._check(vocabulary, name, own, tensors, used, origins)
            made[name] = self._gathered(name, own, tensors, origins, vocabulary.model.checkpoint)
        return _with(vocabulary.model, made)

    def fisher(self, number: int, fisher: Model) -> Model | None:
        """Return the importances of a model's weights with rows in the result's order; None if they are so.

        Rows that the model takes from others, or that are made, count nothing in it.
        """
        if self._unchanged(number):
            return None
        vocabulary = self._vocabularies[number]
        origins = only_own(self._rows.origins(number), number)
        made: dict[str, Tensor] = {}
        for name in (*vocabulary.tables, *self._heads(number)):
            weight = self._counterpart(vocabulary, name, number)
            tensor = fisher.checkpoint.get(name if name in fisher.checkpoint else self._embeddings(vocabulary, name))
            # What does not fit is refused where importances are looked for.
            if tensor is not None and tensor.shape == weight.shape:
                tensors = [self._rearranger.read(tensor)]
                made[name] = self._gathered(name, tensor, tensors, origins, fisher.checkpoint, rest=ZERO)
        return _with(fisher, made)

    def _unchanged(self, number: int) -> bool:
        vocabulary = self._vocabularies[number]
        return self._padded == len(self._rows.source) and self._rows.unchanged(vocabulary, number)

    def _gathered(
        self,
        name: str,
        own: Tensor,
        tensors: Sequence[Tensor],
        origins: Origins,
        owner: Checkpoint,
        *,
        rest: int = AVERAGE,
    ) -> Tensor:
        """Return a table with rows in the result's order, and behind them as many more as pad it."""

        def shape(rows: int) -> tuple[int, ...]:
            bias = is_head_bias(name)
            return (*own.shape[:-1], rows) if bias else (rows, *own.shape[1:])

        made: Tensor = gathered(name, tensors or [own], origins, shape(len(origins)))
        if self._padded > len(origins):
            more = Origins.first(self._padded, len(origins), rest)
            made = gathered(name, [made], more, shape(self._padded))
        return self._rearranger.own(made, owner)

    def _heads(self, number: int) -> list[str]:
        """Return the heads that other models have and this one ties to its embeddings."""
        vocabulary = self._vocabularies[number]
        heads = dict.fromkeys(name for one in self._vocabularies for name in one.tables if is_head(name))
        found = [name for name in heads if name not in vocabulary.tables and self._embeddings(vocabulary, name)]
        self.untied |= set(found)
        return found

    @staticmethod
    def _embeddings(vocabulary: Vocabulary, name: str) -> str:
        """Return the embeddings that a head is tied to; an empty text where it is not."""
        checkpoint = vocabulary.model.checkpoint
        tied = tied_source(name, checkpoint) if tied_embeddings(checkpoint.config) else None
        return tied if tied is not None and tied in vocabulary.tables else ""

    def _counterpart(self, vocabulary: Vocabulary, name: str, number: int) -> Tensor:
        """Return what a model has in the place of a table of the model of a number.

        Raises:
            PlanError: if it has nothing there, or several tables.
        """
        checkpoint, tables = vocabulary.model.checkpoint, vocabulary.tables
        found = name if name in tables else self._embeddings(vocabulary, name) or alias_source(name, tables)
        if not found:
            # Under another name: within a tower, or a bias that is saved twice.
            same = [other for other in tables if _kind(other) == _kind(name)]
            found = same[0] if len(same) == 1 or (same and is_head_bias(name)) else None
        if found:
            return self._rearranger.read(checkpoint[found])
        this = self._vocabularies[number].model
        if is_head_bias(name):
            # What has no bias adds nothing.
            own = this.checkpoint[name]
            return ArrayTensor(name, np.zeros((*own.shape[:-1], vocabulary.rows), own.dtype))
        raise PlanError(
            f"{vocabulary.model.reference} has no {name}, and tokens that {this.reference} lacks are to come from "
            f"there: the rows that it has are in {', '.join(tables)}"
        )

    def _check(
        self,
        vocabulary: Vocabulary,
        name: str,
        own: Tensor,
        tensors: Sequence[Tensor],
        used: Sequence[int],
        origins: Origins,
    ) -> None:
        """Check that rows of one model can be rows of another."""
        reference = vocabulary.model.reference
        for number, tensor in zip(used, tensors, strict=True):
            width, needed = (one.shape[:-1] if is_head_bias(name) else one.shape[1:] for one in (tensor, own))
            if width != needed:
                other = self._vocabularies[number].model.reference
                raise PlanError(
                    f"{name} is {list(own.shape)} in {reference} and {list(tensor.shape)} in {other}: a row of one "
                    "cannot stand in the other, so that models of different width have no common vocabulary"
                )
        made = (origins.source == MEAN).any() or self._padded > len(origins)
        if (made or len({tensor.dtype for tensor in tensors}) > 1) and not all(
            dtypes.is_float(tensor.dtype) for tensor in tensors
        ):
            raise PlanError(
                f"{name} of {reference} is {dtypes.name_of(own.dtype)}, of which no means are formed: merge the model "
                "it was made from"
            )


def _check_lengths(vocabulary: Vocabulary) -> None:
    """Refuse tables of tokens of another length than the rest: they would keep the old order."""
    for name, tensor in vocabulary.model.checkpoint.items():
        shape = tensor.shape
        table = is_head(name) or (role(name) == "embedding" and not is_position_table(name))
        if table and name not in vocabulary.tables and len(shape) == 2 and shape[0] >= vocabulary.tokenizer.size:
            raise PlanError(
                f"{vocabulary.model.reference} has {name} as {list(shape)}, and other tables of tokens with "
                f"{vocabulary.rows} rows: which token each row is for is not known, so that it cannot be given another "
                "tokenizer; give the result this model's (tokenizer_source), or bring its tables to one length"
            )


def _kind(name: str) -> str:
    if is_head_bias(name):
        return "bias"
    return "head" if is_head(name) else "embeddings"


def _with(model: Model, made: Mapping[str, Tensor]) -> Model:
    """Return a model with some tensors in place of its own; those that it did not have come last."""
    own = model.checkpoint
    view = Checkpoint(
        own.name, {**own, **made}, own.companions, own.identities, own.components, is_adapter=own.is_adapter
    )
    return Model(model.reference, model.label, view)
