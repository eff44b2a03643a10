"""Which number a tokenizer gives each token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError

# The largest vocabularies that there are take 35 MB.
_LARGEST = 100_000_000


def read_vocabulary(files: Mapping[str, Path]) -> dict[str, int] | None:
    """Read the vocabulary of a fast tokenizer.

    Args:
        files: a checkpoint's companion files by name.

    Returns:
        Token -> number, added tokens included; None where there is no ``tokenizer.json``.

    Raises:
        CheckpointError: if ``tokenizer.json`` is not what the tokenizers library writes.
    """
    path = files.get("tokenizer.json")
    if path is None:
        return None
    text = read_whole(str(path), _LARGEST)
    try:
        content = json.loads(text)
        found = _vocabulary(content["model"].get("vocab") or {})
        found |= {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {repr(error)[:200]}") from error
    return found


def _vocabulary(entries: Any) -> dict[str, int]:
    # BPE and WordPiece map tokens to numbers; Unigram lists pairs of token and score.
    if isinstance(entries, dict):
        return {str(token): int(number) for token, number in entries.items()}
    return {str(entry[0]): number for number, entry in enumerate(entries)}
