"""Plain weights in the form that they are trained in, where that is exact: folding gives the weights back."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import PlanError, RecipeError, did_you_mean
from weightsmith.reparameterized.layer import Layer, stored, tiles
from weightsmith.reparameterized.result import Restructured, opened
from weightsmith.reparameterized.tensors import KernelTensor
from weightsmith.reparameterized.weights import mapped, norms

Spelling = Literal["suffix", "parametrization"]


class UnfoldedModel(Restructured):
    """A model some of whose weights are in another form.

    Attributes:
        unfolded: the weights that are.
    """

    def __init__(self, model: Checkpoint, tensors: dict[str, Tensor], unfolded: tuple[str, ...], how: dict[str, Any]):
        """Collect what it is made of.

        Args:
            model: the model as it is.
            tensors: its tensors, in the other form where they have one.
            unfolded: the weights that have.
            how: what a recipe says of it.
        """
        self.unfolded = unfolded
        self._how = how
        super().__init__(model, f"{model.name} (unfolded)", tensors)

    def how(self) -> dict[str, Any]:
        """See :meth:`Restructured.how`."""
        return {"unfold": self._how}


def unfold_weight_norm(
    model: Source, names: str = "*.weight", *, axis: int | None = 0, spelling: Spelling = "parametrization"
) -> UnfoldedModel:
    """Write weights as gain and direction: ``g = ||w||``, ``v = w`` (weight normalisation, arXiv:1602.07868).

    Args:
        model: a reference or a checkpoint.
        names: the weights: a name, or a pattern with ``*`` and ``?``. Of those it fits, tensors of two axes and more.
        axis: the axis that has a norm for each index (negative: from the last); None for one norm of each weight.
        spelling: ``parametrization`` for the names of ``torch.nn.utils.parametrizations.weight_norm``
            (``parametrizations.weight.original0`` and ``original1``), ``suffix`` for those of
            ``torch.nn.utils.weight_norm`` (``weight_g`` and ``weight_v``).

    Raises:
        PlanError: if no weight fits, or one lacks the axis.
    """
    if spelling not in ("suffix", "parametrization"):
        raise RecipeError(f"spelling is {spelling!r}; it must be suffix or parametrization")
    checkpoint = opened(model)
    tensors: dict[str, Tensor] = dict(checkpoint)
    found = _chosen(checkpoint, names, axes=2)
    for name in found:
        weight = tensors.pop(name)
        own = axis
        if axis is not None and not -len(weight.shape) <= axis < len(weight.shape):
            raise PlanError(f"{checkpoint.name}: {name} is {list(weight.shape)}, and has no axis {axis}")
        if own is not None:
            own %= len(weight.shape)
        shape = () if own is None else tuple(n if i == own else 1 for i, n in enumerate(weight.shape))
        gain_name, direction_name = _names(name, spelling)
        for other in (gain_name, direction_name):
            if other in tensors:
                raise PlanError(f"{checkpoint.name} holds {other} beside {name}: it is unfolded in part")
        tensors[gain_name] = KernelTensor(gain_name, _gain(stored(weight), own), shape)
        tensors[direction_name] = weight
    how = {"kind": "weight_norm", "names": names, "axis": axis, "spelling": spelling}
    return UnfoldedModel(checkpoint, tensors, found, how)


def unfold_compander(model: Source, names: str = "*.weight", *, a: float, b: float) -> UnfoldedModel:
    """Write weights as Weight Compander keeps them: ``v = b tan(w / a)``. Inferred; see the kind compander of a fold.

    The weights are read once to check that they can be written so.

    Args:
        model: a reference or a checkpoint.
        names: the weights: a name, or a pattern with ``*`` and ``?``.
        a: two over pi times the largest weight there can be.
        b: the scale of v.

    Raises:
        PlanError: if no weight fits; or some are beyond ``a pi / 2``, which is reported for each tensor.
    """
    for label, value in (("a", a), ("b", b)):
        if not math.isfinite(value) or value <= 0:
            raise RecipeError(f"{label} is {value!r}; it must be a number above 0")
    checkpoint = opened(model)
    found = _chosen(checkpoint, names, axes=1)
    tensors: dict[str, Tensor] = dict(checkpoint)
    beyond = []
    for name in found:
        layer = stored(checkpoint[name])
        largest, count = _beyond(layer, a * math.pi / 2)
        if count:
            beyond.append((largest, f"{name}: {count:,} of {checkpoint[name].size:,} (up to {largest:g})"))
        tensors[name] = KernelTensor(name, mapped(layer, lambda values: b * np.tan(values / a)))
    if beyond:
        more = f"; and {len(beyond) - 5} tensors more" if len(beyond) > 5 else ""
        raise PlanError(
            f"{checkpoint.name} has weights that are not below a pi / 2 = {a * math.pi / 2:g}, which no v stands for: "
            + "; ".join(text for _, text in beyond[:5])
            + f"{more}; with a above {2 * max(largest for largest, _ in beyond) / math.pi:g} all can be written so"
        )
    return UnfoldedModel(checkpoint, tensors, found, {"kind": "compander", "names": names, "a": a, "b": b})


def _chosen(model: Checkpoint, names: str, axes: int) -> tuple[str, ...]:
    fitting = [name for name in model if fnmatch.fnmatchcase(name, names)]
    found = tuple(
        name
        for name in fitting
        if dtypes.is_float(model[name].dtype) and len(model[name].shape) >= axes and model[name].size
    )
    if not found:
        why = f"none of the {len(fitting)} that fit has {axes} axes or more, of floats" if fitting else "none fits"
        raise PlanError(f"{model.name} holds no weights {names!r}: {why}{did_you_mean(names, model)}")
    return found


def _names(name: str, spelling: Spelling) -> tuple[str, str]:
    if spelling == "suffix":
        return f"{name}_g", f"{name}_v"
    module, dot, weight = name.rpartition(".")
    stem = f"{module}{dot}parametrizations.{weight}.original"
    return f"{stem}0", f"{stem}1"


def _gain(weight: Layer, axis: int | None) -> Layer:
    """Return the norms of a weight as a tensor of one axis."""
    shape = (1 if axis is None else weight.shape[axis],)
    if axis == 0:
        return replace(weight, shape=shape, rows=lambda start, stop: norms(_part(weight, start, stop), 0))
    return replace(weight, shape=shape, rows=lambda start, stop: norms(weight, axis)[start:stop])


def _part(layer: Layer, start: int, stop: int) -> Layer:
    return replace(
        layer,
        shape=(stop - start, *layer.shape[1:]),
        rows=lambda first, last: layer.rows(start + first, start + last),
    )


def _beyond(layer: Layer, limit: float) -> tuple[float, int]:
    """Return the largest absolute value, and how many are not below a limit, NaN with them."""
    largest, count = 0.0, 0
    for values in _sizes(layer):
        count += int(np.count_nonzero(~(values < limit)))
        largest = max(largest, float(np.nanmax(values, initial=0)))
    return largest, count


def _sizes(layer: Layer) -> Iterator[Any]:
    return (np.abs(values) for values in tiles(layer))
