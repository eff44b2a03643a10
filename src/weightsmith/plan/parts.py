"""The parts of a model that are merged by themselves, and where every model keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightsmith.architecture.towers import Tower, match_tower, tower
from weightsmith.errors import PlanError
from weightsmith.plan.slots import Model, Settings
from weightsmith.recipe.schema import ModelInput, Module, Source

Open = Callable[[str], Model]


@dataclass(frozen=True)
class Part:
    """The whole model, or one module of it, whose tensors go by their names within it.

    Attributes:
        donor: the model whose names the output takes.
        module: the module's name, or None for the whole model.
        tower: where the donor keeps it.
        levels: parameters given for the module and the merge, the nearest first.
        towers: id of a model -> where that model keeps it, if not under the donor's prefix.
        others: what the names within it begin with of tensors that belong to other modules.
    """

    donor: Model
    module: str | None
    tower: Tower
    levels: tuple[Settings, ...]
    towers: dict[int, Tower] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def tower_in(self, model: Model) -> Tower:
        """Return where a model keeps this part."""
        return self.towers.get(id(model), self.tower)

    def name_in(self, model: Model, name: str) -> str:
        """Return what a model calls the tensor that this part calls ``name``."""
        return self.tower_in(model).name(name)

    def seen(self, model: Model) -> dict[str, str]:
        """Return the names within this part of a model's tensors -> the model's own names."""
        tower = self.tower_in(model)
        inner = ((tower.inner(name), name) for name in model.checkpoint)
        return {one: name for one, name in inner if one is not None and not one.startswith(self.others)}

    def region(self, name: str) -> str | None:
        """Return the donor's prefix under which a tensor of this part lies, or None if it is none of this part's."""
        inner = self.tower.inner(name)
        if inner is None or inner.startswith(self.others):
            return None
        return next(prefix for prefix in reversed(self.tower.prefixes) if name.startswith(prefix))


def divide(modules: Mapping[str, Module], donor: Model, top: Settings) -> list[Part]:
    """Divide the donor's tensors among the modules: of several whose prefixes fit a name, the longest has it.

    Args:
        modules: module -> what the recipe says of it.
        donor: the model whose names the output takes.
        top: parameters given for the merge.

    Raises:
        PlanError: if a module has no tensors, or two modules have the same.
    """
    towers = {
        name: Tower.under(
            tower(donor.checkpoint, name) if entry.prefix is None else entry.prefix, name, donor.checkpoint
        )
        for name, entry in modules.items()
    }
    parts = [
        Part(donor, name, towers[name], (entry.parameters, top), others=_others(name, towers))
        for name, entry in modules.items()
    ]
    covered: dict[str, str | None] = {}
    for part in parts:
        own = [name for name in donor.checkpoint if part.region(name) is not None]
        if not own:
            raise PlanError(f"module {part.module!r}: no tensor of {donor.reference} begins with {part.tower.prefix!r}")
        for name in own:
            other = covered.setdefault(name, part.module)
            if other != part.module:
                raise PlanError(f"{name} belongs to two modules, {other!r} and {part.module!r}; give one of them")
    return parts


def _others(module: str, towers: Mapping[str, Tower]) -> tuple[str, ...]:
    """Return what the names within a module begin with of tensors that belong to modules inside it."""
    own = towers[module]
    inside = [
        own.inner(prefix)
        for name, other in towers.items()
        for prefix in other.prefixes
        # What lies beside two modules belongs to both, which is an error, unless it is a module of its own.
        if name != module and (prefix == other.prefix or prefix not in own.prefixes)
    ]
    return tuple(inner for inner in inside if inner)


def find_towers(part: Part, entry: Module, open_model: Open) -> dict[int, Tower]:
    """Return where those models keep a module that may keep it elsewhere than the donor: id of the model -> tower.

    Args:
        part: the module.
        entry: what the recipe says of it.
        open_model: gives the model of a reference.

    Raises:
        PlanError: if a model has no part that matches the module, or several that match equally well.
    """
    sources: list[ModelInput | Source] = list(entry.models or ())
    sources += [source for piece in entry.slices or () for source in piece.sources]
    prefix = part.tower.prefix
    names = [name.removeprefix(prefix) for name in part.donor.checkpoint if part.region(name) == prefix]
    towers = {}
    for source in sources:
        model = open_model(source.model)
        given = source.prefix if isinstance(source, ModelInput) else None
        if given is None and model is not part.donor:
            given = match_tower(prefix, names, model.checkpoint, model.reference)
        if given is not None:
            towers[id(model)] = Tower.under(given, str(part.module), model.checkpoint)
    return towers
