"""Importances of weights: the tensors of Fisher checkpoints, beside the weights that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightsmith import dtypes
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import MethodError, PlanError, did_you_mean
from weightsmith.methods.registry import all_methods
from weightsmith.plan.evaluated import Rearranger
from weightsmith.plan.slots import Contribution, Model, Slot
from weightsmith.plan.ways import Way


class Importances:
    """Finds the importances for the tensors of one merge, and collects what is wrong with them."""

    def __init__(self, rearranger: Rearranger) -> None:
        self._rearranger = rearranger
        self._taken: set[tuple[Model, Model]] = set()
        self._methods: dict[str, str] = {}
        self._problems: list[tuple[Way, str]] = []

    def of(
        self, slot: Slot, way: Way, everyone: Sequence[Contribution], shape: tuple[int, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the importances of all who take part in a tensor, None for those without; nothing if there are none.

        Args:
            slot: the tensor.
            way: how it is made.
            everyone: who takes part, the base first where the method works from one.
            shape: the tensor's shape. Where a model has another number of rows, its importances get this one too.

        Raises:
            PlanError: if the method needs importances and a model has none.
        """
        method = way.method
        self._methods[method.name] = method.fisher
        if method.fisher == "unused":
            return ()
        if method.fisher == "required":
            _require(slot, way, everyone)
        found = tuple(self._find(way, one, shape) for one in everyone)
        return found if any(tensor is not None for tensor in found) else ()

    def finish(self, slots: Iterable[Slot], fishers: Sequence[Model]) -> None:
        """Raise one error for all importances that are missing, or have no effect.

        Args:
            slots: all slots of the merge.
            fishers: all Fisher checkpoints of the merge.

        Raises:
            PlanError: if a Fisher checkpoint lacks a tensor, or has it in another shape.
            MethodError: if a Fisher checkpoint is given that no method takes.
        """
        if self._problems:
            way, text = self._problems[0]
            more = f" (and {len(self._problems) - 1} more tensors are like that)" if len(self._problems) > 1 else ""
            raise PlanError(
                way.named(
                    f"{text}{more}; a Fisher checkpoint holds for each weight one importance, in a tensor of the same "
                    "name and shape"
                )
            )
        for slot in slots if fishers else ():
            for one in slot.contributions:
                if one.fisher is not None and (one.model, one.fisher) not in self._taken:
                    raise self._idle(slot, one.model, one.fisher)
        for fisher in fishers:
            if all(fisher is not taken for _, taken in self._taken):
                raise MethodError(
                    f"{fisher.reference} is given as the Fisher checkpoint of a model that takes part in no tensor: "
                    "take it away"
                )

    def _find(self, way: Way, one: Contribution, shape: tuple[int, ...]) -> Tensor | None:
        name = one.held_as
        if one.fisher is None or name is None:
            return None
        self._taken.add((one.model, one.fisher))
        checkpoint, weight = one.fisher.checkpoint, one.model.checkpoint[name]
        tensor = checkpoint.get(name)
        about = f"{one.fisher.reference}, the Fisher checkpoint of {one.model.reference},"
        if tensor is None:
            # The importances of another weight are not what is meant.
            others = [other for other in checkpoint if other not in one.model.checkpoint]
            self._problems.append((way, f"{about} has no tensor {name}{did_you_mean(name, others)}"))
        elif tensor.shape != weight.shape:
            shapes = f"as {list(tensor.shape)}, and the weight is {list(weight.shape)}"
            self._problems.append((way, f"{about} has {name} {shapes}"))
        elif not dtypes.is_float(tensor.dtype):
            self._problems.append((way, f"{about} has {name} as {dtypes.name_of(tensor.dtype)}, not as floats"))
        elif tensor.shape != shape:
            return self._rearranger.with_rows(tensor, shape[0], checkpoint)
        return tensor

    def _idle(self, slot: Slot, model: Model, fisher: Model) -> MethodError:
        """Return the error for a Fisher checkpoint that has no effect."""
        given = f"{fisher.reference} is given as the Fisher checkpoint of {model.reference}"
        if all(policy == "unused" for policy in self._methods.values()):
            takers = ", ".join(method.name for method in all_methods().values() if method.fisher != "unused")
            names = " and ".join(map(repr, self._methods)) or "this merge"
            return MethodError(
                f"{given}, and {names} has no use for one: take it away"
                + (f", or merge by a method that has: {takers}" if takers else "")
            )
        if slot.base is not None and slot.base.model is model and slot.base.fisher is not fisher:
            return MethodError(f"{given}, which is the base: give it as base_fisher")
        return MethodError(f"{given}, which takes part in no tensor whose method has a use for one: take it away")


def _require(slot: Slot, way: Way, everyone: Sequence[Contribution]) -> None:
    """Check that all models have importances; those of a base are never required."""
    base = slot.base if way.method.base != "unused" else None
    lacking = [one.model.reference for one in everyone if one.fisher is None and one is not base]
    if lacking:
        raise PlanError(
            way.named(
                f"method {way.method.name!r} needs a Fisher checkpoint of every model, and {', '.join(lacking)} "
                "has none: give it as fisher under the model (--fisher MODEL=CHECKPOINT)"
            )
        )
