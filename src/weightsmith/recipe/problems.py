"""What is wrong with a recipe, in sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from weightsmith.errors import did_you_mean, shown
from weightsmith.recipe import schema

_SHOWN = 3
_EXPECTED = {
    "missing": "is missing",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_too_short": "must not be empty",
}


def describe(error: ValidationError) -> str:
    """Return the first problems of a recipe, each with its place, and how many more there are."""
    sentences = list(dict.fromkeys(_sentence(entry) for entry in _most_telling(error.errors())))
    text = "; ".join(sentences[:_SHOWN])
    more = len(sentences) - _SHOWN
    return f"{text}; and {more} more" if more > 0 else text


def _most_telling(entries: Iterable[Any]) -> list[Any]:
    """Drop what follows from another problem: of the forms that a value may take, one speaks for all."""
    chosen: dict[tuple[Any, ...], Any] = {}
    for entry in entries:
        place = _place(entry["loc"])
        known = chosen.get(place)
        if known is None or (known["type"] != "extra_forbidden" and entry["type"] == "extra_forbidden"):
            chosen[place] = entry
    # A value that fits no form of a union is reported for each form: keep the innermost.
    outer = {place[:length] for place in chosen for length in range(len(place))}
    return [entry for place, entry in chosen.items() if place not in outer]


def _place(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave out the parts of a location that name forms of a union, not keys of the recipe."""
    return tuple(
        part
        for part in location
        if isinstance(part, int) or not any(c in str(part) for c in "[(")
        if str(part) not in _FORMS
    )


_MAPPINGS = {"dict_type", "model_type", "model_attributes_type"}
_FORMS = {"Condition", "Scope", "TokenSource", "str", "bool", "int", "float"}


def _sentence(entry: Any) -> str:
    place = _place(entry["loc"])
    kind = entry["type"]
    if kind == "extra_forbidden":
        # Taken from the location: a key may look like the name of a union's form.
        key, place = str(entry["loc"][-1]), _place(entry["loc"][:-1])
        where = _text(place)
        known = _keys_at(place)
        prefix = f"{where}: " if where else ""
        return f"{prefix}unknown key {shown(key)}{did_you_mean(key, known)}; known are {', '.join(known)}"
    where = _text(place)
    prefix = f"{where} " if where else ""
    found = entry.get("input")
    if kind == "value_error":
        return f"{where}: {entry['ctx']['error']}" if where else str(entry["ctx"]["error"])
    if kind == "literal_error":
        allowed = entry["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{prefix}is {shown(found)}{did_you_mean(str(found), allowed)}; it takes one of {', '.join(allowed)}"
    if kind in _EXPECTED:
        seen = "" if kind == "missing" else f", and is {shown(found)}"
        keys = f" ({', '.join(_keys_at(place))})" if kind in _MAPPINGS and str(place[-1]) in _HOLDERS else ""
        return f"{prefix}{_EXPECTED[kind]}{keys}{seen}"
    return f"{prefix}is {shown(found)}: {entry['msg'][:1].lower()}{entry['msg'][1:]}"


def _text(place: tuple[Any, ...]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


_HOLDERS: dict[str, type[BaseModel]] = {
    "models": schema.ModelInput,
    "rules": schema.ScopeRule,
    "slices": schema.Slice,
    "sources": schema.Source,
    "modules": schema.Module,
    "steps": schema.Merge,
    "tokenizer": schema.Tokenizer,
    "tokens": schema.TokenRule,
    "source": schema.TokenSource,
    "scope": schema.Scope,
    "parameters": schema.Condition,
}


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    """Return the keys that are known at a place of a recipe."""
    for part in reversed(place):
        holder = schema.RuleModel if part == "models" and "rules" in place else _HOLDERS.get(str(part))
        if holder is not None:
            return list(holder.model_fields)
    return [*schema.Recipe.model_fields, "include", "variables"]
