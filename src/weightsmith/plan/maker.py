"""From a slot to a tensor: who takes part, with which parameters, and what to do where models disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith import dtypes
from weightsmith.architecture.config import is_head
from weightsmith.architecture.vocabulary import is_token_table
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.expression import Computed, Group
from weightsmith.errors import MethodError, PlanError
from weightsmith.plan.evaluated import Rearranger
from weightsmith.plan.importances import Importances
from weightsmith.plan.naming import Naming
from weightsmith.plan.parameters import Resolver
from weightsmith.plan.slots import Contribution, Slot
from weightsmith.plan.ways import Way, Ways
from weightsmith.recipe.schema import Merge

_SHOWN = 5


class Maker:
    """Makes the tensors of one merge, and collects what is wrong so that all of it is told at once.

    Attributes:
        warnings: what a person should know.
        untied: names of head tensors that some model ties to its embeddings and another does not.
    """

    def __init__(self, recipe: Merge, ways: Ways, rearranger: Rearranger) -> None:
        self._recipe = recipe
        self._ways = ways
        self._resolvers: dict[Way, Resolver] = {}
        self._cast = dtypes.float_from_name(recipe.dtype) if recipe.dtype else None
        output = recipe.out_dtype or recipe.dtype
        self._output = dtypes.float_from_name(output) if output else None
        self._groups: dict[tuple[Way, str | None, str, int | None], Group] = {}
        self._missing: list[tuple[Way, Slot, list[str], list[str]]] = []
        self._misshapen: list[tuple[Way, Slot, list[tuple[str, tuple[int, ...]]]]] = []
        self._left_out: list[str] = []
        self._taken: dict[str, list[str]] = {}
        self._lengthened: dict[tuple[str, int], list[str]] = {}
        self._rearranger = rearranger
        self._importances = Importances(rearranger)
        self.warnings: list[str] = []
        self.untied: set[str] = set()

    def make(self, slot: Slot) -> Tensor | None:
        """Return the slot's tensor, or None where it is left out or cannot be made (see :meth:`finish`)."""
        if slot.carried:
            return self._carry(slot, slot.models[0])
        way = self._ways.of(slot.where)
        base, models = way.participants(slot)
        everyone = [base, *models] if base else models
        found = [one.find() for one in everyone]
        if is_head(slot.name) and any(one.held_as not in (None, one.tensor) for one in slot.contributions):
            self.untied.add(slot.name)
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            return self._incomplete(slot, way, everyone, found)
        floats = [dtypes.is_float(tensor.dtype) for tensor in tensors]
        if not any(floats):
            return self._carry(slot, everyone[0])
        if not all(floats):
            kinds = ", ".join(
                f"{dtypes.name_of(t.dtype)} in {one.model.label}" for one, t in zip(everyone, tensors, strict=True)
            )
            raise PlanError(way.named(f"{slot.name} cannot be merged: it is {kinds}; only floating tensors are merged"))
        if len({tensor.shape for tensor in tensors}) > 1:
            if self._recipe.on_shape_mismatch not in ("pad", "crop") or not _differ_in_rows([t.shape for t in tensors]):
                return self._mismatched(slot, way, everyone, tensors)
            tensors = self._to_one_length(slot, everyone, tensors)
        if tensors[0].size == 0:
            return tensors[0]
        return self._compute(slot, way, base, models, tensors)

    def finish(self, naming: Naming) -> None:
        """Raise one error for all tensors that could not be made, and note those that were left out.

        Args:
            naming: all that was to be made, and of what.

        Raises:
            PlanError: if tensors are missing or differ in shape, and the recipe does not say what to do then; or if
                Fisher checkpoints lack tensors.
            MethodError: if a Fisher checkpoint is given that no method takes.
        """
        if self._missing:
            way, slot, having, lacking = self._missing[0]
            raise PlanError(
                way.named(
                    f"{slot.name} is in {_names(having)} but not in {_names(lacking)}{_more(self._missing)}; "
                    "say where such tensors come from with on_missing: base, first or skip"
                )
            )
        if self._misshapen:
            way, slot, shapes = self._misshapen[0]
            text = " and ".join(f"{list(shape)} in {label}" for label, shape in shapes)
            ways_out = "with on_shape_mismatch: base or first such tensors are taken from one model"
            if _differ_in_rows([shape for _, shape in shapes]):
                ways_out += (
                    " (where the vocabulary differs, from the model whose tokenizer the result takes); pad completes "
                    "the shorter with rows of zeros, crop cuts all to the shortest"
                )
                if self._recipe.asked_tokenizer is None and is_token_table(slot.name):
                    ways_out = (
                        "where their tokenizers differ, tokenizer_source: union brings them to one vocabulary, token "
                        f"by token; {ways_out}"
                    )
            raise PlanError(
                way.named(
                    f"{slot.name} is {text}{_more(self._misshapen)}; models of different shape cannot be merged "
                    f"entry by entry: {ways_out}"
                )
            )
        self._importances.finish(naming.slots, naming.fishers)
        if self._left_out:
            self.warnings.append(f"left out (on_missing: skip): {_names(self._left_out)}")
        for label, names in self._taken.items():
            self.warnings.append(f"taken from {label} alone: {_names(names)}")
        for (label, rows), names in self._lengthened.items():
            told = f"{rows} rows of zeros are added to {label}" if rows > 0 else f"{-rows} rows of {label} are dropped"
            self.warnings.append(f"{told} (on_shape_mismatch: {self._recipe.on_shape_mismatch}): {_names(names)}")
        self._check_groups()

    def _incomplete(
        self,
        slot: Slot,
        way: Way,
        everyone: list[Contribution],
        found: list[Tensor | None],
    ) -> Tensor | None:
        lacking = [one for one, tensor in zip(everyone, found, strict=True) if tensor is None]
        having = [one for one, tensor in zip(everyone, found, strict=True) if tensor is not None]
        # Where none of those who take part has it, it is another's to give: an unused base's, or a rule's others'.
        having = having or [one for one in slot.contributions if one.find() is not None]
        choice = self._recipe.on_missing
        if choice == "error":
            self._missing.append((way, slot, [o.model.label for o in having], [o.model.label for o in lacking]))
            return None
        if choice == "first" or (choice == "base" and slot.base is not None):
            chosen = having[0] if choice == "first" else slot.base
            if chosen is not None and chosen.find() is not None:
                self._taken.setdefault(chosen.model.label, []).append(slot.name)
                return self._carry(slot, chosen)
        self._left_out.append(slot.name)
        return None

    def _mismatched(self, slot: Slot, way: Way, everyone: list[Contribution], tensors: list[Tensor]) -> Tensor | None:
        choice = self._recipe.on_shape_mismatch
        chosen = {"base": slot.base, "first": everyone[0]}.get(choice)
        if chosen is None:
            shapes = {tensor.shape: one.model.label for one, tensor in zip(everyone, tensors, strict=True)}
            self._misshapen.append((way, slot, [(label, shape) for shape, label in shapes.items()]))
            return None
        self._taken.setdefault(chosen.model.label, []).append(slot.name)
        return self._carry(slot, chosen)

    def _to_one_length(self, slot: Slot, everyone: list[Contribution], tensors: list[Tensor]) -> list[Tensor]:
        """Bring tensors to as many rows as the longest (pad) or the shortest (crop) of them has."""
        lengths = [tensor.shape[0] for tensor in tensors]
        rows = max(lengths) if self._recipe.on_shape_mismatch == "pad" else min(lengths)
        fitted: list[Tensor] = []
        for one, tensor in zip(everyone, tensors, strict=True):
            if tensor.shape[0] == rows:
                fitted.append(tensor)
                continue
            self._lengthened.setdefault((one.model.label, rows - tensor.shape[0]), []).append(slot.name)
            fitted.append(self._rearranger.with_rows(tensor, rows, one.model.checkpoint))
        return fitted

    def _carry(self, slot: Slot, one: Contribution) -> Tensor | None:
        tensor = one.find()
        if tensor is None:
            raise PlanError(f"{one.model.label} has no tensor {one.tensor}, which {slot.name} is taken from")
        return tensor

    def _compute(
        self, slot: Slot, way: Way, base: Contribution | None, models: list[Contribution], tensors: list[Tensor]
    ) -> Tensor:
        parameters = self._parameters(slot, way, models, has_base=base is not None)
        fishers = self._importances.of(slot, way, [base, *models] if base else models, tensors[0].shape)
        own = tensors[1:] if base else tensors
        return Computed(
            slot.name,
            self._output or dtypes.promote([tensor.dtype for tensor in tensors]),
            way.method,
            tuple(own),
            tensors[0] if base else None,
            parameters=parameters,
            labels=tuple(one.model.label for one in models),
            seed=self._recipe.seed,
            group=self._group(slot, way, parameters),
            rounds=self._output is not None,
            casts=self._cast if self._recipe.compat == "mergekit" else None,
            fishers=fishers,
        )

    def dtype_of(self, tensor: Tensor) -> DType:
        """Return the dtype in which a tensor of this merge is written."""
        if self._output is not None and dtypes.is_float(tensor.dtype):
            return self._output
        return tensor.dtype

    def _parameters(self, slot: Slot, way: Way, models: list[Contribution], *, has_base: bool) -> Mapping[str, Any]:
        resolver = self._resolvers.get(way)
        if resolver is None:
            resolver = self._resolvers[way] = Resolver(way, self._recipe.compat)
        try:
            return resolver.resolve(slot, models, has_base=has_base)
        except MethodError as error:
            labels = ", ".join(one.model.label for one in models)
            raise PlanError(way.named(f"{error} (for {slot.name}, merging {labels})")) from error

    def _group(self, slot: Slot, way: Way, parameters: Mapping[str, Any]) -> Group | None:
        """Return the tensors that the method's statistic ranges over: those of a scope that are made in one way."""
        method = way.method
        scope = parameters.get(method.scope) if method.scope else None
        if method.statistic is None or scope not in ("layer", "model"):
            return None
        key: tuple[Way, str | None, str, int | None] = (way, None, "", None)
        if scope == "layer":
            layer = slot.where.layer
            # Stacks of two modules may have the same name within them.
            key = (way, slot.where.module, slot.name if layer is None else slot.stack, layer)
        return self._groups.setdefault(key, Group())

    def _check_groups(self) -> None:
        for (way, *_), group in self._groups.items():
            first = group.members[0]
            wide = max((member.working for member in group.members), key=lambda dtype: dtype.itemsize)
            for member in group.members:
                member.working = wide
                for name in way.method.statistic_parameters:
                    if member.parameters[name] != first.parameters[name]:
                        scope = way.method.scope
                        raise PlanError(
                            way.named(
                                f"{name} differs between {first.name} and {member.name}, but with "
                                f"{scope}: {first.parameters[str(scope)]} it must be one value for all of them: "
                                "use scope tensor, or give one value"
                            )
                        )


def _differ_in_rows(shapes: list[tuple[int, ...]]) -> bool:
    """Whether shapes are the same but for the length of their first axis."""
    return all(shapes) and len({shape[1:] for shape in shapes}) == 1


def _names(names: list[str]) -> str:
    text = ", ".join(names[:_SHOWN])
    return f"{text} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else text


def _more(entries: list[Any]) -> str:
    return f" (and {len(entries) - 1} more tensors are like that)" if len(entries) > 1 else ""
