"""Making a bundle from models that a person names, or again from the recipe in its manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith.bundle.bundle import Bundle
from weightsmith.bundle.description import is_task_name
from weightsmith.bundle.kind import Kind, make_kind
from weightsmith.bundle.making import Making, Recipe
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.layout import DEFAULT_SHARD_SIZE
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.checkpoint.staging import check_target, resolve_target, settle
from weightsmith.engine.executor import Summary
from weightsmith.engine.progress import ProgressListener
from weightsmith.errors import MethodError, PlanError
from weightsmith.plan.output import check_folder
from weightsmith.plan.remake import understood


@dataclass(frozen=True)
class Created:
    """What was made.

    Attributes:
        bundle: the bundle, opened.
        summary: what the run did.
    """

    bundle: Bundle
    summary: Summary


def create(
    target: str | os.PathLike[str],
    models: Mapping[str, Source] | Sequence[Source],
    *,
    base: Source,
    kind: str | Kind,
    base_by_reference: bool = False,
    dtype: str | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    progress: ProgressListener | None = None,
    **parameters: Any,
) -> Created:
    """Make a bundle of several fine-tunes of one base.

    Args:
        target: the folder to make.
        models: task -> model; or models, each under the last part of its path. An adapter is folded onto the base.
        base: the base.
        kind: a kind, or its name: ``emr``, ``tall``, ``tsv``, ``rmm``, ``bitdelta`` or ``lossless``.
        base_by_reference: whether the bundle does not hold the base, but names it and knows its content by hashes.
        dtype: the dtype in which changes are kept as floats; by default that of the models.
        shard_size: most bytes of tensors in a file.
        threads: how many threads to use; by default one per core.
        overwrite: whether a target that exists may be replaced.
        restart: whether to discard what an unfinished run left, instead of going on from there.
        verify: whether to hash all inputs first, and note the hashes.
        progress: told of progress: of the models' bytes where they are read to plan, of the bundle's own, and again of
            the models' as they are compared with it.
        **parameters: the kind's parameters (``lambda_`` for ``lambda``).

    Raises:
        MethodError: if there is no such kind or parameter.
        PlanError: if these models cannot be bundled.
        CheckpointError: if one cannot be read, or holds values that the kind cannot keep.
        OutputError: if the target exists, is an input, or cannot be written.
        Interrupted: on Ctrl-C; the same call goes on from there.
    """
    if not isinstance(kind, str) and parameters:
        raise MethodError(f"the kind is given with its parameters; {', '.join(parameters)} would change nothing")
    chosen = make_kind(kind, parameters) if isinstance(kind, str) else kind
    path = resolve_target(Path(target))
    check_folder(target, "a bundle is a folder")
    settle(path)
    check_target(path, overwrite=overwrite)
    named = _named(models)
    opened = {task: as_checkpoint(source) for task, source in named.items()}
    recipe = Recipe(
        chosen,
        as_reference(base),
        {task: as_reference(source) for task, source in named.items()},
        base_by_reference,
        dtype,
    )
    with one_blas_thread(chosen):
        making = Making(recipe, opened, as_checkpoint(base), threads=threads, progress=progress)
        summary = making.save(
            target,
            shard_size=shard_size,
            threads=threads,
            overwrite=overwrite,
            restart=restart,
            verify=verify,
            progress=progress,
        )
    return Created(Bundle(str(path), os.fspath(target)), summary)


@contextlib.contextmanager
def one_blas_thread(kind: Kind) -> Iterator[None]:
    """Keep linear algebra to one thread in each of ours: sums that it divides among threads depend on their number."""
    if not kind.uses_matrices:
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Making:
    """Return the bundle that a manifest describes; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        recipe = Recipe(
            make_kind(content["kind"], content["parameters"]),
            content["base"],
            {str(task): str(reference) for task, reference in content["tasks"].items()},
            content["base_by_reference"],
            content["dtype"],
        )
    tasks = {task: open_checkpoint(reference) for task, reference in recipe.tasks.items()}
    with one_blas_thread(recipe.kind):
        return Making(recipe, tasks, open_checkpoint(recipe.base), threads=threads)


def _named(models: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Return the models by task."""
    if isinstance(models, Mapping):
        pairs = list(models.items())
    else:
        pairs = [(default_name(source), source) for source in models]
    if not pairs:
        raise PlanError("a bundle needs at least one model")
    seen: dict[str, str] = {}
    for name, _ in pairs:
        if not is_task_name(name):
            raise PlanError(
                f"a task cannot be named {name!r}: letters, digits, '_', '-' and '.' only, 100 at most, and no '.' or "
                "'-' first; give another with --name"
            )
        # Each has a folder of its own, and some filesystems know no capitals.
        other = seen.setdefault(name.lower(), name)
        if other is not name or len([one for one, _ in pairs if one == name]) > 1:
            raise PlanError(
                f"two tasks would be named {other!r} and {name!r}; name them with --name, once for each model"
            )
    return dict(pairs)


def default_name(source: Source) -> str:
    """Return the name of a task whose model has none: the last part of its path, or of its adapter's."""
    text = source.name if isinstance(source, Checkpoint) else os.fspath(source)
    parsed = parse_reference(text)
    if parsed.adapters:
        parsed = parsed.adapters[-1].reference
    return parsed.task or replace(parsed, revision=None).short_name.removesuffix(".safetensors")
