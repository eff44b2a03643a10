"""From a recipe's models, slices and modules to slots: which tensor of which model goes where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.architecture.stacks import Architecture, Stack, analyse, before_layers
from weightsmith.architecture.towers import Tower
from weightsmith.errors import PlanError
from weightsmith.plan.parts import Open, Part, divide, find_towers
from weightsmith.plan.slots import Contribution, Model, Participant, Settings, Slot, union
from weightsmith.recipe.load import fishers, references
from weightsmith.recipe.schedule import Place
from weightsmith.recipe.schema import Merge, ModelInput, Module, Slice, Source


@dataclass(frozen=True)
class Restack:
    """A stack of layers that slices put together anew.

    Attributes:
        stack: the donor's stack.
        picked: for every output layer, the index of the donor's layer whose per-layer settings it takes.
    """

    stack: Stack
    picked: tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """All slots of a merge.

    Attributes:
        slots: the output's tensors, in order.
        donor: the model whose config, tokenizer and carried tensors the output takes: the base, or else the
            first model that the recipe lists.
        models: every model that takes part, the donor first.
        fishers: the checkpoints of the importances of their weights.
        restacks: the stacks whose layers were chosen by slices.
    """

    slots: tuple[Slot, ...]
    donor: Model
    models: tuple[Model, ...]
    fishers: tuple[Model, ...] = ()
    restacks: tuple[Restack, ...] = ()


def name_slots(recipe: Merge, open_model: Open) -> Naming:
    """Find out which tensors the output has and what each is made from.

    Args:
        recipe: the recipe of one merge.
        open_model: gives the model of a reference; the same object for the same reference.

    Raises:
        PlanError: if layer ranges, modules or stacks do not fit the models.
    """
    models = open_models(recipe, open_model)
    donor = models[0]
    # Opened after all models: their short names, which random masks depend on, are as without these.
    importances = tuple(dict.fromkeys(open_model(reference) for reference in fishers(recipe)))
    base = _base(recipe, open_model)
    restacks: list[Restack] = []
    part = Part(donor, None, Tower(""), (recipe.parameters,))
    if recipe.modules:
        slots, restacks = _name_modules(recipe, donor, base, open_model)
    elif recipe.slices:
        slots, restack = _name_slices(part, recipe.slices, base, open_model)
        restacks.append(restack)
    else:
        slots = _name_models(part, recipe.models or (), base, open_model)
    return Naming(tuple(slots), donor, models, importances, tuple(restacks))


def open_models(recipe: Merge, open_model: Open) -> tuple[Model, ...]:
    """Return every model of a recipe once: the donor of config and carried tensors first, then in the recipe's order.

    Args:
        recipe: the recipe of one merge.
        open_model: gives the model of a reference; the same object for the same reference.
    """
    first = [recipe.base_model] if recipe.base_model else []
    everything = (*first, *_references(recipe), *references(recipe))
    return tuple(dict.fromkeys(open_model(reference) for reference in everything))


def _base(entry: Merge | Slice, open_model: Open) -> Participant | None:
    if entry.base_model is None:
        return None
    fisher = open_model(entry.base_fisher) if entry.base_fisher else None
    return Participant(open_model(entry.base_model), fisher=fisher)


def _references(recipe: Merge) -> Iterable[str]:
    holders: list[Merge | Module] = [recipe, *(recipe.modules or {}).values()]
    for holder in holders:
        for entry in holder.models or ():
            yield entry.model
        for piece in holder.slices or ():
            for source in piece.sources:
                yield source.model


def _entry(entry: ModelInput | Source, open_model: Open) -> Participant:
    fisher = open_model(entry.fisher) if entry.fisher else None
    return Participant(open_model(entry.model), entry.parameters, fisher)


def _name_models(part: Part, inputs: Sequence[ModelInput], base: Participant | None, open_model: Open) -> list[Slot]:
    entries = [_entry(entry, open_model) for entry in inputs]
    names = union(*(part.seen(model) for model in _everyone(base, entries)))
    architecture = analyse(names, part.donor.checkpoint.config)
    towers = [(entry, part.tower_in(entry.model)) for entry in entries]
    slots = []
    for name in names:
        layer, position, stack = _whereabouts(architecture, name)
        slots.append(
            Slot(
                Place(part.tower.name(name), layer, position, part.module),
                tuple([entry.contribution(tower.name(name)) for entry, tower in towers]),
                base.contribution(part.name_in(base.model, name)) if base else None,
                part.levels,
                stack=stack,
            )
        )
    return slots


def _everyone(base: Participant | None, entries: Iterable[Participant]) -> list[Model]:
    """Return the models of participants, the base's first, each once."""
    return list(dict.fromkeys(entry.model for entry in (*([base] if base else []), *entries)))


def _whereabouts(architecture: Architecture, name: str) -> tuple[int | None, float | None, str]:
    """Return a tensor's layer (counted from 0), its position in [0, 1] among the layers, and its stack."""
    place = architecture.locate(name)
    if place is None:
        return None, None, ""
    layer = place.stack.ranks[place.index]
    last = len(place.stack.indices) - 1
    return layer, layer / last if last else 1.0, place.stack.prefix


def _name_slices(
    part: Part, slices: Sequence[Slice], base: Participant | None, open_model: Open
) -> tuple[list[Slot], Restack]:
    architectures: dict[int, tuple[Architecture, Stack]] = {}

    def of(model: Model) -> tuple[Architecture, Stack]:
        if id(model) not in architectures:
            found = analyse(part.seen(model), model.checkpoint.config)
            architectures[id(model)] = (found, _main_stack(found, model, part.module))
        return architectures[id(model)]

    _, donor_stack = of(part.donor)
    slots: list[Slot] = []
    picked: list[int] = []
    for number, piece in enumerate(slices):
        slice_base = _base(piece, open_model) or base
        sources = [_entry(source, open_model) for source in piece.sources]
        length = _slice_length(number, piece, sources, of)
        levels = (piece.parameters, *part.levels)
        if number == 0:
            slots += _outside(part, sources, slice_base, levels, of, before=True)
        for step in range(length):
            ranks = [
                (entry, source.layer_range[0] + step) for entry, source in zip(sources, piece.sources, strict=True)
            ]
            # A base that is not among the sources takes part with the layer that the first source does.
            own = slice_base.model if slice_base else None
            base_rank = next((rank for entry, rank in ranks if entry.model is own), ranks[0][1])
            donor_rank = next((rank for entry, rank in ranks if entry.model is part.donor), ranks[0][1])
            position = step / (length - 1) if length > 1 else 1.0
            layer = _Layer(donor_stack, len(picked), position, ranks, (slice_base, base_rank) if slice_base else None)
            slots += _layer_slots(part, layer, levels, of)
            picked.append(donor_rank)
        if number == len(slices) - 1:
            slots += _outside(part, sources, slice_base, levels, of, before=False)
    return slots, Restack(_under(donor_stack, part.tower.prefix), tuple(picked))


@dataclass(frozen=True)
class _Layer:
    """One layer of the output, and the layers it is made from.

    Attributes:
        stack: the donor's stack, whose names the output takes.
        number: the layer's number in the output.
        position: its place in its slice, from 0 to 1.
        ranks: the models, each with the rank of its layer among its own.
        base: the base with the rank of its layer, or None.
    """

    stack: Stack
    number: int
    position: float
    ranks: list[tuple[Participant, int]]
    base: tuple[Participant, int] | None


def _layer_slots(
    part: Part,
    layer: _Layer,
    levels: tuple[Settings, ...],
    of: Callable[[Model], tuple[Architecture, Stack]],
) -> list[Slot]:
    """Return the slots of one layer: every tensor that any of its sources has there."""

    def names(model: Model, rank: int) -> Mapping[str, str]:
        architecture, stack = of(model)
        return architecture.members(stack, stack.indices[rank])

    def contribution(entry: Participant, rank: int, suffix: str) -> Contribution:
        stack = of(entry.model)[1]
        return entry.contribution(part.name_in(entry.model, stack.name(stack.indices[rank], suffix)))

    everyone = [*layer.ranks, *([layer.base] if layer.base else [])]
    return [
        Slot(
            Place(part.tower.name(layer.stack.name(layer.number, suffix)), layer.number, layer.position, part.module),
            tuple(contribution(entry, rank, suffix) for entry, rank in layer.ranks),
            contribution(*layer.base, suffix) if layer.base else None,
            levels,
            stack=layer.stack.prefix,
        )
        for suffix in union(*(names(entry.model, rank) for entry, rank in everyone))
    ]


def _outside(
    part: Part,
    sources: Sequence[Participant],
    base: Participant | None,
    levels: tuple[Settings, ...],
    of: Callable[[Model], tuple[Architecture, Stack]],
    *,
    before: bool,
) -> list[Slot]:
    """Return the slots of the tensors before the first layer, or of those after the last."""

    def outside(model: Model) -> dict[str, str]:
        architecture, stack = of(model)
        places = {name: architecture.locate(name) for name in part.seen(model)}
        return {name: name for name, place in places.items() if place is None or place.stack != stack}

    names = union(*(outside(model) for model in _everyone(base, sources)))
    return [
        Slot(
            Place(part.tower.name(name), None, None, part.module),
            tuple(entry.contribution(part.name_in(entry.model, name)) for entry in sources),
            base.contribution(part.name_in(base.model, name)) if base else None,
            levels,
        )
        for name in names
        if before_layers(name) == before
    ]


def _slice_length(
    number: int,
    piece: Slice,
    sources: Sequence[Participant],
    of: Callable[[Model], tuple[Architecture, Stack]],
) -> int:
    lengths = set()
    for (model, *_), source in zip(sources, piece.sources, strict=True):
        start, stop = source.layer_range
        count = len(of(model)[1].indices)
        if not 0 <= start < stop <= count:
            raise PlanError(
                f"slices[{number}]: layer_range [{start}, {stop}] does not lie in the {count} layers of "
                f"{model.reference}; it takes the first layer and the one after the last, counted from 0"
            )
        lengths.add(stop - start)
    if len(lengths) > 1:
        raise PlanError(
            f"slices[{number}]: its sources have {' and '.join(map(str, sorted(lengths)))} layers; "
            "all sources of a slice must have the same number"
        )
    return lengths.pop()


def _main_stack(architecture: Architecture, model: Model, module: str | None) -> Stack:
    stacks = architecture.main
    if len(stacks) == 1:
        return stacks[0]
    inside = f"module {module!r} of {model.reference}" if module else model.reference
    if not stacks:
        raise PlanError(f"{inside} has no numbered layers, so it cannot be sliced")
    listed = ", ".join(f"{stack.prefix} ({len(stack.indices)} layers)" for stack in stacks)
    raise PlanError(f"{inside} has several stacks of layers: {listed}; say with modules: which one the slices mean")


def _under(stack: Stack, prefix: str) -> Stack:
    return Stack(prefix + stack.prefix, stack.indices)


def _name_modules(
    recipe: Merge, donor: Model, base: Participant | None, open_model: Open
) -> tuple[list[Slot], list[Restack]]:
    restacks: list[Restack] = []
    regions: dict[str | None, list[Slot]] = {}
    modules = recipe.modules or {}
    parts = divide(modules, donor, recipe.parameters)
    for own, entry in zip(parts, modules.values(), strict=True):
        part = replace(own, towers=find_towers(own, entry, open_model))
        if entry.slices:
            slots, restack = _name_slices(part, entry.slices, base, open_model)
            restacks.append(restack)
        else:
            slots = _name_models(part, entry.models or (), base, open_model)
        for slot in slots:
            regions.setdefault(part.region(slot.name), []).append(slot)
    return _in_order(donor, parts, regions), restacks


def _in_order(donor: Model, parts: Sequence[Part], regions: dict[str | None, list[Slot]]) -> list[Slot]:
    """Put carried tensors and modules in the donor's order: a module stands where its first tensor stood."""
    slots: list[Slot] = []
    for name in donor.checkpoint:
        region = next((found for part in parts if (found := part.region(name)) is not None), None)
        if region is None:
            slots.append(Slot(Place(name, None, None, None), (Contribution(donor, name),), carried=True))
        else:
            slots += regions.pop(region, [])
    # What other models have beside a module and the donor does not: a head that it ties to its embeddings.
    return slots + [slot for rest in regions.values() for slot in rest]
