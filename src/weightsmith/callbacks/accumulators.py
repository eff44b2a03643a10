"""A running average in memory: what it holds, what a snapshot of weights makes of it, and its way to disk and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.staging import resolve_target, settle
from weightsmith.checkpoint.tensor import Array, ArrayTensor
from weightsmith.errors import CheckpointError, PlanError, shown
from weightsmith.kernels.convert import narrow, widen
from weightsmith.runs.accumulation import Averaging, accumulator_of, begun, moved, spread
from weightsmith.runs.record import Record
from weightsmith.runs.state import NextState, State

# Elements that are worked on at a time: their float64 forms stay in the cache.
_BLOCK = 1 << 14
_FLOAT64 = np.dtype(np.float64)


class Accumulators:
    """The mean of snapshots, and for SWAG their squared deviations.

    The arithmetic is that of ``weightsmith average --update``, to the bit; the state on disk is the same.

    Attributes:
        record: what is known of the average; None before the first snapshot.
    """

    def __init__(self, averaging: Averaging, accumulator: str | None = None) -> None:
        """Begin with nothing.

        Args:
            averaging: what kind of average it is.
            accumulator: ``float32`` or ``float64``; by default what the kind and the weights need.
        """
        accumulator_of(averaging, accumulator, [])
        self.record: Record | None = None
        self._averaging = averaging
        self._accumulator = accumulator
        self._mean: dict[str, Array] = {}
        self._squares: dict[str, Array] = {}
        # The record of the state on disk that the next one takes the place of.
        self._text: str | None = None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a state on disk.

        Raises:
            CheckpointError: if it cannot be read.
            PlanError: if it is a state of another kind.
        """
        state = State(path)
        record = state.record
        for what, wanted, found in (
            ("an average of the kind", self._averaging, record.averaging),
            ("kept in", self._accumulator or record.accumulator, record.accumulator),
        ):
            if wanted != found:
                raise PlanError(
                    f"{os.fspath(path)} is {what} {found}, not {wanted}; give the callback what the state is, or "
                    "another folder"
                )
        self.record, self._text = record, state.text
        # What is read may be read-only.
        self._mean = {name: np.array(tensor.numpy()) for name, tensor in state.mean.items()}
        self._squares = {name: np.array(tensor.numpy()) for name, tensor in state.squares.items()}

    def add(self, values: Mapping[str, Array], step: int) -> None:
        """Take a snapshot of the weights into the average.

        Args:
            values: tensor name -> array, of any dtype of a checkpoint; not kept.
            step: the training step.

        Raises:
            PlanError: if tensors or shapes are not those of the average.
            CheckpointError: if a value is NaN or infinite.
        """
        record = self.record
        if record is None:
            floats = [array.dtype for array in values.values() if dtypes.is_float(array.dtype)]
            kept = accumulator_of(self._averaging, self._accumulator, floats)
            record = Record(self._averaging, kept.name, 0, None, {})
            for name, array in values.items():
                averaged = dtypes.is_float(array.dtype)
                self._mean[name] = np.zeros(array.shape, kept if averaged else array.dtype)
                if averaged and self._averaging.keeps_squares:
                    self._squares[name] = np.zeros(array.shape, kept)
        self._check(values)
        names = {name: dtypes.name_of(array.dtype) for name, array in values.items()}
        after = record.followed(f"step {step}", step, None, names)
        for name, array in values.items():
            if dtypes.is_float(array.dtype):
                self._take(name, np.ascontiguousarray(array).reshape(-1), after.count, step)
            else:
                self._mean[name][...] = array
        self.record = after

    def save(self, path: str | os.PathLike[str], companions: Companions, *, is_adapter: bool = False) -> None:
        """Write the state.

        Args:
            path: its folder.
            companions: the config and files that go with the model.
            is_adapter: whether the weights are those of an adapter.

        Raises:
            OutputError: if it cannot be written, or another run has written it.
        """
        assert self.record is not None
        newest = Checkpoint("training", {}, companions, is_adapter=is_adapter)
        state = NextState(
            self.record,
            {name: ArrayTensor(name, array) for name, array in self._mean.items()},
            {name: ArrayTensor(name, array) for name, array in self._squares.items()},
            newest=newest,
            replaces=self._text,
        )
        state.save(path, threads=1)
        self._text = self.record.to_text()

    def mean(self) -> Mapping[str, Array]:
        """Return the average: tensor name -> array in the accumulator's dtype; integer tensors are the newest's."""
        return self._mean

    def _take(self, name: str, values: Array, count: int, step: int) -> None:
        share = self._averaging.share(count)
        mean, squares = self._mean[name].reshape(-1), self._squares.get(name)
        for start in range(0, len(values), _BLOCK):
            part = slice(start, start + _BLOCK)
            new, before = widen(values[part], _FLOAT64), widen(mean[part], _FLOAT64)
            after = begun(new) if count == 1 else moved(before, new, share)
            if after is None:
                raise CheckpointError(
                    f"{shown(name)} has values that are NaN or infinite at step {step}: training has diverged; the "
                    "average on disk is that of before"
                )
            if squares is not None and count > 1:
                flat = squares.reshape(-1)
                flat[part] = narrow(spread(widen(flat[part], _FLOAT64), before, after, new), flat.dtype)
            mean[part] = narrow(after, mean.dtype)

    def _check(self, values: Mapping[str, Array]) -> None:
        for name in (*self._mean, *values):
            known, found = self._mean.get(name), values.get(name)
            if known is None or found is None or known.shape != found.shape:
                forms = ["missing" if one is None else str(list(one.shape)) for one in (found, known)]
                raise PlanError(
                    f"{shown(name)} is {forms[0]} in the model that is trained, and {forms[1]} in its average; an "
                    "average is of the weights of one model"
                )
            if dtypes.is_float(known.dtype) != dtypes.is_float(found.dtype):
                raise PlanError(
                    f"{shown(name)} is {dtypes.name_of(found.dtype)} in the model that is trained, and "
                    f"{dtypes.name_of(known.dtype)} in its average"
                )


def has_state(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything at the place of a state."""
    target = resolve_target(Path(path))
    settle(target)
    return os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))
