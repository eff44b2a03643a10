"""The state of a running average on disk, what follows it, and the model that it is the average for.

A state is a folder. It holds ``mean``, a model of its own in float32 or float64 (with the newest checkpoint's config,
tokenizer and integer tensors), for SWAG ``squares`` with the sums of squared deviations from it, and a record in JSON.
The next state is written beside it and takes its place when it is whole: a training job that is killed at any moment
leaves the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.folder import PIPELINE_FILE, open_weights
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.staging import resolve_target, settle
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import Plan
from weightsmith.errors import CheckpointError, MethodError, OutputError, shown
from weightsmith.plan.output import Output, check_folder, parts_of
from weightsmith.runs.batch_norm import warnings_of
from weightsmith.runs.moments import SampleTensor
from weightsmith.runs.record import RECORD_FILE, Record, read_record, record_text

MEAN, SQUARES = "mean", "squares"


class State:
    """The state of a running average, opened.

    Attributes:
        path: its folder.
        text: its record as it is on disk.
        record: what it knows of itself.
        mean: the mean: float tensors in the accumulator's dtype, all others as the newest checkpoint has them.
        squares: for SWAG, tensor name -> sum of squared deviations; else empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a state, reading headers only.

        Raises:
            CheckpointError: if it is none, or its files do not fit each other.
            OutputError: if another run is writing it now.
        """
        self.path = resolve_target(Path(path))
        settle(self.path)
        self.text = record_text(self.path)
        self.record = read_record(self.path)
        self.mean = open_weights(str(self.path / MEAN), os.fspath(path))
        self.squares: Mapping[str, Tensor] = {}
        accumulator = np.dtype(self.record.accumulator)
        floats = {name: tensor for name, tensor in self.mean.items() if dtypes.is_float(tensor.dtype)}
        wrong = [name for name, tensor in floats.items() if tensor.dtype != accumulator]
        if self.record.averaging.keeps_squares and floats:
            self.squares = open_weights(str(self.path / SQUARES), f"{path}/{SQUARES}")
            kept = {name: (one.shape, one.dtype) for name, one in self.squares.items()}
            wrong += [name for name, one in floats.items() if kept.pop(name, None) != (one.shape, accumulator)]
            wrong += kept
        wrong += set(self.mean) ^ set(self.record.dtypes)
        if wrong:
            raise CheckpointError(
                f"{path}: {shown(wrong[0])} is not as {RECORD_FILE} has it: files of the state were changed; begin a "
                "new one"
            )


class NextState(Output):
    """A state that is not written yet.

    Attributes:
        record: what it will know of itself.
    """

    def __init__(
        self,
        record: Record,
        mean: Mapping[str, Tensor],
        squares: Mapping[str, Tensor],
        *,
        newest: Checkpoint,
        inputs: Sequence[Checkpoint] = (),
        replaces: str | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Collect what a state is made of.

        Args:
            record: what it will know of itself.
            mean: tensor name -> its mean.
            squares: tensor name -> sum of squared deviations from it.
            newest: the checkpoint whose config and files go with the mean.
            inputs: the checkpoints whose files must not change while they are read.
            replaces: the record of the state that it takes the place of; None where there is none.
            warnings: what a person should know before saving it.
        """
        tensors = {f"{MEAN}/{name}": tensor for name, tensor in mean.items()}
        tensors |= {f"{SQUARES}/{name}": tensor for name, tensor in squares.items()}
        super().__init__("running average", tensors, inputs=inputs, written={}, warnings=warnings)
        self.record = record
        self._newest = newest
        self._replaces = replaces
        self._target = Path()

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        last = self.record.seen[-1].name if self.record.seen else None
        return _yaml({"average": str(self.record.averaging), "count": self.record.count, "newest": last})

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`: the mean, and for SWAG the squares, as files of a model each."""
        parts = [Part(f"{kind}/{part.prefix}", part.stem) for kind in (MEAN, SQUARES) for part in _parts(self._newest)]
        return [part for part in parts if any(name.startswith(part.prefix) for name in self)]

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """Write the state; see :meth:`Output.save`. What an update that was killed left half-done is begun anew.

        Raises:
            OutputError: if the target is something else than the state that this one follows.
        """
        self._target = resolve_target(Path(target))
        check_state_target(self._target)
        return super().save(target, **{**options, "overwrite": True, "restart": True})

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: the record, and config and files of the newest checkpoint."""
        # Under the lock of the target: who began with the same state and was faster must not be undone.
        if record_text(self._target) != self._replaces:
            raise OutputError(
                f"{self._target} was updated by another run meanwhile, and this update would undo that; run it again"
            )
        (folder / RECORD_FILE).write_text(self.record.to_text(), "utf-8")
        (folder / MEAN).mkdir(exist_ok=True)
        index = self._newest.companions.files.get(PIPELINE_FILE)
        if index is not None and self._newest.components and self.record.averaging.keeps_squares:
            # By this file the squares are known as those of a pipeline.
            (folder / SQUARES).mkdir(exist_ok=True)
            write_companions(folder / SQUARES, {}, {PIPELINE_FILE: index})
        return _write_files(folder / MEAN, self._newest)


class Averaged(Output):
    """The average of a state, or a sample of SWAG-diagonal's distribution, as a model that is not written yet."""

    def __init__(self, state: State, reference: str, *, dtype: str | None = None, sample: int | None = None) -> None:
        """Lay the model out.

        Args:
            state: the state.
            reference: how a person named it.
            dtype: the dtype of all float tensors; by default each has that of the newest checkpoint.
            sample: the seed of a sample; None for the average itself.

        Raises:
            MethodError: if a sample is asked of an average that has no variance.
            RecipeError: if there is no such dtype.
        """
        record, given = state.record, None if dtype is None else dtypes.float_from_name(dtype)
        if sample is not None:
            _check_sample(state, reference, sample)
        written = {
            name: given or dtypes.from_name(record.dtypes[name])
            for name, tensor in state.mean.items()
            if dtypes.is_float(tensor.dtype)
        }
        tensors = dict(state.mean)
        inputs = [state.mean]
        if sample is not None:
            tensors |= {
                name: SampleTensor(name, state.mean[name], squares, record.count, written[name], sample)
                for name, squares in state.squares.items()
            }
            inputs += [state.squares] if isinstance(state.squares, Checkpoint) else []
        super().__init__(
            f"average of {record.count} checkpoints",
            tensors,
            inputs=inputs,
            written=written,
            companions=state.mean.companions,
            warnings=warnings_of(tensors) if record.count > 1 else (),
            components=state.mean.components,
        )
        self.is_adapter = state.mean.is_adapter
        self._settings = {"state": reference, "dtype": dtype, "sample": sample}

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return _yaml({name: value for name, value in self._settings.items() if value is not None})

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`: those of the checkpoints."""
        return _parts(self)

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: config and files of the newest checkpoint."""
        return _write_files(folder, self)


def check_state_target(target: Path) -> None:
    """Check that a state may be written at a place: nothing else is there.

    Raises:
        OutputError: if something else is there.
    """
    check_folder(target, "the state of a running average is a folder")
    if not os.path.lexists(target) or record_text(target) is not None:
        return
    if not target.is_dir() or any(target.iterdir()):
        raise OutputError(f"{target} is there, and is not the state of a running average; choose another folder")


def _check_sample(state: State, reference: str, seed: int) -> None:
    if not state.record.averaging.keeps_squares:
        raise MethodError(
            f"{reference} is a running average of the kind {state.record.averaging}, which has no variance; samples "
            "are drawn from one begun with --weights swag"
        )
    if state.record.count < 2:
        raise MethodError(f"{reference} has one checkpoint, and so no variance; a sample needs at least two")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MethodError(f"the seed of a sample is {shown(seed)}; a whole number is needed")


def _parts(model: Checkpoint) -> list[Part]:
    return [Part("", "adapter_model")] if model.is_adapter else parts_of(model)


def _write_files(folder: Path, model: Checkpoint) -> list[str]:
    """Write a model's config and files, those of an adapter under their own name."""
    if not model.is_adapter:
        return write_companions(folder, model.config, model.companions.files)
    if model.config:
        (folder / "adapter_config.json").write_text(
            json.dumps(model.config, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
    return write_companions(folder, {}, model.companions.files)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump({"running": dict(content)}, sort_keys=False, allow_unicode=True)
