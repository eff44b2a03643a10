"""The model card: a README.md that says what a model was made from, and how to make it again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from weightsmith import __version__
from weightsmith.checkpoint.hub import is_hub_id
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.errors import RecipeError
from weightsmith.methods.registry import Method


def model_card(
    recipe: str,
    *,
    methods: Sequence[Method],
    models: Sequence[str],
    base: str | None,
    config: Mapping[str, Any],
) -> str:
    """Return the text of a model card, with the front matter that model hubs read.

    Args:
        recipe: the recipe as YAML.
        methods: the methods that make its tensors, the recipe's own first.
        models: the models' references, as the recipe gives them.
        base: the base's reference, if there is one.
        config: the result's config.
    """
    front: dict[str, Any] = {"tags": ["weightsmith", "merge"]}
    hub = [found for model in (*models, *_of_steps(recipe)) for found in _hub_ids(model)]
    if hub:
        front["base_model"] = list(dict.fromkeys(hub))
    if config.get("architectures"):
        front["library_name"] = "transformers"
    listed = "\n".join(f"- `{_inline(model)}`" + (" (base)" if model == base else "") for model in models)
    first, *others = methods
    by = f"`{first.name}`" + (f", and for some tensors `{'`, `'.join(one.name for one in others)}`" if others else "")
    published = "".join(
        f"\n\nThe method{f' `{one.name}`' if others else ''}: {one.source}." for one in methods if one.source
    )
    fence = "`" * max(3, _longest_run(recipe, "`") + 1)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n"
        "# A merged model\n\n"
        f"Merged with weightsmith {__version__} by {by} from:\n\n{listed}{published}\n\n"
        "## The recipe\n\n"
        "Kept beside this file as `weightsmith.yaml`; `weightsmith merge weightsmith.yaml OUT` makes the same "
        "weights again.\n\n"
        f"{fence}yaml\n{recipe.rstrip()}\n{fence}\n"
    )


def _hub_ids(reference: str) -> Iterator[str]:
    """Yield the ids on a hub that a reference names: the model's, and its adapters'."""
    try:
        parsed = parse_reference(reference)
    except RecipeError:
        # A name that was given to a checkpoint in memory.
        return
    for part in (parsed, *(one.reference for one in parsed.adapters)):
        if "/" in part.path and is_hub_id(part.path) and not os.path.exists(part.path):
            yield part.path


def _of_steps(recipe: str) -> Iterator[str]:
    """Yield the references in the steps of a pipeline: what the models of its last step were made from."""
    document = yaml.safe_load(recipe)
    pending: list[Any] = [document.get("steps")] if isinstance(document, dict) else []
    while pending:
        value = pending.pop(0)
        if isinstance(value, dict):
            named = [value.get(key) for key in ("model", "base_model")]
            yield from (one for one in named if isinstance(one, str))
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _inline(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")


def _longest_run(text: str, letter: str) -> int:
    longest = run = 0
    for one in text:
        run = run + 1 if one == letter else 0
        longest = max(longest, run)
    return longest
