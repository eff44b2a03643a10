"""Making a model in another form again, from the recipe in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith.errors import RecipeError
from weightsmith.recipe.yaml_text import parse
from weightsmith.reparameterized.fold import fold_model
from weightsmith.reparameterized.result import RECIPE_KEY, Restructured
from weightsmith.reparameterized.unfold import unfold_compander, unfold_weight_norm

_UNFOLDS = {"weight_norm": unfold_weight_norm, "compander": unfold_compander}


def is_recipe(text: str) -> bool:
    """Whether a manifest's recipe is that of a model in another form."""
    return text.startswith(f"{RECIPE_KEY}:\n")


def remake(text: str) -> Restructured:
    """Return the model that a manifest's recipe describes.

    Args:
        text: the recipe, as :meth:`Restructured.to_yaml` writes it.

    Raises:
        RecipeError: if it is no such recipe.
        CheckpointError: if the model cannot be read.
        PlanError: if it cannot be made any more.
    """
    content = parse(text, "the recipe")[0][RECIPE_KEY]
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, str) and set(content) == {"model", "rules"} and isinstance(content["rules"], list):
        return fold_model(model, content["rules"])
    unfold = content.get("unfold") if isinstance(model, str) else None
    if isinstance(model, str) and isinstance(unfold, Mapping) and unfold.get("kind") in _UNFOLDS:
        make: Any = _UNFOLDS[unfold["kind"]]
        try:
            made: Restructured = make(model, **{key: value for key, value in unfold.items() if key != "kind"})
        except TypeError as error:
            raise RecipeError(f"the recipe cannot be understood: {error}") from error
        return made
    raise RecipeError("the recipe of a folded or unfolded model cannot be understood: it has other keys than those")
