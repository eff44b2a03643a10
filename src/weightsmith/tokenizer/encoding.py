"""Text split into tokens, by the tokenizers library (the extra ``weightsmith[tokenizers]``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weightsmith.errors import CheckpointError, WeightsmithError
from weightsmith.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

# How many times as long a text may become: replacements that tokenizers need put one character for another.
_MOST_GROWTH = 10_000


class TokenizersMissingError(WeightsmithError):
    """The tokenizers library is not installed, and text was to be split."""


def encoder(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return what splits text into tokens, and puts tokens together.

    It neither cuts nor pads texts, whatever its file says.

    Args:
        tokenizer: the tokenizer as its files describe it.

    Raises:
        TokenizersMissingError: if the tokenizers library is not installed.
        CheckpointError: if the library refuses the tokenizer, or it would make any text so long that it fills the
            memory.
    """
    for part in ("normalizer", "decoder"):
        if _growth(tokenizer.content.get(part)) > _MOST_GROWTH:
            raise CheckpointError(
                f"the {part} of {tokenizer.owner} replaces letters by long texts, one after the other: no text is "
                "split by a tokenizer that makes it so long"
            )
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizersMissingError(
            "splitting text into tokens needs the tokenizers library: pip install 'weightsmith[tokenizers]'"
        ) from error
    with no_panic(tokenizer.owner):
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.content))
        made.no_truncation()
        made.no_padding()
        return made


def _growth(part: Any) -> int:
    """Return how many times as long a part of a tokenizer makes a text at most, by its replacements."""
    growth, left = 1, [part]
    while left and growth <= _MOST_GROWTH:
        value = left.pop()
        if isinstance(value, dict):
            content = value.get("content")
            if value.get("type") == "Replace" and isinstance(content, str):
                growth *= max(len(content), 1)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return growth


@contextmanager
def no_panic(owner: str) -> Iterator[None]:
    """Turn what the tokenizers library raises to one error.

    Where it meets what its authors took for impossible, the library panics: such an exception is no ``Exception``, and
    would end the program.

    Args:
        owner: how a person names the tokenizer's model.

    Raises:
        CheckpointError: where the library raises or panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, WeightsmithError):
        raise
    except BaseException as error:
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the tokenizers library refuses the tokenizer of {owner}: {told}; its tokenizer.json is damaged, or "
            "written by a newer version of the library"
        ) from error
