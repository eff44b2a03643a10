"""What a training program logged, as far as it lies beside its checkpoints: losses and scores by step."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import is_url, join, list_folder, read_whole
from weightsmith.errors import CheckpointError

TRAINER_STATE = "trainer_state.json"
# Lightning's CSVLogger.
_CSV = "metrics.csv"
_LARGEST_LOG = 256_000_000
# ``val_loss=0.25`` in the name of a Lightning file; whole numbers are steps and epochs.
_IN_NAME = re.compile(r"(?:^|-)([A-Za-z_][\w/.]*?)=(-?\d+\.\d+(?:e-?\d+)?)")

# Step -> what was logged there.
Log = list[tuple[int, Mapping[str, float]]]


def metrics_of(path: str, steps: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return for each checkpoint of a run what was logged at or last before its step: name -> number.

    Read are ``trainer_state.json`` in the checkpoint (transformers), else in the run's folder; ``metrics.csv`` of
    Lightning's CSVLogger in the run's folder, or around one named ``checkpoints``; and ``name=value`` in the
    checkpoint's own name.

    Args:
        path: the run's folder.
        steps: name of a checkpoint in it -> its step.

    Raises:
        CheckpointError: if a log cannot be read.
    """
    shared = _csv_log(path) or _csv_log(_around(path)) or _trainer_log(path)
    found = {}
    for entry, step in steps.items():
        own = _trainer_log(join(path, entry)) or shared
        named = {name: float(value) for name, value in _IN_NAME.findall(entry)}
        found[entry] = _until(own, step) | named
    return found


def _around(path: str) -> str:
    """Return the folder of a Lightning run whose checkpoints are in a folder of that name; of any other the same."""
    whole = path.rstrip("/") if is_url(path) else os.path.abspath(path)
    folder, _, name = whole.rpartition("/")
    return folder if name == "checkpoints" else path


def _until(log: Log, step: int) -> dict[str, float]:
    """Return the last value of every metric up to a step."""
    found: dict[str, float] = {}
    for logged, values in log:
        if logged <= step:
            found |= values
    return found


def _trainer_log(folder: str) -> Log:
    if TRAINER_STATE not in list_folder(folder):
        return []
    where = join(folder, TRAINER_STATE)
    history = parse_object(read_whole(where, _LARGEST_LOG), where).get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{where} has no log_history: a list of what was logged at each step")
    return _ordered(
        (entry.get("step"), {name: value for name, value in entry.items() if name != "step"}) for entry in history
    )


def _csv_log(folder: str) -> Log:
    if _CSV not in list_folder(folder):
        return []
    where = join(folder, _CSV)
    try:
        rows = list(csv.DictReader(io.StringIO(read_whole(where, _LARGEST_LOG).decode())))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{where} is no table of comma-separated values in UTF-8: {error}") from error
    # A row holds what one call logged; the other columns are empty.
    return _ordered((_number(row.get("step")), {k: _number(v) for k, v in row.items() if k != "step"}) for row in rows)


def _ordered(entries: Iterable[tuple[Any, Mapping[Any, Any]]]) -> Log:
    """Return the numbers of a log, by step; what is no number is left out."""
    found: Log = []
    for step, values in entries:
        if isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step):
            numbers = {
                str(name): float(value)
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            found.append((int(step), numbers))
    return sorted(found, key=lambda entry: entry[0])


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
