"""Adapters of one kind, combined tensor by tensor: each result is a weighted sum of the tensors of one name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.combine.inputs import Inputs
from weightsmith.bundle.tiles import Values
from weightsmith.checkpoint.rows import read_wide
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, PlanError, shown


def alike(inputs: Inputs) -> list[str]:
    """Return the names of the tensors of adapters that are of one kind, with the same shapes and settings.

    Raises:
        PlanError: if they are not.
    """
    first, *others = inputs.adapters
    for other in others:
        if other.kind.peft_type != first.kind.peft_type:
            raise PlanError(
                f"{first.name} is of the kind {first.kind.title} and {other.name} of the kind {other.kind.title}: only "
                "tensors of one kind can be averaged"
            )
        for setting in first.kind.settings:
            for key in filter(None, (setting.name, setting.patterns)):
                one, two = ((adapter.checkpoint.config.get(key) or setting.default) for adapter in (first, other))
                if one != two:
                    raise PlanError(
                        f"{first.name} has {key} {shown(one)} and {other.name} {shown(two)}: tensors that are scaled "
                        "differently are not averaged; average the products"
                    )
        missing = set(first.checkpoint) ^ set(other.checkpoint)
        if missing:
            raise PlanError(f"only one of {first.name} and {other.name} has {min(missing)}; average the products")
        for name, tensor in first.checkpoint.items():
            if other.checkpoint[name].shape != tensor.shape:
                raise PlanError(
                    f"{name} is {list(tensor.shape)} in {first.name} and {list(other.checkpoint[name].shape)} in "
                    f"{other.name}: tensors of other shapes are not averaged; average the products"
                )
    return [name for name, tensor in first.checkpoint.items() if dtypes.is_float(tensor.dtype)]


def rows_of(inputs: Inputs, name: str) -> list[Tensor]:
    """Return the tensor of that name of every adapter."""
    return [adapter.checkpoint[name] for adapter in inputs.adapters]


def weighted(name: str, tensors: Sequence[Tensor], weights: Sequence[float], dtype: DType) -> Tensor:
    """Return the weighted sum of tensors of one shape, computed in float64 as it is read."""

    def compute(start: int, stop: int) -> Array:
        found = np.zeros(stop - start)
        for tensor, weight in zip(tensors, weights, strict=True):
            if weight:
                found += weight * read_wide(tensor, start, stop)
        if not np.isfinite(found).all():
            raise CheckpointError(f"{name}: values are NaN or infinite")
        return found

    return Values(name, tensors[0].shape, dtype, compute)
