"""A person's own command that measures a model: how it is run, and how its answer is read."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from weightsmith.errors import EvaluationError, shown

PLACE = "{model}"
# What a metric is called where the command prints a number alone.
UNNAMED = "value"
# Of what a command printed, from the end: metrics are its last line.
_TAIL = 1 << 20
# Seconds between asking a command to end and ending it.
_GRACE = 5.0


@dataclass(frozen=True)
class Command:
    """A command that measures a model.

    Attributes:
        text: the command, with ``{model}`` where the model's folder belongs.
        shell: whether a shell runs it, so that pipes and variables work; else it is cut into words and run as it is.
        timeout: seconds that it may take, or None for any time.
    """

    text: str
    shell: bool = False
    timeout: float | None = None

    def check(self) -> None:
        """Check what can be known before the command is run.

        Raises:
            EvaluationError: if it does not say where the model belongs, is no command line, or names no program.
        """
        if PLACE not in self.text:
            raise EvaluationError(
                f"the command {shown(self.text)} does not say where the model belongs; write {PLACE} there"
            )
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise EvaluationError(f"the timeout is {self.timeout} s; give a number of seconds above 0")
        if self.shell:
            return
        try:
            program = shlex.split(self.text)[0]
        except ValueError as error:
            raise EvaluationError(f"the command {shown(self.text)} is no command line: {error}") from error
        if PLACE not in program and shutil.which(program) is None:
            raise EvaluationError(
                f"there is no program {shown(program)}; the command is run without a shell, unless --shell is given"
            )

    def run(self, model: Path, out: Path, err: Path) -> dict[str, float]:
        """Measure a model.

        The command has no input, and ends with all that it started where it takes too long or this process is stopped.

        Args:
            model: the model's folder.
            out: a file for what it prints.
            err: a file for its standard error.

        Returns:
            Metric -> value; NaN and infinities are values too.

        Raises:
            EvaluationError: if it cannot be started, fails, takes too long, or prints no metric.
        """
        with out.open("wb") as stdout, err.open("wb") as stderr:
            code = self._run(model, stdout, stderr)
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
            raise EvaluationError(f"the command {how}{_last_of(err) or _last_of(out)}")
        return metrics_of(_tail(out))

    def _run(self, model: Path, stdout: BinaryIO, stderr: BinaryIO) -> int:
        path = os.path.abspath(model)
        words: str | list[str] = (
            self.text.replace(PLACE, shlex.quote(path))
            if self.shell
            else [word.replace(PLACE, path) for word in shlex.split(self.text)]
        )
        try:
            process = subprocess.Popen(
                words,
                shell=self.shell,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise EvaluationError(f"the command cannot be started: {error}") from error
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise EvaluationError(f"the command took more than {self.timeout:g} s, and was ended") from None
        finally:
            if process.returncode is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it started, which is in its own group: kindly first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            # What does not listen may have been left by what does.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            return


def metrics_of(text: str) -> dict[str, float]:
    """Read what a command printed: its last line is a number, or a JSON object of which every number is a metric.

    The object may be indented over several lines. Values that are no numbers are passed over.

    Raises:
        EvaluationError: if there is no number.
    """
    lines = text.rstrip().splitlines()
    if not lines:
        raise EvaluationError(
            "the command printed nothing; its last line must be a number, or a JSON object of numbers"
        )
    last = lines[-1].strip()
    if last == "}" and "{" in lines:
        begin = len(lines) - 1 - lines[::-1].index("{")
        last = "\n".join(lines[begin:])
    try:
        return named(json.loads(last))
    except (ValueError, RecursionError):
        pass
    try:
        return {UNNAMED: float(last)}
    except ValueError:
        raise EvaluationError(
            f"the last line that the command printed is {shown(last)}; it must be a number, or a JSON object of numbers"
        ) from None


def named(answer: Any) -> dict[str, float]:
    """Return the metrics of an answer: a number, or a mapping in which every number is a metric.

    Raises:
        EvaluationError: if there is no number in it.
    """
    if isinstance(answer, Mapping):
        found = {str(name): _number(value) for name, value in answer.items() if _is_number(value)}
        if found:
            return found
    elif _is_number(answer):
        return {UNNAMED: _number(answer)}
    raise EvaluationError(f"the answer is {shown(answer)}; it must be a number, or a mapping with numbers in it")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        return file.read().decode("utf-8", "replace")


def _last_of(path: Path) -> str:
    lines = [line.strip() for line in _tail(path).splitlines() if line.strip()]
    return f": {lines[-1][:500]}" if lines else ""
