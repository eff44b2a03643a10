"""How long a run took: an attribute of a file of the result, and no byte of it.

A result is the same bytes every time, and a duration would differ. File systems keep attributes beside a file's
content, and through renaming it; copies may lose them, and some systems have none: the record is for people, and may be
missing.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_ATTRIBUTE = "user.weightsmith.run"
_LARGEST = 4096


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

    def attach(self, file: Path) -> None:
        """Attach it to a file, where its file system keeps attributes."""
        if hasattr(os, "setxattr"):
            with suppress(OSError):
                os.setxattr(file, _ATTRIBUTE, json.dumps(asdict(self)).encode())

    @classmethod
    def of(cls, file: Path) -> RunRecord | None:
        """Return the record of a file, or None where it has none that can be understood."""
        if not hasattr(os, "getxattr"):
            return None
        try:
            text = os.getxattr(file, _ATTRIBUTE)
            content = json.loads(text) if len(text) <= _LARGEST else None
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict):
            return None
        seconds, *counts = (content.get(name) for name in cls.__dataclass_fields__)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
            return None
        whole = [value for value in counts if type(value) is int and 0 <= value < 1 << 62]
        return cls(float(seconds), *whole) if len(whole) == len(counts) else None
