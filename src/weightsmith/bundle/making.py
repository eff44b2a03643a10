"""A bundle that is not written yet: which tensor is kept in which form, and everything that lies beside the weights."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from weightsmith import __version__, dtypes
from weightsmith.adapters.fold import fold
from weightsmith.architecture.stacks import analyse
from weightsmith.bundle.bundle import Bundle
from weightsmith.bundle.description import Base, BaseTensor, Description, Entry, Form, Task
from weightsmith.bundle.identical import hash_tensor, identical
from weightsmith.bundle.kind import BASE, SHARED, TASKS, WHOLE, Group, Kind, Survey, task_name
from weightsmith.bundle.measure import measure
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.folder import BUNDLE_FILE
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.plan import Plan
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import PlanError, RecipeError
from weightsmith.plan.output import Output

FILES = "files"
_BFLOAT16 = dtypes.float_from_name("bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a bundle is made.

    Attributes:
        kind: its kind, with its parameters.
        base: the base's reference.
        tasks: name -> the model's reference.
        base_by_reference: whether the base stays where it is.
        dtype: the dtype in which changes are kept as floats; None for that of the models.
    """

    kind: Kind
    base: str
    tasks: Mapping[str, str]
    base_by_reference: bool = False
    dtype: str | None = None

    def to_yaml(self) -> str:
        """Return it as YAML, as the bundle's manifest keeps it."""
        content = {
            "kind": self.kind.name,
            "parameters": _plain(self.kind.to_json()),
            "base": self.base,
            "tasks": dict(self.tasks),
            "base_by_reference": self.base_by_reference,
            "dtype": self.dtype,
        }
        return yaml.safe_dump({"bundle": content}, sort_keys=False, allow_unicode=True)


class Making(Output):
    """A bundle that is not written yet: its tensors are computed as they are.

    Attributes:
        recipe: how it is made.
        models: the models by task, adapters folded.
        base: the base.
        tasks: what is restored of each model, and from what.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, Checkpoint],
        base: Checkpoint,
        *,
        threads: int | None = None,
        progress: ProgressListener | None = None,
    ) -> None:
        """Look at the models, and decide how each tensor is kept.

        Reads what must be known before anything can be written: which tensors are the base's to the bit, and what the
        kind asks for.

        Args:
            recipe: how it is made.
            models: the models by task.
            base: the base.
            threads: how many threads to use; by default one per core.
            progress: told of progress when models are read to plan, and when errors are measured.

        Raises:
            PlanError: if these models cannot be bundled.
            MethodError: if a parameter of the kind does not fit them.
            CheckpointError: if one cannot be read, or holds values that the kind cannot keep.
        """
        if base.is_adapter:
            raise PlanError(f"{base.name} is an adapter, and cannot be a base")
        self.recipe = recipe
        self.base = base
        self.models = {task: fold(base, model) if model.is_adapter else model for task, model in models.items()}
        self._threads = threads or default_threads()
        self._listener = progress or Silent()
        for one in (base, *self.models.values()):
            _check(one, recipe.kind)
        with ThreadMapper(self._threads, matrices=recipe.kind.uses_matrices) as mapper:
            same = self._same_as_base(mapper)
            survey = Survey(mapper, self._listener)
            made = recipe.kind.make(self._groups(same), tuple(self.models), survey)
        changed = {(task, group.name) for group in made.groups for task in group.models}
        self.tasks: dict[str, Mapping[str, Entry]] = {}
        tensors = {tensor.name: tensor for tensor in made.tensors}
        for task, model in self.models.items():
            entries = {}
            for name, tensor in model.items():
                form: Form = "base" if (task, name) in same else "change" if (task, name) in changed else "whole"
                entries[name] = Entry(tensor.dtype, tensor.shape, form)
                if form == "whole":
                    tensors[task_name(task, WHOLE, name)] = tensor
            self.tasks[task] = entries
        if not recipe.base_by_reference:
            tensors |= {f"{BASE}/{name}": tensor for name, tensor in base.items()}
        super().__init__("bundle", tensors, inputs=[base, *self.models.values()], written={})

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return self.recipe.to_yaml()

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`: those that hold anything."""
        prefixes = [f"{BASE}/", f"{SHARED}/", *(f"{TASKS}/{task}/" for task in self.tasks)]
        return [Part(prefix) for prefix in prefixes if any(name.startswith(prefix) for name in self)]

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: files of all models, and the description with measured errors."""
        files = _Files(folder)
        notes = []
        if not self.recipe.base_by_reference:
            (folder / BASE).mkdir(exist_ok=True)
            notes += write_companions(folder / BASE, self.base.config, self.base.companions.files)
            files.know(BASE)
        described = {}
        for task, entries in self.tasks.items():
            kept, more = files.keep(self.models[task])
            notes += more
            described[task] = Task(self.recipe.tasks[task], entries, kept)
        with ThreadMapper(self._threads, matrices=self.recipe.kind.uses_matrices) as mapper:
            description = Description(
                version=__version__,
                kind=self.recipe.kind.name,
                parameters=self.recipe.kind.to_json(),
                base=self._described_base(mapper),
                tasks=described,
            )
            file = folder / BUNDLE_FILE
            file.write_text(description.to_text(), "utf-8")
            measured = self._measured(folder, description, mapper)
        file.write_text(replace(description, tasks=measured).to_text(), "utf-8")
        return list(dict.fromkeys(notes))

    def _same_as_base(self, mapper: ThreadMapper) -> set[tuple[str, str]]:
        """Return the tensors of tasks that are the base's to the bit."""
        pairs = [
            (task, name)
            for task, model in self.models.items()
            for name, tensor in model.items()
            if name in self.base and (tensor.shape, tensor.dtype) == (self.base[name].shape, self.base[name].dtype)
        ]
        found = mapper(lambda pair: identical(self.models[pair[0]][pair[1]], self.base[pair[1]]), pairs)
        return {pair for pair, same in zip(pairs, found, strict=True) if same}

    def _groups(self, same: set[tuple[str, str]]) -> list[Group]:
        """Return the tensors of the base that some models change."""
        kind = self.recipe.kind
        asked = dtypes.float_from_name(self.recipe.dtype) if self.recipe.dtype else None
        if asked is not None and asked.itemsize < 2:
            raise RecipeError(f"changes cannot be kept as {self.recipe.dtype}; use float32, bfloat16 or float16")
        architecture = analyse(self.base, self.base.config)
        groups = []
        for name, tensor in self.base.items():
            models = {
                task: model[name]
                for task, model in self.models.items()
                if name in model
                and (task, name) not in same
                and model[name].shape == tensor.shape
                and _has_change(tensor, model[name], kind)
            }
            if models:
                kept = asked or _dtype_of_changes([one.dtype for one in models.values()])
                groups.append(Group(name, tensor, models, kept, architecture.locate(name)))
        return groups

    def _described_base(self, mapper: ThreadMapper) -> Base:
        if not self.recipe.base_by_reference:
            return Base(self.recipe.base)
        needed = {name for entries in self.tasks.values() for name, entry in entries.items() if entry.form != "whole"}
        names = [name for name in self.base if name in needed]
        hashes = mapper(lambda name: hash_tensor(self.base[name]), names)
        return Base(
            self.recipe.base,
            {
                name: BaseTensor(self.base[name].dtype, self.base[name].shape, digits)
                for name, digits in zip(names, hashes, strict=True)
            },
        )

    def _measured(self, folder: Path, description: Description, mapper: ThreadMapper) -> dict[str, Task]:
        """Return the tasks with the errors of what was written."""
        bundle = Bundle(str(folder), base=self.base if self.recipe.base_by_reference else None)
        found = {}
        self._listener.start(sum(model.nbytes for model in self.models.values()), len(self.models), 0)
        try:
            for name, task in description.tasks.items():
                error = measure(bundle.task(name), self.models[name], self.base, mapper, self._listener)
                found[name] = replace(task, error=error)
                self._listener.tensor_done(name)
        finally:
            self._listener.finish()
        return found


class _Files:
    """The files beside the models of a bundle, each content once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, str] = {}

    def know(self, part: str) -> None:
        """Take notice of the files of a folder that is written already."""
        for path in sorted((self._folder / part).rglob("*")):
            if path.is_file() and path.suffix != ".safetensors":
                self._known.setdefault(_hash(path), path.relative_to(self._folder).as_posix())

    def keep(self, model: Checkpoint) -> tuple[dict[str, str], list[str]]:
        """Write a model's files; return name -> path in the bundle, and what a person should know of them."""
        scratch = self._folder / FILES / "new"
        scratch.mkdir(parents=True, exist_ok=True)
        notes = write_companions(scratch, model.config, model.companions.files)
        kept = {}
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            digits = _hash(path)
            place = self._known.setdefault(digits, f"{FILES}/{digits}-{path.name}")
            kept[path.relative_to(scratch).as_posix()] = place
            if not (self._folder / place).exists():
                path.rename(self._folder / place)
        shutil.rmtree(scratch)
        if not any((self._folder / FILES).iterdir()):
            (self._folder / FILES).rmdir()
        return kept, notes


def _check(one: Checkpoint, kind: Kind) -> None:
    if one.components:
        raise PlanError(
            f"{one.name} is a pipeline of several models; bundle one of its components: {one.name}/{one.components[0]}"
        )
    if one.config.get("quantization_config") and not kind.any_dtype:
        raise PlanError(
            f"{one.name} is quantised: its tensors are codes, not weights, and have no changes to speak of; the kind "
            "lossless keeps them, or bundle the model it was made from"
        )


def _has_change(base: Tensor, tensor: Tensor, kind: Kind) -> bool:
    floats = dtypes.is_float(base.dtype) and dtypes.is_float(tensor.dtype)
    return base.size > 0 and (floats or (kind.any_dtype and base.dtype == tensor.dtype))


def _dtype_of_changes(found: list[DType]) -> DType:
    """Return the dtype that all models have or can be widened to; eight bits are too few for a sum of changes."""
    if not all(map(dtypes.is_float, found)):
        return np.dtype(np.float32)
    dtype = dtypes.promote(found)
    return dtype if dtype.itemsize >= 2 else _BFLOAT16


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
