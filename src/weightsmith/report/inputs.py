"""What a report is about: models that are named, those of a recipe, or a merged folder with what it is made of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint, Identity
from weightsmith.checkpoint.folder import open_weights
from weightsmith.checkpoint.manifest import MANIFEST_FILE, Manifest, manifest_text, read_manifest
from weightsmith.checkpoint.reference import ShortNames, parse_reference
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.checkpoint.storage import is_url
from weightsmith.errors import ReportError, WeightsmithError
from weightsmith.plan.compile import compile_recipe
from weightsmith.plan.run_record import RunRecord
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.load import load_recipe
from weightsmith.recipe.schema import Merge, Recipe
from weightsmith.report.findings import FileState, InputFile, Kind, Merged, RecipeFacts, RecipeInput

_RECIPES = (".yaml", ".yml")
# What the texts of outputs that are no merges begin with; see weightsmith.plan.remake.
_NO_RECIPE = re.compile(r"(?!merge_method|models|slices|modules|base_model|steps)\w+:\n")


@dataclass(frozen=True)
class Side:
    """A model that takes part: its label, how it was named, and its tensors."""

    label: str
    reference: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Inputs:
    """What a report is about.

    Attributes:
        kind: see :class:`weightsmith.report.findings.Report`.
        base: what task vectors are taken from.
        base_named: whether a person named it.
        models: the others.
        result: the merged result, or None.
        recipe: facts on the recipe, or None.
        merged: facts on the folder, or None.
        notes: what a person should know.
        restacked: whether the result's layers are not the inputs' layers of the same number.
    """

    kind: Kind
    base: Side
    base_named: bool
    models: tuple[Side, ...]
    result: Side | None = None
    recipe: RecipeFacts | None = None
    merged: Merged | None = None
    notes: tuple[str, ...] = ()
    restacked: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        """All of them: the base, the models, the result."""
        return (self.base, *self.models, *(() if self.result is None else (self.result,)))


def find_inputs(sources: Sequence[Source | Recipe], base: Source | None) -> Inputs:
    """Return what a report is about.

    Args:
        sources: models; or one recipe, by its file or itself; or one merged folder.
        base: the base, for models alone.

    Raises:
        ReportError: if nothing is named, or a base beside a recipe, or an adapter without its base.
        CheckpointError: if a model cannot be opened.
        RecipeError: if the recipe is none.
        PlanError: if a step of the recipe cannot be carried out.
    """
    if not sources:
        raise ReportError("name what the report is to be about: models, a recipe, or a merged folder")
    (first, *more) = sources
    recipe = _recipe(first)
    if recipe is not None or any(_recipe(one) is not None for one in more):
        if more or recipe is None:
            raise ReportError("a report is about one recipe, or about models: name the recipe alone")
        if base is not None:
            raise ReportError("a recipe names its base itself (base_model): leave --base away")
        return _of_recipe(recipe, to_yaml(recipe))
    models = [one for one in sources if not isinstance(one, Recipe)]
    if not more and base is None:
        found = _manifest(first)
        if found is not None:
            return _of_merged(Path(os.fspath(first)), found)  # type: ignore[arg-type]
    return _of_models(models, base)


def _recipe(source: Source | Recipe) -> Recipe | None:
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Checkpoint) or not os.fspath(source).lower().endswith(_RECIPES):
        return None
    return load_recipe(source)


def _manifest(source: Source | Recipe) -> Manifest | None:
    """Return the manifest of a merge, None for anything else."""
    if isinstance(source, Checkpoint | Recipe) or not os.path.exists(source):
        return None
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        return None
    text, where = manifest_text(path)
    manifest = None if text is None else read_manifest(text, where)
    return None if manifest is None or _NO_RECIPE.match(manifest.recipe) else manifest


def _of_models(sources: Sequence[Source], base: Source | None) -> Inputs:
    names = ShortNames()
    sides = [_side(names, source) for source in ([] if base is None else [base]) + list(sources)]
    return Inputs("models", sides[0], base is not None, tuple(sides[1:]))


def _side(names: ShortNames, source: Source) -> Side:
    reference = as_reference(source)
    return _checked(Side(names.of(reference), reference, as_checkpoint(source)))


def _checked(side: Side) -> Side:
    if side.checkpoint.is_adapter:
        raise ReportError(f"{side.reference} is an adapter, not a model: name it on its base, as BASE+{side.reference}")
    return side


def _of_recipe(recipe: Recipe, text: str) -> Inputs:
    names, find = ShortNames(), _finder(recipe)
    references = list(dict.fromkeys(_references(recipe)))
    if recipe.base_model is not None:
        references = [recipe.base_model, *(one for one in references if one != recipe.base_model)]
    sides = [_checked(Side(names.of(one), one, find(one))) for one in references]
    return Inputs(
        "recipe",
        sides[0],
        recipe.base_model is not None,
        tuple(sides[1:]),
        recipe=_facts(recipe, text, sides),
        restacked=_restacks(recipe),
    )


def _of_merged(path: Path, manifest: Manifest) -> Inputs:
    """Return a merged folder with its inputs, as far as they are still there."""
    recipe = load_recipe(manifest.recipe)
    find, notes, known = _finder(recipe), [], {}
    references = list(dict.fromkeys([*([recipe.base_model] if recipe.base_model else []), *_references(recipe)]))
    gone = [one.path for one in manifest.inputs if _state(one) == "missing"]
    for reference in references:
        try:
            # A folder that is gone may be a model's name on a hub, which nobody asked for.
            _refuse_gone(reference, recipe, gone)
            known[reference] = find(reference)
        except WeightsmithError as error:
            notes.append(f"{reference} cannot be opened any more, and is in no figure: {error}")
    names = ShortNames()
    sides = [_checked(Side(names.of(one), one, known[one])) for one in references if one in known]
    result = Side(names.of(path), str(path), open_weights(str(path), str(path)))
    files = dict.fromkeys(entry.file for entry in manifest.tensors.values())
    folder = path if path.is_dir() else path.parent
    merged = Merged(
        path=str(path),
        version=manifest.version,
        arithmetic=manifest.arithmetic,
        written=_written(path),
        files={file: (folder / file).stat().st_size for file in files if (folder / file).exists()},
        inputs=tuple(InputFile(one.path, one.size, _state(one)) for one in manifest.inputs),
        run=RunRecord.of(path / MANIFEST_FILE if path.is_dir() else path),
    )
    notes += [f"{one.path} was changed since it was merged" for one in merged.inputs if one.state == "changed"]
    if _restacks(recipe):
        notes.append("the recipe puts layers together anew: how much of each input is in a layer cannot be told")
    facts = _facts(recipe, manifest.recipe, sides)
    base_there = recipe.base_model is None or recipe.base_model in known
    if not sides or not base_there:
        notes.append("without the base there is nothing to compare with: the result's own health alone is looked at")
        return Inputs("merged", result, False, (), None, facts, merged, tuple(notes), _restacks(recipe))
    named = recipe.base_model is not None
    return Inputs("merged", sides[0], named, tuple(sides[1:]), result, facts, merged, tuple(notes), _restacks(recipe))


def _refuse_gone(reference: str, recipe: Recipe, gone: Sequence[str]) -> None:
    """Raise an error if a model, or one that a step is made of, lay in files that are not there any more.

    Raises:
        ReportError: with the first of these files.
    """
    left, seen = [reference], set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        step = recipe.steps.get(name)
        if step is not None:
            left += [*([step.base_model] if step.base_model else []), *_references(step)]
            continue
        parsed = parse_reference(name)
        for path in (parsed.path, *(one.reference.path for one in parsed.adapters)):
            file = next((one for one in gone if Path(one).is_relative_to(path)), None)
            if file is not None and not os.path.exists(path):
                where = "" if os.path.isabs(file) else " here; run the report in the folder that the merge was run in"
                raise ReportError(f"there is no {file}{where}")


def _finder(recipe: Recipe) -> Callable[[str], Checkpoint]:
    """Return what opens a model by its reference: a file, or the result of a step, which is computed as it is read."""
    known: dict[str, Checkpoint] = {}

    def find(reference: str) -> Checkpoint:
        if reference not in known:
            step = recipe.steps.get(reference)
            if step is None:
                known[reference] = open_checkpoint(reference)
            else:
                whole = Recipe.model_validate(step.model_dump() | {"steps": recipe.steps, "name": reference})
                known[reference] = compile_recipe(whole, known)
        return known[reference]

    return find


def _references(recipe: Merge) -> Iterator[str]:
    """Yield the models that a merge names, in the order in which it does."""
    yield from (one.model for one in recipe.models or ())
    slices = [*(recipe.slices or ())]
    for module in (recipe.modules or {}).values():
        yield from (one.model for one in module.models or ())
        slices += module.slices or ()
    for piece in slices:
        yield from (one.model for one in piece.sources)
        if piece.base_model is not None:
            yield piece.base_model


def _restacks(recipe: Merge) -> bool:
    """Whether a layer of the result is made of layers that have another number in the inputs."""
    pieces = [list(recipe.slices or ())] + [list(module.slices or ()) for module in (recipe.modules or {}).values()]
    for slices in pieces:
        place = 0
        for piece in slices:
            first, last = piece.sources[0].layer_range
            if any(source.layer_range[0] != place for source in piece.sources):
                return True
            place += last - first
    return False


def _facts(recipe: Recipe, text: str, sides: Sequence[Side]) -> RecipeFacts:
    labels = {side.reference: side.label for side in sides}
    return RecipeFacts(
        text=text,
        method=recipe.merge_method,
        inputs=tuple(
            RecipeInput(labels.get(one.model, one.model), _settings(one.model_dump(exclude_defaults=True)))
            for one in recipe.models or ()
        ),
        parameters=_settings({"parameters": recipe.model_dump(exclude_defaults=True).get("parameters", {})}),
        steps=tuple(recipe.steps),
        dtype=recipe.out_dtype or recipe.dtype or "",
        by_tokens=any(one.asked_tokenizer is not None for one in (recipe, *recipe.steps.values())),
    )


def _settings(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of a model or merge, each as YAML in a line."""
    return {name: _in_line(value) for name, value in entry.get("parameters", {}).items()}


def _in_line(value: Any) -> str:
    plain = yaml.safe_load(yaml.safe_dump(_lists(value)))
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _lists(value: Any) -> Any:
    """Return a value with lists for tuples, which YAML does not know."""
    if isinstance(value, Mapping):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value


def _written(path: Path) -> str:
    file = path / MANIFEST_FILE if path.is_dir() else path
    return datetime.fromtimestamp(int(file.stat().st_mtime), UTC).isoformat()


def _state(identity: Identity) -> FileState:
    if is_url(identity.path):
        return "unknown"
    try:
        found = os.stat(identity.path)
    except OSError:
        return "missing"
    return "same" if (found.st_size, found.st_mtime_ns) == (identity.size, identity.modified) else "changed"
