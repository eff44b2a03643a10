"""SentencePiece models: the pieces, and how text is prepared for them (https://github.com/google/sentencepiece).

The files are messages in Protocol Buffers; of them is read what the splitting of text depends on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from weightsmith.errors import CheckpointError, shown

# More than any vocabulary has; a file of nothing but empty pieces would take gigabytes.
_MOST_PIECES = 4_000_000
# SentencePiece learns pieces of up to 16 characters; longer ones are those that a person defined.
_LONGEST_PIECE = 1_000
_KINDS: dict[int, Literal["Unigram", "BPE"]] = {1: "Unigram", 2: "BPE"}
_UNSUPPORTED = {3: "whole words", 4: "single characters"}

Value = int | bytes


class PieceType(IntEnum):
    """What a piece is, as the format numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece: its text with ``▁`` for spaces, its score, and what it is."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model, as far as the splitting of text depends on it.

    Attributes:
        kind: how it splits: by the likeliest pieces, or by merges.
        pieces: the pieces, by number.
        unknown: the number of the unknown piece.
        byte_fallback: whether characters that no piece has are split into bytes.
        charsmap: the compiled map of characters that text goes through first; empty for none.
        dummy_prefix: whether a space is put before a text.
        remove_extra_whitespaces: whether spaces at both ends, and all but one of several, are left out.
    """

    kind: Literal["Unigram", "BPE"]
    pieces: tuple[Piece, ...]
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool


def parse_sentencepiece(content: bytes, where: str) -> SentencePieceModel:
    """Read a SentencePiece model.

    Args:
        content: the file's bytes.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if it is no such model, or one that cannot be expressed otherwise: of words or characters,
            with spaces behind words, with unused pieces, or with a map of characters for decoding.
    """
    try:
        return _parse(content)
    except _UnusualError as error:
        raise CheckpointError(
            f"{where} is a SentencePiece model {error}, which is not converted here: load it once with transformers "
            "and save it with save_pretrained"
        ) from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{where} is no SentencePiece model: {error}") from error


class _UnusualError(Exception):
    """A good model of a kind that is not converted."""


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(content):
        if number == 1:
            if len(pieces) == _MOST_PIECES:
                raise ValueError(f"it has more than {_MOST_PIECES:,} pieces")
            pieces.append(_piece(_bytes(value), len(pieces)))
        elif number == 2:
            trainer |= dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer |= dict(_fields(_bytes(value)))
        elif number == 5 and dict(_fields(_bytes(value))).get(2):
            raise _UnusualError("that maps characters when it decodes")
    kind = _number(trainer, 3, 1)
    if kind in _UNSUPPORTED:
        raise _UnusualError(f"of {_UNSUPPORTED[kind]}")
    if kind not in _KINDS:
        raise ValueError(f"its kind is {kind}; known are 1 (Unigram) and 2 (BPE)")
    if _number(trainer, 24, 0):
        raise _UnusualError("with spaces behind words instead of before them")
    if not _number(normalizer, 5, 1):
        raise _UnusualError("that keeps spaces as they are instead of writing them as ▁")
    fallback = bool(_number(trainer, 35, 0))
    _check(pieces, fallback)
    return SentencePieceModel(
        kind=_KINDS[kind],
        pieces=tuple(pieces),
        unknown=next(number for number, piece in enumerate(pieces) if piece.type == PieceType.UNKNOWN),
        byte_fallback=fallback,
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
    )


def _piece(content: bytes, place: int) -> Piece:
    fields = dict(_fields(content))
    raw = _bytes(fields.get(1, b""))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"piece {place} is not UTF-8: {shown(raw)}") from None
    if not text or len(text) > _LONGEST_PIECE:
        raise ValueError(f"piece {place} has {len(text):,} characters; expected are 1 to {_LONGEST_PIECE:,}")
    packed = fields.get(2, b"\0\0\0\0")
    if not isinstance(packed, bytes) or len(packed) != 4:
        raise ValueError(f"the score of piece {place} is no number of 32 bits")
    (score,) = struct.unpack("<f", packed)
    if not math.isfinite(score):
        raise ValueError(f"the score of piece {place}, {shown(text)}, is {score}")
    # The type's numbers are those of the format; others are refused by the enumeration.
    return Piece(text, score, PieceType(_number(fields, 3, PieceType.NORMAL)))


def _check(pieces: list[Piece], fallback: bool) -> None:
    """Check what SentencePiece itself asks of a model."""
    known = {piece.text for piece in pieces}
    if len(known) != len(pieces):
        raise ValueError("it has a piece twice")
    unknown = sum(piece.type == PieceType.UNKNOWN for piece in pieces)
    if unknown != 1:
        raise ValueError(f"it has {unknown} unknown pieces; expected is one")
    if any(piece.type == PieceType.UNUSED for piece in pieces):
        raise _UnusualError("with unused pieces")
    letters = {piece.text for piece in pieces if piece.type == PieceType.BYTE}
    if fallback and letters != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise ValueError(f"it falls back on bytes, and has {len(letters)} pieces for the 256 bytes")


def _fields(content: bytes) -> Iterator[tuple[int, Value]]:
    """Yield the fields of a message: whole numbers as they are, all else as its bytes."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError(f"there is a field 0 at byte {place:,}")
        if wire == 0:
            value, place = _varint(content, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(content, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"there is a field of the unknown kind {wire} at byte {place:,}")
        if length > len(content) - place:
            raise ValueError(f"it is cut short: {length:,} bytes are announced at byte {place:,}")
        yield number, content[place : place + length]
        place += length


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """Read a whole number of 7 bits a byte, of at most 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise ValueError("it is cut short in a number")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, place
    raise ValueError(f"there is a number of more than 64 bits at byte {place:,}")


def _number(fields: dict[int, Value], key: int, default: int) -> int:
    value = fields.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"field {key} is no whole number")
    return value


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a text or a message is expected")
    return value
