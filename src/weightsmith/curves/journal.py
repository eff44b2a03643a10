"""The file of results: a line for each point that was measured, so that nothing is measured twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from weightsmith.curves.results import Result, number_to_json
from weightsmith.errors import OutputError

RESULTS_FILE = "results.jsonl"
FORMAT = 1
# What results rest on -> how it is called.
_KEYS = {
    "shape": "shape",
    "recipes": "models or settings",
    "files": "files of the models",
    "evaluation": "evaluation",
}


class Journal:
    """The results of one study, written as they come. The first line says what of.

    Results are found again by their coefficients: a finer grid uses those of a coarser one.

    Attributes:
        results: what was measured, by an earlier run or by this one, in that order.
    """

    def __init__(self, path: Path, study: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open the file, or make it; no other run may have it open.

        Args:
            path: the file.
            study: what its results rest on, as JSON values.
            restart: whether to discard what is in it.

        Raises:
            OutputError: if another run has it open, it cannot be written, is no such file, or holds results of another
                study.
        """
        self.path = path
        self.results: list[Result] = []
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._claim()
            if restart:
                self._file.truncate(0)
            self._read({"format": FORMAT, **json.loads(json.dumps(study))})
        except BaseException:
            self._file.close()
            raise
        self._known = {one.coefficients: one for one in self.results}

    def find(self, coefficients: tuple[float, ...]) -> Result | None:
        """Return what was measured at a point, or None."""
        return self._known.get(coefficients)

    def add(self, result: Result) -> None:
        """Write a result; it is on disk when this returns.

        Raises:
            OutputError: if it cannot be written.
        """
        self._write(
            {
                "point": result.label,
                "coordinates": list(result.coordinates),
                "coefficients": list(result.coefficients),
                "metrics": {name: number_to_json(value) for name, value in result.metrics.items()},
                "seconds": result.seconds,
            }
        )
        self.results.append(result)
        self._known[result.coefficients] = result

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is measuring into {self.path.parent}") from None

    def _read(self, study: Mapping[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # A line that was cut short as the run was killed: its point is measured again.
            self._file.truncate(len(whole))
        head, *lines = whole.splitlines() or [b""]
        if not head:
            self._write(study)
            return
        try:
            found = json.loads(head)
            if found.get("format") != FORMAT:
                raise ValueError("another format")
        except (ValueError, AttributeError):
            raise OutputError(
                f"{self.path} is there, and holds no results of this version; move it, or discard it with --restart"
            ) from None
        differing = [name for key, name in _KEYS.items() if found.get(key) != study.get(key)]
        if differing:
            raise OutputError(
                f"{self.path} holds results of other {' and '.join(differing)}; choose another folder, or discard them "
                "with --restart"
            )
        for number, line in enumerate(lines, 2):
            self.results.append(self._result(line, number))

    def _result(self, line: bytes, number: int) -> Result:
        try:
            entry = json.loads(line)
            return Result(
                str(entry["point"]),
                tuple(float(one) for one in entry["coordinates"]),
                tuple(float(one) for one in entry["coefficients"]),
                {str(name): float(value) for name, value in entry["metrics"].items()},
                float(entry["seconds"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"line {number} of {self.path} is no result ({type(error).__name__}: {error}); remove the line, or "
                "discard all results with --restart"
            ) from error

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
