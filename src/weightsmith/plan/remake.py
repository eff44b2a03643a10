"""Making an output again from the text in its manifest, whatever it is: a merge, a bundle, an adapter."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from weightsmith.errors import RecipeError
from weightsmith.plan.output import Output
from weightsmith.recipe.yaml_text import parse

# What a text begins with -> the module whose ``remake(key, content, threads=…)`` understands what stands below. Recipes
# of merges have no such key: they are recipes as people write them.
_MAKERS = {
    "adapter_merge": "weightsmith.adapters.combine.create",
    "adapter_revert": "weightsmith.adapters.combine.create",
    "bundle": "weightsmith.bundle.create",
    "reparameterized": "weightsmith.reparameterized.recipe",
    "extract": "weightsmith.extraction.create",
    "initialize": "weightsmith.initialization.create",
    "convert": "weightsmith.adapters.layouts.converted",
    "running": "weightsmith.runs.running",
    "transplant": "weightsmith.transplantation.create",
}


def remake(text: str, *, threads: int | None = None) -> Output:
    """Return the output that a manifest's text describes, lazily.

    Args:
        text: what :meth:`Output.to_yaml` gave.
        threads: how many threads to use where weights must be read to plan.

    Raises:
        RecipeError: if this version does not understand it.
        CheckpointError: if an input cannot be read.
        PlanError: if it cannot be made any more.
    """
    key = re.match(r"(\w+):\n", text)
    home = _MAKERS.get(key[1]) if key is not None else None
    if key is None or home is None:
        from weightsmith.api import merge_recipe

        return merge_recipe(text)
    with understood():
        (document,) = parse(text, "the recipe in the manifest")
        content = dict(document[key[1]])
    made = importlib.import_module(home).remake(key[1], content, threads=threads)
    assert isinstance(made, Output)
    return made


@contextmanager
def understood() -> Iterator[None]:
    """Take what goes wrong with a text's content for a text that is not understood.

    Raises:
        RecipeError: if anything is missing, or of another kind than it must be.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"the recipe in the manifest cannot be understood: {type(error).__name__}: {error}"
        ) from error
