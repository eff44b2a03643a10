"""What the parts of a ``tokenizer.json`` do to text, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.errors import shown

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
# What says nothing of how text is split: offsets alone follow it.
_SILENT = ("type", "trim_offsets")


def describe(part: str, component: Any) -> str:
    """Say what a normalizer, pre-tokenizer, post-processor or decoder does.

    Args:
        part: which of them it is: one of ``PARTS``.
        component: the part as ``tokenizer.json`` has it; whatever it holds is described somehow.
    """
    return "; ".join(_steps(part, component)) or "nothing"


def template(component: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the special tokens that a post-processor puts before one text, and those that it puts behind it.

    Args:
        component: the post-processor as ``tokenizer.json`` has it.
    """
    for step in _flat(component):
        kind = step.get("type")
        if kind == "TemplateProcessing":
            return _around(step.get("single"))
        if kind in ("BertProcessing", "RobertaProcessing"):
            return _first(step.get("cls")), _first(step.get("sep"))
    return (), ()


def _flat(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part, sequences taken apart, in their order."""
    left = [component]
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        inner = next((step[key] for key in _LISTS if isinstance(step.get(key), list)), None)
        if inner is None:
            yield step
        else:
            left += reversed(inner)


def _steps(part: str, component: Any) -> Iterator[str]:
    for step in _flat(component):
        kind = _name(step.get("type"))
        if kind == "Replace":
            yield f"{_pattern(step.get('pattern'))} becomes {shown(step.get('content'))}"
        elif kind == "Prepend":
            yield f"{shown(step.get('prepend'))} is put before a text"
        elif kind == "Split":
            cut = f"cut at {_pattern(step.get('pattern'))}"
            inverted = ", inverted" if step.get("invert") else ""
            yield f"{cut}, {_name(step.get('behavior')).lower()}{inverted}"
        elif kind == "ByteLevel" and part != "pre_tokenizer":
            # Its settings tell how to split; a post-processor moves offsets alone.
            if part != "post_processor":
                yield kind
        elif kind in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
            before, behind = template(step)
            yield " ".join([*before, "text", *behind])
            yield f"two texts: {' '.join(_two(step))}"
        else:
            settings = ", ".join(f"{key} {_short(value)}" for key, value in step.items() if key not in _SILENT)
            yield f"{kind} ({settings})" if settings else kind


def _name(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _pattern(pattern: Any) -> str:
    if isinstance(pattern, dict) and len(pattern) == 1:
        (kind, text), *_ = pattern.items()
        if isinstance(text, str):
            return f"/{text}/" if kind == "Regex" else repr(text)
    return shown(pattern)


def _short(value: Any) -> str:
    # A precompiled map of characters has hundreds of kilobytes.
    if isinstance(value, bool | None):
        return {True: "on", False: "off", None: "unset"}[value]
    if isinstance(value, str):
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        return repr(value) if len(value) <= 60 else f"of {len(value):,} characters ({digest})"
    return shown(value)


def _two(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield what stands around two texts, A and B, in their order."""
    kind = step.get("type")
    if kind != "TemplateProcessing":
        first, separator = _first(step.get("cls")), _first(step.get("sep"))
        yield from (*first, "A", *separator, *(separator if kind == "RobertaProcessing" else ()), "B", *separator)
        return
    pair = step.get("pair")
    for entry in pair if isinstance(pair, list) else ():
        for piece in entry.values() if isinstance(entry, dict) else ():
            yield _name(piece.get("id") if isinstance(piece, dict) else piece)


def _around(single: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    before: list[str] = []
    behind: list[str] = []
    found = before
    for entry in single if isinstance(single, list) else ():
        if not isinstance(entry, dict):
            continue
        if "Sequence" in entry:
            found = behind
        elif isinstance(entry.get("SpecialToken"), dict):
            found.append(str(entry["SpecialToken"].get("id")))
    return tuple(before), tuple(behind)


def _first(pair: Any) -> tuple[str, ...]:
    return (str(pair[0]),) if isinstance(pair, list) and pair else ()
