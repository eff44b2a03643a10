"""From a recipe and the headers of its models to a lazy checkpoint. No weight is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from weightsmith.errors import PlanError
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
    naming = name_slots(recipe, _opener(find))
    methods, warnings = ways.check(naming.slots, naming.models)
    maker = Maker(recipe, ways)
    made = {slot.name: maker.make(slot) for slot in naming.slots}
    maker.finish(naming)
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    warnings += maker.warnings
    written = {name: maker.dtype_of(tensor) for name, tensor in tensors.items()}
    config = _config(recipe, naming, maker, tensors, written, warnings)
    donor = naming.donor.checkpoint
    tokenizer = _tokenizer_of(recipe, naming)
    files = {
        **other_files(donor.companions.files),
        **tokenizer_files(tokenizer.checkpoint.companions.files),
    }
    warnings += check_vocabularies(naming.models, tokenizer, tensors)
    template = choose_template(
        recipe.chat_template, [read_template(model.checkpoint.companions.files) for model in naming.models]
    )
    everything = [one.checkpoint for one in (*naming.models, *naming.fishers)]
    steps = [one for one in everything if isinstance(one, LazyCheckpoint)]
    for step in steps:
        warnings += [f"step {step.name}: {warning}" for warning in step.warnings]
    card = model_card(
        to_yaml(recipe),
        methods=methods,
        models=[model.reference for model in naming.models],
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
        resized=maker.resizer.owners,
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
    recipe: Merge,
    naming: Naming,
    maker: Maker,
    tensors: Mapping[str, Any],
    written: Mapping[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    config = dict(naming.donor.checkpoint.config)
    if not config:
        return config
    architecture = analyse(naming.donor.checkpoint if naming.restacks else (), config)
    for restack in naming.restacks:
        config, notes = configs.with_layers(config, restack.stack, restack.picked, architecture)
        warnings += notes
    config, notes = configs.with_rows(config, token_tables(tensors, naming.donor.checkpoint, config))
    warnings += notes
    own_head = any(not configs.tied_embeddings(model.checkpoint.config) for model in naming.models)
    if own_head and maker.untied & set(tensors) and configs.tied_embeddings(config):
        config = configs.untie(config)
        warnings.append("the head is no longer tied to the embeddings, because one of the models unties it")
    floats = {dtype for dtype in written.values() if dtypes.is_float(dtype)}
    if floats:
        weights = {d: sum(tensors[n].size for n, w in written.items() if w == d) for d in floats}
        config = configs.with_dtype(config, dtypes.name_of(max(weights, key=lambda dtype: weights[dtype])))
    return config


def _tokenizer_of(recipe: Merge, naming: Naming) -> Model:
    """Return the model whose tokenizer the result takes: the donor, or the one the recipe names."""
    source = recipe.tokenizer_source
    if recipe.tokenizer is not None:
        source = recipe.tokenizer.source
        if recipe.tokenizer.tokens or recipe.tokenizer.pad_to_multiple_of:
            raise PlanError(
                "tokenizer.tokens and tokenizer.pad_to_multiple_of rebuild embeddings token by token, which "
                "this version does not do yet; take one model's tokenizer with tokenizer_source"
            )
    if source is None:
        return naming.donor
    if source == "union":
        raise PlanError(
            "tokenizer_source: union is not supported yet; take one model's tokenizer: base, or a model's name"
        )
    if source == "base":
        if recipe.base_model is None:
            raise PlanError("tokenizer_source: base needs a base_model")
        return naming.donor
    for model in naming.models:
        if model.reference == source:
            return model
    names = ", ".join(model.reference for model in naming.models)
    raise PlanError(f"tokenizer_source {source!r} is none of the models that are merged: {names}")
