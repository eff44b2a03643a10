"""What there is to know of one tokenizer, and whether the model beside it agrees."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith.architecture.config import row_counts
from weightsmith.architecture.vocabulary import is_token_table, vocabulary_tensors
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, File
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, read_companion, tokenizer_files
from weightsmith.checkpoint.folder import PIPELINE_FILE, is_weights, read_companions
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.source import Source
from weightsmith.checkpoint.storage import list_folder
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.behaviour import Behaviour, observe
from weightsmith.tokenizer.chat_template import read_template
from weightsmith.tokenizer.components import PARTS, describe, template
from weightsmith.tokenizer.encoding import TokenizersMissingError
from weightsmith.tokenizer.tokenizer import Kind, Tokenizer, read_tokenizer

_GENERATION = "generation_config.json"
# Digits of tokens that are counted apart; longer ones are counted together.
_DIGITS = 4


@dataclass(frozen=True, eq=False)
class Opened:
    """A tokenizer with what lies beside it.

    Attributes:
        tokenizer: the tokenizer.
        config: the model's config; empty where there is none.
        generation: its ``generation_config.json``; empty where there is none.
        chat_template: its chat template, or None.
        rows: how many tokens the model's embeddings have rows for, or its config says so; None where neither tells.
        width: how many elements a row of its embeddings has; None where there are none.
    """

    tokenizer: Tokenizer
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    chat_template: str | None
    rows: int | None
    width: int | None


@dataclass(frozen=True)
class TokenizerFacts:
    """What there is to know of one tokenizer.

    Attributes:
        name: how a person names it.
        kind: how it splits words.
        alphabet: how it writes spaces.
        tokens: how many tokens it has.
        size: how many rows of embeddings their numbers need.
        rows: how many rows the model beside it has; None where there is none.
        width: how many elements each of these has; None where there are none.
        added: how many of its tokens were added.
        special: the special tokens, by number.
        roles: role -> its token and its number; None for a token that the vocabulary lacks.
        contradictions: where config or generation config say otherwise.
        before: the special tokens that it puts before a text.
        behind: those that it puts behind it.
        parts: normalizer, pre-tokenizer, post-processor, decoder, in words.
        digits: number of digits -> how many tokens are numbers of so many; the last entry counts longer ones too.
        chat_template: a hash of the chat template; None where there is none.
        notes: what a person should know of how it was read.
        behaviour: how it splits text; None without the tokenizers library.
    """

    name: str
    kind: Kind
    alphabet: str
    tokens: int
    size: int
    rows: int | None
    width: int | None
    added: int
    special: tuple[str, ...]
    roles: Mapping[str, tuple[str, int | None]]
    contradictions: tuple[str, ...]
    before: tuple[str, ...]
    behind: tuple[str, ...]
    parts: Mapping[str, str]
    digits: Mapping[int, int]
    chat_template: str | None
    notes: tuple[str, ...]
    behaviour: Behaviour | None

    @property
    def padding(self) -> int | None:
        """Rows of the model that no token has; below 0 where tokens have no row; None where there is no model."""
        return None if self.rows is None else self.rows - self.size

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        found = {**asdict(self), "padding": self.padding}
        if self.behaviour is not None:
            for name, sample in self.behaviour.texts.items():
                found["behaviour"]["texts"][name]["per_character"] = sample.per_character
        return found


def open_tokenizer(source: Source) -> Opened:
    """Read the tokenizer of a model, of a folder without weights, or of one file.

    Args:
        source: a checkpoint, its reference, a folder that holds a tokenizer, or a file: ``tokenizer.json``, a
            SentencePiece model.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_holder(os.fspath(source))
    files = checkpoint.companions.files
    tokenizer = read_tokenizer(files, checkpoint.name, checkpoint.config)
    if tokenizer is None:
        inner = sorted({name.split("/")[0] for name in files if re.fullmatch(r"[\w.-]+/(tokenizer|vocab)\.json", name)})
        hint = f"; name one of its folders: {', '.join(f'{checkpoint.name}/{one}' for one in inner)}" if inner else ""
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer: neither tokenizer.json, nor a SentencePiece model, nor vocab.json "
            f"and merges.txt, nor vocab.txt lies there{hint}"
        )
    config = checkpoint.config
    tables = vocabulary_tensors(checkpoint, config, tokenizer.size)
    rows = [checkpoint[name].shape[axis] for name, axis in tables.items()]
    widths = [checkpoint[name].shape[1] for name in tables if is_token_table(name)]
    return Opened(
        tokenizer,
        config,
        _generation(files),
        read_template(files),
        max(rows) if rows else max(row_counts(config), default=None),
        widths[0] if widths else None,
    )


def tokenizer_facts(source: Source | Opened) -> TokenizerFacts:
    """Tell what there is to know of a tokenizer.

    Args:
        source: what :func:`open_tokenizer` takes, or what it returns.

    Raises:
        CheckpointError: if there is no tokenizer, or it cannot be read.
    """
    opened = source if isinstance(source, Opened) else open_tokenizer(source)
    tokenizer = opened.tokenizer
    notes = list(tokenizer.notes)
    try:
        behaviour = observe(tokenizer)
    except TokenizersMissingError as error:
        behaviour = None
        notes.append(f"how text is split is left out: {error}")
    before, behind = template(tokenizer.content.get("post_processor"))
    special = [token for token in tokenizer.tokens.values() if token in tokenizer.special]
    text = opened.chat_template
    return TokenizerFacts(
        name=tokenizer.owner,
        kind=tokenizer.kind,
        alphabet=tokenizer.alphabet,
        tokens=len(tokenizer.tokens),
        size=tokenizer.size,
        rows=opened.rows,
        width=opened.width,
        added=len(tokenizer.added),
        special=tuple(special),
        roles={role: (token, tokenizer.vocabulary.get(token)) for role, token in tokenizer.roles.items()},
        contradictions=tuple(_contradictions(opened)),
        before=before,
        behind=behind,
        parts={part: describe(part, tokenizer.content.get(part)) for part in PARTS},
        digits=digit_tokens(tokenizer),
        chat_template=None if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        notes=tuple(notes),
        behaviour=behaviour,
    )


def open_holder(reference: str) -> Checkpoint:
    """Open a model, or what holds a tokenizer and no weights.

    Args:
        reference: a checkpoint's reference, a folder that holds a tokenizer, or a file of one.

    Raises:
        CheckpointError: if there is nothing of the kind.
    """
    path = os.path.expanduser(reference)
    if os.path.isdir(path):
        entries = list_folder(path)
        weights = PIPELINE_FILE in entries or any(map(is_weights, entries))
        if not weights and tokenizer_files(dict.fromkeys(entries, b"")):
            return Checkpoint(reference, {}, read_companions(path, entries))
    elif os.path.isfile(path) and not is_weights(path):
        name = os.path.basename(path)
        # A tokenizer of the library goes by any name; other files are told by theirs.
        known = "tokenizer.json" if name.endswith(".json") else name
        known = "tekken.json" if name.startswith("tekken") else known
        # Mistral's own have their version behind.
        known = "tokenizer.model" if re.search(r"\.(model|spm)(\.v\w+)?$", name) else known
        return Checkpoint(reference, {}, Companions({}, {known: Path(path).absolute()}))
    return open_checkpoint(reference)


def _generation(files: Mapping[str, File]) -> Mapping[str, Any]:
    file = files.get(_GENERATION)
    return {} if file is None else parse_object(read_companion(file, LARGEST_SETTINGS), _GENERATION)


def _contradictions(opened: Opened) -> Iterator[str]:
    """Say where a config gives a role to another number than the tokenizer."""
    tokenizer = opened.tokenizer
    places = [("config.json", opened.config), (_GENERATION, opened.generation)]
    inner = opened.config.get("text_config")
    if isinstance(inner, Mapping):
        places.append(("text_config of config.json", inner))
    for role, token in tokenizer.roles.items():
        number = tokenizer.vocabulary.get(token)
        for place, config in places:
            given = config.get(f"{role}_id")
            numbers = given if isinstance(given, list) else [given]
            known = [one for one in numbers if type(one) is int]
            if known and number not in known:
                told = ", ".join(f"{one} ({tokenizer.tokens.get(one, 'no token')})" for one in known[:4])
                own = "which its vocabulary lacks" if number is None else f"number {number}"
                yield f"{place} gives {role}_id {told}; the tokenizer's {role} is {token}, {own}"


def digit_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Return number of digits -> how many tokens are numbers of so many; the last entry counts longer ones too."""
    counts = dict.fromkeys(range(1, _DIGITS + 1), 0)
    for token in tokenizer.vocabulary:
        surface = tokenizer.surface(token)
        text = surface.text.removesuffix(b"\0").strip(b" ")
        if surface.kind == "text" and text.isdigit():
            counts[min(len(text), _DIGITS)] += 1
    return counts
