"""Running averages: each checkpoint of a run is read when it comes, and needed no more."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.bundle.identical import hash_tensor
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.manifest import hash_of
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.checkpoint.staging import resolve_target, settle
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.executor import Summary
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError, PlanError, RecipeError, shown
from weightsmith.plan.remake import understood
from weightsmith.runs.accumulation import Averaging, accumulator_of
from weightsmith.runs.discovery import step_of
from weightsmith.runs.moments import MovedMean, MovedSquares
from weightsmith.runs.record import Record, record_text
from weightsmith.runs.state import Averaged, NextState, State, check_state_target


@dataclass(frozen=True)
class Updated:
    """What an update did.

    Attributes:
        record: what the state knows of itself now.
        summary: what the run did.
    """

    record: Record
    summary: Summary


def update_average(
    state: str | os.PathLike[str],
    checkpoint: Source,
    *,
    weights: str | Averaging | None = None,
    bias_correction: bool = False,
    accumulator: str | None = None,
    step: int | None = None,
    again: bool = False,
    threads: int | None = None,
    progress: ProgressListener | None = None,
) -> Updated:
    """Take one more checkpoint into a running average, and begin the average if there is none.

    Reads the checkpoint twice, once to know it again, and the state once; holds blocks of both. Killed at any moment,
    the state is the old one or the new one, and the same call does what is to be done.

    Args:
        state: the folder of the state.
        checkpoint: the checkpoint: a reference or an opened one.
        weights: ``uniform``, ``ema:DECAY`` or ``swag``; by default what the state is, or ``uniform`` for a new one.
        bias_correction: of an EMA, see :class:`weightsmith.runs.accumulation.Averaging`.
        accumulator: ``float32`` or ``float64``; by default float32, or float64 where the checkpoint has float64 tensors
            or the decay is above 0.999.
        step: the checkpoint's training step; by default the one that its name tells, if it does.
        again: whether to take a checkpoint that is in the average already once more.
        threads: how many threads to use; by default one per core.
        progress: told of progress.

    Raises:
        MethodError: if there is no such average, or the state is one of another kind.
        PlanError: if the checkpoint is in the average already, or its tensors do not fit the state's.
        CheckpointError: if it or the state cannot be read, or it holds values that are NaN or infinite.
        OutputError: if the state cannot be written, or another run updates it.
    """
    wanted, target = _wanted(weights, bias_correction), resolve_target(Path(state))
    settle(target)
    check_state_target(target)
    known = None if record_text(target) is None else State(state)
    opened = as_checkpoint(checkpoint)
    _check_averaged(opened)
    if known is not None:
        _check_settings(known, wanted, accumulator, state)
        _check_fits(known, opened)
    count = threads or default_threads()
    step = step_of(opened.name.rstrip("/").rpartition("/")[2]) if step is None else step
    digits = _digits(opened, count)
    if known is not None:
        _check_new(known.record, opened.name, step, digits, again=again)
    output = _next(known, opened, wanted, accumulator, step, digits)
    return Updated(output.record, output.save(state, threads=count, progress=progress))


def running_average(state: str | os.PathLike[str], *, dtype: str | None = None, sample: int | None = None) -> Averaged:
    """Return the average that a state holds, as a model to save.

    Args:
        state: the folder of the state.
        dtype: the dtype of all float tensors; by default each has that of the newest checkpoint.
        sample: a seed: return a sample of SWAG-diagonal's normal distribution instead, ``mean + sqrt(variance) z``
            (Maddox et al. 2019, arXiv:1902.02476, section 3.2, with ``M2 / (n - 1)`` for the variance where the paper
            has ``M2 / n``). The same seed gives the same weights on every machine.

    Raises:
        CheckpointError: if the folder holds no such state.
        MethodError: if a sample is asked of an average that has no variance.
    """
    return Averaged(State(state), os.fspath(state), dtype=dtype, sample=sample)


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Averaged:
    """Return the average of a state; see :func:`weightsmith.plan.remake.remake`. A state's predecessor is gone."""
    with understood():
        if "state" in content:
            return running_average(str(content["state"]), dtype=content.get("dtype"), sample=content.get("sample"))
    raise RecipeError(
        "the state of a running average cannot be made again: it was made from the state before, which is gone; "
        "'weightsmith average RUN_DIR OUT' makes the average of checkpoints that are still there"
    )


def _next(
    known: State | None,
    opened: Checkpoint,
    wanted: Averaging | None,
    accumulator: str | None,
    step: int | None,
    digits: str,
) -> NextState:
    """Return the state that follows."""
    if known is None:
        averaging = wanted or Averaging()
        floats = [tensor.dtype for tensor in opened.values() if dtypes.is_float(tensor.dtype)]
        kept = accumulator_of(averaging, accumulator, floats)
        record = Record(averaging, kept.name, 0, None, {})
    else:
        record, kept = known.record, np.dtype(known.record.accumulator)
    # What is not averaged is the newest's, in whatever order checkpoints come.
    late = known is not None and None not in (step, known.record.step) and step < known.record.step  # type: ignore[operator]
    newest = known.mean if known is not None and late else opened
    names = record.dtypes if late else {name: dtypes.name_of(tensor.dtype) for name, tensor in opened.items()}
    after = record.followed(opened.name, step, digits, names)
    mean: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for name, tensor in opened.items():
        if not dtypes.is_float(tensor.dtype):
            mean[name] = newest[name]
            continue
        before = None if known is None else known.mean[name]
        mean[name] = moving = MovedMean(before, tensor, record.averaging.share(after.count), kept, opened.name)
        if record.averaging.keeps_squares:
            squares[name] = MovedSquares(None if known is None else known.squares[name], moving)
    warnings = []
    if opened.is_adapter:
        warnings.append(
            f"{opened.name} is an adapter: its factors are averaged, and the product of averages is not the average of "
            "products; name it on its base, as BASE+ADAPTER, to average the models that it makes of it"
        )
    replaces = None if known is None else known.text
    return NextState(after, mean, squares, newest=newest, inputs=[opened], replaces=replaces, warnings=warnings)


def _wanted(weights: str | Averaging | None, bias_correction: bool) -> Averaging | None:
    if isinstance(weights, Averaging):
        return weights
    if weights is None:
        if bias_correction:
            raise MethodError("bias correction belongs to an EMA; say which: --weights ema:0.999 --bias-correction")
        return None
    return Averaging.parse(weights, bias_correction=bias_correction)


def _check_settings(
    known: State, wanted: Averaging | None, accumulator: str | None, state: str | os.PathLike[str]
) -> None:
    own = known.record
    if wanted is not None and wanted != own.averaging:
        raise MethodError(
            f"{os.fspath(state)} is a running average of the kind {own.averaging}, not {wanted}; leave --weights out, "
            "or begin another state"
        )
    if accumulator is not None and accumulator != own.accumulator:
        raise MethodError(
            f"{os.fspath(state)} is kept in {own.accumulator}, not {accumulator}; leave --accumulator out, or begin "
            "another state"
        )


def _check_averaged(opened: Checkpoint) -> None:
    if opened.config.get("quantization_config"):
        raise PlanError(f"{opened.name} is quantised: its tensors are codes, which have no average")
    if opened.is_adapter and opened.components:
        raise PlanError(f"{opened.name} is an adapter of several models; average that of each by itself")
    if not any(dtypes.is_float(tensor.dtype) for tensor in opened.values()):
        raise PlanError(f"{opened.name} has no floating tensor: there is nothing to average")


def _check_fits(known: State, opened: Checkpoint) -> None:
    """Check that a checkpoint has the state's tensors."""
    problems = [f"it lacks {shown(name)}" for name in known.mean if name not in opened]
    for name, tensor in opened.items():
        own = known.mean.get(name)
        if own is None:
            problems.append(f"{shown(name)} is not in the average")
        elif own.shape != tensor.shape:
            problems.append(f"{shown(name)} is {list(tensor.shape)}, and in the average {list(own.shape)}")
        elif dtypes.is_float(own.dtype) != dtypes.is_float(tensor.dtype):
            found = dtypes.name_of(tensor.dtype)
            problems.append(f"{shown(name)} is {found}, and in the average {known.record.dtypes[name]}")
    if problems:
        more = f" (and {len(problems) - 1:,} more such tensors)" if len(problems) > 1 else ""
        raise PlanError(
            f"{opened.name} does not fit the running average {known.mean.name}: {problems[0]}{more}; an average is of "
            "checkpoints of one run"
        )


def _check_new(record: Record, name: str, step: int | None, digits: str, *, again: bool) -> None:
    """Check that a checkpoint is not in the average, and for an EMA that it comes after those that are."""
    if not again:
        for one in record.seen:
            if one.hash == digits:
                raise PlanError(
                    f"{name} is in the average already, as {one.name}: all its tensors are the same; add --again to "
                    "count it once more"
                )
        steps = {one.step for one in record.seen} | {record.step}
        if step is not None and step in steps:
            raise PlanError(
                f"a checkpoint of step {step:,} is in the average already, and {name} is of that step too; give "
                "another with --step if it is not, or add --again to count it"
            )
    if record.averaging.kind == "ema" and step is not None and record.step is not None and step < record.step:
        raise PlanError(
            f"{name} is of step {step:,}, and the average is at step {record.step:,}; an EMA takes checkpoints in order"
        )


def _digits(opened: Checkpoint, threads: int) -> str:
    """Return the hash of all tensors, with names, dtypes and shapes."""
    with ThreadMapper(threads) as mapper:
        hashes = mapper(lambda item: hash_tensor(item[1]), opened.items())
        content = [
            (name, dtypes.name_of(tensor.dtype), tensor.shape, digits)
            for (name, tensor), digits in zip(opened.items(), hashes, strict=True)
        ]
    return hash_of(json.dumps(sorted(content)).encode())
