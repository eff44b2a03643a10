"""A tokenizer as its files describe it: vocabulary, added tokens, roles, and what text each token stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import read_companion
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import CheckpointError, shown

# The largest vocabularies that there are take 35 MB.
LARGEST = 100_000_000
_LARGEST_SETTINGS = 16_000_000
# More tokens than any model has rows for.
MOST_TOKENS = 1 << 26
# Of a token with several roles the first decides what it is matched by: a model that cannot stop is the worse.
ROLES = ("eos_token", "bos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Kind = Literal["BPE", "WordPiece", "Unigram", "WordLevel"]
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_SPACE = "▁"


class Surface(NamedTuple):
    """What a token stands for, in a form that does not depend on the kind of its tokenizer.

    Attributes:
        kind: ``text``; ``byte`` for one byte, or some that are no whole characters; ``special`` for what stands for no
            text of its own.
        text: the bytes, with a space before them where the token begins a word; the name of a special token.
    """

    kind: Literal["text", "byte", "special"]
    text: bytes


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast tokenizer, as ``tokenizer.json`` and ``tokenizer_config.json`` describe it.

    Attributes:
        owner: how a person names its model.
        content: what ``tokenizer.json`` holds.
        settings: what ``tokenizer_config.json`` holds; empty where there is none.
        roles: ``bos_token`` and the like -> the token that has this role.
        notes: what a person should know of how it was read.
    """

    owner: str
    content: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The part of ``tokenizer.json`` that splits words into tokens."""
        found: Mapping[str, Any] = self.content["model"]
        return found

    @cached_property
    def kind(self) -> Kind:
        """How it splits words; files from before the type was written are told by what they hold."""
        kind: Any = self.model.get("type")
        if kind is None:
            # As the tokenizers library tells them.
            if "merges" in self.model:
                kind = "BPE"
            elif isinstance(self.model.get("vocab"), list):
                kind = "Unigram"
            else:
                kind = "WordPiece" if "continuing_subword_prefix" in self.model else "WordLevel"
        if kind in ("BPE", "WordPiece", "Unigram", "WordLevel"):
            return cast(Kind, kind)
        raise CheckpointError(
            f"the tokenizer of {self.owner} is of kind {shown(kind)}; known are BPE, WordPiece, Unigram, WordLevel"
        )

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> number, added tokens included."""
        return vocabulary_of(self.content)

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Number -> token, in ascending order. Of tokens with one number the added one is shown."""
        return dict(sorted((number, token) for token, number in self.vocabulary.items()))

    @cached_property
    def size(self) -> int:
        """How many rows of embeddings its numbers need: the highest number and one."""
        return max(self.vocabulary.values(), default=-1) + 1

    @cached_property
    def added(self) -> Mapping[str, Mapping[str, Any]]:
        """Text of an added token -> what the file says of it (``special``, ``lstrip``, …)."""
        return {entry["content"]: entry for entry in self.content.get("added_tokens") or ()}

    @cached_property
    def special(self) -> frozenset[str]:
        """The tokens that stand for no text: what decoding leaves out."""
        marked = {text for text, entry in self.added.items() if entry.get("special")}
        return frozenset(marked | set(self.roles.values()))

    @cached_property
    def alphabet(self) -> Literal["bytes", "metaspace", "words", "characters"]:
        """How its tokens write spaces: as one of 256 letters for bytes; as ``▁``; not at all, with ``##`` before
        what goes on; or as they are.
        """
        types = set(self._components("type"))
        if "ByteLevel" in types:
            return "bytes"
        patterns = {str(content) for content in self._components("content")}
        if "Metaspace" in types or _SPACE in patterns:
            return "metaspace"
        return "words" if self.kind == "WordPiece" else "characters"

    def surface(self, token: str) -> Surface:
        """Return what a token stands for.

        Args:
            token: a token of the vocabulary, as the file spells it.
        """
        found = self._surfaces.get(token)
        if found is None:
            found = self._surfaces[token] = self._surface(token)
        return found

    @cached_property
    def _surfaces(self) -> dict[str, Surface]:
        """What was asked for before: tokens are compared in many places."""
        return {}

    def _surface(self, token: str) -> Surface:
        if token in self.special:
            return Surface("special", _utf8(token))
        if token in self.added:
            return Surface("text", _utf8(token))
        suffix = self.model.get("end_of_word_suffix") or ""
        ends = bool(suffix) and token.endswith(suffix)
        inner = token.removesuffix(suffix) if ends else token
        # Nothing else tells where a word ends: a character that no text holds does.
        end = b"\0" if ends else b""
        if self.alphabet == "bytes":
            try:
                text = bytes([_BYTES[letter] for letter in inner])
            except KeyError:
                return Surface("text", _utf8(token))
            return Surface("text" if _is_text(text) else "byte", text + end)
        if self.alphabet == "metaspace":
            if len(inner) == 6 and inner.startswith("<0x") and inner.endswith(">"):
                try:
                    return Surface("byte", bytes([int(inner[3:5], 16)]))
                except ValueError:
                    pass
            return Surface("text", _utf8(inner.replace(_SPACE, " ")) + end)
        if self.alphabet == "words":
            prefix = self.model.get("continuing_subword_prefix") or "##"
            goes_on = inner.startswith(prefix) and inner != prefix
            return Surface("text", _utf8(inner.removeprefix(prefix) if goes_on else f" {inner}"))
        return Surface("text", _utf8(inner) + end)

    def _components(self, key: str) -> Iterator[Any]:
        """Yield what normalizer, pre-tokenizer and decoder hold under a key, however deep."""
        left = [self.content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                found = value.get(key)
                if isinstance(found, str):
                    yield found
                left += value.values()
            elif isinstance(value, list):
                left += value


def read_tokenizer(files: Mapping[str, File], owner: str, config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """Read a model's tokenizer.

    Args:
        files: the files beside the model's weights, by name.
        owner: how a person names the model.
        config: the model's config: a slow tokenizer's files may leave it to tell their class.

    Returns:
        The tokenizer, a slow one (SentencePiece, merges, words) converted; None where the model has no file of one.

    Raises:
        CheckpointError: if a file of it is not what the tokenizers library or transformers write, or a slow tokenizer
            is of a class that is not converted.
    """
    settings = _settings(files, "tokenizer_config.json", owner)
    roles = {**_roles(_settings(files, "special_tokens_map.json", owner)), **_roles(settings)}
    file = files.get("tokenizer.json")
    if file is None:
        # Few models come without the file of a fast tokenizer.
        from weightsmith.tokenizer.slow import convert

        made = convert(files, owner, settings, roles, config or {})
        if made is None:
            return None
        # The roles that its class gives are in no file yet.
        return Tokenizer(owner, made.content, {**made.roles, **settings}, made.roles, (made.note,))
    return Tokenizer(owner, parse_tokenizer(read_companion(file, LARGEST), shown_file(file, owner)), settings, roles)


def parse_tokenizer(text: bytes, where: str) -> dict[str, Any]:
    """Parse ``tokenizer.json``, and check the parts of it that this package relies on.

    Args:
        text: the file's content.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if it is not what the tokenizers library writes.
    """
    try:
        # Vocabularies may name a token twice: the last counts, here as in the tokenizers library.
        content = json.loads(text)
        vocabulary = vocabulary_of(content)
        if any(not 0 <= number < MOST_TOKENS for number in vocabulary.values()):
            raise ValueError("a token has a number below 0 or above 67 million")
        model = content["model"]
        if not all(isinstance(model.get(key) or "", str) for key in _AFFIXES):
            raise TypeError(f"{' or '.join(_AFFIXES)} is no text")
        if not all(isinstance(entry["content"], str) for entry in content.get("added_tokens") or []):
            raise TypeError("an added token is no text")
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        form = (list, dict) if kind is None else (list,) if kind == "Unigram" else (dict,)
        if model.get("vocab") and not isinstance(model["vocab"], form):
            raise TypeError("Unigram's vocabulary is a list, and that of other kinds a mapping")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise CheckpointError(
            f"{where} is not a tokenizer.json as the tokenizers library writes it, with a model and its vocab: {told}"
        ) from error
    assert isinstance(content, dict)
    return content


def vocabulary_of(content: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> number of the content of a ``tokenizer.json``, added tokens included.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, IndexError: if it is no such content.
    """
    entries = content["model"].get("vocab") or {}
    # BPE and WordPiece map tokens to numbers; Unigram lists pairs of token and score.
    if isinstance(entries, dict):
        found = {str(token): int(number) for token, number in entries.items()}
    else:
        found = {str(entry[0]): number for number, entry in enumerate(entries)}
    return found | {str(entry["content"]): int(entry["id"]) for entry in content.get("added_tokens") or []}


def _roles(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for role in ROLES:
        value = settings.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[role] = text
    return found


def _settings(files: Mapping[str, File], name: str, owner: str) -> dict[str, Any]:
    file = files.get(name)
    if file is None:
        return {}
    return parse_object(read_companion(file, _LARGEST_SETTINGS), shown_file(file, owner))


def shown_file(file: File, owner: str) -> str:
    """Return what to call a file of a tokenizer in errors: its path, or whose it is where it was made."""
    return f"the tokenizer of {owner}" if isinstance(file, bytes) else str(file)


def _byte_letters() -> dict[str, int]:
    """Return the letters by which byte-level tokens write bytes: printable ones stand for themselves (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
_LETTERS = {byte: letter for letter, byte in _BYTES.items()}


def in_byte_letters(text: bytes) -> str:
    """Return bytes as byte-level tokens write them: a letter for each."""
    return "".join(_LETTERS[byte] for byte in text)


def _utf8(text: str) -> bytes:
    # A file may hold half a character.
    return text.encode("utf-8", "surrogatepass")


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
