"""How long a merge took: kept beside the result and no part of it, for the result is the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.folder import RUN_FILE
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError

_LARGEST = 10_000


@dataclass(frozen=True)
class RunRecord:
    """How long a run took.

    Attributes:
        seconds: wall time of the run that finished the result; one that was stopped before it is not counted.
        bytes_read: bytes of all tensors that the result rests on, each counted once.
        bytes_written: bytes of the files of weights.
        threads: how many threads there were.
        tensors: how many tensors the result has.
        resumed: how many of them an earlier run had written.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    threads: int
    tensors: int
    resumed: int

    def write(self, folder: Path) -> None:
        """Write it into a finished output.

        Raises:
            OSError: if it cannot be written.
        """
        (folder / RUN_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Return the record of a folder, or None where it has none that can be understood: it is for people alone."""
        try:
            content = parse_object(read_whole(str(folder / RUN_FILE), _LARGEST), RUN_FILE)
        except CheckpointError:
            return None
        seconds, *counts = (content.get(name) for name in cls.__dataclass_fields__)
        whole = [_count(value) for value in counts]
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
            return None
        read, written, threads, tensors, resumed = whole
        if read is None or written is None or threads is None or tensors is None or resumed is None:
            return None
        return cls(float(seconds), read, written, threads, tensors, resumed)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None
