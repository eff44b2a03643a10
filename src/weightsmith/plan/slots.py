"""What goes into one output tensor, by name: the plan before shapes and numbers are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from weightsmith.architecture.config import alias_source, tied_embeddings, tied_source
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.recipe.schedule import Place
from weightsmith.recipe.schema import Setting

Settings = Mapping[str, Setting]
NO_SETTINGS: Settings = MappingProxyType({})


@dataclass(frozen=True)
class Model:
    """A checkpoint as a recipe names it.

    Attributes:
        reference: the text by which the recipe names it.
        label: a short name, unique in the merge; random masks depend on it.
        checkpoint: what was opened.
    """

    reference: str
    label: str
    checkpoint: Checkpoint


class Contribution(NamedTuple):
    """One model's tensor for an output tensor.

    Attributes:
        model: the model.
        tensor: the tensor's name in that model; the model may turn out not to have it.
        settings: parameters given for this model.
        fisher: the checkpoint of the importances of its weights, or None.
    """

    model: Model
    tensor: str
    settings: Settings = NO_SETTINGS
    fisher: Model | None = None

    @property
    def held_as(self) -> str | None:
        """The name under which the model holds the tensor, another of its names if need be; None if it lacks it."""
        checkpoint = self.model.checkpoint
        if self.tensor in checkpoint:
            return self.tensor
        source = alias_source(self.tensor, checkpoint)
        if source is None and tied_embeddings(checkpoint.config):
            source = tied_source(self.tensor, checkpoint)
        return source

    def find(self) -> Tensor | None:
        """Return the tensor, or None where the model has none."""
        tensor = self.model.checkpoint.get(self.tensor)
        if tensor is not None:
            return tensor
        name = self.held_as
        return None if name is None else self.model.checkpoint[name]


class Participant(NamedTuple):
    """A model as one place of a recipe names it.

    Attributes:
        model: the model.
        settings: parameters given for it there.
        fisher: the checkpoint of the importances of its weights, or None.
    """

    model: Model
    settings: Settings = NO_SETTINGS
    fisher: Model | None = None

    def contribution(self, tensor: str) -> Contribution:
        """Return what it contributes by its tensor of a name."""
        return Contribution(self.model, tensor, self.settings, self.fisher)


class Slot(NamedTuple):
    """One output tensor.

    Attributes:
        where: its name, layer and module in the output: what schedules and filters look at.
        models: what the listed models contribute, in the recipe's order.
        base: what the base contributes, or None where the recipe names none.
        levels: parameters given for the slice, the module and the merge, the nearest first.
        carried: whether it is taken from its one model as it is.
        stack: the stack of layers it belongs to, by its name within the module, or an empty text.
    """

    where: Place
    models: tuple[Contribution, ...]
    base: Contribution | None = None
    levels: tuple[Settings, ...] = ()
    carried: bool = False
    stack: str = ""

    @property
    def name(self) -> str:
        """The tensor's name in the output."""
        return self.where.name

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """What the base, if there is one, and the models contribute."""
        return self.models if self.base is None else (self.base, *self.models)


def union(*collections: Mapping[str, object]) -> list[str]:
    """Return the names in any of the mappings: in the first's order, with others' after their predecessors."""
    order = list(dict.fromkeys(name for one in collections[:1] for name in one))
    known = set(order)
    for other in collections[1:]:
        if all(name in known for name in other):
            continue
        previous = None
        after: dict[str | None, list[str]] = {}
        for name in other:
            if name in known:
                previous = name
            else:
                after.setdefault(previous, []).append(name)
                known.add(name)
        order = after.get(None, []) + [n for name in order for n in (name, *after.get(name, ()))]
    return order
