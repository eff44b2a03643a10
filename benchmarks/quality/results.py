"""Results of models and merges, measured once and kept: a file for each seed, setting and part of the data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import weightsmith as ws
from benchmarks.quality.schemes import Scheme, measure
from benchmarks.quality.zoo import Evaluator, PartName, Zoo, digest_of, weights_of
from weightsmith.methods.registry import get_method

# Task -> result.
Scores = dict[str, float]


@dataclass(frozen=True)
class Seed:
    """The trained models of one seed of a zoo, and what has been measured of them.

    A result is kept under a hash of all that it depends on: the bytes of the models and of the data, the parameters,
    and the source text of the method's own functions. Not of what these call in turn: after a change there, delete
    the folder ``results`` or the method's files in it.

    Attributes:
        zoo: the zoo.
        number: the seed; it seeds random methods too.
        folder: where the models are.
        data: the folder that keeps the data of packages.
    """

    zoo: Zoo
    number: int
    folder: Path
    data: Path

    def model(self, name: str, part: PartName) -> Scores:
        """Return the results of a trained model on all tasks.

        Args:
            name: which of the zoo's models.
            part: the part of the data.
        """

        def compute(evaluator: Evaluator) -> Scores:
            checkpoint = ws.open(self.folder / name)
            tasks = (*self.zoo.tasks, self.zoo.base_task)
            found = evaluator(weights_of(checkpoint), checkpoint.config, tasks)
            return dict(zip(tasks, found, strict=True))

        return self._kept(name, part, {"model": name}, compute)

    def merge(self, method: str, parameters: Mapping[str, Any], scheme: Scheme, part: PartName) -> Scores:
        """Return the results of a merge on all tasks.

        Args:
            method: name of the method.
            parameters: its parameters.
            scheme: which models are merged.
            part: the part of the data.
        """

        def compute(evaluator: Evaluator) -> Scores:
            return measure(self.zoo, self.folder, method, parameters, scheme, self.number, evaluator)

        made = {"method": method, "code": code_of(method), "parameters": dict(parameters), "scheme": scheme}
        return self._kept(method, part, made, compute)

    def _kept(self, name: str, part: PartName, made: dict[str, Any], compute: Callable[[Evaluator], Scores]) -> Scores:
        """Return the scores that are kept under a key, or compute and keep them."""
        evaluator = _evaluator(self.zoo, part, self.data)
        key = {**made, "seed": self.number, "part": part, "data": evaluator.digest, "models": self._models}
        digest = digest_of(json.dumps(key, sort_keys=True).encode())
        file = self.folder / "results" / f"{name}-{part}-{digest}.json"
        if file.is_file():
            scores: Scores = json.loads(file.read_text())["scores"]
            return scores
        scores = compute(evaluator)
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**key, "scores": scores}, indent=1) + "\n")
        unfinished.rename(file)
        return scores

    @cached_property
    def _models(self) -> str:
        """A hash of the weights of all models."""
        files = [self.folder / name / "model.safetensors" for name in self.zoo.models]
        return digest_of(*(file.read_bytes() for file in files))


def code_of(method: str) -> str:
    """Return a hash of the source text of a method's own functions.

    Args:
        method: its name.
    """
    found = get_method(method)
    functions = [function for function in (found.function, found.statistic) if function is not None]
    return digest_of(*(inspect.getsource(function).encode() for function in functions))


@cache
def _evaluator(zoo: Zoo, part: PartName, data: Path) -> Evaluator:
    return zoo.evaluator(part, data)
