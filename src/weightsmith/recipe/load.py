"""From a file, or a text, to a recipe: YAML with limits, includes, variables and several documents."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weightsmith.errors import RecipeError, did_you_mean, shown
from weightsmith.recipe import problems, yaml_text
from weightsmith.recipe.schema import Merge, Recipe
from weightsmith.recipe.yaml_text import LARGEST

_MOST_INCLUDES = 100
# How many steps may rest one on the other.
_LONGEST_CHAIN = 40
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
    reading = _Reading(origin, folder, len(text))
    documents = [_complete(document, reading, variables) for document in yaml_text.parse(text, origin)]
    if not documents:
        raise RecipeError(f"{origin} is empty; a recipe needs merge_method and models")
    main, steps = _divide(documents, origin)
    if steps:
        own = main.get("steps") or {}
        if not isinstance(own, dict):
            raise RecipeError(f"{origin}: steps must be a mapping of keys, and is {shown(own)}")
        main = {**main, "steps": {**steps, **own}}
    recipe = validate(main, origin)
    _check_steps(recipe, origin)
    return recipe


def _read(source: str | os.PathLike[str]) -> tuple[str, str, Path | None]:
    if isinstance(source, str) and ("\n" in source or ": " in source):
        if len(source) > LARGEST:
            raise RecipeError(f"the recipe has {len(source):,} characters; at most {LARGEST:,} are read")
        return source, "the recipe", None
    path = Path(source)
    try:
        # Whatever its length is said to be: it may be a pipe that another program writes to.
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise RecipeError(f"{path} has more than {LARGEST:,} bytes, and a recipe has at most so many")
        return content.decode("utf-8"), str(path), path.parent
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text in UTF-8") from error
    except ValueError as error:
        raise RecipeError(f"{shown(os.fspath(source))} cannot be the name of a recipe: {error}") from error


class _Reading:
    """What one recipe and the files that it includes have taken so far.

    Attributes:
        origin: the recipe, as errors name it.
        root: its folder, or None where it is no file.
    """

    def __init__(self, origin: str, root: Path | None, letters: int) -> None:
        self.origin = origin
        self.root = root
        self._letters = letters
        self._includes = 0

    def include(self, name: Any, folder: Path | None) -> Path:
        """Return the file that a name stands for in an included file's folder."""
        if folder is None or self.root is None:
            raise RecipeError(f"{self.origin}: include works in recipes that are files")
        if not isinstance(name, str):
            raise RecipeError(f"{self.origin}: include: {shown(name)} is not the name of a file")
        self._includes += 1
        if self._includes > _MOST_INCLUDES:
            raise RecipeError(f"{self.origin} includes more than {_MOST_INCLUDES} files, one in another counted")
        try:
            path = (folder / name).resolve()
            inside = path.is_relative_to(self.root.resolve())
            regular = path.is_file() or not path.exists()
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"{self.origin}: include: {shown(name)} cannot be the name of a file: {error}") from error
        if not inside:
            raise RecipeError(f"{self.origin}: include: {shown(name)} lies outside the recipe's folder")
        if not regular:
            raise RecipeError(f"{self.origin}: include: {shown(name)} is no regular file")
        return path

    def take(self, letters: int) -> None:
        """Count letters that includes or variables add."""
        self._letters += letters
        if self._letters > 2 * LARGEST:
            raise RecipeError(f"{self.origin} has more than {2 * LARGEST:,} letters, includes and variables counted")


def _complete(document: dict[str, Any], reading: _Reading, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Resolve includes, then variables."""
    merged = _include(document, reading, reading.root, ())
    own = merged.pop("variables", None) or {}
    if not isinstance(own, dict):
        raise RecipeError(f"{reading.origin}: variables is a mapping of names to values")
    variables = _Variables({**own, **(given or {})}, reading)
    return {key: variables.substitute(value, f"{reading.origin}: {key}") for key, value in merged.items()}


def _include(
    document: dict[str, Any], reading: _Reading, folder: Path | None, chain: tuple[Path, ...]
) -> dict[str, Any]:
    own = dict(document)
    names = own.pop("include", None)
    if names is None:
        return own
    base: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        path = reading.include(name, folder)
        if path in chain:
            raise RecipeError(f"{reading.origin}: {name} includes itself")
        text, where, inner = _read(path)
        reading.take(len(text))
        documents = yaml_text.parse(text, where)
        if len(documents) != 1:
            raise RecipeError(f"{where} has {len(documents)} documents; an included file has one")
        base = _overlay(base, _include(documents[0], reading, inner, (*chain, path)))
    return _overlay(base, own)


def _overlay(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: mappings are joined, everything else is replaced."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _overlay(below, value) if both and isinstance(below, dict) else value
    return result


class _Variables:
    """Puts values in the place of ``${name}``."""

    def __init__(self, values: Mapping[str, Any], reading: _Reading) -> None:
        self._values = values
        self._reading = reading
        self._lengths: dict[str, int] = {}

    def substitute(self, value: Any, where: str) -> Any:
        """Return a value of the recipe with its variables replaced; one that is the whole text keeps its type."""
        if isinstance(value, dict):
            return {key: self.substitute(entry, f"{where}.{key}"[:200]) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.substitute(entry, f"{where}[{i}]"[:200]) for i, entry in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _VARIABLE.fullmatch(value)
        if whole:
            return self._look_up(whole, where)
        return _VARIABLE.sub(lambda match: str(self._look_up(match, where)), value)

    def _look_up(self, match: re.Match[str], where: str) -> Any:
        name = match[1]
        if name not in self._values:
            known = [one for one in self._values if isinstance(one, str)]
            raise RecipeError(f"{where}: there is no variable {shown(name)}{did_you_mean(name, known)}")
        if name not in self._lengths:
            self._lengths[name] = len(str(self._values[name]))
        self._reading.take(self._lengths[name])
        return self._values[name]


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
            raise RecipeError(f"{origin} has two documents named {shown(name)}")
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


def fishers(merge: Merge) -> Iterator[str]:
    """Yield the reference of every Fisher checkpoint of a merge, its base's first."""
    yield from (fisher for fisher, _ in fishers_of_models(merge))


def fishers_of_models(merge: Merge) -> Iterator[tuple[str, str]]:
    """Yield every Fisher checkpoint of a merge, its base's first, with the model that it is about; by reference."""
    if merge.base_fisher and merge.base_model:
        yield merge.base_fisher, merge.base_model
    holders: list[Any] = [merge, *(merge.modules or {}).values()]
    for holder in holders:
        pieces = holder.slices or ()
        yield from ((piece.base_fisher, piece.base_model) for piece in pieces if piece.base_fisher)
        sources = [source for piece in pieces for source in piece.sources]
        yield from ((entry.fisher, entry.model) for entry in (*(holder.models or ()), *sources) if entry.fisher)


def _check_steps(recipe: Recipe, origin: str) -> None:
    """Refuse steps that rest on themselves."""
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            circle = " -> ".join((*chain[chain.index(name) :], name))
            raise RecipeError(f"{origin}: the steps go in a circle: {circle}")
        if name in done:
            return
        if len(chain) > _LONGEST_CHAIN:
            raise RecipeError(f"{origin}: more than {_LONGEST_CHAIN} steps rest one on the other")
        for reference in (*references(recipe.steps[name]), *fishers(recipe.steps[name])):
            if reference in recipe.steps:
                visit(reference, (*chain, name))
        done.add(name)

    for name in recipe.steps:
        visit(name, ())
