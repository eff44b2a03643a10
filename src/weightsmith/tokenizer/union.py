"""One tokenizer with the tokens of several: the first's as they are, the others' behind them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import Tokenizer

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# What tokens of some tokenizers begin or end with, to tell where a word goes on or ends.
_SPELLING = ("continuing_subword_prefix", "end_of_word_suffix")
_SHOWN = 4


def alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers split words in one way and spell tokens alike, so that equal texts are equal tokens."""
    if (one.kind, one.alphabet) != (other.kind, other.alphabet):
        return False
    return all((one.model.get(key) or "") == (other.model.get(key) or "") for key in _SPELLING)


def unite(first: Tokenizer, others: Sequence[tuple[Tokenizer, int]]) -> tuple[Tokenizer, list[str]]:
    """Return a tokenizer with the tokens of all, and what a person should know.

    The first's tokens keep their numbers. Behind them come the others' pieces, tokenizer after tokenizer in the order
    of their numbers, then the added tokens of all. Pieces of a tokenizer of the same kind become pieces: those of BPE
    with the merges that make them, behind the first's, so that a text is split as before until no merge of the first's
    is left; those of Unigram with their scores. Tokens of another kind are matched by the text that they stand for, and
    the rest become added tokens. Normalizer, pre-tokenizer, post-processor and decoder are the first's.

    Args:
        first: the tokenizer that is extended.
        others: the others, each with the number of rows that its model has: tokens beyond them are left out.

    Raises:
        CheckpointError: if a tokenizer is of an unknown kind, or its scores or merges are none.
    """
    growing = _Growing(first)
    notes: list[str] = []
    for other, rows in others:
        if alike(first, other):
            growing.take_pieces(other, rows)
        else:
            notes += _take_foreign(growing, other, rows)
    for other, rows in others:
        if alike(first, other):
            notes += growing.take_added(other, rows)
    for other, _ in others:
        notes += _differences(first, other)
    return growing.finish(), list(dict.fromkeys(notes))


def with_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that finds some texts whole, as added tokens: those that it does not have, behind its own."""
    growing = _Growing(tokenizer)
    for text in texts:
        if text not in growing.vocabulary:
            growing.add(text, dict.fromkeys(_FLAGS, False))
    return growing.finish()


class _Growing:
    """A tokenizer to which tokens are added.

    Attributes:
        vocabulary: token -> number, added tokens included.
    """

    def __init__(self, first: Tokenizer) -> None:
        self._first = first
        self.vocabulary = dict(first.vocabulary)
        self._next = first.size
        self._pieces: dict[str, float] = {}
        self._merges: list[tuple[str, str]] = []
        self._added: list[dict[str, Any]] = []

    def piece(self, text: str, score: float = 0.0) -> None:
        """Add a piece under the next number."""
        self.vocabulary[text] = self._next
        self._pieces[text] = score
        self._next += 1

    def add(self, text: str, flags: Mapping[str, Any]) -> None:
        """Add a token that is found in a text before it is split; under the next number where there is none of it."""
        if text not in self.vocabulary:
            self.piece(text, self._lowest)
        kept = {key: bool(flags.get(key, False)) for key in _FLAGS}
        self._added.append({"id": self.vocabulary[text], "content": text, **kept})

    def take_pieces(self, other: Tokenizer, rows: int) -> None:
        """Add the pieces of a tokenizer of the same kind that are new, and how they are made."""
        scores = dict(_scores(other)) if other.kind == "Unigram" else {}
        new = set()
        for number, text in other.tokens.items():
            if number < rows and text not in other.added and text not in self.vocabulary:
                self.piece(text, scores.get(text, 0.0))
                new.add(text)
        prefix = other.model.get("continuing_subword_prefix") or ""
        if other.kind == "BPE":
            for left, right in _merges(other):
                made = left + right.removeprefix(prefix)
                if made in new and left in self.vocabulary and right in self.vocabulary:
                    self._merges.append((left, right))

    def take_added(self, other: Tokenizer, rows: int) -> list[str]:
        """Add the added tokens of a tokenizer of the same kind that are new, and return what a person should know."""
        known = {**self._first.added, **{entry["content"]: entry for entry in self._added}}
        unlike = []
        for text, entry in sorted(other.added.items(), key=lambda item: int(item[1]["id"])):
            if int(entry["id"]) >= rows:
                continue
            own = known.get(text)
            if own is None:
                # A piece that another tokenizer finds before it splits a text is a name there, if it is special.
                if text not in self.vocabulary or entry.get("special"):
                    self.add(text, entry)
            elif any(bool(own.get(key)) != bool(entry.get(key)) for key in _FLAGS):
                unlike.append(text)
        if not unlike:
            return []
        return [f"{other.owner} finds {_some(unlike)} in another way (spaces, case, special) than is taken here"]

    def finish(self) -> Tokenizer:
        """Return the tokenizer."""
        if not self._pieces and not self._added:
            return self._first
        first = self._first
        model = dict(first.model)
        # The tokenizers library numbers an added token that is no piece by what there are already, whatever the file
        # says: as a piece it keeps its number.
        if first.kind == "Unigram":
            model["vocab"] = self._list()
        else:
            vocab = dict(model.get("vocab") or {})
            for text, number in self.vocabulary.items():
                vocab.setdefault(text, number)
            model["vocab"] = vocab
        if self._merges:
            model["merges"] = _joined(model.get("merges") or [], self._merges)
        changed = {entry["content"] for entry in self._added}
        kept = [copy.deepcopy(entry) for text, entry in first.added.items() if text not in changed]
        added = sorted((*kept, *self._added), key=lambda entry: int(entry["id"]))
        return replace(first, content={**first.content, "model": model, "added_tokens": added})

    def _list(self) -> list[list[Any]]:
        """Return Unigram's vocabulary, whose numbers are places."""
        pieces = [list(entry) for entry in self._first.model.get("vocab") or ()]
        texts = {number: text for text, number in self.vocabulary.items()}
        for number in range(len(pieces), self._next):
            text = texts.get(number, f"<no token {number}>")
            pieces.append([text, self._pieces.get(text, self._lowest)])
        return pieces

    @property
    def _lowest(self) -> float:
        """The score of what is never split off: a lower one would change what the library gives to the unknown."""
        if self._first.kind != "Unigram":
            return 0.0
        return min((score for _, score in _scores(self._first)), default=0.0)


def _take_foreign(growing: _Growing, other: Tokenizer, rows: int) -> list[str]:
    """Add the tokens of a tokenizer of another kind that stand for something new, and say what that does."""
    known = growing.finish()
    found = match(other, known, bytes_as_text=True)
    taken, lost = [], []
    for number, token in other.tokens.items():
        if number >= rows or found[number] >= 0:
            continue
        kind, content = other.surface(token)
        text = content.rstrip(b"\0").decode("utf-8", "surrogatepass") if kind != "byte" else ""
        entry = other.added.get(token)
        if not text or (text in growing.vocabulary and entry is None):
            lost.append(token)
        elif text not in growing.vocabulary:
            growing.add(text, entry or {"special": kind == "special"})
            taken.append(text)
    notes = []
    if taken:
        notes.append(
            f"{other.owner} splits text in another way than {known.owner} ({other.kind}, {other.alphabet}; "
            f"{known.kind}, {known.alphabet}): {len(taken):,} of its tokens ({_some(taken)}) are added whole, and are "
            "cut out of every text before it is split, so that text is split in other places than either model saw"
        )
    if lost:
        notes.append(
            f"{len(lost):,} tokens of {other.owner} ({_some(lost)}) stand for no text that {known.owner}'s kind of "
            "tokenizer could find, and are left out"
        )
    return notes


def _differences(first: Tokenizer, other: Tokenizer) -> Iterator[str]:
    """Say where another tokenizer treats text or tokens in another way than the one that is taken."""
    parts = [part for part in _PIPELINE if first.content.get(part) != other.content.get(part)]
    if parts:
        yield f"{other.owner} has another {', '.join(parts)} than {first.owner}, whose own is taken"
    mine = {text: role for role, text in reversed(list(first.roles.items()))}
    for role, text in other.roles.items():
        own = mine.get(text)
        if own is not None and first.roles.get(role) != text:
            yield f"{shown(text)} is the {role} of {other.owner} and the {own} of {first.owner}, which is taken"
    for one in (first, other):
        twice = len(one.vocabulary) - len(one.tokens)
        if twice:
            yield f"{one.owner} has {twice:,} numbers that stand for two tokens; the row is that of the added one"


def _scores(tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
    for entry in tokenizer.model.get("vocab") or ():
        try:
            yield str(entry[0]), float(entry[1])
        except (IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer of {tokenizer.owner} has {shown(entry)} for token and score"
            ) from error


def _merges(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    merges = tokenizer.model.get("merges") or []
    for merge in merges if isinstance(merges, list) else [merges]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(
                f"the tokenizer of {tokenizer.owner} has the merge {shown(merge)}; a merge is of two pieces"
            )
        yield parts[0], parts[1]


def _joined(own: list[Any], merges: Sequence[tuple[str, str]]) -> list[Any]:
    """Return merges in the form that a file has: texts with a space between pieces, where no piece holds one."""
    merges = list(dict.fromkeys(merges))
    if not (own and isinstance(own[0], str)):
        return [*own, *map(list, merges)]
    if any(" " in piece for merge in merges for piece in merge):
        return [*(merge.split(" ") for merge in own), *map(list, merges)]
    return [*own, *(" ".join(merge) for merge in merges)]


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return ", ".join(map(shown, texts[:_SHOWN])) + more
