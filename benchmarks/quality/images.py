"""The image zoo: the small vision transformer of ``examples/zoo``, with as many seeds as asked for.

Base and experts are trained by ``examples/zoo/train.py``; here they are kept in float32, so that training can go on
from what is on disk. The models in ``examples/zoo`` are those of seed 0, rounded to float16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.zoo import BASE, JOINT, Evaluator, Floats, Measure, PartName, Zoo, digest_of
from examples.zoo.tasks import BASE_TASK, EXPERTS, SOURCES, TASKS, Part, Source
from weightsmith.quickstart import vit

# So many images at a time stay in the processor's cache: half the time of all at once.
_CHUNK = 50


class Images(Zoo):
    """Experts for ways in which images of digits can be changed, and for images of other things."""

    name = "image"
    base_task = BASE_TASK
    tasks = EXPERTS
    measure = Measure("accuracy, %", digits=1)

    def make(self, name: str, seed: int, folder: Path, data: Path) -> Any:
        """Train one model."""
        # Only training needs PyTorch.
        import torch
        from transformers import ViTForImageClassification

        from examples.zoo import train as training

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        sources = _sources(data)
        if name == BASE:
            model = training.new_model(seed)
            training.fit_base(model, sources, seed)
            return model
        model = ViTForImageClassification.from_pretrained(folder / BASE)
        if name == JOINT:
            # Each expert's share of a batch is a sixth of what it is while the expert is trained.
            schedule = replace(training.FINE, steps=training.FINE.steps * len(EXPERTS))
            training.fit(model, training.joint_batches(sources, schedule.replay, seed + 200), schedule)
        else:
            training.fit_expert(model, sources, name, seed)
        return model

    def evaluator(self, part: PartName, data: Path) -> Evaluator:
        """Return the accuracies on one part of all images."""
        return Accuracies({name: getattr(source, part) for name, source in _sources(data).items()})


class Accuracies(Evaluator):
    """Measures the share of images classified rightly, in per cent, with the forward pass of the quickstart."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        """Change the images for each task.

        Args:
            parts: source -> plain images and labels.
        """
        self._parts = {
            name: Part(task.change(parts[task.source].images), parts[task.source].labels)
            for name, task in TASKS.items()
            if task.source in parts
        }

    @property
    def digest(self) -> str:
        """A hash of the images and labels of all tasks."""
        return digest_of(*(array.tobytes() for part in self._parts.values() for array in (part.images, part.labels)))

    def __call__(self, weights: Mapping[str, Floats], config: Mapping[str, Any], tasks: Sequence[str]) -> list[float]:
        """Measure a model on each of some tasks."""
        return [100 * self._accuracy(weights, config, self._parts[task]) for task in tasks]

    def _accuracy(self, weights: Mapping[str, Floats], config: Mapping[str, Any], part: Part) -> float:
        right = 0
        for first in range(0, len(part.labels), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            found = vit.logits(weights, config, part.images[chunk]).argmax(axis=-1)
            right += int(np.count_nonzero(found == part.labels[chunk]))
        return right / len(part.labels)


@cache
def _sources(data: Path) -> dict[str, Source]:
    return {name: read(data) for name, read in SOURCES.items()}
