"""How a tokenizer splits text: numbers, white space, and many scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weightsmith.tokenizer.encoding import encoder, no_panic
from weightsmith.tokenizer.samples import DIGITS, NUMBERS, SPACES, TEXTS
from weightsmith.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_BYTE_DIGIT = re.compile(r"<0x3(\d)>")

Grouping = Literal["single", "left", "right", "free", "unknown"]
Pieces = tuple[str, ...]


@dataclass(frozen=True)
class Numerals:
    """How numbers are split.

    What a model knows of arithmetic is bound to how its numbers are split: after a change to a tokenizer that splits
    them otherwise, models lose it (Goddard and Fernandes Neto, arXiv 2506.06607).

    Attributes:
        grouping: ``single``, digit by digit; ``left``, groups of ``longest`` digits counted from the left; ``right``,
            the same from the right; ``free``, as the merges have it; ``unknown``, where digits are unknown tokens.
        longest: most digits in one token.
        pieces: number -> what it is split into.
    """

    grouping: Grouping
    longest: int
    pieces: Mapping[str, Pieces]

    def in_words(self) -> str:
        """Say how numbers are split."""
        many = {2: "two", 3: "three", 4: "four"}.get(self.longest, str(self.longest))
        return {
            "single": "digit by digit",
            "left": f"in groups of {many}, counted from the left",
            "right": f"in groups of {many}, counted from the right",
            "free": f"freely, as the vocabulary has them, up to {many} digits in a token",
            "unknown": "into unknown tokens, some or all of them",
        }[self.grouping]

    @property
    def kind(self) -> tuple[str, int]:
        """What two tokenizers must share to split numbers alike; free splits may differ all the same."""
        return self.grouping, 0 if self.grouping == "free" else self.longest


@dataclass(frozen=True)
class Spaces:
    """How white space is split.

    Attributes:
        pieces: what is looked at (``tab``, ``leading space``, …) -> what its text is split into.
        lost: those of them whose text does not come back when its tokens are decoded.
        prefix: whether a space is put before a text that has none.
    """

    pieces: Mapping[str, Pieces]
    lost: tuple[str, ...]
    prefix: bool


@dataclass(frozen=True)
class Sample:
    """How one text is split.

    Attributes:
        characters: how many characters it has.
        tokens: into how many tokens it is split, special ones left out.
        unknown: how many of them are the unknown token.
        exact: whether decoding them gives the text back, to the character.
        numbers: the tokens' numbers.
    """

    characters: int
    tokens: int
    unknown: int
    exact: bool
    numbers: tuple[int, ...]

    @property
    def per_character(self) -> float:
        """Tokens per character."""
        return self.tokens / self.characters


@dataclass(frozen=True)
class Behaviour:
    """How a tokenizer splits text.

    Attributes:
        numerals: numbers.
        spaces: white space.
        texts: script or language -> a text of it.
    """

    numerals: Numerals
    spaces: Spaces
    texts: Mapping[str, Sample]


def observe(tokenizer: Tokenizer) -> Behaviour:
    """Split the built-in texts, and tell what was seen.

    Args:
        tokenizer: the tokenizer.

    Raises:
        TokenizersMissingError: if the tokenizers library is not installed.
        CheckpointError: if the library refuses the tokenizer.
    """
    splitting = _Splitting(tokenizer, encoder(tokenizer))
    return Behaviour(_numerals(splitting), _spaces(splitting), {name: splitting(text) for name, text in TEXTS.items()})


def observe_numerals(tokenizer: Tokenizer) -> Numerals:
    """The same of numbers alone."""
    return _numerals(_Splitting(tokenizer, encoder(tokenizer)))


class _Splitting:
    """Splits texts and keeps what is needed to show the pieces."""

    def __init__(self, tokenizer: Tokenizer, made: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._made = made
        self.unknown = unknown_number(tokenizer)

    def __call__(self, text: str) -> Sample:
        numbers = self.numbers(text)
        return Sample(len(text), len(numbers), numbers.count(self.unknown), self.decode(numbers) == text, numbers)

    def numbers(self, text: str) -> tuple[int, ...]:
        with no_panic(self._tokenizer.owner):
            return tuple(self._made.encode(text, add_special_tokens=False).ids)

    def decode(self, numbers: Sequence[int]) -> str:
        with no_panic(self._tokenizer.owner):
            return str(self._made.decode(list(numbers), skip_special_tokens=False))

    def pieces(self, text: str) -> Pieces:
        return tuple(self._piece(number) for number in self.numbers(text))

    def _piece(self, number: int) -> str:
        if number == self.unknown:
            return "?"
        token = self._tokenizer.tokens.get(number)
        if token is None:
            return "?"
        surface = self._tokenizer.surface(token)
        if surface.kind == "byte":
            return "".join(f"<0x{byte:02X}>" for byte in surface.text)
        return surface.text.removesuffix(b"\0").decode("utf-8", "replace")


def unknown_number(tokenizer: Tokenizer) -> int:
    """Return the number of the unknown token, -1 where there is none."""
    place: Any = tokenizer.model.get("unk_id")
    if tokenizer.kind == "Unigram" and type(place) is int:
        return place
    token = tokenizer.model.get("unk_token")
    return tokenizer.vocabulary.get(token, -1) if isinstance(token, str) else -1


def _numerals(splitting: _Splitting) -> Numerals:
    groups = {text: _groups(splitting.pieces(text)) for text in DIGITS}
    return Numerals(*_grouping(groups), {text: tuple(_without_space(splitting.pieces(text))) for text in NUMBERS})


def _grouping(groups: Mapping[str, tuple[int, ...]]) -> tuple[Grouping, int]:
    """Tell how numbers are grouped from how many digits each token of each has."""
    if any(sum(sizes) != len(text) for text, sizes in groups.items()):
        return "unknown", 0
    longest = max(size for sizes in groups.values() for size in sizes)
    if longest == 1:
        return "single", 1
    for side in ("left", "right"):
        if all(sizes == _regular(len(text), longest, side) for text, sizes in groups.items()):
            return ("left" if side == "left" else "right"), longest
    return "free", longest


def _regular(length: int, size: int, side: str) -> tuple[int, ...]:
    full, rest = divmod(length, size)
    left = (size,) * full + ((rest,) if rest else ())
    return left if side == "left" else left[::-1]


def _groups(pieces: Pieces) -> tuple[int, ...]:
    # A byte of UTF-8 that is a digit stands for it.
    texts = (_BYTE_DIGIT.sub(r"\1", piece) for piece in pieces)
    counts = (sum(letter.isdigit() for letter in text) for text in texts)
    return tuple(count for count in counts if count)


def _without_space(pieces: Pieces) -> Pieces:
    """Leave out the space before a text: it is told once, and in the way of everything else."""
    if not pieces:
        return pieces
    first = pieces[0].removeprefix(" ")
    return (first, *pieces[1:]) if first else pieces[1:]


def _spaces(splitting: _Splitting) -> Spaces:
    return Spaces(
        pieces={name: splitting.pieces(text) for name, text in SPACES.items()},
        lost=tuple(name for name, text in SPACES.items() if splitting.decode(splitting.numbers(text)) != text),
        prefix="".join(splitting.pieces("a")).startswith(" "),
    )
