"""From a file, or a text, to a recipe: YAML with limits, includes, variables and several documents."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from weightsmith.errors import RecipeError, did_you_mean
from weightsmith.recipe import problems
from weightsmith.recipe.schema import Merge, Recipe

_LARGEST = 1_000_000
_DEEPEST = 40
# Nodes after aliases are expanded: a recipe of a thousand lines has a few thousand.
_MOST_NODES = 200_000
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def load_recipe(source: str | os.PathLike[str], variables: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: a path, or the YAML itself (a text of more than one line, or with ``: `` in it).
        variables: values for ``${name}``, in place of those in the recipe's ``variables``.

    Raises:
        RecipeError: if the text is not YAML, has unknown keys, or does not say what a merge needs. The message
            names the file, the place and what was expected.
    """
    text, origin, folder = _read(source)
    documents = [_complete(document, origin, folder, variables) for document in _parse(text, origin)]
    if not documents:
        raise RecipeError(f"{origin} is empty; a recipe needs merge_method and models")
    main, steps = _divide(documents, origin)
    if steps:
        main = {**main, "steps": {**steps, **(main.get("steps") or {})}}
    recipe = validate(main, origin)
    _check_steps(recipe, origin)
    return recipe


def _read(source: str | os.PathLike[str]) -> tuple[str, str, Path | None]:
    if isinstance(source, str) and ("\n" in source or ": " in source):
        if len(source) > _LARGEST:
            raise RecipeError(f"the recipe has {len(source):,} characters; at most {_LARGEST:,} are read")
        return source, "the recipe", None
    path = Path(source)
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {_LARGEST:,}")
        return path.read_text("utf-8"), str(path), path.parent
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path} is not a text in UTF-8") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where plain YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing duplicate keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool):
                raise RecipeError(f"line {key.start_mark.line + 1}: {name!r} cannot be a key")
            if name in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: the key {name!r} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str, origin: str) -> list[dict[str, Any]]:
    try:
        found = []
        for node in yaml.compose_all(text, _Loader):
            _bound(node, origin)
        for document in yaml.load_all(text, _Loader):
            if document is None:
                continue
            if not isinstance(document, dict):
                raise RecipeError(f"{origin}: a recipe is a mapping of keys, and this is a {_kind(document)}")
            found.append(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{line}: not YAML: {problem}") from error
    except RecipeError as error:
        text = str(error)
        raise (error if text.startswith(origin) else RecipeError(f"{origin}, {text}")) from None
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{origin}: not YAML that a recipe may hold: {error}") from error
    return found


def _bound(root: yaml.Node | None, origin: str) -> None:
    """Refuse nesting and aliases that would grow without bound when expanded."""
    nodes = 0
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if depth > _DEEPEST:
            raise RecipeError(f"{origin} is nested more than {_DEEPEST} levels deep")
        if nodes > _MOST_NODES:
            raise RecipeError(f"{origin} has more than {_MOST_NODES:,} entries, aliases counted")
        if isinstance(node, yaml.SequenceNode):
            stack += [(child, depth + 1) for child in node.value]
        elif isinstance(node, yaml.MappingNode):
            stack += [(child, depth + 1) for pair in node.value for child in pair]


def _complete(
    document: dict[str, Any], origin: str, folder: Path | None, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Resolve includes, then variables."""
    merged = _include(document, origin, folder, folder, ())
    own = merged.pop("variables", None) or {}
    if not isinstance(own, dict):
        raise RecipeError(f"{origin}: variables is a mapping of names to values")
    variables = {**own, **(given or {})}
    return {key: _substitute(value, variables, f"{origin}: {key}") for key, value in merged.items()}


def _include(
    document: dict[str, Any], origin: str, folder: Path | None, root: Path | None, chain: tuple[Path, ...]
) -> dict[str, Any]:
    own = dict(document)
    names = own.pop("include", None)
    if names is None:
        return own
    base: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        if folder is None or root is None:
            raise RecipeError(f"{origin}: include works in recipes that are files")
        path = (folder / str(name)).resolve()
        if not isinstance(name, str) or not path.is_relative_to(root.resolve()):
            raise RecipeError(f"{origin}: include: {name!r} lies outside the recipe's folder")
        if path in chain:
            raise RecipeError(f"{origin}: {name} includes itself")
        text, where, inner = _read(path)
        documents = _parse(text, where)
        if len(documents) != 1:
            raise RecipeError(f"{where} has {len(documents)} documents; an included file has one")
        base = _overlay(base, _include(documents[0], where, inner, root, (*chain, path)))
    return _overlay(base, own)


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: mappings are joined, everything else is replaced."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _overlay(below, value) if both and isinstance(below, dict) else value
    return result


def _substitute(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(entry, variables, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_substitute(entry, variables, f"{where}[{i}]") for i, entry in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> Any:
        name = match[1]
        if name not in variables:
            raise RecipeError(f"{where}: there is no variable {name!r}{did_you_mean(name, variables)}")
        return variables[name]

    whole = _VARIABLE.fullmatch(value)
    return look_up(whole) if whole else _VARIABLE.sub(lambda match: str(look_up(match)), value)


def _divide(documents: list[dict[str, Any]], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the main merge, which has no name or comes last, from the named ones."""
    unnamed = [document for document in documents if document.get("name") is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{origin} has {len(unnamed)} documents without a name; all but one need a name, so that the "
            "others can refer to them"
        )
    main = unnamed[0] if unnamed else documents[-1]
    steps: dict[str, Any] = {}
    for document in documents:
        if document is main:
            continue
        name = str(document["name"])
        if name in steps or name == main.get("name"):
            raise RecipeError(f"{origin} has two documents named {name!r}")
        steps[name] = {key: value for key, value in document.items() if key != "name"}
    return main, steps


def validate(document: Mapping[str, Any], origin: str) -> Recipe:
    """Turn parsed values into a recipe.

    Args:
        document: the recipe's keys and values, includes and variables resolved.
        origin: what to call the recipe in errors.

    Raises:
        RecipeError: if it is not a recipe.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {problems.describe(error)}") from None
    except RecursionError:
        raise RecipeError(f"{origin} is nested too deeply") from None


def references(merge: Merge) -> Iterator[str]:
    """Yield every model reference of a merge, in order, its base first."""
    if merge.base_model:
        yield merge.base_model
    holders: list[Any] = [merge, *(merge.modules or {}).values()]
    for holder in holders:
        for entry in holder.models or ():
            yield entry.model
        for piece in holder.slices or ():
            if piece.base_model:
                yield piece.base_model
            for source in piece.sources:
                yield source.model


def _check_steps(recipe: Recipe, origin: str) -> None:
    """Refuse steps that rest on themselves."""
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            circle = " -> ".join((*chain[chain.index(name) :], name))
            raise RecipeError(f"{origin}: the steps go in a circle: {circle}")
        if name in done:
            return
        for reference in references(recipe.steps[name]):
            if reference in recipe.steps:
                visit(reference, (*chain, name))
        done.add(name)

    for name in recipe.steps:
        visit(name, ())


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "text" if isinstance(value, str) else type(value).__name__
