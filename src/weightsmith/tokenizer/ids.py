"""Numbers of tokens in config.json and generation_config.json, brought from one tokenizer to another."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.tokenizer.tokenizer import ROLES, Tokenizer

# One number, or a list of them.
_ID = re.compile(r"^(?!codec_|codebook_|t2u_)\w*(token_ids?|token_index)$|^(begin_)?suppress_tokens$|^forced_bos_id$")
# Lists of words, each a list of numbers.
_WORDS = frozenset({"bad_words_ids", "force_words_ids"})
# What a language or a task is called -> its number.
_NAMED = frozenset({"lang_to_id", "task_to_id"})
# Parts of a config whose numbers count something else than tokens of text.
_APART = re.compile(r"vision|visual|image|audio|speech|codec|code2wav|vq|t2u|talker|dvae|mimi|depth_decoder")
_ROLE_IDS = tuple(role.replace("_token", "_token_id") for role in ROLES)

Numbers = npt.NDArray[np.int64]


def with_ids(
    content: Mapping[str, Any],
    before: Tokenizer,
    after: Tokenizer,
    moved: Numbers,
    *,
    other: Mapping[str, Any] | None = None,
    name: str = "config.json",
) -> tuple[dict[str, Any], list[str]]:
    """Return a config whose numbers of tokens are those of another tokenizer, and what a person should know.

    What stands for a token that is gone is taken from the other model's config, or is the token of the same role; where
    neither says, it is dropped. Numbers of codes of sound or images are left as they are.

    Args:
        content: what ``config.json`` or ``generation_config.json`` holds.
        before: the tokenizer whose numbers it has.
        after: the tokenizer that it is for.
        moved: per number of ``before`` the number of ``after`` that stands for the same, -1 where there is none; as
            :func:`weightsmith.tokenizer.matching.match` returns it.
        other: the same file of the model that ``after`` is from.
        name: what to call the file.
    """
    notes: list[str] = []
    changed = _mapped(copy.deepcopy(dict(content)), other or {}, _Ids(before, after, moved, name, notes))
    return changed, list(dict.fromkeys(notes))


class _Ids:
    """Numbers of one tokenizer in another, and a note of each that is gone."""

    def __init__(self, before: Tokenizer, after: Tokenizer, moved: Numbers, name: str, notes: list[str]) -> None:
        self.before, self.after, self.notes = before, after, notes
        self._moved, self._name = moved, name

    def of(self, number: int) -> int | None:
        """Return a token's number now; None where it is gone. What is below 0 stands for no token, and stays."""
        if number < 0:
            return number
        found = int(self._moved[number]) if number < len(self._moved) else -1
        return None if found < 0 else found

    def under(self, key: str, number: int) -> int | None:
        """Return a token's number now, under a key of a config; one token may have several roles, and their tokens be
        several elsewhere.
        """
        found = self.of(number)
        token = self.before.tokens.get(number)
        if found is None or token is None or self.before.roles.get(key.removesuffix("_id")) != token:
            return found
        now = _by_role(key, self)
        return found if now is None else now

    def dropped(self, key: str, number: Any) -> None:
        """Note what was dropped."""
        token = self.before.tokens.get(number) if type(number) is int else None
        shown = f"{number} ({token})" if token is not None else f"{number}"
        self.notes.append(f"{self._name}: {key} {shown} is no token of the new tokenizer, and is left out")


def _mapped(content: dict[str, Any], other: Mapping[str, Any], ids: _Ids) -> dict[str, Any]:
    for key, value in list(content.items()):
        theirs = other.get(key)
        if isinstance(value, dict) and key not in _NAMED and key != "sequence_bias":
            if not _APART.search(key):
                content[key] = _mapped(value, theirs if isinstance(theirs, Mapping) else {}, ids)
        elif value is not None:
            content[key] = _value(key, value, theirs, ids)
    for key in _ROLE_IDS:
        # A model that cannot stop is worse than a number too many.
        if key in content and content[key] is None and _fits(other.get(key), ids.after):
            content[key] = other[key]
        elif key not in content and key in other and _fits(other[key], ids.after):
            content[key] = copy.deepcopy(other[key])
    return content


def _value(key: str, value: Any, theirs: Any, ids: _Ids) -> Any:
    if key in _WORDS:
        return _lists(key, value, ids, lambda word: word)
    if key == "forced_decoder_ids":
        return _lists(key, value, ids, lambda pair: pair[1:], lambda pair, numbers: [pair[0], *numbers])
    if key == "sequence_bias" and isinstance(value, list):
        return _lists(key, value, ids, lambda entry: entry[0], lambda entry, numbers: [numbers, *entry[1:]])
    if key in _NAMED and isinstance(value, dict):
        found = {name: (number, ids.of(number)) for name, number in value.items() if type(number) is int}
        for name, (number, now) in found.items():
            if now is None:
                ids.dropped(f"{key}.{name}", number)
        return {name: now for name, (_, now) in found.items() if now is not None}
    if not _ID.match(key):
        return value
    if type(value) is int:
        return _one(key, value, theirs, ids)
    if isinstance(value, list) and all(type(number) is int for number in value):
        kept = []
        for number in value:
            now = ids.under(key, number)
            if now is None:
                ids.dropped(key, number)
            elif now not in kept:
                kept.append(now)
        if kept or not value:
            return kept
        return copy.deepcopy(theirs) if _fits(theirs, ids.after) else _by_role(key, ids)
    return value


def _one(key: str, number: int, theirs: Any, ids: _Ids) -> Any:
    now = ids.under(key, number)
    if now is not None:
        return now
    if _fits(theirs, ids.after):
        return copy.deepcopy(theirs)
    now = _by_role(key, ids)
    if now is None:
        ids.dropped(key, number)
    return now


def _by_role(key: str, ids: _Ids) -> int | None:
    token = ids.after.roles.get(key.removesuffix("_id")) if key.endswith("_id") else None
    return None if token is None else ids.after.vocabulary.get(token)


def _fits(value: Any, tokenizer: Tokenizer) -> bool:
    """Whether a value of another config gives one or more tokens that the tokenizer has."""
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(type(number) is int and number in tokenizer.tokens for number in numbers)


def _lists(
    key: str,
    value: Any,
    ids: _Ids,
    numbers_of: Callable[[Any], Any],
    joined: Callable[[Any, list[int]], Any] = lambda _, numbers: numbers,
) -> Any:
    """Return a list of entries with their numbers brought over, without those of which a token is gone."""
    kept = []
    for entry in value if isinstance(value, list) else ():
        numbers = numbers_of(entry) if isinstance(entry, list) and entry else None
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            # What another program wrote in a form of its own is not ours to judge.
            kept.append(entry)
            continue
        now = [found for number in numbers if (found := ids.of(number)) is not None]
        if len(now) == len(numbers):
            kept.append(joined(entry, now))
        else:
            ids.dropped(key, numbers)
    return kept if isinstance(value, list) else value
