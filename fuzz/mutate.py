"""Changes that keep a format's pieces whole: a fuzzer that only flips bits seldom gets past the parser."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Sequence
from random import Random

from fuzz.target import Mutator

_PIECE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|[ \t]+|.', re.DOTALL)
# What readers stumble over, in any text.
_AWKWARD = (
    b'0 1 -1 1.5 1e400 NaN Infinity true null {} [] [[]] "" ~ 9223372036854775808 18446744073709551616 .. ../x /etc/x'
).split()
_AWKWARD += [b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xe2\x80\xae", b"\n", b" ", b"[" * 40, b'{"a":' * 40, b"9" * 50]


def text_mutator(words: Sequence[bytes]) -> Mutator:
    """Return a mutator of JSON, YAML and the like, which also puts in these words.

    The first byte of an input chooses what the rest is, and is left alone.
    """
    table = (*words, *_AWKWARD)

    def mutate(content: bytes, random: Random) -> bytes:
        pieces = _PIECE.findall(content[1:4000])
        return content[:1] + b"".join(_shuffled(pieces, random, lambda: random.choice(table)))

    return mutate


def _shuffled(pieces: list[bytes], random: Random, fresh: Callable[[], bytes]) -> list[bytes]:
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(pieces) + 1)
        span = random.randint(1, 8)
        kind = random.randrange(5)
        if kind == 0 or not pieces:
            pieces[at:at] = [fresh()]
        elif kind == 1:
            pieces[at : at + 1] = [fresh()]
        elif kind == 2:
            del pieces[at : at + span]
        elif kind == 3:
            other = random.randrange(len(pieces) + 1)
            pieces[other:other] = pieces[at : at + span]
        else:
            pieces[at : at + span] = pieces[at : at + span][::-1]
    return pieces


def field_mutator(words: Sequence[bytes]) -> Mutator:
    """Return a mutator of messages in Protocol Buffers, field by field, that also puts in these fields.

    The first byte of an input chooses what the rest is, and is left alone.
    """

    def mutate(content: bytes, random: Random) -> bytes:
        pieces = _shuffled(_fields(content[1:4000]), random, lambda: random.choice(words))
        if pieces and random.random() < 0.5:
            # Fields are messages in their turn.
            place = random.randrange(len(pieces))
            inner = bytearray(pieces[place])
            if inner:
                inner[random.randrange(len(inner))] = random.choice([0, 1, 2, 5, 127, 128, 255, random.randrange(256)])
            pieces[place] = bytes(inner)
        return content[:1] + b"".join(pieces)

    return mutate


def _fields(content: bytes) -> list[bytes]:
    """Cut a message before each field with a length of one byte; what cannot be understood stays in one piece."""
    pieces, place = [], 0
    while place + 1 < len(content) and content[place] & 7 == 2 and content[place + 1] < 128:
        stop = place + 2 + content[place + 1]
        pieces.append(content[place:stop])
        place = stop
    return [*pieces, content[place:]] if place < len(content) else pieces


def pickle_mutator(words: Sequence[bytes]) -> Mutator:
    """Return a mutator of pickles, instruction by instruction, that also puts in these pieces of pickle.

    The first byte of an input chooses what the rest is, and is left alone.
    """

    def mutate(content: bytes, random: Random) -> bytes:
        return content[:1] + b"".join(_shuffled(_instructions(content[1:4000]), random, lambda: random.choice(words)))

    return mutate


def _instructions(content: bytes) -> list[bytes]:
    """Cut a pickle before each instruction; what cannot be understood stays in one piece."""
    places = []
    try:
        places = [place for _, _, place in pickletools.genops(content) if place is not None]
    except Exception:
        places = places or [0]
    stops = [*places[1:], len(content)]
    return [content[start:stop] for start, stop in zip(places, stops, strict=True)]
