"""YAML from strangers: safe, within limits, with one meaning."""

from __future__ import annotations

import re
from typing import Any

import yaml

from weightsmith.errors import RecipeError, shown

# Letters of a text; PyYAML takes some ten seconds for a million.
LARGEST = 1_000_000
_DEEPEST = 40
# Nodes after aliases are expanded: a recipe of a thousand lines has a few thousand.
_MOST_NODES = 50_000
# Letters of a number, a date or another value that is no text: hexadecimal ones take any number of digits.
_LONGEST_NUMBER = 100
# What PyYAML raises, beside its own errors, for values that look like a date or a number, or say so, and are none.
_PYTHONS = (RecursionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class _Loader(yaml.SafeLoader):
    """Safe YAML with limits, that refuses a key given twice, where plain YAML would silently take the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build a node, refusing too many and too deep ones before they are built."""
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise RecipeError(f"more than {_MOST_NODES:,} entries are in it")
        if self._depth > _DEEPEST:
            raise RecipeError(f"it is nested more than {_DEEPEST} levels deep")
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing duplicate keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool):
                raise RecipeError(f"line {key.start_mark.line + 1}: {shown(name)} cannot be a key")
            if name in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: the key {shown(name)} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-3 for a text: its numbers need a dot and a sign. People mean YAML 1.2.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, origin: str) -> list[dict[str, Any]]:
    """Parse the documents of a YAML text, each a mapping; empty ones are left out.

    Args:
        text: the text.
        origin: what to call it in errors.

    Raises:
        RecipeError: if it is not YAML, gives a key twice, or goes beyond the limits of this module.
    """
    try:
        found = []
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            _bound(node)
            document = loader.construct_document(node)
            if document is None:
                continue
            if not isinstance(document, dict):
                raise RecipeError(f"a recipe is a mapping of keys, and this is a {_kind(document)}")
            found.append(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{line}: not YAML: {problem[:200]}") from error
    except RecipeError as error:
        raise RecipeError(f"{origin}{', ' if str(error).startswith('line ') else ': '}{error}") from None
    except _PYTHONS as error:
        raise RecipeError(f"{origin}: not YAML that a recipe may hold: {str(error)[:200]}") from error
    return found


def _bound(root: yaml.Node | None) -> None:
    """Refuse nesting, aliases and numbers that would grow without bound when they are expanded."""
    nodes = letters = 0
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if depth > _DEEPEST:
            raise RecipeError(f"it is nested more than {_DEEPEST} levels deep")
        if nodes > _MOST_NODES or letters > LARGEST:
            raise RecipeError(f"it has more than {_MOST_NODES:,} entries or {LARGEST:,} letters, aliases counted")
        if isinstance(node, yaml.ScalarNode):
            letters += len(node.value)
            if len(node.value) > _LONGEST_NUMBER and node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(
                    f"line {node.start_mark.line + 1}: a value of {len(node.value):,} letters that is no text: quote it"
                )
        elif isinstance(node, yaml.SequenceNode):
            stack += [(child, depth + 1) for child in node.value]
        elif isinstance(node, yaml.MappingNode):
            stack += [(child, depth + 1) for pair in node.value for child in pair]


def parse_value(text: str) -> Any:
    """Return the value that a short text stands for in YAML.

    Raises:
        ValueError: if it stands for none.
    """
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecipeError, *_PYTHONS) as error:
        raise ValueError(str(error)) from error


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "text" if isinstance(value, str) else type(value).__name__
