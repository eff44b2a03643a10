"""What the files of slow tokenizers hold, as the parts of a ``tokenizer.json``."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.classes import TokenizerClass
from weightsmith.tokenizer.sentencepiece import Piece, PieceType, SentencePieceModel

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Where ALBERT and XLNet cut after a number, whatever the vocabulary has.
_COMMA = re.compile(r".*\d,$", re.DOTALL)
_UNLIKELY = -100.0
# More sentinels than T5's hundred are in nobody's files.
_MOST_SENTINELS = 10_000

Part = dict[str, Any] | None


@dataclass(frozen=True)
class Parts:
    """The parts of a ``tokenizer.json`` that a slow tokenizer's files decide.

    Attributes:
        model: what splits words into tokens.
        normalizer: what is done to a text first.
        pre_tokenizer: how it is cut into words.
        decoder: how tokens become text.
        vocabulary: token -> number.
        added: tokens of the vocabulary that are looked for before a text is split -> whether they are special.
    """

    model: dict[str, Any]
    normalizer: Part
    pre_tokenizer: Part
    decoder: Part
    vocabulary: Mapping[str, int]
    added: Mapping[str, bool]


def from_sentencepiece(
    model: SentencePieceModel, own: TokenizerClass, roles: Mapping[str, str], settings: Mapping[str, Any], where: str
) -> Parts:
    """Express a SentencePiece model.

    Args:
        model: the model.
        own: what its class adds.
        roles: the tokens that have roles.
        settings: what ``tokenizer_config.json`` holds.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if the model is not laid out as its class has it.
    """
    entries = [(piece.text, _score(piece, own)) for piece in model.pieces]
    unknown = model.unknown
    if own.fairseq:
        # The control pieces that lead a model lose their numbers to fairseq's.
        led = [piece.type in (PieceType.UNKNOWN, PieceType.CONTROL) for piece in model.pieces[: own.skipped]]
        if len(led) < own.skipped or not all(led):
            raise CheckpointError(
                f"{where} does not begin with {own.skipped} control pieces, as models of its class do: its numbers are "
                "unknown"
            )
        first = [roles.get(token, token) for token in own.fairseq]
        entries = [*((token, _unused(token)) for token in first), *entries[own.skipped :], (roles["mask_token"], 0.0)]
        unknown = first.index(roles["unk_token"])
    entries += [(token, 0.0) for token in sentinels(own, settings, where)]
    vocabulary = {token: number for number, (token, _) in enumerate(entries)}
    if len(vocabulary) != len(entries):
        raise CheckpointError(f"{where} already has a piece that its class adds: its numbers are unknown")
    added = {
        piece.text: piece.type != PieceType.USER_DEFINED
        for piece in model.pieces
        if piece.type in (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN) and piece.text in vocabulary
    }
    asked = settings.get("add_prefix_space")
    prefix = asked if isinstance(asked, bool) else model.dummy_prefix
    return Parts(
        model=_unigram(entries, unknown, model) if model.kind == "Unigram" else _merged(vocabulary, model),
        normalizer=_normalizer(model, own, settings, prefix),
        pre_tokenizer=_metaspace(prefix) if _modern(settings) else None,
        decoder=_spaces_back(model, prefix),
        vocabulary=vocabulary,
        added=added,
    )


def sentinels(own: TokenizerClass, settings: Mapping[str, Any], where: str) -> list[str]:
    """Return the tokens that T5 appends to its pieces, in the order of their numbers.

    Raises:
        CheckpointError: if the settings ask for more than there are anywhere.
    """
    count = settings.get("extra_ids", own.sentinels) if own.sentinels else 0
    if type(count) is not int or not 0 <= count <= _MOST_SENTINELS:
        raise CheckpointError(f"{where}: extra_ids is {shown(count)}; expected is a number up to {_MOST_SENTINELS:,}")
    return [f"<extra_id_{number}>" for number in reversed(range(count))]


def from_merges(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    own: TokenizerClass,
    settings: Mapping[str, Any],
    unknown: str | None,
) -> Parts:
    """Express byte-level merges: GPT-2's kind, Qwen2's or CLIP's.

    Args:
        vocabulary: token -> number.
        merges: the pairs that are put together, the first first.
        own: what the class adds.
        settings: what ``tokenizer_config.json`` holds.
        unknown: the unknown token; only CLIP's kind takes one.
    """
    clip = own.pattern == "clip"
    model = _bpe(vocabulary, merges) | {
        "unk_token": unknown if clip else None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>" if clip else "",
    }
    before = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space") is True, "trim_offsets": True}
    normalizer: Part = None
    if own.pattern == "gpt2":
        cut: Part = {**before, "use_regex": True}
    elif own.pattern == "qwen2":
        normalizer = {"type": "NFC"}
        cut = _in_turn("pretokenizers", [_split(_QWEN2, "Isolated", False), {**before, "use_regex": False}])
    else:
        normalizer = _in_turn("normalizers", [{"type": "NFC"}, _replace(r"\s+", " ", "Regex"), {"type": "Lowercase"}])
        own_bytes = {**before, "add_prefix_space": False, "use_regex": True}
        cut = _in_turn("pretokenizers", [_split(_CLIP, "Removed", True), own_bytes])
    decoder: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if clip:
        # Strip would do it, and panics where there is nothing to strip.
        ends = [_replace("</w>", " "), _replace(r" \z", "", "Regex")]
        decoder = _in_turn("decoders", [decoder, *ends])
    return Parts(model, normalizer, cut, decoder, vocabulary, {})


def from_words(vocabulary: Mapping[str, int], own: TokenizerClass, settings: Mapping[str, Any], unknown: str) -> Parts:
    """Express BERT's vocabulary of words and their parts.

    Args:
        vocabulary: token -> number.
        own: what the class adds.
        settings: what ``tokenizer_config.json`` holds.
        unknown: the unknown token.
    """
    accents = settings.get("strip_accents")
    model = {
        "type": "WordPiece",
        "unk_token": unknown,
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": dict(vocabulary),
    }
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars") is not False,
        "strip_accents": accents if isinstance(accents, bool) else None,
        "lowercase": _flag(settings, "do_lower_case", bool(own.lower)),
    }
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return Parts(model, normalizer, {"type": "BertPreTokenizer"}, decoder, vocabulary, {})


def _score(piece: Piece, own: TokenizerClass) -> float:
    return piece.score + _UNLIKELY if own.quotes and _COMMA.match(piece.text) else piece.score


def _unused(token: str) -> float:
    # A piece that text must not be split into.
    return _UNLIKELY if token.startswith("<unk>") and token != "<unk>" else 0.0


def _unigram(entries: Iterable[tuple[str, float]], unknown: int, model: SentencePieceModel) -> dict[str, Any]:
    vocabulary = [[token, score] for token, score in entries]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": model.byte_fallback}


def _merged(vocabulary: Mapping[str, int], model: SentencePieceModel) -> dict[str, Any]:
    """Find the merges that SentencePiece leaves unsaid: any two pieces that are a third, by the score of that.

    Of pairs with one score the one whose left half is longer comes first, as transformers has it.
    """
    usable = {piece.text for piece in model.pieces if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED)}
    found = []
    for piece in model.pieces:
        if piece.text in usable:
            for cut in range(1, len(piece.text)):
                left, right = piece.text[:cut], piece.text[cut:]
                if left in usable and right in usable:
                    found.append((-piece.score, -cut, -len(right), vocabulary[piece.text], left, right))
    found.sort(key=lambda one: one[:4])
    settings = {"unk_token": model.pieces[model.unknown].text, "fuse_unk": True, "byte_fallback": model.byte_fallback}
    return _bpe(vocabulary, ((left, right) for *_, left, right in found)) | settings


def _bpe(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in merges],
    }


def _normalizer(model: SentencePieceModel, own: TokenizerClass, settings: Mapping[str, Any], prefix: bool) -> Part:
    steps: list[dict[str, Any]] = []
    if own.quotes:
        steps += [_replace("``", '"'), _replace("''", '"')]
        if not _flag(settings, "keep_accents", False):
            steps += [{"type": "NFKD"}, {"type": "StripAccents"}]
    if own.lower is not None and _flag(settings, "do_lower_case", own.lower):
        steps.append({"type": "Lowercase"})
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_extra_whitespaces:
        # Spaces alone: what else is white space is a matter of the map of characters.
        steps += [_replace(r"\A +| +\z", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    if not _modern(settings):
        steps += [{"type": "Prepend", "prepend": "▁"}] if prefix else []
        steps.append(_replace(" ", "▁"))
    return _in_turn("normalizers", steps) if steps else None


def _modern(settings: Mapping[str, Any]) -> bool:
    """Whether the space before a text is put before the first word alone, not behind each special token too."""
    return settings.get("legacy") is False


def _metaspace(prefix: bool) -> Part:
    scheme = "first" if prefix else "never"
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _spaces_back(model: SentencePieceModel, prefix: bool) -> Part:
    steps: list[dict[str, Any]] = [_replace("▁", " ")]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _in_turn("decoders", steps)


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _split(pattern: str, behavior: str, invert: bool) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def _in_turn(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def _flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key)
    return value if isinstance(value, bool) else default
