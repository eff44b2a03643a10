"""The average of a run's checkpoints, as a recipe: no new arithmetic, only new weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightsmith.api import fuse, merge
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.errors import RecipeError
from weightsmith.methods.sparse import Mask
from weightsmith.plan.merged import LazyCheckpoint
from weightsmith.runs.batch_norm import statistics_within, warnings_of
from weightsmith.runs.discovery import Run, Saved, find_run
from weightsmith.runs.weights import Weights, weighting

# Shown where no metric decides: what there is of these, the first found.
_LOSSES = ("eval_loss", "val_loss", "valid_loss", "loss", "train_loss")


@dataclass(frozen=True)
class Weighted:
    """One checkpoint of an average.

    Attributes:
        saved: the checkpoint.
        weight: its weight; all weights of the average sum to one.
        checkpoint: what was opened.
    """

    saved: Saved
    weight: float
    checkpoint: Checkpoint


@dataclass(frozen=True)
class RunAverage:
    """What is averaged, before anything is read but headers.

    Attributes:
        run: the run.
        checkpoints: those that were chosen, the oldest first, with their weights.
        metric: the metric that is shown: the one that decides the weights, else a loss; None if none was logged.
    """

    run: Run
    checkpoints: tuple[Weighted, ...]
    metric: str | None

    @property
    def newest(self) -> Weighted:
        """The newest of the chosen checkpoints: config, tokenizer and integer buffers are its."""
        return self.checkpoints[-1]

    @cached_property
    def statistics(self) -> list[str]:
        """Names of batch-norm statistics, which an average makes wrong."""
        return statistics_within(self.newest.checkpoint)

    def result(
        self,
        *,
        base: str | None = None,
        dtype: str | None = None,
        mask: Mask | None = None,
        variance_corrected: bool = False,
    ) -> LazyCheckpoint:
        """Return the average: ``sum_i w_i W_i``, each floating tensor by itself.

        The recipe lists the newest first: config, tokenizer, integer buffers and the files beside are the first's.
        Checkpoints of weight 0 are not read, but for the newest.

        Args:
            base: the model that the checkpoints are adapters of. The average is then of the models that they make
                of it, not of their factors: ``W + sum_i w_i (f_i(W) - W)``, and the base is read once.
            dtype: dtype of the output; by default that of the checkpoints.
            mask: for pruned checkpoints whose masks differ, which entries stay: see the method ``sparse_soup``;
                ``first`` is the newest's mask.
            variance_corrected: whether to bring the variance of each matrix back to the mean of the checkpoints': see
                the method of this name.

        Raises:
            RecipeError: if the checkpoints are adapters and there is no base, or the other way round; or a mask, a
                correction and adapters are asked for together.
            PlanError: if they differ in tensors or shapes.
        """
        if mask is not None and variance_corrected:
            raise RecipeError("a variance correction moves zeros off zero: give mask or variance_corrected, not both")
        adapters = [one for one in self.checkpoints if one.checkpoint.is_adapter]
        if adapters and base is None:
            raise RecipeError(
                f"{adapters[0].saved.path} is an adapter, and averaging factors is not averaging the changes they "
                "stand for: name the model it is for with --base, and the models that adapters make of it are averaged"
            )
        if base is not None:
            if len(adapters) < len(self.checkpoints):
                other = next(one for one in self.checkpoints if not one.checkpoint.is_adapter)
                raise RecipeError(f"{other.saved.path} is a model, not an adapter: leave out --base")
            if mask is not None or variance_corrected:
                raise RecipeError(
                    "adapters are averaged as what they add to their base, which has neither mask nor variance of its "
                    "own; save the average, and leave out mask and variance_corrected"
                )
            used = [one for one in self.checkpoints if one.weight]
            return fuse(base, [one.saved.path for one in used], [one.weight for one in used], out_dtype=dtype)
        used = [one for one in reversed(self.checkpoints) if one.weight or one is self.newest]
        models = [one.checkpoint for one in used]
        method, parameters = _method(mask, variance_corrected)
        averaged = merge(method, models, weight=[one.weight for one in used], out_dtype=dtype, **parameters)
        if len(used) > 1:
            averaged.warnings = (*averaged.warnings, *warnings_of(self.newest.checkpoint))
        return averaged

    def to_json(self) -> dict[str, Any]:
        """Return the list as JSON values."""
        return {
            "run": self.run.path,
            "kind": self.run.kind,
            "left_out": list(self.run.left_out),
            "metric": self.metric,
            "checkpoints": [
                {
                    "path": one.saved.path,
                    "step": one.saved.step,
                    "weight": one.weight,
                    "nbytes": one.checkpoint.nbytes,
                    "metrics": dict(one.saved.metrics),
                }
                for one in self.checkpoints
            ],
        }


def choose(
    run_dir: str | os.PathLike[str],
    *,
    weights: Weights = "uniform",
    last: int | None = None,
    every: int = 1,
    steps: tuple[int | None, int | None] | None = None,
    pattern: str | None = None,
) -> RunAverage:
    """Find the checkpoints of a run, choose among them and weight them; headers alone are read.

    Args:
        run_dir: the folder that the checkpoints are in.
        weights: see :func:`weightsmith.runs.weights.weighting`.
        last: take so many of the newest.
        every: take every so-manieth, counted back from the newest.
        steps: first and last step to take, both included; None where it is open.
        pattern: with ``*`` and ``?``, which names in the folder to look at.

    Raises:
        CheckpointError: if there are no such checkpoints, or one cannot be read, or a metric was not logged.
        RecipeError: if the weights are not understood.
        MethodError: if weights are out of range, or do not go with so many checkpoints.
    """
    if every < 1 or (last is not None and last < 1):
        raise RecipeError(f"every and last are numbers from 1; found every={every}, last={last}")
    found = weighting(weights)
    run = find_run(os.fspath(run_dir), pattern)
    saved = run.chosen(steps=steps, every=every, last=last)
    shares = found.of(saved)
    opened = [Weighted(one, share, open_checkpoint(one.path)) for one, share in zip(saved, shares, strict=True)]
    return RunAverage(run, tuple(opened), found.metric or _a_loss(saved))


def average_run(
    run_dir: str | os.PathLike[str],
    *,
    weights: Weights = "uniform",
    last: int | None = None,
    every: int = 1,
    steps: tuple[int | None, int | None] | None = None,
    pattern: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    mask: Mask | None = None,
    variance_corrected: bool = False,
) -> LazyCheckpoint:
    """Average the checkpoints of a training run, lazily.

    >>> ws.average_run("run", last=10, weights="wsm:1-sqrt").save("out")  # doctest: +SKIP

    Args:
        run_dir: the folder that the checkpoints are in: of transformers' Trainer, Lightning,
            torch.distributed.checkpoint, Megatron, or numbered files or folders of any kind.
        weights: ``uniform``, ``ema:0.9``, ``linear-decay``, ``1-sqrt``, ``cosine``, ``wsm:cosine:5000``,
            ``by-metric:loss:2``, …; numbers for the checkpoints, the oldest first; step -> number; or a function from
            the steps to weights that sum to one. All: docs/guide/runs.md.
        last: take so many of the newest.
        every: take every so-manieth, counted back from the newest.
        steps: first and last step to take, both included; None where it is open.
        pattern: with ``*`` and ``?``, which names in the folder to look at.
        base: for checkpoints that are adapters, the model that they are for.
        dtype: dtype of the output; by default that of the checkpoints.
        mask: for pruned checkpoints whose masks differ, which entries stay: ``intersection``, ``union`` or ``first``,
            the newest's; see the method ``sparse_soup``.
        variance_corrected: whether to bring the variance of each matrix back to the mean of the checkpoints'; see the
            method of this name. Checkpoints of one run are so near each other that it changes little.

    Returns:
        A checkpoint whose tensors are computed when they are read; ``.save(path)`` writes it. Optimiser states,
        schedulers and step counters are not read; integer tensors are the newest's.

    Raises:
        CheckpointError: if there are no such checkpoints, or one cannot be read, or a metric was not logged.
        RecipeError: if the weights are not understood, or adapters are given without a base.
        MethodError: if weights are out of range, or do not go with so many checkpoints.
        PlanError: if the checkpoints differ in tensors or shapes.
    """
    chosen = choose(run_dir, weights=weights, last=last, every=every, steps=steps, pattern=pattern)
    return chosen.result(
        base=None if base is None else os.fspath(base), dtype=dtype, mask=mask, variance_corrected=variance_corrected
    )


def _method(mask: Mask | None, variance_corrected: bool) -> tuple[str, dict[str, Any]]:
    if mask is not None:
        return "sparse_soup", {"mask": mask}
    return ("variance_corrected" if variance_corrected else "linear"), {}


def _a_loss(saved: Sequence[Saved]) -> str | None:
    return next((name for name in _LOSSES if any(name in one.metrics for one in saved)), None)
