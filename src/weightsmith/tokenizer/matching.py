"""Which tokens of two tokenizers stand for the same text, whatever the kind of each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightsmith.tokenizer.tokenizer import ROLES, Surface, Tokenizer

Numbers = npt.NDArray[np.int64]


def match(wanted: Tokenizer, known: Tokenizer, *, bytes_as_text: bool = False) -> Numbers:
    """Find the token of one tokenizer that stands for what a token of another stands for.

    Tokens match by their surface, so that ``Ġthe``, ``▁the`` and WordPiece's ``the`` are one; of several with the same
    surface the one that is spelled alike is taken, or else the first. Special tokens match by their text, and otherwise
    by their role: the beginning of a text is that under any name.

    Args:
        wanted: the tokenizer whose tokens are looked up.
        known: the one that they are looked up in.
        bytes_as_text: whether ``<0x41>`` is the same as ``A``.

    Returns:
        Per number of ``wanted`` the number in ``known``, -1 where there is none: ``[wanted.size]``, int64. Numbers
        that no token has are -1 as well.
    """
    # Of tokens with the same surface the first is the one that text is split into.
    places: dict[Surface, int] = {}
    for number, token in known.tokens.items():
        places.setdefault(known.surface(token), number)
    if bytes_as_text:
        places = {**{_as_text(surface): number for surface, number in reversed(places.items())}, **places}
    # A token's roles that the other knows, the first of them last: it is the one that stays.
    shared = [role for role in reversed(ROLES) if role in wanted.roles and known.roles.get(role) in known.vocabulary]
    own = {wanted.roles[role]: known.vocabulary[known.roles[role]] for role in shared}
    found = np.full(wanted.size, -1, np.int64)
    for number, token in wanted.tokens.items():
        surface = wanted.surface(token)
        place = known.vocabulary.get(token)
        if place is None or known.surface(token) != surface:
            place = places.get(surface)
        if place is None and bytes_as_text:
            place = places.get(_as_text(surface))
        if place is None:
            place = own.get(token)
        if place is not None:
            found[number] = place
    return found


def _as_text(surface: Surface) -> Surface:
    return Surface("text", surface.text) if surface.kind == "byte" else surface
