"""Slow tokenizers: SentencePiece models, merges, words, and the settings that say how they are meant."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random

from fuzz.mutate import field_mutator, text_mutator
from fuzz.target import Defect, Target
from weightsmith.checkpoint.checkpoint import File
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import parse_tokenizer, read_tokenizer

# What the first byte chooses: which file the rest is, and for which class.
_MODELS = ("", "LlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", "AlbertTokenizer", "XLMRobertaTokenizer")
_TEXTS = (
    ("vocab.json", "GPT2Tokenizer"),
    ("merges.txt", "Qwen2Tokenizer"),
    ("merges.txt", "CLIPTokenizer"),
    ("vocab.txt", "BertTokenizer"),
    ("tokenizer_config.json", "LlamaTokenizer"),
    ("added_tokens.json", "RobertaTokenizer"),
)
_WORDS = (
    b'"tokenizer_class" "LlamaTokenizer" "T5Tokenizer" "bos_token" "<s>" "added_tokens_decoder" "content" "special"'
)
_WORDS += b' "extra_ids" "add_bos_token" "legacy" "additional_special_tokens" "4" "5" 4 5 a b ab [UNK] { } [ ] : ,'


def run(content: bytes) -> None:
    """Read a tokenizer of which one file holds these bytes, and use what was made of it."""
    if not content:
        return
    kind = content[0] % (len(_MODELS) + len(_TEXTS))
    name, own = ("tokenizer.model", _MODELS[kind]) if kind < len(_MODELS) else _TEXTS[kind - len(_MODELS)]
    files: dict[str, File] = {**_around(name, own), name: content[1:]}
    try:
        tokenizer = read_tokenizer(files, "fuzzed")
    except CheckpointError as error:
        if len(str(error)) > 2000:
            raise Defect("an error of two thousand characters") from error
        return
    if tokenizer is None:
        raise Defect("a tokenizer was not seen")
    # What was made must be what this package itself takes for a tokenizer.
    parsed = parse_tokenizer(json.dumps(tokenizer.content).encode(), "fuzzed")
    if parsed["model"] != tokenizer.content["model"]:
        raise Defect("what was made does not survive being written")
    if sorted(tokenizer.tokens) != list(range(tokenizer.size)) and name == "tokenizer.model":
        raise Defect("the numbers of a converted tokenizer have gaps")
    match(tokenizer, tokenizer, bytes_as_text=True)


def _around(name: str, own: str) -> dict[str, File]:
    """Return good files beside the one that is tried."""
    files: dict[str, File] = {"tokenizer_config.json": json.dumps({"tokenizer_class": own} if own else {}).encode()}
    if own in ("LlamaTokenizer", "T5Tokenizer") and name != "tokenizer.model":
        files["tokenizer.model"] = _model()
    if own in ("GPT2Tokenizer", "Qwen2Tokenizer", "CLIPTokenizer", "RobertaTokenizer"):
        files |= {"vocab.json": b'{"a": 0, "b": 1, "ab": 2, "<s>": 3}', "merges.txt": b"#version: 0.2\na b\n"}
    return files


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([24, kind]))


def _model(trainer: bytes = b"") -> bytes:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", -1.0, 1), ("b", -2.0, 1), ("ab", -0.5, 1)]
    return b"".join(_piece(*piece) for piece in pieces) + _field(2, trainer)


def seeds() -> Sequence[bytes]:
    """A good model for each class, good files of the other kinds, and what leads astray."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"6": {"content": "<x>", "special": True}},
        "pad_token": {"content": "<x>", "lstrip": True},
    }
    texts = [
        b'{"a": 0, "b": 1, "ab": 2}',
        b"#version: 0.2\na b\n",
        b"a b\n",
        b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\n",
        json.dumps(settings).encode(),
        b'{"<x>": 4}',
    ]
    merged, unusual = _model(b"\x18\x02"), _model(b"\x18\x03")
    models = [bytes([place]) + made for place in range(len(_MODELS)) for made in (_model(), merged)]
    chosen = [bytes([len(_MODELS) + place]) + text for place, text in enumerate(texts)]
    return [*models, *chosen, b"\1" + unusual, b"\0" + b"\n\0" * 500, b"\1IQ== 0\nIg== 1\n"]


_FIELDS = [_piece("<0x41>", 0.0, 6), _piece("c", 0.0, 4), _piece("abab", -0.1, 1), _field(2, b"\x18\x02\xc0\x02\x00")]
_FIELDS += [
    _field(3, b"\x18\x00 \x00"),
    _field(3, b"\x12\x03map"),
    _field(5, b"\x12\x01x"),
    b"\n\xff\xff\xff\xff\x0f",
    b"\x0b",
]
_fields_mutator, _text_mutator = field_mutator(_FIELDS), text_mutator(_WORDS.split())


def mutate(content: bytes, random: Random) -> bytes:
    """Change a model by its fields, and texts by their words."""
    if content and content[0] % (len(_MODELS) + len(_TEXTS)) >= len(_MODELS):
        return _text_mutator(content, random)
    return _fields_mutator(content, random)


TARGET = Target("slow_tokenizers", run, seeds, mutate)
