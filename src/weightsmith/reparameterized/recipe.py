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


def remake(text: str, *, threads: int | None = None) -> Restructured:
    """Return the model that a manifest's recipe describes.

    Args:
        text: the recipe, as :meth:`Restructured.to_yaml` writes it.
        threads: how many threads to use; nothing here needs more than one.

    Raises:
        RecipeError: if it is no such recipe.
        CheckpointError: if the model cannot be read.
        PlanError: if it cannot be made any more.
    """
    content = parse(text, "the recipe")[0][RECIPE_KEY]
    model, dtype = (content.get(key) for key in ("model", "dtype")) if isinstance(content, Mapping) else (None, None)
    if isinstance(model, str) and isinstance(dtype, str | None):
        rules, unfold = content.get("rules"), content.get("unfold")
        if isinstance(rules, list):
            return fold_model(model, rules, dtype=dtype)
        if isinstance(unfold, Mapping) and unfold.get("kind") in _UNFOLDS:
            make: Any = _UNFOLDS[unfold["kind"]]
            try:
                made: Restructured = make(model, **{key: value for key, value in unfold.items() if key != "kind"})
            except TypeError as error:
                raise RecipeError(f"the recipe cannot be understood: {error}") from error
            return made
    raise RecipeError("the recipe of a folded or unfolded model cannot be understood: it has other keys than those")
