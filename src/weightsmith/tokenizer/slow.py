"""Slow tokenizers: SentencePiece models, merges and lists of words become the content of a ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import read_companion
from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.added_tokens import WAY_OUT, added_tokens, shown_part
from weightsmith.tokenizer.classes import BY_MODEL, CLASSES, PLAIN, Slots, TokenizerClass
from weightsmith.tokenizer.sentencepiece import PieceType, SentencePieceModel, parse_sentencepiece
from weightsmith.tokenizer.slow_models import (
    Parts,
    from_merges,
    from_sentencepiece,
    from_words,
)
from weightsmith.tokenizer.tokenizer import LARGEST, ROLES
from weightsmith.tokenizer.vocabulary_files import parse_merges, parse_vocabulary, parse_words

# The names under which SentencePiece models lie beside weights, the likeliest first.
_SENTENCEPIECE = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
)
# A line of tiktoken: the bytes of a token, and its number.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclass(frozen=True)
class Converted:
    """A slow tokenizer as a fast one.

    Attributes:
        content: what its ``tokenizer.json`` would hold.
        roles: the tokens that have roles, those that its class gives among them.
        note: what it was made of.
    """

    content: dict[str, Any]
    roles: dict[str, str]
    note: str


def convert(
    files: Mapping[str, File],
    owner: str,
    settings: Mapping[str, Any],
    roles: Mapping[str, str],
    config: Mapping[str, Any],
) -> Converted | None:
    """Convert the tokenizer of a model that has no ``tokenizer.json``.

    Args:
        files: the files beside the model's weights, by name.
        owner: how a person names the model.
        settings: what ``tokenizer_config.json`` holds.
        roles: the tokens that files give roles.
        config: the model's config, which tells the class where no other file does.

    Returns:
        The tokenizer, or None where no file is one.

    Raises:
        CheckpointError: if a file is damaged, or of a kind or class that is not converted.
    """
    name = class_name(settings, config)
    own = CLASSES.get(name or "")
    model = next((file for file in _SENTENCEPIECE if file in files), None)
    formats = {
        "sentencepiece": model,
        "merges": "vocab.json" if {"vocab.json", "merges.txt"} <= set(files) else None,
        "words": "vocab.txt" if "vocab.txt" in files else None,
    }
    if not any(formats.values()):
        _refuse_tiktoken(files, owner)
        return None
    file = formats[own.format] if own is not None else next(filter(None, formats.values()))
    if file is None:
        assert own is not None
        raise CheckpointError(
            f"{owner} has no file of a {name}: expected is {_expected(own)}; correct tokenizer_class in "
            "tokenizer_config.json, or add the file"
        )
    if own is None and (name is not None or file != model):
        raise CheckpointError(_unknown_class(owner, file, name))
    own = own or PLAIN
    chosen = {**own.roles, **roles}
    for role in own.roles:
        # What a file says to be nothing is nothing.
        if role in settings and settings[role] is None:
            chosen.pop(role, None)
    parts, chosen = _read(files, file, own, chosen, settings, shown_part(files[file], owner, file))
    added = added_tokens(parts, chosen, own, settings, files, owner)
    numbers = {**parts.vocabulary, **{entry["content"]: entry["id"] for entry in added}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": _template(own, chosen, settings, numbers),
        "decoder": parts.decoder,
        "model": parts.model,
    }
    kind = f"as a {name} has it" if name else "as SentencePiece splits text: no file names a class"
    made_of = f"{file} and merges.txt" if own.format == "merges" else file
    return Converted(content, chosen, f"made of {made_of}, {kind}; there is no tokenizer.json")


def class_name(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return the class of transformers that reads a tokenizer's files, without ``Fast``; None where no file tells.

    Args:
        settings: what ``tokenizer_config.json`` holds.
        config: the model's config.
    """
    for holder in (settings, config):
        named = holder.get("tokenizer_class")
        # A class of no model says nothing of how files are meant.
        if isinstance(named, str) and not named.startswith(("PreTrainedTokenizer", "TokenizersBackend")):
            return named.removesuffix("Fast")
    kind = config.get("model_type")
    return BY_MODEL.get(kind, f"tokenizer of {kind}") if isinstance(kind, str) else None


def _read(
    files: Mapping[str, File],
    file: str,
    own: TokenizerClass,
    roles: dict[str, str],
    settings: Mapping[str, Any],
    where: str,
) -> tuple[Parts, dict[str, str]]:
    content = read_companion(files[file], LARGEST)
    if own.format == "sentencepiece":
        if _TIKTOKEN.match(content[:1000]):
            raise CheckpointError(_tiktoken(where))
        model = parse_sentencepiece(content, where)
        if own is PLAIN:
            roles = {**_roles_of(model), **roles}
        needed = tuple(token for token in own.fairseq if token in ROLES)
        _need(own, roles, (*needed, "mask_token") if needed else (), where)
        if settings.get("split_by_punct") is True:
            raise CheckpointError(f"{where} is split at punctuation first, which is not converted here: {WAY_OUT}")
        return from_sentencepiece(model, own, roles, settings, where), roles
    if own.format == "merges":
        vocabulary = parse_vocabulary(content, where)
        lines = read_companion(files["merges.txt"], LARGEST)
        merges = parse_merges(lines, vocabulary, where.replace("vocab.json", "merges.txt"))
        return from_merges(vocabulary, merges, own, settings, roles.get("unk_token")), roles
    if settings.get("do_basic_tokenize") is False:
        raise CheckpointError(
            f"{where} is used without splitting at punctuation, which is not converted here: {WAY_OUT}"
        )
    _need(own, roles, ("unk_token",), where)
    return from_words(parse_words(content, where), own, settings, roles["unk_token"]), roles


def _roles_of(model: SentencePieceModel) -> dict[str, str]:
    """Return the roles that a SentencePiece model of no class tells by the names of its control pieces."""
    control = {piece.text for piece in model.pieces if piece.type == PieceType.CONTROL}
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    found = {role: token for role, token in named.items() if token in control}
    return {**found, "unk_token": model.pieces[model.unknown].text}


def _need(own: TokenizerClass, roles: Mapping[str, str], needed: tuple[str, ...], where: str) -> None:
    slots = {slot for slot, _ in (*(own.single or ()), *own.pair)} - {"A", "B"}
    missing = [role for role in (*needed, *sorted(slots)) if role not in roles]
    if missing:
        raise CheckpointError(
            f"{where}: its class needs {', '.join(missing)}, and tokenizer_config.json says it has none"
        )


def _template(
    own: TokenizerClass, roles: Mapping[str, str], settings: Mapping[str, Any], numbers: Mapping[str, int]
) -> dict[str, Any] | None:
    single, pair = own.single, own.pair
    if single is None:
        single, pair = _ends(own, roles, settings)
        if single == (("A", 0),):
            return None
    used = sorted({roles[slot] for slot, _ in (*single, *pair) if slot not in ("A", "B")})
    return {
        "type": "TemplateProcessing",
        "single": [_slot(slot, segment, roles) for slot, segment in single],
        "pair": [_slot(slot, segment, roles) for slot, segment in pair],
        "special_tokens": {token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in used},
    }


def _ends(own: TokenizerClass, roles: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[Slots, Slots]:
    """Return what is put around one text and around two where settings decide it."""
    chosen = {}
    for role, default in (("bos_token", own.bos), ("eos_token", False)):
        asked = settings.get(f"add_{role}")
        # Of merges, GPT-2's class alone asks, and of the beginning alone.
        allowed = role in roles and (own.format == "sentencepiece" or (role == "bos_token" and own.pattern == "gpt2"))
        chosen[role] = allowed and (asked if isinstance(asked, bool) else default)

    def around(text: str, segment: int, before: bool) -> Slots:
        first = (("bos_token", segment),) if before else ()
        last = (("eos_token", segment),) if chosen["eos_token"] else ()
        return (*first, (text, segment), *last)

    single = around("A", 0, chosen["bos_token"])
    return single, (*single, *around("B", 1, chosen["bos_token"] and own.format == "sentencepiece"))


def _slot(slot: str, segment: int, roles: Mapping[str, str]) -> dict[str, Any]:
    if slot in ("A", "B"):
        return {"Sequence": {"id": slot, "type_id": segment}}
    return {"SpecialToken": {"id": roles[slot], "type_id": segment}}


def _expected(own: TokenizerClass) -> str:
    return {
        "sentencepiece": f"a SentencePiece model ({', '.join(_SENTENCEPIECE)})",
        "merges": "vocab.json with merges.txt",
        "words": "vocab.txt",
    }[own.format]


def _unknown_class(owner: str, file: str, name: str | None) -> str:
    if name is None:
        return (
            f"{owner} has {file} and no file that says which class of tokenizer it is for, and so how text is split: "
            f"name it as tokenizer_class in tokenizer_config.json, or {WAY_OUT}"
        )
    return f"the {file} of {owner} is that of a {shown(name)[1:-1]}, which is not converted here: {WAY_OUT}"


def _refuse_tiktoken(files: Mapping[str, File], owner: str) -> None:
    for name, file in files.items():
        if name == "tekken.json" or name.endswith(".tiktoken"):
            raise CheckpointError(_tiktoken(shown_part(file, owner, name)))


def _tiktoken(where: str) -> str:
    return f"{where} is a tokenizer in the form of tiktoken, which holds no merges and is not converted here: {WAY_OUT}"
