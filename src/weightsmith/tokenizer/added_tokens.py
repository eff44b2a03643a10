"""The added tokens of a slow tokenizer: those that its files number, and those that its class brings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, read_companion
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.classes import TokenizerClass
from weightsmith.tokenizer.slow_models import Parts, sentinels

WAY_OUT = "load it once with transformers' AutoTokenizer and save it with save_pretrained, which writes tokenizer.json"
# In this order transformers gives numbers to special tokens that have none.
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def added_tokens(
    parts: Parts,
    roles: Mapping[str, str],
    own: TokenizerClass,
    settings: Mapping[str, Any],
    files: Mapping[str, File],
    owner: str,
) -> list[dict[str, Any]]:
    """Return the added tokens, by number: those that files name, and those that the class adds.

    The tokenizers library numbers tokens that are not in the vocabulary one after the other behind it.

    Args:
        parts: what the other files decide, the vocabulary among it.
        roles: the tokens that have roles.
        own: what the class adds.
        settings: what ``tokenizer_config.json`` holds.
        files: the files beside the model's weights, by name.
        owner: how a person names the model.

    Raises:
        CheckpointError: if files contradict each other, or give numbers that the library cannot.
    """
    entries: dict[str, dict[str, Any]] = {}

    def add(token: str, flags: Mapping[str, Any], **own_flags: Any) -> None:
        known = {flag: flags[flag] for flag in _FLAGS if isinstance(flags.get(flag), bool)}
        entries[token] = {**dict.fromkeys(_FLAGS, False), "id": None, **entries.get(token, {}), **known, **own_flags}

    for token, special in parts.added.items():
        add(token, {}, special=special)
    for role in _ORDER:
        if role in roles:
            given = settings.get(role)
            greedy = {"lstrip": role == "mask_token" and own.greedy_mask}
            flags: Mapping[str, Any] = given if isinstance(given, dict) else greedy
            add(roles[role], flags, special=True)
    for token in (*own.extra, *sentinels(own, settings, owner), *_additional(settings)):
        add(token, {}, special=True)
    for token, number, flags in _declared(settings, files, owner):
        add(token, flags, id=number)
    own_numbers = parts.vocabulary
    for token, entry in entries.items():
        declared = entry["id"]
        number = own_numbers.get(token, declared)
        if declared is not None and number != declared:
            raise CheckpointError(
                f"the tokenizer of {owner} has {shown(token)} under number {number}, and its files of added tokens say "
                f"{declared}: {WAY_OUT}"
            )
        entry["id"] = number
    numbered = {token: entry["id"] for token, entry in entries.items() if entry["id"] is not None}
    following = max([*own_numbers.values(), *numbered.values()], default=-1) + 1
    for entry in entries.values():
        if entry["id"] is None:
            entry["id"], following = following, following + 1
    result = [{"id": entry["id"], "content": token, **_only(entry)} for token, entry in entries.items()]
    result.sort(key=lambda entry: entry["id"])
    beyond = [entry["id"] for entry in result if entry["content"] not in own_numbers]
    first = max(own_numbers.values(), default=-1) + 1
    if beyond and len(set(own_numbers.values())) != first:
        raise CheckpointError(
            f"the vocabulary of {owner} leaves numbers out, and tokens are added behind it: {WAY_OUT}"
        )
    if beyond != list(range(first, first + len(beyond))):
        raise CheckpointError(
            f"the added tokens of {owner} have the numbers {shown(beyond)}, and not those that follow its vocabulary, "
            f"{first} to {first + len(beyond) - 1}: {WAY_OUT}"
        )
    return result


def _only(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry[flag]) for flag in _FLAGS}


def _additional(settings: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key)
        for entry in value if isinstance(value, list) else ():
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                yield text


def _declared(
    settings: Mapping[str, Any], files: Mapping[str, File], owner: str
) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield the added tokens that files number: text, number, flags."""
    file = files.get("added_tokens.json")
    if file is not None:
        where = shown_part(file, owner, "added_tokens.json")
        for token, number in parse_object(read_companion(file, LARGEST_SETTINGS), where).items():
            if type(number) is not int or not token:
                raise CheckpointError(
                    f"{where} gives {shown(token)} the number {shown(number)}; a whole one is expected"
                )
            yield token, number, {}
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text or not re.fullmatch(r"\d{1,9}", key):
            raise CheckpointError(
                f"added_tokens_decoder of {owner}'s tokenizer_config.json is damaged at {shown(key)}: a number, and a "
                "token with its content, are expected"
            )
        yield text, int(key), entry


def shown_part(file: File, owner: str, name: str) -> str:
    """Return what to call one of several files of a tokenizer in errors."""
    return f"{name} of {owner}" if isinstance(file, bytes) else str(file)
