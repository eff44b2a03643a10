"""Slow tokenizers: SentencePiece models, merges and lists of words become the content of a ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, read_companion
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.classes import BY_MODEL, CLASSES, PLAIN, Slots, TokenizerClass
from weightsmith.tokenizer.sentencepiece import PieceType, SentencePieceModel, parse_sentencepiece
from weightsmith.tokenizer.slow_models import (
    Parts,
    from_merges,
    from_sentencepiece,
    from_words,
    parse_merges,
    parse_vocabulary,
    parse_words,
    sentinels,
)
from weightsmith.tokenizer.tokenizer import LARGEST, ROLES

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
_WAY_OUT = "load it once with transformers' AutoTokenizer and save it with save_pretrained, which writes tokenizer.json"
# In this order transformers gives numbers to special tokens that have none.
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


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
    parts, chosen = _read(files, file, own, chosen, settings, _shown(files[file], owner, file))
    added = _added(parts, chosen, own, settings, files, owner)
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
            raise CheckpointError(f"{where} is split at punctuation first, which is not converted here: {_WAY_OUT}")
        return from_sentencepiece(model, own, roles, settings, where), roles
    if own.format == "merges":
        vocabulary = parse_vocabulary(content, where)
        lines = read_companion(files["merges.txt"], LARGEST)
        merges = parse_merges(lines, vocabulary, where.replace("vocab.json", "merges.txt"))
        return from_merges(vocabulary, merges, own, settings, roles.get("unk_token")), roles
    if settings.get("do_basic_tokenize") is False:
        raise CheckpointError(
            f"{where} is used without splitting at punctuation, which is not converted here: {_WAY_OUT}"
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


def _added(
    parts: Parts,
    roles: Mapping[str, str],
    own: TokenizerClass,
    settings: Mapping[str, Any],
    files: Mapping[str, File],
    owner: str,
) -> list[dict[str, Any]]:
    """Return the added tokens, by number: those that files name, and those that the class adds.

    The tokenizers library numbers tokens that are not in the vocabulary one after the other behind it.
    """
    entries: dict[str, dict[str, Any]] = {}

    def add(token: str, flags: Mapping[str, Any], **own_flags: Any) -> None:
        known = {flag: flags[flag] for flag in _FLAGS if isinstance(flags.get(flag), bool)}
        entries[token] = {**dict.fromkeys(_FLAGS, False), "id": None, **entries.get(token, {}), **known, **own_flags}

    for token, special in parts.added.items():
        add(token, {}, special=special)
    for role in _ORDER:
        if role in roles:
            given = settings.get(role)
            greedy = {"lstrip": role == "mask_token" and own.greedy_mask}
            flags: Mapping[str, Any] = given if isinstance(given, dict) else greedy
            add(roles[role], flags, special=True)
    for token in (*own.extra, *sentinels(own, settings, owner), *_additional(settings)):
        add(token, {}, special=True)
    for token, number, flags in _declared(settings, files, owner):
        add(token, flags, id=number)
    own_numbers = parts.vocabulary
    for token, entry in entries.items():
        declared = entry["id"]
        number = own_numbers.get(token, declared)
        if declared is not None and number != declared:
            raise CheckpointError(
                f"the tokenizer of {owner} has {shown(token)} under number {number}, and its files of added tokens say "
                f"{declared}: {_WAY_OUT}"
            )
        entry["id"] = number
    numbered = {token: entry["id"] for token, entry in entries.items() if entry["id"] is not None}
    following = max([*own_numbers.values(), *numbered.values()], default=-1) + 1
    for entry in entries.values():
        if entry["id"] is None:
            entry["id"], following = following, following + 1
    result = [{"id": entry["id"], "content": token, **_only(entry)} for token, entry in entries.items()]
    result.sort(key=lambda entry: entry["id"])
    beyond = [entry["id"] for entry in result if entry["content"] not in own_numbers]
    first = max(own_numbers.values(), default=-1) + 1
    if beyond and len(set(own_numbers.values())) != first:
        raise CheckpointError(
            f"the vocabulary of {owner} leaves numbers out, and tokens are added behind it: {_WAY_OUT}"
        )
    if beyond != list(range(first, first + len(beyond))):
        raise CheckpointError(
            f"the added tokens of {owner} have the numbers {shown(beyond)}, and not those that follow its vocabulary, "
            f"{first} to {first + len(beyond) - 1}: {_WAY_OUT}"
        )
    return result


def _only(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry[flag]) for flag in _FLAGS}


def _additional(settings: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key)
        for entry in value if isinstance(value, list) else ():
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                yield text


def _declared(
    settings: Mapping[str, Any], files: Mapping[str, File], owner: str
) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yield the added tokens that files number: text, number, flags."""
    file = files.get("added_tokens.json")
    if file is not None:
        where = _shown(file, owner, "added_tokens.json")
        for token, number in parse_object(read_companion(file, LARGEST_SETTINGS), where).items():
            if type(number) is not int or not token:
                raise CheckpointError(
                    f"{where} gives {shown(token)} the number {shown(number)}; a whole one is expected"
                )
            yield token, number, {}
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text or not re.fullmatch(r"\d{1,9}", key):
            raise CheckpointError(
                f"added_tokens_decoder of {owner}'s tokenizer_config.json is damaged at {shown(key)}: a number, and a "
                "token with its content, are expected"
            )
        yield text, int(key), entry


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
            f"name it as tokenizer_class in tokenizer_config.json, or {_WAY_OUT}"
        )
    return f"the {file} of {owner} is that of a {shown(name)[1:-1]}, which is not converted here: {_WAY_OUT}"


def _refuse_tiktoken(files: Mapping[str, File], owner: str) -> None:
    for name in files:
        if name == "tekken.json" or name.endswith(".tiktoken"):
            raise CheckpointError(_tiktoken(f"{name} of {owner}"))


def _tiktoken(where: str) -> str:
    return (
        f"{where} is a tokenizer in the form of tiktoken, which holds no merges and is not converted here: {_WAY_OUT}"
    )


def _shown(file: File, owner: str, name: str) -> str:
    return f"{name} of {owner}" if isinstance(file, bytes) else str(file)
