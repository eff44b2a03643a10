"""How adapters are combined: all that a person chose, checked against what the method takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from weightsmith import dtypes
from weightsmith.adapters.combine import peft
from weightsmith.adapters.combine.registry import Combiner, Saved, get_combiner
from weightsmith.dtypes import DType
from weightsmith.errors import MethodError
from weightsmith.methods.matrices import Decomposition
from weightsmith.methods.registry import get_method


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: the method's name.
        adapters: their references.
        weights: one for each.
        parameters: of the method.
        rank: the greatest rank of a layer, or None.
        energy: the share of the squared norm that is kept, or None.
        base: the reference of the model that they are for, or None.
        dtype: the dtype of the result; None for the inputs'.
        compat: ``peft`` for PEFT's own numbers, or None.
        saved: what becomes of biases and saved modules; None for what the method says.
        seed: of random methods.
        decomposition: of dense matrices.
    """

    method: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    base: str | None = None
    dtype: str | None = None
    compat: str | None = None
    saved: Saved | None = None
    seed: int = 0
    decomposition: Decomposition = "exact"

    def to_yaml(self) -> str:
        """Return it as YAML, as the result's manifest keeps it."""
        content = {
            "method": self.method,
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "parameters": {name: list(v) if isinstance(v, tuple) else v for name, v in self.parameters.items()},
            "rank": self.rank,
            "energy": self.energy,
            "base": self.base,
            "dtype": self.dtype,
            "compat": self.compat,
            "saved": self.saved,
            "seed": self.seed,
            "decomposition": self.decomposition,
        }
        return yaml.safe_dump({"adapter_merge": content}, sort_keys=False, allow_unicode=True)


def combiner_of(recipe: Recipe) -> Combiner:
    """Return the method that a recipe names.

    Raises:
        MethodError: if there is none.
    """
    if recipe.compat is None:
        return get_combiner(recipe.method)
    return peft.combiner(recipe.method)


def parameters_of(recipe: Recipe, combiner: Combiner) -> dict[str, Any]:
    """Return all parameters of a recipe's method.

    Raises:
        MethodError: if it does not take these, or something else that was given means nothing to it.
    """
    given = dict(recipe.parameters)
    if combiner.own_rank and recipe.rank is not None:
        key = "clusters" if "clusters" in combiner.parameters else "rank"
        if given.get(key) not in (None, recipe.rank):
            raise MethodError(f"rank is {recipe.rank} and {key} is {given[key]}; give one of the two")
        given[key] = recipe.rank
    if combiner.works == "entries" and combiner.weighted:
        if "weight" in given:
            raise MethodError("the weights are given by --weight, not as a parameter")
        given["weight"] = list(recipe.weights)
    elif not combiner.weighted and any(weight != 1 for weight in recipe.weights):
        raise MethodError(f"the method {combiner.name!r} takes no weights")
    if recipe.energy is not None and combiner.own_rank:
        raise MethodError(f"the method {combiner.name!r} has a rank of its own, so energy would change nothing")
    if recipe.energy is not None and recipe.compat is not None:
        raise MethodError("PEFT's combinations know no energy; leave out compat, or give a rank to svd")
    found = combiner.complete(given, len(recipe.adapters))
    if combiner.works == "factors" and found.get("average", "factors") == "factors":
        for name, value in (("rank", recipe.rank), ("energy", recipe.energy), ("saved", recipe.saved)):
            if value is not None:
                raise MethodError(f"{name} means nothing where tensors are averaged one by one, as they are")
    scope = get_method(combiner.name).scope if combiner.works == "entries" else None
    if scope is not None and found[scope] != "tensor":
        raise MethodError(f"adapters are combined layer by layer: give {scope}=tensor")
    return found


def dtype_of(name: str | None, own: DType) -> DType:
    """Return the dtype in which factors are written: the one that is named, or the inputs'.

    Raises:
        MethodError: if it is too coarse.
        RecipeError: if there is none of that name.
    """
    if name is None:
        return own
    dtype = dtypes.float_from_name(name)
    if dtype.itemsize < 2:
        raise MethodError(f"dtype is {name}, too coarse for factors; use float32, bfloat16 or float16")
    return dtype
