"""How a method is put to use on a zoo: which models it merges, and on which tasks the result is measured.

A method that takes any number of models merges all experts. One that takes two merges each expert with the next, the
last with the first, so that every expert has its part in two merges. One that takes a single fine-tune takes each
expert in turn. A task's result is the mean over the merges in which its expert takes part, and that of the base's task
the mean over all merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

import weightsmith as ws
from benchmarks.quality.zoo import BASE, Evaluator, Zoo, weights_of
from weightsmith.methods.registry import get_method
from weightsmith.plan.merged import LazyCheckpoint

Scheme = Literal["all", "pairs", "chained pairs", "transferred pairs", "single"]


@dataclass(frozen=True)
class Group:
    """One merge.

    Attributes:
        models: names of the models that are merged.
        base: name of the model that stands as the base.
        tasks: of the experts that take part.
    """

    models: tuple[str, ...]
    base: str
    tasks: tuple[str, ...]


def groups(scheme: Scheme, zoo: Zoo) -> list[Group]:
    """Return the merges of a scheme.

    ``pairs`` has both experts as models beside the base. In ``chained pairs`` the first stands as the base, for methods
    that go from one model to another; in ``transferred pairs`` it does too, and the second and its own base are models.
    """
    if scheme == "all":
        return [Group(zoo.tasks, BASE, zoo.tasks)]
    if scheme == "single":
        return [Group((task,), BASE, (task,)) for task in zoo.tasks]
    pairs = list(zip(zoo.tasks, (*zoo.tasks[1:], zoo.tasks[0]), strict=True))
    if scheme == "pairs":
        return [Group(pair, BASE, pair) for pair in pairs]
    if scheme == "chained pairs":
        return [Group((second,), first, (first, second)) for first, second in pairs]
    return [Group((second, BASE), first, (first, second)) for first, second in pairs]


def merge(group: Group, folder: Path, method: str, parameters: Mapping[str, Any], seed: int) -> LazyCheckpoint:
    """Return one merge, not computed yet.

    Args:
        group: what is merged.
        folder: the models of one seed.
        method: name of the method.
        parameters: its parameters, as :func:`weightsmith.merge` takes them.
        seed: of random methods.
    """
    base = None if get_method(method).base == "unused" else folder / group.base
    return ws.merge(method, [folder / name for name in group.models], base, seed=seed, **parameters)


def measure(
    zoo: Zoo,
    folder: Path,
    method: str,
    parameters: Mapping[str, Any],
    scheme: Scheme,
    seed: int,
    evaluator: Evaluator,
) -> dict[str, float]:
    """Merge as a scheme says and return the result of each task, that of the base's task included.

    Args:
        zoo: whose tasks.
        folder: the models of one seed.
        method: name of the method.
        parameters: its parameters, as :func:`weightsmith.merge` takes them.
        scheme: which models are merged.
        seed: of random methods.
        evaluator: what measures.
    """
    found: dict[str, list[float]] = {task: [] for task in (*zoo.tasks, zoo.base_task)}
    for group in groups(scheme, zoo):
        merged = merge(group, folder, method, parameters, seed)
        tasks = (*group.tasks, zoo.base_task)
        # Read lazily, what a method must know of the whole model would be computed anew for every tensor.
        with TemporaryDirectory() as scratch:
            merged.save(Path(scratch) / "merged", threads=1)
            saved = ws.open(Path(scratch) / "merged")
            results = evaluator(weights_of(saved), saved.config, tasks)
        for task, result in zip(tasks, results, strict=True):
            found[task].append(result)
    return {task: float(np.mean(results)) for task, results in found.items()}
