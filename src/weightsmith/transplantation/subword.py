"""New rows from the rows of the pieces that a model's own tokenizer cuts a token's text into.

The baseline of every work on vocabularies (mean: Sachidananda et al. 2021, arXiv:2109.07460, and FVT: Gee et al. 2022,
arXiv:2402.09977; the other rules are those of mergekit-tokensurgeon). It looks at no donor's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError
from weightsmith.tokenizer.encoding import encoder, no_panic
from weightsmith.tokenizer.matching import Numbers
from weightsmith.tokenizer.tokenizer import Surface, Tokenizer, in_byte_letters
from weightsmith.transplantation.combination import Combinations
from weightsmith.transplantation.recipe import Part, Pieces

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"


def subword(
    donor: Tokenizer, model: Tokenizer, targets: Numbers, rows: int, *, pieces: Pieces, part: Part
) -> Combinations:
    """Make each target of the pieces of its text.

    ``mean`` and ``sum`` are those of the pieces' rows. ``weighted_mean`` weighs the pieces 1, 2, …, n in embeddings,
    where the last one ends what was read, and n, …, 2, 1 in a head, which has to foretell the first. ``first_last``
    takes the last one in embeddings, the first in a head.

    Args:
        donor: the donor's tokenizer.
        model: the model's, which cuts.
        targets: ``[T]``: numbers of the donor's tokens.
        rows: how many rows the model's table has.
        pieces: what is made of the pieces.
        part: of what the rows are made.

    Returns:
        Combinations of the model's tokens: ``anchors`` are their numbers in its vocabulary. A token that has no pieces
        has no anchors: one that stands for no text, or whose letters the model's tokenizer does not know.

    Raises:
        TokenizersMissingError: if the tokenizers library is not installed.
        CheckpointError: if the library refuses the model's tokenizer.
        MethodError: if there is no such rule.
    """
    cutter = Cutter(model)
    parts: list[tuple[Array, Array]] = []
    with no_panic(model.owner):
        for number in targets.tolist():
            found = [piece for piece in cutter.cut(donor.surface(donor.tokens[number])) if piece < rows]
            parts.append(_weighed(found, pieces, part))
    return Combinations.padded(parts, np.full(len(targets), np.nan))


def _weighed(found: Sequence[int], pieces: Pieces, part: Part) -> tuple[Array, Array]:
    numbers, count = np.array(found, np.int32), len(found)
    if pieces == "mean":
        return numbers, np.full(count, 1 / max(count, 1))
    if pieces == "sum":
        return numbers, np.ones(count)
    if pieces == "weighted_mean":
        weights = np.arange(1.0, count + 1)
        return numbers, (weights if part == "embeddings" else weights[::-1]) / max(weights.sum(), 1.0)
    if pieces == "first_last":
        chosen = numbers[-1:] if part == "embeddings" else numbers[:1]
        return chosen, np.ones(len(chosen))
    raise MethodError(f"there is no rule {pieces!r} for the rows of pieces")


class Cutter:
    """Cuts the text of another vocabulary's tokens into a tokenizer's own.

    A token is a part of a text, and may begin in the middle of a word. So it is not cut as a text is, before which some
    tokenizers put a space, but spelled in the tokenizer's letters and given to its model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Make ready.

        Args:
            tokenizer: the one that cuts.

        Raises:
            TokenizersMissingError: if the tokenizers library is not installed.
            CheckpointError: if the library refuses the tokenizer.
        """
        self._tokenizer = tokenizer
        self._encoder: tokenizers.Tokenizer = encoder(tokenizer)
        unknown = tokenizer.model.get("unk_token")
        # Unigram gives the number instead.
        number = tokenizer.vocabulary.get(unknown) if isinstance(unknown, str) else tokenizer.model.get("unk_id")
        self._unknown = number
        self._bytes: dict[bytes, int] = {}
        for place, token in tokenizer.tokens.items():
            surface = tokenizer.surface(token)
            is_byte = surface.kind == "byte" or (tokenizer.alphabet == "bytes" and surface.kind == "text")
            if is_byte and len(surface.text) == 1:
                self._bytes.setdefault(surface.text, place)

    def cut(self, surface: Surface) -> list[int]:
        """Return the numbers of the tokens that stand for what a token stands for; none where there are none.

        Args:
            surface: what it stands for.
        """
        if surface.kind == "special":
            return []
        # A mark of a word's end is no letter; alone it is one.
        text = surface.text.removesuffix(b"\0") or surface.text
        if surface.kind == "text":
            found = [number for number in self._cut_text(text.decode("utf-8", "replace")) if number != self._unknown]
            if found:
                return found
        # Parts of a character, and letters that no token has.
        return [self._bytes[text[i : i + 1]] for i in range(len(text)) if text[i : i + 1] in self._bytes]

    def _cut_text(self, text: str) -> list[int]:
        alphabet = self._tokenizer.alphabet
        if alphabet == "words":
            return self._cut_words(text)
        plain = self._normalized(text)
        if alphabet == "bytes":
            plain = in_byte_letters(plain.encode())
        elif alphabet == "metaspace":
            plain = plain.replace(" ", _SPACE)
            # Normalizers put a space before every text.
            before = len(text) - len(text.lstrip(" "))
            plain = _SPACE * min(before, len(plain) - len(plain.lstrip(_SPACE))) + plain.lstrip(_SPACE)
        return [token.id for token in self._encoder.model.tokenize(plain)] if plain else []

    def _cut_words(self, text: str) -> list[int]:
        """Cut as WordPiece does; what begins without a space goes on with a word."""
        if text.startswith(" "):
            return list(self._encoder.encode(text, add_special_tokens=False).ids)
        prefix = self._tokenizer.model.get("continuing_subword_prefix") or "##"
        rest, found = self._normalized(text), []
        while rest:
            ends = range(len(rest), 0, -1)
            end = next((end for end in ends if prefix + rest[:end] in self._tokenizer.vocabulary), 0)
            if not end:
                # Signs are words of their own.
                return list(self._encoder.encode(text, add_special_tokens=False).ids)
            found.append(self._tokenizer.vocabulary[prefix + rest[:end]])
            rest = rest[end:]
        return found

    def _normalized(self, text: str) -> str:
        normalizer = self._encoder.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))
