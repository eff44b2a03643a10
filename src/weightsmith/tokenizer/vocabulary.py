"""Which number a tokenizer gives each token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import CheckpointError

_LARGEST = 200_000_000


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
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST:,} are read")
    try:
        content = json.loads(path.read_bytes())
        found = _vocabulary(content["model"].get("vocab") or {})
        found |= {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {error!r}") from error
    return found


def _vocabulary(entries: Any) -> dict[str, int]:
    # BPE and WordPiece map tokens to numbers; Unigram lists pairs of token and score.
    if isinstance(entries, dict):
        return {str(token): int(number) for token, number in entries.items()}
    return {str(entry[0]): number for number, entry in enumerate(entries)}
