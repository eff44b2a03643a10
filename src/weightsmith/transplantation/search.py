"""For each new token the model's tokens that make it up: found once, and kept for a run that goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.progress import ProgressListener
from weightsmith.tokenizer.matching import Numbers
from weightsmith.transplantation.combination import Combinations, Progress
from weightsmith.transplantation.gaussian import mean_of
from weightsmith.transplantation.neighbours import nearest_neighbours
from weightsmith.transplantation.pursuit import MEMORY, matching_pursuit
from weightsmith.transplantation.recipe import Way
from weightsmith.transplantation.rows import Rows
from weightsmith.transplantation.similarity import softmax_of_nearest, sparsemax_of_all

# Bytes of what is worked on at a time.
_BATCH = 400_000_000


@dataclass(frozen=True, eq=False)
class Found:
    """What new tokens are made of.

    Attributes:
        combinations: for each new token, which of ``model`` make it up.
        model: numbers of the model's tokens that are used: ``[S]``, int64.
        seconds: how long it took; 0 where an earlier run had found it.
    """

    combinations: Combinations
    model: Numbers
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Shared:
    """Tokens that donor and model share.

    Attributes:
        donor: their numbers in the donor: ``[S]``, int64.
        model: their numbers in the model: ``[S]``, int64.
    """

    donor: Numbers
    model: Numbers


class Search:
    """The combinations for some new tokens, found when they are first asked for.

    Attributes:
        targets: the new tokens' numbers in the donor: ``[T]``, int64.
        tensor: where the donor's tokens lie: ``[V, d]``.
        nbytes: what is read of the new tokens, in bytes: the measure of progress.
    """

    def __init__(self, way: Way, tensor: Tensor, shared: Shared, targets: Numbers) -> None:
        """Say what is to be found.

        Args:
            way: how.
            tensor: where the donor's tokens lie.
            shared: the anchors.
            targets: the new tokens.
        """
        self._way, self._shared = way, shared
        self.tensor, self.targets = tensor, targets
        self.nbytes = len(targets) * tensor.shape[1] * tensor.dtype.itemsize
        self._found: Found | None = None
        self._lock = threading.Lock()

    @property
    def memory(self) -> tuple[int, int]:
        """About how many bytes are held while it is found: at the least, and where there is room."""
        anchors, width = len(self._shared.donor), self.tensor.shape[1]
        rows = 4 * anchors * width
        batch = min(len(self.targets) * (8 * anchors + 12 * width), _BATCH)
        if self._way.method != "omp":
            return rows + batch, rows + batch
        # Rows of the anchors' products with one another: those of one target, or of all.
        wanted = min(anchors, len(self.targets) * self._way.atoms)
        least = rows + 2 * anchors * min(self._way.atoms, wanted) + batch // 10
        return least, max(least, min(rows + 2 * anchors * wanted + batch, MEMORY))

    @property
    def held(self) -> int:
        """About how many bytes what is found takes, at most, beside the rows of the model that are added up."""
        places = {"omp": self._way.atoms, "nearest": 1}.get(self._way.method, self._way.neighbours or 0)
        return len(self.targets) * places * 12

    def find(
        self,
        *,
        threads: int | None = None,
        memory: int | None = None,
        listener: ProgressListener | None = None,
        kept: Path | None = None,
    ) -> Found:
        """Return what is found; from any thread.

        Args:
            threads: how many threads to use; by default one per core.
            memory: most bytes to hold.
            listener: told of the targets' bytes.
            kept: a file to keep it in for another run, or to take it from.

        Raises:
            MethodError: if there are fewer anchors than the way takes.
            CheckpointError: if a row cannot be read, or is not finite.
        """
        with self._lock:
            if self._found is None:
                self._found = self._known(kept)
            if self._found is None:
                started = time.monotonic()
                combinations = self._look(threads, memory, listener)
                self._found = _used(combinations, self._shared.model, time.monotonic() - started)
                if kept is not None:
                    _keep(self._found, kept)
            elif listener is not None:
                listener.advance(self.nbytes)
            return self._found

    def _look(self, threads: int | None, memory: int | None, listener: ProgressListener | None) -> Combinations:
        way = self._way
        centre = mean_of(Rows(self.tensor), self._shared.donor) if way.centred else None
        rows = Rows(self.tensor, centre)
        each = self.tensor.shape[1] * self.tensor.dtype.itemsize
        progress: Progress | None = None if listener is None else lambda count: listener.advance(count * each)
        anchors, targets = self._shared.donor, self.targets
        common: dict[str, Any] = {"threads": threads, "progress": progress}
        if way.method == "omp":
            if memory is not None:
                common["memory"] = memory
            return matching_pursuit(rows, anchors, targets, count=way.atoms, nearest=way.neighbours, **common)
        if way.method == "interpolation":
            count = min(way.neighbours or len(anchors), len(anchors))
            return nearest_neighbours(
                rows, anchors, targets, count=count, metric=way.metric, scheme=way.weights, **common
            )
        if way.method == "nearest":
            return nearest_neighbours(rows, anchors, targets, count=1, metric="cosine", **common)
        if way.method == "wechsel":
            count = min(way.neighbours or len(anchors), len(anchors))
            return softmax_of_nearest(rows, anchors, targets, count=count, temperature=way.temperature, **common)
        assert way.method == "focus"
        return sparsemax_of_all(rows, anchors, targets, **common)

    def _known(self, kept: Path | None) -> Found | None:
        """Return what an earlier run found, or None; a file that is damaged is none."""
        if kept is None or not kept.exists():
            return None
        try:
            with np.load(kept, allow_pickle=False) as held:
                combinations = Combinations(held["anchors"], held["weights"], held["residual"])
                model = held["model"]
        except (OSError, ValueError, KeyError, BadZipFile, EOFError):
            return None
        return Found(combinations, model)


def _used(combinations: Combinations, model: Numbers, seconds: float) -> Found:
    """Leave out the anchors that nothing is made of: their rows need not be read."""
    anchors = combinations.anchors
    used = np.unique(anchors[anchors >= 0])
    numbers = np.full(len(model) + 1, -1, np.int32)
    numbers[used] = np.arange(len(used), dtype=np.int32)
    return Found(Combinations(numbers[anchors], combinations.weights, combinations.residual), model[used], seconds)


def _keep(found: Found, kept: Path) -> None:
    """Write what was found, whole or not at all; what cannot be kept would be found again."""
    part, one = kept.with_suffix(".part"), found.combinations
    with suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, anchors=one.anchors, weights=one.weights, residual=one.residual, model=found.model)
            file.flush()
            os.fsync(file.fileno())
        part.rename(kept)


def of_model(combinations: Combinations) -> Callable[[], Found]:
    """Return how to get combinations of the model's own tokens, which name them by their numbers there."""
    used = np.unique(combinations.anchors[combinations.anchors >= 0]).astype(np.int64)
    found = _used(combinations, np.arange(int(used[-1]) + 1 if len(used) else 0), 0.0)
    return lambda: found
