"""Models of one merge brought to one vocabulary: before anything is merged, row i is the same token in all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from weightsmith.architecture.vocabulary import vocabulary_tensors
from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, read_companion
from weightsmith.checkpoint.gathered import MEAN, ZERO, Numbers
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import PlanError, did_you_mean
from weightsmith.plan.aligner import Aligner
from weightsmith.plan.evaluated import Rearranger
from weightsmith.plan.naming import open_models
from weightsmith.plan.parts import Open
from weightsmith.plan.slots import Model
from weightsmith.plan.token_rows import TokenRows, Vocabulary, token_rows
from weightsmith.recipe.load import fishers, fishers_of_models
from weightsmith.recipe.schema import Merge
from weightsmith.recipe.schema import Tokenizer as Asked
from weightsmith.tokenizer.files import files_of
from weightsmith.tokenizer.ids import with_ids
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import LARGEST, Tokenizer, read_tokenizer
from weightsmith.tokenizer.union import unite, with_tokens

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_GENERATION = "generation_config.json"
# Tokens beyond a model's rows are a few that were added and never trained; a file that claims more is not the model's.
_MOST_WITHOUT_ROWS = 4096


@dataclass(frozen=True)
class Alignment:
    """What a recipe's ``tokenizer`` makes of its models.

    Attributes:
        tokenizer: the result's tokenizer.
        source: the model whose tokenizer it is, or is an extension of.
        files: the tokenizer's files, or None where they are the source's own.
        views: reference -> the model, or Fisher checkpoint, with the result's tokens in their order; without those
            that are as they were.
        untied: heads that were made for models that tie theirs to the embeddings.
        warnings: what a person should know.
        donor: the tokenizer that the numbers in the config are from; None where they are the result's: a tokenizer that
            was extended keeps its own.
    """

    tokenizer: Tokenizer
    source: Model
    files: Mapping[str, File] | None
    views: Mapping[str, Model] = field(default_factory=dict)
    untied: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    donor: Tokenizer | None = None

    def opener(self, open_model: Open) -> Open:
        """Return what gives the models of references with the result's tokens."""
        return lambda reference: self.views.get(reference) or open_model(reference)

    def config(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the donor's config with the result's numbers of tokens, and what a person should know."""
        return self._renumbered(config, self.source.checkpoint.config, "config.json")

    def beside(self, files: Mapping[str, File]) -> tuple[dict[str, File], list[str]]:
        """Return the donor's files that are no part of its tokenizer, with the result's numbers of tokens."""
        own, other = (_settings(one.get(_GENERATION)) for one in (files, self.source.checkpoint.companions.files))
        changed, notes = self._renumbered(own, other, _GENERATION)
        if not own or changed == own:
            return dict(files), notes
        return {**files, _GENERATION: json.dumps(changed, indent=2).encode()}, notes

    def _renumbered(
        self, content: Mapping[str, Any], other: Mapping[str, Any], name: str
    ) -> tuple[dict[str, Any], list[str]]:
        if not content or self.donor is None:
            return dict(content), []
        return with_ids(content, self.donor, self.tokenizer, self._moved, other=other, name=name)

    @cached_property
    def _moved(self) -> Numbers:
        """Per number in the donor's config the result's number, -1 where there is none: ``[n]``, int64."""
        assert self.donor is not None, "the donor's numbers are the result's"
        return match(self.donor, self.tokenizer)


def align(recipe: Merge, open_model: Open, rearranger: Rearranger) -> Alignment | None:
    """Bring the models of a recipe to the vocabulary that it asks for.

    Args:
        recipe: the recipe of one merge.
        open_model: gives the model of a reference; the same object for the same reference.
        rearranger: makes the tensors.

    Returns:
        The vocabulary and the models; None where the recipe asks for none.

    Raises:
        PlanError: if a model has no tokenizer, or its embeddings do not fit it; if a token or a model of the recipe
            does not exist.
        CheckpointError: if a tokenizer cannot be read.
    """
    asked = recipe.asked_tokenizer
    if asked is None:
        return None
    models = open_models(recipe, open_model)
    vocabularies = _vocabularies(models)
    source = _source(asked, recipe, models, vocabularies)
    base = open_model(recipe.base_model) if recipe.base_model else None
    tokenizer = source.tokenizer
    notes = [f"the tokenizer of {source.model.reference} is {note}" for note in tokenizer.notes]
    if asked.source == "union":
        others = [one for one in vocabularies if one.tokenizer is not tokenizer]
        tokenizer, told = unite(tokenizer, [(one.tokenizer, one.rows) for one in others])
        notes += told
    tokenizer = with_tokens(tokenizer, list(asked.tokens))
    multiple = asked.pad_to_multiple_of
    keep = multiple is None and recipe.compat != "mergekit"
    length = max(tokenizer.size, source.rows) if keep else tokenizer.size
    rows = token_rows(tokenizer, length, vocabularies, base, asked.tokens, keep_padding=keep)
    padded = -(-length // multiple) * multiple if multiple else length
    aligner = Aligner(vocabularies, rows, padded, rearranger)
    views = {one.model.reference: aligner.view(number) for number, one in enumerate(vocabularies)}
    # Opened after all models: their short names, which random masks depend on, are as without these.
    for reference in dict.fromkeys(fishers(recipe)):
        open_model(reference)
    for fisher, about in fishers_of_models(recipe):
        number = next((n for n, one in enumerate(vocabularies) if one.model.reference == about), None)
        if number is not None and fisher not in views:
            views[fisher] = aligner.fisher(number, open_model(fisher))
    files = None
    if tokenizer is not source.tokenizer:
        own = source.model.checkpoint.companions.files
        donor_config = models[0].checkpoint.config
        other_kind = donor_config.get("model_type") != source.model.checkpoint.config.get("model_type")
        files, told = files_of(tokenizer, own, donor_config, rebuilt=other_kind)
        notes += told
    notes += _statistics(tokenizer, source, vocabularies, rows, padded)
    donor = next((one for one in vocabularies if one.model is models[0]), source)
    return Alignment(
        tokenizer,
        source.model,
        files,
        {reference: view for reference, view in views.items() if view is not None},
        frozenset(aligner.untied),
        tuple(notes),
        None if donor is source else donor.tokenizer,
    )


def _vocabularies(models: Sequence[Model]) -> list[Vocabulary]:
    """Return the vocabularies of all models that have embeddings of tokens."""
    known: dict[bytes, Tokenizer] = {}
    found = []
    for model in models:
        tokenizer = _tokenizer(model, known)
        checkpoint = model.checkpoint
        size = 0 if tokenizer is None else tokenizer.size
        tables = vocabulary_tensors(checkpoint, checkpoint.config, size)
        if tokenizer is not None and not tables:
            # A config may be older than embeddings that were made longer; or the tokenizer longer than they are.
            tables = vocabulary_tensors(checkpoint, {}, size) or vocabulary_tensors(checkpoint, {}, 1)
        if not tables:
            continue
        if tokenizer is None:
            raise PlanError(
                f"{model.reference} has no tokenizer (tokenizer.json), so that which token each of its rows of "
                "embeddings is for is not known: put the one that it was trained with beside its weights, or merge "
                "without tokenizer and tokenizer_source"
            )
        lengths = {name: checkpoint[name].shape[axis] for name, axis in tables.items()}
        rows = max(lengths.values())
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise PlanError(
                f"{model.reference} has several numbers of tokens: {text}; one tokenizer is for one vocabulary"
            )
        if tokenizer.size > 2 * rows + _MOST_WITHOUT_ROWS:
            raise PlanError(
                f"the tokenizer of {model.reference} numbers tokens up to {tokenizer.size - 1}, and the model has "
                f"{rows} rows of embeddings: it is not this model's"
            )
        found.append(Vocabulary(model, tokenizer, tables, rows))
    return found


def _tokenizer(model: Model, known: dict[bytes, Tokenizer]) -> Tokenizer | None:
    """Read a model's tokenizer; one that another model has as well is read once."""
    files = model.checkpoint.companions.files
    if "tokenizer.json" not in files:
        return read_tokenizer(files, model.reference, model.checkpoint.config)
    digest = hashlib.blake2b()
    for name in _TOKENIZER_FILES:
        content = read_companion(files[name], LARGEST) if name in files else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    found = known.get(digest.digest()) or read_tokenizer(files, model.reference, model.checkpoint.config)
    if found is not None:
        known[digest.digest()] = found
    return found


def _source(asked: Asked, recipe: Merge, models: Sequence[Model], vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """Return the vocabulary whose tokenizer the result takes, or extends."""
    wanted = models[0]
    if asked.source == "base":
        if recipe.base_model is None:
            raise PlanError("tokenizer_source: base needs a base_model")
    elif asked.source != "union":
        names = [model.reference for model in models]
        if asked.source not in names:
            raise PlanError(
                f"tokenizer_source {asked.source!r} is neither union, nor base, nor one of the models that are merged"
                f"{did_you_mean(asked.source, ['union', 'base', *names])}: {', '.join(names)}"
            )
        wanted = models[names.index(asked.source)]
    for one in vocabularies:
        if one.model is wanted:
            return one
    raise PlanError(
        f"{wanted.reference} has no embeddings of tokens, so that it cannot give the result its tokenizer; name a "
        "model that has (tokenizer_source)"
    )


def _settings(file: File | None) -> dict[str, Any]:
    return {} if file is None else parse_object(read_companion(file, LARGEST_SETTINGS), _GENERATION)


def _statistics(
    tokenizer: Tokenizer, source: Vocabulary, vocabularies: Sequence[Vocabulary], rows: TokenRows, padded: int
) -> list[str]:
    """Say how many tokens the models share, and what they take from each other."""
    tokens = np.fromiter(tokenizer.tokens, np.int64, len(tokenizer.tokens))
    present = rows.own[:, tokens] >= 0
    if padded == len(rows.source) and all(rows.unchanged(one, number) for number, one in enumerate(vocabularies)):
        return []
    added = len(tokens) - len(source.tokenizer.tokens)
    first = f"{len(source.tokenizer.tokens):,} of {source.model.reference}" + (f" and {added:,} more" if added else "")
    shared = np.count_nonzero(present.all(0))
    text = f"vocabulary: {len(tokens):,} tokens ({first}), of which all models have {shared:,}"
    if padded > len(tokens):
        text += f", in {padded:,} rows"
    notes = [text]
    taken, forced = rows.source[tokens], rows.forced[tokens]
    for number, one in enumerate(vocabularies):
        lacking = ~present[number] | forced
        names = {place: f"from {other.model.reference}" for place, other in enumerate(vocabularies)}
        names |= {MEAN: "as means", ZERO: "as zeros"}
        counts = {kind: np.count_nonzero(lacking & (taken == kind)) for kind in names}
        parts = [f"{found:,} {names[kind]}" for kind, found in counts.items() if found]
        if parts:
            own = np.count_nonzero(~lacking)
            notes.append(f"{one.model.reference} has {own:,} of them, and takes {', '.join(parts)}")
        # Several tokens of the result may have one row of the model: <0x41> and A.
        left = len(set(one.tokenizer.tokens).difference(rows.own[number, tokens].tolist()))
        if left:
            notes.append(f"{left:,} tokens of {one.model.reference} are none of the result's")
    return notes
