"""Which of a donor's tokens a model has already, and which it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightsmith.tokenizer.behaviour import Numerals
from weightsmith.tokenizer.encoding import TokenizersMissingError
from weightsmith.tokenizer.matching import Numbers, match
from weightsmith.tokenizer.tokenizer import Tokenizer

Kinds = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# How a number of the donor's vocabulary gets its row.
UNUSED, NEW, SURFACE, ROLE, BYTE, PREFIX, UNTRAINED = range(7)
# How a report names them.
SHARED = {SURFACE: "surface", ROLE: "role", BYTE: "byte", PREFIX: "prefix"}


@dataclass(frozen=True, eq=False)
class Matches:
    """Where the row of every token of the donor comes from, in one part of the model.

    Attributes:
        model: per number of the donor the number of the model's token whose row it takes, -1 where there is none:
            ``[size]``, int64.
        how: per number why, or why not, by the constants of this module: ``[size]``, uint8.
        anchors: numbers of the donor's tokens that others may be made of: ``[S]``, int64, ascending. They stand for the
            same text in both.
    """

    model: Numbers
    how: Kinds
    anchors: Numbers

    @property
    def new(self) -> Numbers:
        """Numbers of the donor's tokens that need a row made for them: ``[T]``, ascending."""
        return np.flatnonzero(self.how == NEW)

    def count(self, how: int) -> int:
        """Return how many numbers get their rows so."""
        return int(np.count_nonzero(self.how == how))

    def is_identity(self, own: Tokenizer) -> bool:
        """Whether the donor's tokens are the model's, each under the same number.

        Args:
            own: the model's tokenizer.
        """
        numbers = np.flatnonzero(self.how != UNUSED)
        same = (self.how[numbers] == SURFACE).all() and (self.model[numbers] == numbers).all()
        return bool(same) and numbers.tolist() == list(own.tokens)

    def without(self, model: Mask, donor: Mask) -> Matches:
        """Return the same without trust in tokens that look untrained.

        A token that looks so in both, or that the model lacks and that looks so in the donor, becomes a row of zeros.
        One that looks so in the model alone is made anew. One that looks so in the donor alone keeps the model's row,
        and is no anchor.

        Args:
            model: per number of the model whether its token looks untrained.
            donor: the same of the donor.
        split: returns how the two split numbers.
        """
        how, taken = self.how.copy(), self.model.copy()
        theirs = donor[: len(how)]
        ours = (taken >= 0) & model[taken]
        shared = how == SURFACE
        how[shared & ours & ~theirs] = NEW
        how[(shared & ours & theirs) | ((how == NEW) & theirs)] = UNTRAINED
        taken[(how == NEW) | (how == UNTRAINED)] = -1
        return Matches(taken, how, np.flatnonzero((how == SURFACE) & ~theirs))


def match_tokens(donor: Tokenizer, model: Tokenizer, rows: int, *, byte_match: bool, prefix_match: bool) -> Matches:
    """Find the model's token for each of the donor's.

    Args:
        donor: the tokenizer that is taken over.
        model: the model's own.
        rows: how many rows the model's table has; tokens beyond it have none to give.
        byte_match: whether ``<0x41>`` is the same as ``A``.
        prefix_match: whether tokens that find none take the longest one that they begin with.
    """
    how = np.full(donor.size, UNUSED, np.uint8)
    how[list(donor.tokens)] = NEW
    plain = match(donor, model)
    plain[plain >= rows] = -1
    found = plain
    if byte_match:
        other = match(donor, model, bytes_as_text=True)
        other[other >= rows] = -1
        # What is the same without it stays what it is.
        found = np.where(plain >= 0, plain, other)
        how[(found >= 0) & (plain < 0)] = BYTE
    for number in np.flatnonzero(plain >= 0).tolist():
        same = donor.surface(donor.tokens[number]) == model.surface(model.tokens[int(plain[number])])
        how[number] = SURFACE if same else ROLE
    if prefix_match:
        _match_prefixes(donor, model, rows, found, how)
    return Matches(found, how, np.flatnonzero(how == SURFACE))


def _match_prefixes(donor: Tokenizer, model: Tokenizer, rows: int, found: Numbers, how: Kinds) -> None:
    texts: dict[bytes, int] = {}
    for number, token in model.tokens.items():
        surface = model.surface(token)
        if surface.kind == "text" and number < rows:
            texts.setdefault(surface.text, number)
    for number in np.flatnonzero(how == NEW).tolist():
        surface = donor.surface(donor.tokens[number])
        if surface.kind != "text":
            continue
        for end in range(len(surface.text) - 1, 0, -1):
            prefix = texts.get(surface.text[:end])
            if prefix is not None:
                found[number], how[number] = prefix, PREFIX
                break


def number_warning(
    model: Mapping[int, int], donor: Mapping[int, int], split: Callable[[], tuple[Numerals, Numerals]]
) -> str | None:
    """Return what a person should know of numbers, where the two tokenizers split them otherwise.

    They do where they have tokens of other lengths for them; where they do not, it is seen by splitting some, if the
    tokenizers library is there.

    Args:
        model: number of digits -> how many of the model's tokens are numbers of so many.
        donor: the same of the donor.
    """
    longest = [max((digits for digits, count in counts.items() if count), default=0) for counts in (model, donor)]
    if longest[0] == longest[1]:
        try:
            own, other = split()
        except TokenizersMissingError:
            return None
        if own.kind == other.kind:
            return None
        told = f"the model's tokenizer splits them {own.in_words()}, the donor's {other.in_words()}"
    else:
        told = f"the model's tokenizer has {_digits(model, longest[0])}, the donor's {_digits(donor, longest[1])}"
    return (
        f"numbers: {told}: numbers are split otherwise from now on, and what the model knows of arithmetic is bound to "
        "how they were; measure it, and expect to train it anew (arXiv 2506.06607)"
    )


def _digits(counts: Mapping[int, int], longest: int) -> str:
    if longest < 2:
        return "tokens of one digit alone" if longest else "no tokens made of digits"
    several = sum(count for digits, count in counts.items() if digits > 1)
    more = " and more" if longest == max(counts) else ""
    return f"{several:,} tokens of up to {longest} digits{more}"
