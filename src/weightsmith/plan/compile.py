"""From a recipe and the headers of its models to a lazy checkpoint. No weight is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from weightsmith import dtypes
from weightsmith.architecture import config as configs
from weightsmith.architecture.stacks import analyse
from weightsmith.card import model_card
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import other_files, tokenizer_files
from weightsmith.checkpoint.reference import ShortNames
from weightsmith.engine.memory import uncollected
from weightsmith.plan.alignment import align
from weightsmith.plan.evaluated import Rearranger
from weightsmith.plan.maker import Maker
from weightsmith.plan.merged import Beside, LazyCheckpoint
from weightsmith.plan.naming import Naming, name_slots
from weightsmith.plan.slots import Model
from weightsmith.plan.vocabularies import check_vocabularies, token_tables
from weightsmith.plan.ways import Ways
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.schema import Merge, Recipe
from weightsmith.tokenizer.chat_template import choose_template, read_template


def compile_recipe(recipe: Recipe, opened: Mapping[str, Checkpoint] | None = None) -> LazyCheckpoint:
    """Make the lazy checkpoint that a recipe describes.

    Args:
        recipe: the recipe; its steps are compiled where a model names them.
        opened: reference -> a checkpoint that is open already.

    Raises:
        PlanError: if the recipe cannot be carried out on these models.
        RecipeError: if a parameter is unknown to its method.
        CheckpointError: if a model cannot be opened.
        MethodError: if the method does not exist or cannot work on these models.
    """
    known: dict[str, Checkpoint] = dict(opened or {})

    def find(reference: str) -> Checkpoint:
        if reference not in known:
            step = recipe.steps.get(reference) if recipe.steps else None
            known[reference] = open_checkpoint(reference) if step is None else _compile_one(step, find, reference)
        return known[reference]

    with uncollected():
        return _compile_one(recipe, find, recipe.name or "merged")


def _compile_one(recipe: Merge, find: Callable[[str], Checkpoint], name: str) -> LazyCheckpoint:
    ways = Ways(recipe)
    open_model, rearranger = _opener(find), Rearranger()
    alignment = align(recipe, open_model, rearranger)
    naming = name_slots(recipe, alignment.opener(open_model) if alignment else open_model)
    methods, warnings = ways.check(naming.slots, naming.models)
    maker = Maker(recipe, ways, rearranger)
    made = {slot.name: maker.make(slot) for slot in naming.slots}
    maker.finish(naming)
    # As they were opened, not as they are seen with the result's tokens.
    models = [open_model(model.reference) for model in naming.models]
    donor = models[0].checkpoint
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    warnings += maker.warnings
    written = {name: maker.dtype_of(tensor) for name, tensor in tensors.items()}
    untied = maker.untied | (alignment.untied if alignment else frozenset())
    config = _config(naming, donor, tensors, written, untied, warnings)
    files = other_files(donor.companions.files)
    if alignment is None:
        files |= tokenizer_files(donor.companions.files)
        warnings += check_vocabularies(naming.models, naming.donor, tensors)
    else:
        warnings += alignment.warnings
        config, notes = alignment.config(config)
        files, more = alignment.beside(files)
        own = tokenizer_files(alignment.source.checkpoint.companions.files)
        files |= own if alignment.files is None else alignment.files
        warnings += [*notes, *more]
    template = choose_template(
        recipe.chat_template, [read_template(model.checkpoint.companions.files) for model in models]
    )
    opened = [open_model(one.reference).checkpoint for one in (*naming.models, *naming.fishers)]
    everything = list(dict.fromkeys([*opened, *(one.checkpoint for one in (*naming.models, *naming.fishers))]))
    steps = [one for one in everything if isinstance(one, LazyCheckpoint)]
    for step in steps:
        warnings += [f"step {step.name}: {warning}" for warning in step.warnings]
    card = model_card(
        to_yaml(recipe),
        methods=methods,
        models=[model.reference for model in models],
        base=recipe.base_model,
        config=config,
    )
    return LazyCheckpoint(
        name,
        tensors,
        recipe=recipe,
        companions=Companions(config, files),
        beside=Beside(files, template, card),
        inputs=everything,
        written=written,
        warnings=list(dict.fromkeys(warnings)),
        components=donor.components,
        rearranged=rearranger.owners,
    )


def _opener(find: Callable[[str], Checkpoint]) -> Callable[[str], Model]:
    models: dict[str, Model] = {}
    names = ShortNames()

    def open_model(reference: str) -> Model:
        if reference not in models:
            models[reference] = Model(reference, names.of(reference), find(reference))
        return models[reference]

    return open_model


def _config(
    naming: Naming,
    donor: Checkpoint,
    tensors: Mapping[str, Any],
    written: Mapping[str, Any],
    untied: Set[str],
    warnings: list[str],
) -> dict[str, Any]:
    config = dict(donor.config)
    if not config:
        return config
    architecture = analyse(donor if naming.restacks else (), config)
    for restack in naming.restacks:
        config, notes = configs.with_layers(config, restack.stack, restack.picked, architecture)
        warnings += notes
    config, notes = configs.with_rows(config, token_tables(tensors, donor, config))
    warnings += notes
    own_head = any(not configs.tied_embeddings(model.checkpoint.config) for model in naming.models)
    if own_head and untied & set(tensors) and configs.tied_embeddings(config):
        config = configs.untie(config)
        warnings.append("the head is no longer tied to the embeddings, because one of the models unties it")
    floats = {dtype for dtype in written.values() if dtypes.is_float(dtype)}
    if floats:
        weights = {d: sum(tensors[n].size for n, w in written.items() if w == d) for d in floats}
        config = configs.with_dtype(config, dtypes.name_of(max(weights, key=lambda dtype: weights[dtype])))
    return config
