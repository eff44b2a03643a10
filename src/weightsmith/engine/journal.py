"""What a run has finished, on disk, so that the next run of the same command goes on from there.

A journal is a text file: a first line of JSON that says which run it belongs to, then one line of JSON for
every batch of tensors whose bytes have been synced to disk, or whose bytes were lost with their file. A last line cut
short by a crash is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.staging import sync_folder
from weightsmith.errors import OutputError

# Changed inputs that an error names.
_SHOWN = 5


class Journal:
    """An append-only record of finished tensors.

    Attributes:
        finished: the tensors that earlier runs finished: name -> what they noted of it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Open the journal of a run, or start one.

        Args:
            path: the journal's file.
            run: what makes this run what it is: topic -> JSON value. The journal must hold the same.

        Raises:
            OutputError: if the file is the journal of another run; the message names the topics that differ.
            OSError: if it cannot be read or written.
        """
        self._path = path
        self.finished: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        found = _parse(lines[0]) if len(lines) > 1 else None
        if found is None:
            self._file = path.open("wb", buffering=0)
            self._append(run)
            sync_folder(path.parent)
            return
        differing = [topic for topic in run if found.get(topic) != json.loads(json.dumps(run[topic]))]
        if differing:
            named = _changed_inputs(found.get("inputs"), run["inputs"]) if "inputs" in differing else ""
            raise OutputError(
                f"there is an unfinished run in {path.parent}, but its {' and '.join(differing)} differ from "
                f"this run's{named}; add --restart to discard it and begin anew"
            )
        whole = 0
        for line in lines[:-1]:
            entry = _parse(line)
            if entry is None:
                break
            self.finished |= entry.get("done", {})
            self._drop(entry.get("lost", []))
            whole += len(line) + 1
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(whole)
        self._file.seek(whole)

    def record(self, done: Mapping[str, Any]) -> None:
        """Add finished tensors and what is to be noted of each, as JSON values.

        Their bytes must have been synced before. Returns once it is on disk.
        """
        if done:
            self._append({"done": dict(done)})

    def forget(self, lost: Iterable[str]) -> None:
        """Take back finished tensors whose files are gone. Returns once that is on disk.

        Until it is, the files must not be made anew: a run that is killed then would leave them empty, and the next
        would believe the journal.
        """
        names = [name for name in lost if name in self.finished]
        if names:
            self._append({"lost": names})
            self._drop(names)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self.finished.pop(name, None)

    def _append(self, entry: Mapping[str, Any]) -> None:
        left = memoryview(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())


def _changed_inputs(before: Any, now: Any) -> str:
    """Name the input files of two runs that differ, and in what."""
    try:
        old, new = ({entry["path"]: entry for entry in entries} for entries in (before, now))
        changes = [
            f"{name} ({', '.join(key for key in new[name] if new[name][key] != old[name].get(key))})"
            if name in old
            else f"{name} (new)"
            for name in new
            if new[name] != old.get(name)
        ] + [f"{name} (no longer an input)" for name in old if name not in new]
    except (TypeError, KeyError):
        return ""
    shown = ", ".join(changes[:_SHOWN])
    return f": {shown}" + (f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else "") if changes else ""


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
