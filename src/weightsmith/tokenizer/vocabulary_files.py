"""The files of vocabularies that are texts: ``vocab.json``, ``merges.txt``, ``vocab.txt``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.tokenizer import MOST_TOKENS


def parse_vocabulary(content: bytes, where: str) -> dict[str, int]:
    """Read ``vocab.json``: token -> number.

    Raises:
        CheckpointError: if it is none, or two tokens have one number.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    numbers = list(found.values()) if isinstance(found, dict) else []
    if not numbers or not all(type(number) is int and 0 <= number < MOST_TOKENS for number in numbers):
        raise CheckpointError(f"{where} is no vocabulary: a mapping of tokens to numbers is expected")
    if len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{where} gives one number to two tokens")
    return dict(found)


def parse_merges(content: bytes, vocabulary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Read ``merges.txt``: the pairs that are put together, one a line.

    Args:
        content: the file's bytes.
        vocabulary: token -> number; what is put together must be a token.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if a line is no pair, or its tokens are not in the vocabulary.
    """
    merges = []
    for number, line in enumerate(_lines(content, where), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(token in vocabulary for token in (*pair, "".join(pair))):
            raise CheckpointError(f"{where}, line {number}: {shown(line)} is no pair of tokens of the vocabulary")
        merges.append((pair[0], pair[1]))
    return merges


def parse_words(content: bytes, where: str) -> dict[str, int]:
    """Read ``vocab.txt``: one token a line, numbered from 0.

    Raises:
        CheckpointError: if it is not UTF-8 or has no line.
    """
    lines = _lines(content, where)
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise CheckpointError(f"{where} has no tokens")
    return {token: number for number, token in enumerate(lines)}


def _lines(content: bytes, where: str) -> list[str]:
    # Tokens may hold what Python takes for the end of a line, but neither newlines nor carriage returns.
    try:
        return content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8: {error}") from error
