"""Going on with a merge: models that arrive later are merged onto its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.manifest import manifest_of
from weightsmith.errors import PlanError
from weightsmith.methods.registry import all_methods, get_method
from weightsmith.recipe.load import load_recipe


@dataclass(frozen=True)
class Past:
    """A merge that is gone on with.

    Attributes:
        method: its method.
        base: its base, or None.
        shared: parameters of the merge that goes on with it.
        own: parameters of its result, the first model of that merge.
    """

    method: str
    base: str | None
    shared: Mapping[str, Any]
    own: Mapping[str, Any]


def read_past(merged: str, method: str | None = None) -> Past:
    """Return what the manifest of a merge says of how it is gone on with.

    Args:
        merged: the folder or ``.safetensors`` file that it wrote.
        method: the method to go on with, if a person names it.

    Raises:
        CheckpointError: if there is no manifest, or one that is not as it was written.
        PlanError: if the merge cannot be gone on with, or not by that method.
    """
    manifest = manifest_of(Path(merged))
    recipe = load_recipe(manifest.recipe)
    made_by = get_method(recipe.merge_method)
    wanted = made_by if method is None else get_method(method)
    if wanted is not made_by:
        raise PlanError(f"{merged} was made by {made_by.name}: only that method can go on with it, not {wanted.name}")
    if made_by.continues is None:
        able = ", ".join(name for name, one in all_methods().items() if one.continues is not None)
        raise PlanError(
            f"{merged} was made by {made_by.name}, which needs all models at once; merges that can be gone on with are "
            f"those by {able}"
        )
    if recipe.models is None or recipe.rules:
        raise PlanError(
            f"{merged} was made from slices or modules, or with rules: write a recipe that names it as first model"
        )
    state = manifest.state
    if state is None or None in state.values():
        raise PlanError(
            f"{merged} does not say how it is gone on with: what it would have to say differs between tensors "
            "(schedules, conditions, a scope below the model), or cannot be told; write a recipe that names it as "
            "first model"
        )
    shared = dict(recipe.model_dump(exclude_unset=True).get("parameters", {}))
    own: dict[str, Any] = {}
    for name, value in state.items():
        parameter = made_by.parameter(name)
        (own if parameter.per_model else shared)[name] = parameter.check(value)
    return Past(recipe.merge_method, recipe.base_model, shared, own)
