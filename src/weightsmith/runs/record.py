"""What a running average knows of itself, in a JSON file beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith import __version__, dtypes
from weightsmith.checkpoint.description import is_count
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError, WeightsmithError, shown
from weightsmith.runs.accumulation import ACCUMULATORS, Averaging

# By this file a folder is the state of a running average.
RECORD_FILE = "weightsmith-running.json"
FORMAT = 1
_LARGEST = 256_000_000


@dataclass(frozen=True)
class Seen:
    """A checkpoint that is in the average.

    Attributes:
        name: how it was named.
        step: the training step it was saved at, where that is known.
        hash: the hash of its tensors: 32 hexadecimal digits; None of weights that were never in a file.
    """

    name: str
    step: int | None
    hash: str | None


@dataclass(frozen=True)
class Record:
    """What is known of a running average.

    Attributes:
        averaging: what kind it is.
        accumulator: the dtype that the mean is kept in: ``float32`` or ``float64``.
        count: how many checkpoints are in it.
        step: the training step of the newest, where that is known.
        dtypes: tensor name -> dtype that the newest checkpoint has it in.
        seen: the checkpoints that were given as such; fewer than ``count`` where a training gave its weights itself.
    """

    averaging: Averaging
    accumulator: str
    count: int
    step: int | None
    dtypes: Mapping[str, str]
    seen: tuple[Seen, ...] = ()

    def followed(self, name: str, step: int | None, digits: str | None, newest: Mapping[str, str]) -> Record:
        """Return the record with one more checkpoint.

        Args:
            name: how it is named.
            step: its training step, where that is known.
            digits: the hash of its tensors; with None it is counted and not listed.
            newest: tensor name -> dtype, of the newest.
        """
        known = [one for one in (self.step, step) if one is not None]
        return replace(
            self,
            count=self.count + 1,
            step=max(known, default=None),
            dtypes=newest,
            seen=self.seen if digits is None else (*self.seen, Seen(name, step, digits)),
        )

    def to_text(self) -> str:
        """Return it as JSON."""
        content = {
            "format": FORMAT,
            "weightsmith": __version__,
            "average": asdict(self.averaging),
            "accumulator": self.accumulator,
            "count": self.count,
            "step": self.step,
            "seen": [asdict(one) for one in self.seen],
            "dtypes": dict(self.dtypes),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_record(folder: Path) -> Record:
    """Read the record of a folder.

    Raises:
        CheckpointError: if it has none, or one that cannot be understood.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} is not the state of a running average: it has no {RECORD_FILE}")
    content = parse_object(read_whole(str(file), _LARGEST), str(file))
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file} is of format {shown(content.get('format'))}; this version reads {FORMAT}")
    try:
        return _parsed(content)
    except (ValueError, KeyError, TypeError, AttributeError, WeightsmithError) as error:
        raise CheckpointError(f"{file} cannot be understood: {type(error).__name__}: {str(error)[:300]}") from error


def record_text(folder: Path) -> str | None:
    """Return the record of a state as it is on disk, or None if there is none."""
    file = folder / RECORD_FILE
    return file.read_text("utf-8", errors="replace") if file.is_file() else None


def _parsed(content: Mapping[str, Any]) -> Record:
    if content["accumulator"] not in ACCUMULATORS:
        raise ValueError(f"the accumulator is {shown(content['accumulator'])}")
    named = content["dtypes"]
    if not isinstance(named, dict) or not all(dtypes.is_name(one) for one in named.values()):
        raise ValueError("dtypes is no map from names to dtypes")
    average = dict(content["average"])
    if not isinstance(average["bias_correction"], bool):
        raise ValueError(f"bias_correction is {shown(average['bias_correction'])}")
    return Record(
        Averaging(**average),
        content["accumulator"],
        _count(content["count"], 1),
        None if content["step"] is None else _count(content["step"]),
        named,
        tuple(_seen(one) for one in content["seen"]),
    )


def _seen(entry: Mapping[str, Any]) -> Seen:
    found = Seen(**entry)
    if not isinstance(found.name, str) or not (found.hash is None or isinstance(found.hash, str)):
        raise ValueError(f"{shown(entry)} is no checkpoint")
    return replace(found, step=None if found.step is None else _count(found.step))


def _count(value: Any, least: int = 0) -> int:
    if not is_count(value) or value < least:
        raise ValueError(f"{shown(value)} is no whole number from {least}")
    return int(value)
