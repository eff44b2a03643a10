"""The record of a running average, beside a mean and squares that it may fit or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, check_tensor, scratch_folder
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, MethodError
from weightsmith.runs.record import RECORD_FILE
from weightsmith.runs.running import running_average, update_average
from weightsmith.runs.state import State

_KINDS = ("uniform", "swag")
_WORDS = [
    b'"kind"',
    b'"uniform"',
    b'"ema"',
    b'"swag"',
    b'"decay"',
    b'"bias_correction"',
    b'"float32"',
    b'"float64"',
    b'"int64"',
    b'"count"',
    b'"step"',
    b'"seen"',
    b'"dtypes"',
    b'"w"',
    b'"n"',
    b"null",
    b"true",
    b"0.9",
]


def run(content: bytes) -> None:
    """Open a state whose record is this, after a byte that says of which kind; make the average and a sample of it."""
    # What was written is read before it is written over.
    _records()
    folder = _folder(_KINDS[content[0] % 2 if content else 0])
    (folder / RECORD_FILE).write_bytes(content[1:])
    try:
        record = State(folder).record
        for sample in (None, 1):
            for tensor in running_average(folder, sample=sample).values():
                check_tensor(tensor)
    except (CheckpointError, MethodError):
        return
    if not 0 < record.averaging.share(record.count + 1) <= 1:
        raise Defect(f"{record.averaging} gives the next checkpoint the share {record.averaging.share(2)}")


@cache
def _folder(kind: str) -> Path:
    state = scratch_folder() / "state"
    for number in (1, 2):
        tensors = {"w": np.full((3, 4), number, np.float32), "n": np.array(number)}
        checkpoint = Checkpoint(f"step-{number}", {name: ArrayTensor(name, one) for name, one in tensors.items()})
        update_average(state, checkpoint, weights=kind, threads=1)
    return state


@cache
def _records() -> tuple[bytes, ...]:
    return tuple((_folder(kind) / RECORD_FILE).read_bytes() for kind in _KINDS)


def seeds() -> Sequence[bytes]:
    """The records as they were written, and one of an EMA."""
    uniform, swag = _records()
    ema = uniform.replace(b'"uniform"', b'"ema"').replace(b'"decay": null', b'"decay": 0.9')
    return [b"\0" + uniform, b"\1" + swag, b"\0" + ema, b"\0{}", b"\1[]"]


TARGET = Target("running", run, seeds, text_mutator(_WORDS))
