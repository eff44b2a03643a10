"""What both callbacks do: take snapshots as the model trains, average them beside it, and save the average."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weightsmith.callbacks.accumulators import Accumulators, has_state
from weightsmith.callbacks.snapshots import Snapshots, unwrapped
from weightsmith.checkpoint.checkpoint import Companions
from weightsmith.checkpoint.staging import check_target
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError, OutputError, PlanError
from weightsmith.runs.accumulation import Averaging
from weightsmith.runs.running import running_average


class AveragingWhileTraining:
    """A running average beside a training.

    Weights are copied in the trainer's thread, every so many steps; averaging and writing is the work of a thread of
    its own. There is one copy: where the thread is not done with it when the next is due, the trainer waits. What goes
    wrong in the thread is raised in the trainer, at the next step at the latest.
    """

    def __init__(
        self,
        state: str | os.PathLike[str],
        *,
        every: int = 1,
        start: int = 0,
        weights: str | Averaging = "uniform",
        bias_correction: bool = False,
        accumulator: str | None = None,
        save_every: int | None = None,
        out: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
    ) -> None:
        """Say what is averaged, when, and where to.

        Args:
            state: the folder of the running average, as ``weightsmith average --update`` has it. A training that is
                resumed goes on with it.
            every: take a snapshot every so many optimiser steps.
            start: take none before this step: averages begin where the loss has settled.
            weights: ``uniform``, ``ema:DECAY`` (per snapshot, not per step) or ``swag``.
            bias_correction: of an EMA, see :class:`weightsmith.runs.accumulation.Averaging`.
            accumulator: ``float32`` or ``float64``; by default what kind and weights need.
            save_every: write the state every so many steps; by default whenever the trainer saves a checkpoint. At the
                end of the training it is written always.
            out: a folder for the average as a model, written with the state; None for none.
            dtype: the dtype of its float tensors; by default each has that of the trained model.

        Raises:
            MethodError: if there is no such average, or a number is below 1.
        """
        for name, number, least in (("every", every, 1), ("start", start, 0), ("save_every", save_every, 1)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise MethodError(f"{name} is {number!r}; a whole number from {least} is needed")
        chosen = weights
        if not isinstance(chosen, Averaging):
            chosen = Averaging.parse(chosen, bias_correction=bias_correction)
        self.state = os.fspath(state)
        self.out = None if out is None else os.fspath(out)
        self._every = every
        self._start = start
        self._save_every = save_every
        self._dtype = dtype
        self._averaging = chosen
        self._accumulator = accumulator
        self._accumulators = Accumulators(chosen, accumulator)
        self._snapshots = Snapshots()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._counted = self._saved = -1

    def begin(self, step: int) -> None:
        """Begin with a training, or go on with one.

        Args:
            step: the steps that are done.

        Raises:
            OutputError: if a new training finds a state, or a model in the place of its average.
            CheckpointError: if the state of a resumed one cannot be read.
            PlanError: if it is of another kind.
        """
        self._accumulators = Accumulators(self._averaging, self._accumulator)
        self._counted = self._saved = -1
        if step == 0 and self.out is not None:
            check_target(Path(self.out), overwrite=False)
        if has_state(self.state):
            if step == 0:
                raise OutputError(
                    f"{self.state} is there already, and this training begins at step 0: choose another folder, or "
                    "move it away"
                )
            self._accumulators.load(self.state)
            record = self._accumulators.record
            self._counted = self._saved = -1 if record is None or record.step is None else record.step
            if self._counted > step:
                warnings.warn(
                    f"{self.state} holds snapshots up to step {self._counted}, and the training goes on from step "
                    f"{step}: those in between are not taken again",
                    stacklevel=2,
                )
        self._pool = ThreadPoolExecutor(1, "weightsmith-average")

    def after_step(self, step: int, weights: Callable[[], Mapping[str, Any]]) -> None:
        """Take a snapshot, if one is due.

        Args:
            step: the steps that are done.
            weights: returns tensor name -> PyTorch tensor.

        Raises:
            PlanError: if the weights do not fit the average.
            CheckpointError: if they are not finite.
        """
        if self._pending is not None and self._pending.done():
            self.wait()
        if self._pool is None or step <= self._counted or step < max(self._start, 1) or step % self._every:
            return
        # There is one copy, which the thread may be reading.
        self.wait()
        values = self._snapshots.take(weights())
        self._counted = step
        self._submit(lambda: self._accumulators.add(values, step))

    def is_due(self, step: int) -> bool:
        """Whether the state is to be written after a step, by itself."""
        return self._save_every is not None and step % self._save_every == 0

    def save(self, companions: Callable[[], tuple[Companions, bool]]) -> None:
        """Write the state, and the model beside it, in the thread.

        Args:
            companions: returns the config and files that go with the model, and whether it is an adapter.
        """
        self.wait()
        if self._pool is None or self._accumulators.record is None or self._saved == self._counted:
            return
        beside, is_adapter = companions()
        self._saved = self._counted
        self._submit(lambda: self._write(beside, is_adapter))

    @property
    def saves_with_checkpoints(self) -> bool:
        """Whether the state is written when the trainer saves a checkpoint."""
        return self._save_every is None

    def wait(self) -> None:
        """Wait for the thread, and raise what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def end(self) -> None:
        """Wait for the thread, and end it; raise what went wrong in it."""
        try:
            self.wait()
        finally:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.shutdown()

    def average(self) -> Mapping[str, Array]:
        """Return the average as it is: tensor name -> array in the accumulator's dtype. Later snapshots change it.

        Raises:
            PlanError: if no snapshot was taken yet.
        """
        self.wait()
        if self._accumulators.record is None:
            raise PlanError(f"{self.state} has no snapshot yet: there is no average")
        return self._accumulators.mean()

    def copy_to(self, model: Any) -> None:
        """Put the average into a model, in place; for an evaluation, say. Keep the model's own weights before.

        Args:
            model: a ``torch.nn.Module`` with the tensors that are averaged, under the same names. A model whose files
                have other names than its memory (fused experts, say) is loaded from ``out`` instead.

        Raises:
            PlanError: if no snapshot was taken yet, or it lacks a tensor of the average.
        """
        import torch

        average, own = self.average(), unwrapped(model).state_dict()
        for name in average:
            if name not in own or own[name].shape != average[name].shape:
                raise PlanError(f"the model has no tensor {name} {list(average[name].shape)}, which the average has")
        with torch.no_grad():
            for name, array in average.items():
                own[name].copy_(torch.from_numpy(array))

    def _write(self, companions: Companions, is_adapter: bool) -> None:
        self._accumulators.save(self.state, companions, is_adapter=is_adapter)
        if self.out is not None:
            running_average(self.state, dtype=self._dtype).save(self.out, overwrite=True, restart=True, threads=1)

    def _submit(self, job: Callable[[], None]) -> None:
        assert self._pool is not None
        self._pending = self._pool.submit(job)
