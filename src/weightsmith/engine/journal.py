"""What a run has finished, on disk, so that the next run of the same command goes on from there.

A journal is a text file: a first line of JSON that says which run it belongs to, then one line of JSON for
every batch of tensors whose bytes have been synced to disk. A last line cut short by a crash is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.errors import OutputError


class Journal:
    """An append-only record of finished tensors.

    Attributes:
        finished: names of the tensors that earlier runs finished.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Open the journal of a run, or start one.

        Args:
            path: the journal's file.
            run: what makes this run what it is: topic -> JSON value. The journal must hold the same.

        Raises:
            OutputError: if the file is the journal of another run; the message names the topics that differ.
        """
        self._path = path
        self.finished: frozenset[str] = frozenset()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        found = _parse(lines[0]) if len(lines) > 1 else None
        if found is None:
            self._file = path.open("wb", buffering=0)
            self._append(run)
            return
        differing = [topic for topic in run if found.get(topic) != json.loads(json.dumps(run[topic]))]
        if differing:
            raise OutputError(
                f"there is an unfinished run in {path.parent}, but its {' and '.join(differing)} differ from "
                "this run's; add --restart to discard it and begin anew"
            )
        names: list[str] = []
        whole = 0
        for line in lines[:-1]:
            entry = _parse(line)
            if entry is None:
                break
            names += entry.get("done", [])
            whole += len(line) + 1
        self.finished = frozenset(names)
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(whole)
        self._file.seek(whole)

    def record(self, names: Sequence[str]) -> None:
        """Add finished tensors; their bytes must have been synced before. Returns once it is on disk."""
        if names:
            self._append({"done": list(names)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        os.fsync(self._file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
