"""The operations in Python: each takes checkpoints and gives a checkpoint, and moves no byte until it is saved."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.reference import with_adapters
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import Plan
from weightsmith.errors import MethodError, RecipeError
from weightsmith.methods.registry import get_method
from weightsmith.plan.compile import compile_recipe
from weightsmith.plan.merged import LazyCheckpoint
from weightsmith.plan.onto import read_past
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.load import load_recipe, validate
from weightsmith.recipe.schema import Merge, Recipe

if TYPE_CHECKING:
    from weightsmith.comparison import Comparison
    from weightsmith.methods.sparse import Mask

_SOURCES = (str, os.PathLike, Checkpoint)


def open(reference: str | os.PathLike[str], *, task: str | None = None, base: Source | None = None) -> Checkpoint:
    """Open a model, an adapter, or any file or folder of weights, reading headers only.

    Args:
        reference: a folder, a file, ``org/name`` on a model hub, an fsspec URL such as ``s3://…``, each with
            ``@revision``, ``#task`` and ``+adapter`` where they apply.
        task: one of the models of a bundle, where the reference does not name it.
        base: the bundle's base, where the bundle keeps it by reference.

    Raises:
        CheckpointError: if there is nothing there that can be read as a checkpoint.
        UnsafeFileError: if a file asks for something that no file of weights should ask for.
    """
    if task is None and base is None:
        return open_checkpoint(reference)
    from weightsmith.bundle import open_task

    return open_task(reference, task, base=base)


def merge(
    method: str | None,
    models: Sequence[Source],
    base: Source | None = None,
    *,
    onto: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    compat: str | None = None,
    tokenizer_source: Source | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    on_missing: str = "error",
    on_shape_mismatch: str = "error",
    rules: Sequence[Mapping[str, Any]] = (),
    fisher: Sequence[Source | None] | None = None,
    base_fisher: Source | None = None,
    **parameters: Any,
) -> LazyCheckpoint:
    """Merge models, lazily.

    Args:
        method: a method's name; ``weightsmith methods`` lists them. With ``onto``, None for that merge's own.
        models: references, opened checkpoints, or merges that were not saved.
        base: the base, for methods that work on task vectors.
        onto: a merge that weightsmith wrote, to be gone on with: it is the first model, as its manifest says; method,
            base and the parameters for all models are its own where they are not given.
        dtype: dtype of the output; by default that of the inputs.
        out_dtype: dtype of the output where ``dtype`` is to mean something else (see the recipe reference).
        seed: seed of random methods.
        compat: ``"mergekit"`` to restore that tool's numbers where it departs from the published method.
        tokenizer_source: ``"base"``, one of the models, or ``"union"``: whose tokenizer the output takes. Embeddings
            of all models are brought to its tokens first.
        tokenizer: the same with rules for single tokens: ``source``, ``tokens`` and ``pad_to_multiple_of`` as in a
            recipe.
        chat_template: ``"auto"``, a known format's name, or a Jinja template.
        on_missing: what to do with tensors that some inputs lack: ``error``, ``base``, ``first`` or ``skip``.
        on_shape_mismatch: what to do with tensors of different shape: ``error``, ``base`` or ``first``; ``pad`` or
            ``crop`` where the number of rows alone differs.
        rules: for some tensors another method, or other models or parameters; the first that holds decides. Each has
            the keys of a recipe's rule: ``{"filter": "norm", "merge_method": "linear", "parameters": {"weight": 1}}``.
            Its ``models`` are given as here, or as mappings of ``model`` and ``parameters``, and its parameters as
            here: a list is one entry for each of the rule's models where a parameter has a value per model.
        fisher: for methods that take importances of weights, a Fisher checkpoint for each model, or None for one
            without: tensors under the names of the model's weights and in their shapes.
        base_fisher: the same for the base.
        **parameters: the method's parameters (``lambda_`` for ``lambda``). For one that has a value per model,
            a list with one entry per model, or one value for all; any value may be a schedule over layers
            (a list) or a list of conditions, as in a recipe.

    Returns:
        A checkpoint whose tensors are computed when they are read; ``.save(path)`` writes it.

    Raises:
        MethodError: if a method is unknown or does not take these parameters.
        RecipeError: if a rule is not one.
        PlanError: if the models cannot be merged so.
    """
    inputs = _Inputs()
    recipe = build_recipe(
        method,
        [inputs.reference(model) for model in models],
        None if base is None else inputs.reference(base),
        parameters,
        dtype=dtype,
        out_dtype=out_dtype,
        seed=seed,
        compat=compat,
        tokenizer_source=None if tokenizer_source is None else inputs.reference(tokenizer_source),
        tokenizer=None if tokenizer is None else inputs.tokenizer(tokenizer),
        chat_template=chat_template,
        on_missing=on_missing,
        on_shape_mismatch=on_shape_mismatch,
        onto=None if onto is None else os.fspath(onto),
        rules=[inputs.rule(rule) for rule in rules],
        fishers=None if fisher is None else [None if one is None else inputs.reference(one) for one in fisher],
        **({} if base_fisher is None else {"base_fisher": inputs.reference(base_fisher)}),
        steps=inputs.steps,
    )
    return compile_recipe(recipe, inputs.opened)


def build_recipe(
    method: str | None,
    models: Sequence[str],
    base: str | None,
    parameters: Mapping[str, Any],
    rules: Sequence[Any] = (),
    fishers: Sequence[str | None] | None = None,
    onto: str | None = None,
    **settings: Any,
) -> Recipe:
    """Return the recipe of one merge.

    Args:
        method: the method's name.
        models: the models' references.
        base: the base's reference.
        parameters: the method's parameters, as :func:`merge` takes them.
        rules: rules as :func:`merge` takes them, their models by reference.
        fishers: the reference of each model's Fisher checkpoint, None for a model without; or nothing for none.
        onto: the path of a merge to be gone on with.
        **settings: further keys of the recipe.

    Raises:
        MethodError: if the method is unknown or does not take these parameters.
        RecipeError: if a key or value is not one that a recipe takes.
        CheckpointError: if the merge to be gone on with has no manifest.
        PlanError: if it cannot be gone on with, or not so.
    """
    past = None if onto is None else read_past(onto, method)
    if past is not None:
        method, base, parameters = past.method, base or past.base, {**past.shared, **parameters}
    if method is None:
        raise RecipeError("name a method, or a merge to go on with")
    shared, own = _divide(method, parameters, len(models))
    fishers = [None] * len(models) if fishers is None else fishers
    if len(fishers) != len(models):
        raise RecipeError(
            f"fisher has {len(fishers)} entries for {len(models)} models; give one for each, None for a model without"
        )
    if onto is not None and past is not None:
        models, own, fishers = [onto, *models], [dict(past.own), *own], [None, *fishers]
    document = {
        "merge_method": method,
        "models": [
            {**entry, **({} if fisher is None else {"fisher": fisher})}
            for entry, fisher in zip(_with_parameters(models, own), fishers, strict=True)
        ],
        **({"base_model": base} if base is not None else {}),
        **({"parameters": shared} if shared else {}),
        **({"rules": [_rule(rule, f"rules[{i}]", method, models) for i, rule in enumerate(rules)]} if rules else {}),
        **settings,
    }
    return validate(document, "the merge")


def _with_parameters(models: Sequence[str], own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"model": reference, **({"parameters": given} if given else {})}
        for reference, given in zip(models, own, strict=True)
    ]


def _rule(rule: Any, place: str, method: str, models: Sequence[str]) -> Any:
    """Put a rule's parameters of single models under these models, as a recipe has them."""
    if not isinstance(rule, Mapping):
        return rule
    parameters, own_method, given = rule.get("parameters"), rule.get("merge_method") or method, rule.get("models")
    entries = _with_parameters(models, [{}] * len(models)) if given is None else given
    understood = isinstance(own_method, str) and isinstance(entries, list)
    if not isinstance(parameters, Mapping) or not understood or not all(isinstance(one, dict) for one in entries):
        # Nothing to divide, or a mistake that is found with all others.
        return rule
    try:
        shared, own = _divide(own_method, parameters, len(entries))
    except MethodError as error:
        raise MethodError(f"{place}: {error}") from None
    divided = [
        {**entry, "parameters": {**settings, **(entry.get("parameters") or {})}} if settings else entry
        for entry, settings in zip(entries, own, strict=True)
    ]
    return {**rule, "parameters": shared, **({"models": divided} if given is not None or any(own) else {})}


def average(
    models: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    mask: Mask | None = None,
    tokenizer_source: Source | None = None,
) -> LazyCheckpoint:
    """Average models: the mean of their weights, or the weighted mean.

    Args:
        models: references or checkpoints.
        weights: one number per model; they are divided by their sum. By default all are equal.
        mask: for pruned models whose masks differ, which entries stay: those that all models keep (``intersection``),
            any keeps (``union``) or the first keeps (``first``); see the method ``sparse_soup``. By default no mask is
            looked for: a mask that all models have is kept by the mean itself, and masks that differ give a warning
            with the density of the result when it is saved.
        tokenizer_source: one of the models, or ``"union"``: for models whose vocabularies differ, see :func:`merge`.
    """
    weight = 1.0 if weights is None else list(weights)
    if mask is None:
        return merge("linear", models, weight=weight, tokenizer_source=tokenizer_source)
    return merge("sparse_soup", models, weight=weight, mask=mask, tokenizer_source=tokenizer_source)


def fuse(
    base: Source,
    adapters: Source | Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    out_dtype: str | None = None,
) -> LazyCheckpoint:
    """Fold adapters into their base: ``W + sum_i w_i (f_i(W) - W)``, with ``f_i(W)`` what adapter i makes of W.

    Args:
        base: the model.
        adapters: one adapter, or several, of any kinds that fold (docs/reference/adapters.md). Each one's change is
            formed on the base alone, so that their order makes no difference.
        weights: how much of each is taken: one number for all, or one for each; 1 by default.
        out_dtype: dtype of the output; by default that of the base.

    Raises:
        MethodError: if there are not as many weights as adapters, or one is not finite.
        CheckpointError: if an adapter is of a kind that cannot be folded, or does not fit its own config.
        PlanError: if an adapter does not fit the base.
    """
    given = [adapters] if isinstance(adapters, _SOURCES) else list(adapters)
    shares = [1.0] if weights is None else [float(weight) for weight in weights]
    if not given or len(shares) not in (1, len(given)) or not all(map(math.isfinite, shares)):
        raise MethodError(
            f"there are {len(given)} adapters, and the weights {shares}; give a number for each, or one for all"
        )
    if len(shares) == 1:
        shares *= len(given)
    if isinstance(base, Checkpoint) or any(isinstance(adapter, Checkpoint) for adapter in given):
        from weightsmith.adapters.fold import fold

        model: Source = fold(as_checkpoint(base), [as_checkpoint(adapter) for adapter in given], shares)
    else:
        pairs = [(os.fspath(adapter), share) for adapter, share in zip(given, shares, strict=True)]  # type: ignore[arg-type]
        model = with_adapters(os.fspath(base), pairs)
    return merge("passthrough", [model], out_dtype=out_dtype)


def merge_recipe(recipe: Recipe | str | os.PathLike[str]) -> LazyCheckpoint:
    """Make the checkpoint that a recipe describes, lazily.

    Args:
        recipe: a recipe, a path of a YAML file, or the YAML itself.
    """
    return compile_recipe(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def plan(recipe: Recipe | str | os.PathLike[str]) -> Plan:
    """Return what a recipe would do: every output tensor, its place, its inputs, and the bytes and memory."""
    return merge_recipe(recipe).plan()


def save(checkpoint: Checkpoint, target: str | os.PathLike[str], **options: Any) -> Summary:
    """Write a checkpoint as safetensors in the transformers layout.

    Args:
        checkpoint: any checkpoint, lazy or opened; one of PyTorch pickles is converted by this.
        target: the folder to make, or a path ending in ``.safetensors``.
        **options: see :meth:`weightsmith.plan.output.Output.save`.
    """
    lazy = checkpoint if isinstance(checkpoint, LazyCheckpoint) else merge("passthrough", [checkpoint])
    return lazy.save(target, **options)


def diff(one: Source, other: Source) -> Comparison:
    """Compare two checkpoints, tensor by tensor.

    Args:
        one: a reference or a checkpoint: A.
        other: a reference or a checkpoint: B.
    """
    from weightsmith.comparison import compare

    return compare(as_checkpoint(one), as_checkpoint(other))


class _Inputs:
    """Gives every model of a merge the text by which its recipe names it."""

    def __init__(self) -> None:
        self.opened: dict[str, Checkpoint] = {}
        self.steps: dict[str, Merge] = {}

    def reference(self, source: Source) -> str:
        if not isinstance(source, Checkpoint):
            return os.fspath(source)
        if isinstance(source, LazyCheckpoint):
            return self._step(source, source.recipe)
        known = self.opened.setdefault(source.name, source)
        if known is not source:
            raise RecipeError(f"two different checkpoints are named {source.name!r}; give one another name")
        return source.name

    def rule(self, rule: Any) -> Any:
        """Return a rule with its models by reference; what is no rule is left for the recipe's check."""
        models = rule.get("models") if isinstance(rule, Mapping) else None
        if not isinstance(models, list | tuple):
            return rule
        return {**rule, "models": [self._of_rule(entry) for entry in models]}

    def tokenizer(self, asked: Mapping[str, Any]) -> Any:
        """Return what is asked of a tokenizer with its models by reference."""
        tokens = asked.get("tokens")
        if not isinstance(tokens, Mapping):
            return self._of(asked, "source")
        rules = {token: self._of(rule, "source") for token, rule in tokens.items()}
        return {**self._of(asked, "source"), "tokens": rules}

    def _of(self, entry: Any, key: str) -> Any:
        """Return a mapping with the model under a key, or within what is there, by reference."""
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if isinstance(value, _SOURCES):
            return {**entry, key: self.reference(value)}
        return {**entry, key: self._of(value, "model")} if isinstance(value, Mapping) else entry

    def _of_rule(self, entry: Any) -> Any:
        if isinstance(entry, _SOURCES):
            return {"model": self.reference(entry)}
        return self._of(entry, "model")

    def _step(self, source: LazyCheckpoint, recipe: Merge) -> str:
        for name, known in self.opened.items():
            if known is source:
                return name
        for name, step in (recipe.steps if isinstance(recipe, Recipe) else {}).items():
            if self.steps.setdefault(name, step) != step:
                raise RecipeError(f"two different steps are named {name!r}")
        step = Merge.model_validate(recipe.model_dump(exclude={"steps", "name"}))
        # Named by its content, so that one step used twice is one step and two different ones never clash.
        digest = hashlib.blake2b(to_yaml(step).encode(), digest_size=4).hexdigest()
        name = f"{recipe.merge_method}-{digest}"
        self.steps[name] = step
        self.opened[name] = source
        return name


def _divide(method: str, parameters: Mapping[str, Any], models: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Split parameters into those for all models and those for each."""
    known = get_method(method)
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(models)]
    for given, value in parameters.items():
        name = given.rstrip("_")
        per_model = known.parameter(name).per_model
        conditions = isinstance(value, Sequence) and any(isinstance(entry, Mapping) for entry in value)
        if per_model and isinstance(value, Sequence) and not isinstance(value, str) and not conditions:
            if len(value) != models:
                raise MethodError(
                    f"{name} has {len(value)} values for {models} models; give one for each, or one for all"
                )
            for settings, entry in zip(own, value, strict=True):
                settings[name] = entry
        else:
            shared[name] = value
    return shared, own
