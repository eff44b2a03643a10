"""Writes what travels beside the weights: config, tokenizer, chat template, processors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import open_regular, read_whole
from weightsmith.errors import CheckpointError, UnsafeFileError

_TOKENIZER = re.compile(
    r"^(tokenizer.*|vocab[.-].*|.*\.vocab|merges\.txt|bpe\.codes|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\..*|additional_chat_templates/.*|spiece\.model|sentencepiece.*|spm\.model|.*\.spm|tekken\.json"
    r"|.*\.tiktoken|normalizer\.json)$"
)
_CODE = (".py", ".pyc", ".so", ".sh", ".dll", ".dylib", ".exe")
_LARGEST = 512_000_000
LARGEST_SETTINGS = 16_000_000


def tokenizer_files(files: Mapping[str, File]) -> dict[str, File]:
    """Return those companion files that make up the tokenizer."""
    return {name: path for name, path in files.items() if _TOKENIZER.match(name)}


def other_files(files: Mapping[str, File]) -> dict[str, File]:
    """Return those companion files that are no part of the tokenizer."""
    return {name: path for name, path in files.items() if not _TOKENIZER.match(name)}


def read_companion(file: File, largest: int) -> bytes:
    """Return the content of a file beside the weights.

    Raises:
        CheckpointError: if it cannot be read, or has more bytes than ``largest``.
        UnsafeFileError: if it is no regular file.
    """
    return file if isinstance(file, bytes) else read_whole(str(file), largest)


def write_companions(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, File], *, chat_template: str | None = None
) -> list[str]:
    """Write config and companion files into an output folder.

    Args:
        folder: the output.
        config: what ``config.json`` is to say; an empty one is not written.
        files: relative path -> file to copy, or content to write; links are followed, and their content copied.
            Code is left out.
        chat_template: a template to put in place of the tokenizer's own, or None.

    Returns:
        What a person should know of what was written.

    Raises:
        UnsafeFileError: if a path leads out of the folder, or a file is none: a pipe, say, or a device.
        CheckpointError: if a file is gone, cannot be read or has more than 512 MB.
    """
    notes = []
    if config:
        (folder / "config.json").write_text(_json(config), "utf-8")
        notes += _note_on_code("config.json", config)
    for name, source in files.items():
        if not name.lower().endswith(_CODE):
            _copy(source, folder, name)
        if name.endswith("config.json"):
            notes += _note_on_code(name, _settings(folder / name))
    if chat_template is not None:
        notes += _put_template(folder, chat_template)
    return notes


def _note_on_code(name: str, content: Mapping[str, Any]) -> list[str]:
    if not content.get("auto_map"):
        return []
    return [
        f"{name} names code of its model in auto_map; code is never copied, so the result loads only where that code "
        "is at hand"
    ]


def _settings(path: Path) -> Mapping[str, Any]:
    """Read a file that was copied as it is; what it holds is for others to judge, and may be anything."""
    try:
        return parse_object(read_whole(str(path), LARGEST_SETTINGS), path.name)
    except CheckpointError:
        return {}


def _copy(source: File, folder: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name or not relative.parts:
        raise UnsafeFileError(f"{name!r} cannot be the name of a file beside the weights: it leads out of the folder")
    target = folder / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        target.write_bytes(source)
        return
    try:
        handle, facts = open_regular(source)
        with open(handle, "rb") as opened:
            if facts.st_size > _LARGEST:
                raise CheckpointError(f"{source} has {facts.st_size:,} bytes; at most {_LARGEST:,} are copied")
            with open(target, "wb") as written:
                shutil.copyfileobj(opened, written)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} was there when its model was opened, and is gone") from error
    except PermissionError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error


def _put_template(folder: Path, template: str) -> list[str]:
    """Write the template where it is read first, and put it where an older one would contradict it."""
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        return []
    try:
        content = parse_object(read_whole(str(settings), LARGEST_SETTINGS), settings.name)
    except CheckpointError as error:
        # Everything else is written by now: not worth losing a finished merge.
        return [f"{error}, so the chat template is in chat_template.jinja alone"]
    # Readers from before the file of its own look here. Templates for other uses (tools, say) stay.
    content["chat_template"] = _replaced(content.get("chat_template"), template)
    settings.write_text(_json(content), "utf-8")
    return []


def _replaced(own: Any, template: str) -> Any:
    if not isinstance(own, list):
        return template
    others = [entry for entry in own if isinstance(entry, dict) and entry.get("name") != "default"]
    return [{"name": "default", "template": template}, *others]


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
