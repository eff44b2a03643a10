"""Which row of which model every token of the result has: numbers alone, from tokenizers and headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from weightsmith.checkpoint.gathered import MEAN, ZERO, Numbers, Origins
from weightsmith.errors import PlanError, did_you_mean, shown
from weightsmith.plan.slots import Model
from weightsmith.recipe.schema import TokenRule, TokenSource
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import Tokenizer
from weightsmith.tokenizer.union import alike

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A model's tokens and the tensors that have a row for each.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        tables: its embeddings, head and head's bias -> the axis that counts tokens.
        rows: how many rows these have.
    """

    model: Model
    tokenizer: Tokenizer
    tables: Mapping[str, int]
    rows: int


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Where every row of every model's tables comes from, once all have the result's tokens.

    Attributes:
        own: per model and token the row that the model itself has, or -1: ``[models, rows]``, int64.
        source: per token what a model takes that has no row of its own: the number of a model, ``ZERO`` or ``MEAN``:
            ``[rows]``, int64.
        row: the row of that model, or the number of the group whose mean is taken: ``[rows]``, int64.
        starts: see :class:`Origins`.
        member_source: see :class:`Origins`; numbers of models.
        member_row: see :class:`Origins`.
        forced: the tokens for which every model takes that, and none its own: ``[rows]``, bool.
    """

    own: Numbers
    source: Numbers
    row: Numbers
    starts: Numbers
    member_source: Numbers
    member_row: Numbers
    forced: Flags

    def origins(self, number: int) -> Origins:
        """Return where the rows of a model come from; sources are numbers of models."""
        own = (self.own[number] >= 0) & ~self.forced
        return Origins(
            np.where(own, number, self.source),
            np.where(own, self.own[number], self.row),
            self.starts,
            self.member_source,
            self.member_row,
        )

    def unchanged(self, vocabulary: Vocabulary, number: int) -> bool:
        """Whether a model has the result's rows already, in its order."""
        length = len(self.source)
        own = self.own[number]
        return vocabulary.rows == length and not self.forced.any() and bool((own == np.arange(length)).all())


def token_rows(
    tokenizer: Tokenizer,
    length: int,
    vocabularies: Sequence[Vocabulary],
    base: Model | None,
    rules: Mapping[str, TokenRule],
    *,
    keep_padding: bool,
) -> TokenRows:
    """Decide where the rows of every token come from.

    A model's own row is taken first. Where it has none: the base's; of the only model that has one, that one's; else
    the mean of all models' that have one. Rules for single tokens are nearer than these.

    Args:
        tokenizer: the result's tokenizer.
        length: how many rows the result has, without those that are means of all others.
        vocabularies: all models with tokens, the one that the tokenizer is from among them.
        base: the recipe's base, or None.
        rules: token -> what the recipe says of it; the tokenizer has all of them.
        keep_padding: whether rows without a token are those of their number in the models, where no token of these
            has it; otherwise they are zeros.

    Raises:
        PlanError: if a rule names a token or a model that does not exist.
    """
    own = np.stack([_own_rows(tokenizer, length, one, keep_padding=keep_padding) for one in vocabularies])
    present = own >= 0
    count = present.sum(0)
    source = np.where(count == 0, ZERO, np.where(count == 1, present.argmax(0), MEAN))
    for number, one in enumerate(vocabularies):
        if one.model is base:
            source = np.where(present[number], number, source)
    forced = np.zeros(length, np.bool_)
    row = np.zeros(length, np.int64)
    rest = source >= 0
    row[rest] = own[source[rest], np.flatnonzero(rest)]
    for token, rule in rules.items():
        place = tokenizer.vocabulary[token]
        forced[place] = rule.force
        if rule.source is not None:
            source[place], row[place] = _ruled(token, rule.source, vocabularies, own[:, place])
        elif not count[place]:
            raise _unknown(token, vocabularies)
    means = np.flatnonzero(source == MEAN)
    row[means] = np.arange(len(means))
    # Token after token, and of each the models in their order.
    tokens, models = np.nonzero(present[:, means].T)
    starts = np.concatenate([[0], np.cumsum(count[means])]).astype(np.int64)
    return TokenRows(own, source, row, starts, models, own[models, means[tokens]], forced)


def only_own(origins: Origins, number: int) -> Origins:
    """Return where the importances of a model's rows come from: those of rows of other models are zero."""
    own = origins.source == number
    return Origins(np.where(own, 0, ZERO), np.where(own, origins.row, 0))


def renumbered(origins: Origins) -> tuple[Origins, list[int]]:
    """Return the same with the sources that it uses numbered from 0, and which these are."""
    found = np.unique(np.concatenate([origins.source, origins.member_source]))
    used = found[found >= 0]

    def anew(numbers: Numbers) -> Numbers:
        return np.where(numbers >= 0, np.searchsorted(used, numbers), numbers)

    changed = replace(origins, source=anew(origins.source), member_source=anew(origins.member_source))
    return changed, used.tolist()


def _own_rows(tokenizer: Tokenizer, length: int, vocabulary: Vocabulary, *, keep_padding: bool) -> Numbers:
    """Return per token of the result the row that a model has for it, -1 where it has none: ``[length]``, int64."""
    other = vocabulary.tokenizer
    own = np.full(length, -1, np.int64)
    if other is tokenizer:
        numbers = np.fromiter(other.tokens, np.int64, len(other.tokens))
        own[numbers] = numbers
    elif alike(tokenizer, other):
        find = other.vocabulary.get
        numbers = np.fromiter(tokenizer.tokens, np.int64, len(tokenizer.tokens))
        own[numbers] = np.fromiter((find(text, -1) for text in tokenizer.tokens.values()), np.int64, len(numbers))
    else:
        own[: tokenizer.size] = match(tokenizer, other, bytes_as_text=True)
    if keep_padding:
        taken = [np.fromiter(one.tokens, np.int64, len(one.tokens)) for one in (tokenizer, other)]
        free = np.setdiff1d(np.arange(min(length, vocabulary.rows)), np.concatenate(taken))
        own[free] = free
    own[own >= vocabulary.rows] = -1
    return own


def _ruled(token: str, source: TokenSource | str, vocabularies: Sequence[Vocabulary], own: Numbers) -> tuple[int, int]:
    """Return the number of a model, and its row, that a rule takes a token's embedding from; or ``ZERO``."""
    if isinstance(source, str):
        number = _model(token, source, vocabularies)
        if own[number] < 0:
            raise PlanError(
                f"tokenizer.tokens: {source} has no token {shown(token)}"
                f"{did_you_mean(token, vocabularies[number].tokenizer.vocabulary)}, which its embedding is to come from"
            )
        return number, int(own[number])
    if source.kind == "zero":
        return ZERO, 0
    number = _model(token, source.model or "", vocabularies)
    vocabulary = vocabularies[number]
    row = source.token_id if source.token is None else vocabulary.tokenizer.vocabulary.get(source.token)
    if row is None:
        raise PlanError(
            f"tokenizer.tokens: {source.model} has no token {shown(source.token)}"
            f"{did_you_mean(source.token or '', vocabulary.tokenizer.vocabulary)}, which {shown(token)} is to start "
            "from"
        )
    if not 0 <= row < vocabulary.rows:
        raise PlanError(
            f"tokenizer.tokens: {shown(token)} is to start from number {row} of {source.model}, which has "
            f"{vocabulary.rows} rows of embeddings"
        )
    return number, row


def _model(token: str, reference: str, vocabularies: Sequence[Vocabulary]) -> int:
    known = [one.model.reference for one in vocabularies]
    if reference not in known:
        raise PlanError(
            f"tokenizer.tokens: {shown(token)} is to come from {reference}, which is none of the models that are "
            f"merged{did_you_mean(reference, known)}: {', '.join(known)}"
        )
    return known.index(reference)


def _unknown(token: str, vocabularies: Sequence[Vocabulary]) -> PlanError:
    known = dict.fromkeys(text for one in vocabularies for text in one.tokenizer.vocabulary)
    return PlanError(
        f"tokenizer.tokens: {shown(token)} is a token of none of the models{did_you_mean(token, known)}; to add it, "
        "say what its embedding starts from: source: {kind: zero}, or {kind: model_token, model: …, token: …}"
    )
