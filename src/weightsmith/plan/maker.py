"""From a slot to a tensor: who takes part, with which parameters, and what to do where models disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith import dtypes
from weightsmith.architecture.config import alias_source, tied_embeddings, tied_source
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.expression import Computed, Group
from weightsmith.errors import MethodError, PlanError
from weightsmith.methods.registry import Method
from weightsmith.plan.parameters import Resolver
from weightsmith.plan.slots import Contribution, Slot
from weightsmith.recipe.schema import Merge

_SHOWN = 5


class Maker:
    """Makes the tensors of one merge, and collects what is wrong so that all of it is told at once.

    Attributes:
        warnings: what a person should know.
        untied: names of head tensors that some model ties to its embeddings and another does not.
    """

    def __init__(self, recipe: Merge, method: Method) -> None:
        self._recipe = recipe
        self._method = method
        self._resolver = Resolver(method, recipe.compat)
        self._cast = dtypes.float_from_name(recipe.dtype) if recipe.dtype else None
        output = recipe.out_dtype or recipe.dtype
        self._output = dtypes.float_from_name(output) if output else None
        self._groups: dict[tuple[str | None, str, int | None], Group] = {}
        self._missing: list[tuple[Slot, list[str], list[str]]] = []
        self._misshapen: list[tuple[Slot, list[tuple[str, tuple[int, ...]]]]] = []
        self._left_out: list[str] = []
        self._taken: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self.untied: set[str] = set()

    def make(self, slot: Slot) -> Tensor | None:
        """Return the slot's tensor, or None where it is left out or cannot be made (see :meth:`finish`)."""
        if slot.carried:
            return self._carry(slot, slot.models[0])
        base, models = self._participants(slot)
        everyone = [base, *models] if base else models
        found = [self._find(one) for one in everyone]
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            return self._incomplete(slot, everyone, found)
        floats = [dtypes.is_float(tensor.dtype) for tensor in tensors]
        if not any(floats):
            return self._carry(slot, everyone[0])
        if not all(floats):
            kinds = ", ".join(
                f"{dtypes.name_of(t.dtype)} in {one.model.label}" for one, t in zip(everyone, tensors, strict=True)
            )
            raise PlanError(f"{slot.name} cannot be merged: it is {kinds}; only floating tensors are merged")
        if len({tensor.shape for tensor in tensors}) > 1:
            return self._mismatched(slot, everyone, tensors)
        if tensors[0].size == 0:
            return self._carry(slot, everyone[0])
        return self._compute(slot, base, models, tensors)

    def finish(self) -> None:
        """Raise one error for all tensors that could not be made, and note those that were left out.

        Raises:
            PlanError: if tensors are missing or differ in shape, and the recipe does not say what to do then.
        """
        if self._missing:
            slot, having, lacking = self._missing[0]
            raise PlanError(
                f"{slot.name} is in {_names(having)} but not in {_names(lacking)}{_more(self._missing)}; "
                "say where such tensors come from with on_missing: base, first or skip"
            )
        if self._misshapen:
            slot, shapes = self._misshapen[0]
            text = " and ".join(f"{list(shape)} in {label}" for label, shape in shapes)
            raise PlanError(
                f"{slot.name} is {text}{_more(self._misshapen)}; models of different shape cannot be merged "
                "entry by entry: with on_shape_mismatch: base or first such tensors are taken from one model "
                "(where only the vocabulary differs, from the model whose tokenizer the result takes)"
            )
        if self._left_out:
            self.warnings.append(f"left out (on_missing: skip): {_names(self._left_out)}")
        for label, names in self._taken.items():
            self.warnings.append(f"taken from {label} alone: {_names(names)}")
        self._check_groups()

    def _participants(self, slot: Slot) -> tuple[Contribution | None, list[Contribution]]:
        """Tell the base from the models; a method without use for a base treats it as any other model."""
        if slot.base is None:
            return None, list(slot.models)
        own = slot.base.model
        if self._method.base == "unused":
            listed = any(one.model is own for one in slot.models)
            unlisted = [] if listed or self._recipe.compat != "mergekit" else [slot.base]
            return None, [*slot.models, *unlisted]
        return slot.base, [one for one in slot.models if one.model is not own]

    def _find(self, one: Contribution) -> Tensor | None:
        checkpoint = one.model.checkpoint
        if one.tensor in checkpoint:
            return checkpoint[one.tensor]
        source = alias_source(one.tensor, checkpoint)
        if source is None and tied_embeddings(checkpoint.config):
            source = tied_source(one.tensor, checkpoint)
            if source is not None:
                self.untied.add(one.tensor)
        return None if source is None else checkpoint[source]

    def _incomplete(
        self,
        slot: Slot,
        everyone: list[Contribution],
        found: list[Tensor | None],
    ) -> Tensor | None:
        having = [one for one, tensor in zip(everyone, found, strict=True) if tensor is not None]
        lacking = [one for one, tensor in zip(everyone, found, strict=True) if tensor is None]
        # A tensor of a base that the method has no use for: it is the base's alone.
        having = having or ([slot.base] if slot.base else [])
        rule = self._recipe.on_missing
        if rule == "error":
            self._missing.append((slot, [o.model.label for o in having], [o.model.label for o in lacking]))
            return None
        if rule == "first" or (rule == "base" and slot.base is not None):
            chosen = having[0] if rule == "first" else slot.base
            if chosen is not None and self._find(chosen) is not None:
                self._taken.setdefault(chosen.model.label, []).append(slot.name)
                return self._carry(slot, chosen)
        self._left_out.append(slot.name)
        return None

    def _mismatched(self, slot: Slot, everyone: list[Contribution], tensors: list[Tensor]) -> Tensor | None:
        rule = self._recipe.on_shape_mismatch
        chosen = slot.base if rule == "base" else everyone[0]
        if rule == "error" or chosen is None:
            shapes = {tensor.shape: one.model.label for one, tensor in zip(everyone, tensors, strict=True)}
            self._misshapen.append((slot, [(label, shape) for shape, label in shapes.items()]))
            return None
        self._taken.setdefault(chosen.model.label, []).append(slot.name)
        return self._carry(slot, chosen)

    def _carry(self, slot: Slot, one: Contribution) -> Tensor | None:
        tensor = self._find(one)
        if tensor is None:
            raise PlanError(f"{one.model.label} has no tensor {one.tensor}, which {slot.name} is taken from")
        return tensor

    def _compute(
        self, slot: Slot, base: Contribution | None, models: list[Contribution], tensors: list[Tensor]
    ) -> Tensor:
        parameters = self._parameters(slot, models, has_base=base is not None)
        own = tensors[1:] if base else tensors
        return Computed(
            slot.name,
            self._output or dtypes.promote([tensor.dtype for tensor in tensors]),
            self._method,
            tuple(own),
            tensors[0] if base else None,
            parameters=parameters,
            labels=tuple(one.model.label for one in models),
            seed=self._recipe.seed,
            group=self._group(slot, parameters),
            rounds=self._output is not None,
            casts=self._cast if self._recipe.compat == "mergekit" else None,
        )

    def dtype_of(self, tensor: Tensor) -> DType:
        """Return the dtype in which a tensor of this merge is written."""
        if self._output is not None and dtypes.is_float(tensor.dtype):
            return self._output
        return tensor.dtype

    def _parameters(self, slot: Slot, models: list[Contribution], *, has_base: bool) -> Mapping[str, Any]:
        try:
            return self._resolver.resolve(slot, models, has_base=has_base)
        except MethodError as error:
            labels = ", ".join(one.model.label for one in models)
            raise PlanError(f"{error} (for {slot.name}, merging {labels})") from error

    def _group(self, slot: Slot, parameters: Mapping[str, Any]) -> Group | None:
        scope = parameters.get(self._method.scope) if self._method.scope else None
        if self._method.statistic is None or scope not in ("layer", "model"):
            return None
        key: tuple[str | None, str, int | None] = (None, "", None)
        if scope == "layer":
            layer = slot.where.layer
            # Stacks of two modules may have the same name within them.
            key = (slot.where.module, slot.name if layer is None else slot.stack, layer)
        return self._groups.setdefault(key, Group())

    def _check_groups(self) -> None:
        for group in self._groups.values():
            first = group.members[0]
            wide = max((member.working for member in group.members), key=lambda dtype: dtype.itemsize)
            for member in group.members:
                member.working = wide
                for name in self._method.statistic_parameters:
                    if member.parameters[name] != first.parameters[name]:
                        raise PlanError(
                            f"{name} differs between {first.name} and {member.name}, but with "
                            f"{self._method.scope}: {first.parameters[str(self._method.scope)]} it must be one "
                            "value for all of them: use scope tensor, or give one value"
                        )


def _names(names: list[str]) -> str:
    text = ", ".join(names[:_SHOWN])
    return f"{text} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else text


def _more(entries: list[Any]) -> str:
    return f" (and {len(entries) - 1} more tensors are like that)" if len(entries) > 1 else ""
