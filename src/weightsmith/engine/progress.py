"""How a run tells what it is doing: to nobody, to a terminal, to a log, or to a program."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, Protocol, TextIO

_LINE_EVERY = 5.0
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class ProgressListener(Protocol):
    """Told of a run's progress, from several threads at once."""

    def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
        """A run begins.

        Args:
            total_bytes: bytes of all tensors of the output.
            total_tensors: number of tensors of the output.
            done_bytes: bytes that an earlier run has written.
        """

    def advance(self, nbytes: int) -> None:
        """Bytes of the output were written."""

    def tensor_done(self, name: str) -> None:
        """A tensor of the output is finished."""

    def finish(self) -> None:
        """The run has ended, well or not."""


class Silent:
    """Tells nobody."""

    def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
        """See :class:`ProgressListener`."""

    def advance(self, nbytes: int) -> None:
        """See :class:`ProgressListener`."""

    def tensor_done(self, name: str) -> None:
        """See :class:`ProgressListener`."""

    def finish(self) -> None:
        """See :class:`ProgressListener`."""


class _Counting:
    """Counts bytes and tensors, for listeners that show them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = self.done = self.skipped = self.tensors = self.finished = 0
        self.started = time.monotonic()

    def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
        """See :class:`ProgressListener`."""
        self.total, self.done, self.skipped, self.tensors = total_bytes, done_bytes, done_bytes, total_tensors
        self.finished = 0
        self.started = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """See :class:`ProgressListener`."""
        with self._lock:
            self.done += nbytes

    def tensor_done(self, name: str) -> None:
        """See :class:`ProgressListener`."""
        with self._lock:
            self.finished += 1

    def finish(self) -> None:
        """See :class:`ProgressListener`."""

    @property
    def rate(self) -> float:
        """Bytes of output per second, so far."""
        return (self.done - self.skipped) / max(time.monotonic() - self.started, 1e-9)

    @property
    def unit(self) -> tuple[float, str]:
        """Bytes of the unit that the whole is told in, and its name: of what is small, gigabytes tell nothing."""
        return next((one for one in _UNITS if self.total >= one[0]), _UNITS[-1])

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate, or None where there is no rate yet."""
        return (self.total - self.done) / self.rate if self.done > self.skipped else None


class Lines(_Counting):
    """Writes a line every few seconds, for logs."""

    def __init__(self, stream: TextIO | None = None, every: float = _LINE_EVERY) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._every = every
        self._last = 0.0

    def advance(self, nbytes: int) -> None:
        """See :class:`ProgressListener`."""
        super().advance(nbytes)
        now = time.monotonic()
        if now - max(self._last, self.started) >= self._every:
            self._last = now
            print(self._text(), file=self._stream, flush=True)

    def _text(self) -> str:
        left = self.seconds_left
        remaining = f", {left:.0f} s left" if left is not None else ""
        factor, unit = self.unit
        return (
            f"{self.done / factor:.2f} of {self.total / factor:.2f} {unit}, {self.finished} tensors, "
            f"{self.rate / factor:.2f} {unit}/s{remaining}"
        )


class JsonLines(_Counting):
    """Writes a JSON object per line: the start, every finished tensor, and the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr

    def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
        """See :class:`ProgressListener`."""
        super().start(total_bytes, total_tensors, done_bytes)
        self.write(event="start", total_bytes=total_bytes, total_tensors=total_tensors, done_bytes=done_bytes)

    def tensor_done(self, name: str) -> None:
        """See :class:`ProgressListener`."""
        super().tensor_done(name)
        self.write(event="tensor", name=name, done_bytes=self.done)

    def finish(self) -> None:
        """See :class:`ProgressListener`."""
        self.write(event="finish", done_bytes=self.done, seconds=round(time.monotonic() - self.started, 3))

    def write(self, **entry: Any) -> None:
        """Write one line."""
        with self._lock:
            print(json.dumps(entry), file=self._stream, flush=True)


class Live(_Counting):
    """Draws a bar on a terminal: bytes and tensors done, bytes per second, time left."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[tensors]} tensors"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None

    def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
        """See :class:`ProgressListener`."""
        super().start(total_bytes, total_tensors, done_bytes)
        self._task = self._bar.add_task("", total=total_bytes, completed=done_bytes, tensors=0, rate="")
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """See :class:`ProgressListener`."""
        super().advance(nbytes)
        factor, unit = self.unit
        rate = f"{self.rate / factor:.2f} {unit}/s"
        self._bar.update(self._task, completed=self.done, tensors=f"{self.finished}/{self.tensors}", rate=rate)

    def finish(self) -> None:
        """See :class:`ProgressListener`."""
        self._bar.stop()
        # The next thing that a run does has a bar of its own.
        self._bar.remove_task(self._task)
