"""What lies beside the weights of a model with another tokenizer: config, the tokenizer's files, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.architecture.config import with_rows
from weightsmith.checkpoint.checkpoint import Checkpoint, File
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, other_files, read_companion, tokenizer_files
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import shown
from weightsmith.tokenizer.chat_template import read_template
from weightsmith.tokenizer.files import files_of
from weightsmith.tokenizer.ids import with_ids
from weightsmith.tokenizer.matching import match
from weightsmith.transplantation.layout import Layout
from weightsmith.transplantation.recipe import Template

_GENERATION, _SETTINGS = "generation_config.json", "tokenizer_config.json"
_TEMPLATES = re.compile(r"^(chat_template\..*|additional_chat_templates/.*)$")


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights.

    Attributes:
        config: what ``config.json`` says.
        files: path -> file to copy, or content to write.
        template: a chat template in place of the tokenizer's own, or None.
        notes: what a person should know.
    """

    config: Mapping[str, Any]
    files: Mapping[str, File]
    template: str | None
    notes: tuple[str, ...]


def beside(layout: Layout, model: Checkpoint, donor: Checkpoint, template: Template) -> Beside:
    """Return what lies beside the weights of the result.

    Numbers of tokens in the model's config and generation config become the donor's. Where model and donor are of one
    kind (``model_type``), the donor's files are copied as they are; for a model of another kind they are written such
    that transformers loads this tokenizer, and not the one that it builds for such models. A slow tokenizer is written
    as the fast one that it was read as.

    Args:
        layout: where the rows come from.
        model: the model.
        donor: the donor.
        template: whose chat template the result has.

    Raises:
        PlanError: if tables that the config gives one length have several now.
        CheckpointError: if a file cannot be read.
    """
    config, notes = dict(model.config), []
    files = other_files(model.companions.files)
    if config:
        lengths = {made.table.tensor.name: (made.table.rows, made.rows) for made in layout.tables}
        config, told = with_rows(config, lengths)
        notes += told
    if not layout.same or layout.own.roles != layout.new.roles:
        config, told = _moved(layout, config, donor.config, "config.json")
        notes += told
        if _GENERATION in files:
            theirs = donor.companions.files.get(_GENERATION)
            content, told = _moved(
                layout, _parsed(files[_GENERATION]), {} if theirs is None else _parsed(theirs), _GENERATION
            )
            notes += told
            files[_GENERATION] = _text(content)
    taken = tokenizer_files(donor.companions.files)
    kind = donor.config.get("model_type")
    other = kind is None or kind != model.config.get("model_type")
    if donor is not model and (other or "tokenizer.json" not in taken):
        taken, told = files_of(layout.new, donor.companions.files, config, rebuilt=other)
        notes += told
    if template == "donor":
        return Beside(config, {**files, **taken}, None, tuple(notes))
    own = read_template(model.companions.files) if template == "keep" else None
    lost = [token for token in layout.own.added if own and token in own and token not in layout.new.vocabulary]
    if lost:
        notes.append(
            f"the chat template that is kept writes {', '.join(map(shown, lost[:4]))}{' …' if len(lost) > 4 else ''}, "
            "no token of the new tokenizer: it is split into pieces, which the model never saw in its place"
        )
    return Beside(config, {**files, **_without_templates(taken)}, own, tuple(notes))


def _moved(
    layout: Layout, content: Mapping[str, Any], theirs: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[str]]:
    moved = match(layout.own, layout.new)
    return with_ids(content, layout.own, layout.new, moved, other=theirs, name=name)


def _without_templates(files: Mapping[str, File]) -> dict[str, File]:
    """Return the files of a tokenizer without its chat templates."""
    kept = {name: file for name, file in files.items() if not _TEMPLATES.match(name)}
    if _SETTINGS in kept:
        settings = _parsed(kept[_SETTINGS])
        if settings.pop("chat_template", None) is not None:
            kept[_SETTINGS] = _text(settings)
    return kept


def _parsed(file: File) -> dict[str, Any]:
    where = "a file that was made" if isinstance(file, bytes) else str(file)
    return parse_object(read_companion(file, LARGEST_SETTINGS), where)


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
