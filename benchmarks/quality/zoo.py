"""What the benchmark asks of a zoo: trained models of several tasks that share a base, and a way to measure a model."""

from __future__ import annotations

import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.kernels.convert import widen

PartName = Literal["validation", "test"]
Floats = npt.NDArray[np.float32]

BASE, JOINT = "base", "joint"


@dataclass(frozen=True)
class Measure:
    """How well a model does a task, in one number.

    Attributes:
        name: what it is called, with its unit. Whether more of it is better is seen from the experts.
        digits: decimals that are worth printing.
    """

    name: str
    digits: int


class Evaluator(ABC):
    """Measures models on one part of the data, which it holds."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """What tells this part of the data from any other."""

    @abstractmethod
    def __call__(self, weights: Mapping[str, Floats], config: Mapping[str, Any], tasks: Sequence[str]) -> list[float]:
        """Measure a model on each of some tasks.

        Args:
            weights: its tensors by the names that they have on disk.
            config: the contents of its ``config.json``.
            tasks: the tasks.
        """


class Zoo(ABC):
    """Models of one architecture.

    In a folder of each seed there is a ``base``, an expert for each task, under its name, and a ``joint`` model,
    trained on all of the tasks with as much data of each as its expert: what merging would like to be.

    Attributes:
        name: how it is called in the tables.
        base_task: what the base was trained on.
        tasks: of the experts.
        measure: what its evaluators return.
    """

    name: str
    base_task: str
    tasks: tuple[str, ...]
    measure: Measure

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models of a seed, in the order in which they can be trained."""
        return (BASE, *self.tasks, JOINT)

    @abstractmethod
    def make(self, name: str, seed: int, folder: Path, data: Path) -> Any:
        """Train one model and return it, as something with ``save_pretrained``.

        Args:
            name: which of :attr:`models`.
            seed: seed of all of its randomness.
            folder: where the models of the seed are; all but the base start from the base in it.
            data: the folder that keeps the data of packages.
        """

    @abstractmethod
    def evaluator(self, part: PartName, data: Path) -> Evaluator:
        """Return what measures models on one part of the data."""


def train(zoo: Zoo, seed: int, folder: Path, data: Path) -> None:
    """Train all models of a seed that are not there yet.

    What a model is depends on its seed and the base alone, so it does not matter when training is interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in zoo.models:
        if (folder / name).is_dir():
            continue
        began = time.process_time()
        unfinished = folder / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        zoo.make(name, seed, folder, data).save_pretrained(unfinished)
        unfinished.rename(folder / name)
        print(f"{zoo.name}, seed {seed}: trained {name} in {time.process_time() - began:.0f} s", flush=True)


def weights_of(checkpoint: Checkpoint) -> dict[str, Floats]:
    """Read all tensors of a checkpoint as float32."""
    return {
        name: widen(tensor.numpy().reshape(-1), np.dtype(np.float32)).reshape(tensor.shape)
        for name, tensor in checkpoint.items()
    }


def digest_of(*parts: bytes) -> str:
    """Return a short hash of some bytes, of which it matters where one part ends."""
    whole = hashlib.blake2b(digest_size=12)
    for part in parts:
        whole.update(hashlib.blake2b(part).digest())
    return whole.hexdigest()
