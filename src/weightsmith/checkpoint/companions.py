"""Writes what travels beside the weights: config, tokenizer, chat template, processors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOKENIZER = re.compile(
    r"^(tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|additional_chat_templates/.*|spiece\.model|sentencepiece.*|tekken\.json|.*\.tiktoken|normalizer\.json)$"
)


def tokenizer_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return those companion files that make up the tokenizer."""
    return {name: path for name, path in files.items() if _TOKENIZER.match(name)}


def other_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return those companion files that are no part of the tokenizer."""
    return {name: path for name, path in files.items() if not _TOKENIZER.match(name)}


def write_companions(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, Path], *, chat_template: str | None = None
) -> None:
    """Write config and companion files into an output folder.

    Args:
        folder: the output.
        config: what ``config.json`` is to say; an empty one is not written.
        files: relative path -> file to copy; links are followed, and their content copied.
        chat_template: a template to put in place of the tokenizer's own, or None.
    """
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if chat_template is not None:
        _put_template(folder, chat_template)


def _put_template(folder: Path, template: str) -> None:
    """Write the template where it is read first, and take it out where an older one would contradict it."""
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        content = json.loads(settings.read_bytes())
        # Readers from before the file of its own look here.
        content["chat_template"] = template
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
