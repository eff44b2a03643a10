"""What a fuzz target is, and what all of them need."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from weightsmith.checkpoint import storage
from weightsmith.checkpoint.storage import Source
from weightsmith.checkpoint.tensor import Tensor

Mutator = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """One reader, and how to try it.

    Attributes:
        name: as the command line takes it.
        run: gives the reader one input; raises nothing but for a defect. weightsmith's own errors are the reader's
            business and are caught in here.
        seeds: inputs to start from, most of them good files.
        mutate: makes another input of one, in the format's own pieces.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutator


class Defect(AssertionError):
    """A reader took a file that it should have refused, or made something else of it than it says."""


class MemorySource(Source):
    """A file that lies in memory, followed by zeros that take none: a file may be larger than its input."""

    def __init__(self, content: bytes, zeros: int = 0) -> None:
        """Make a file of some bytes and so many zeros."""
        self.path = "fuzzed"
        self.size = len(content) + zeros
        self._content = content

    def _read(self, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop:
            raise Defect(f"bytes {start} to {stop} were asked for")
        stop = min(stop, self.size)
        if stop - start > 200_000_000:
            raise Defect(f"{stop - start} bytes were read at once")
        found = self._content[start:stop]
        return found + bytes(max(stop - start, 0) - len(found))


def check_tensor(tensor: Tensor) -> None:
    """Read a tensor's first and last elements: what was let through must be readable."""
    for start, stop in ((0, min(tensor.size, 8)), (max(tensor.size - 8, 0), tensor.size)):
        found = tensor.read(start, stop)
        if found.shape != (stop - start,) or found.dtype != tensor.dtype:
            raise Defect(f"{tensor} gives {found.dtype} {found.shape} for elements {start} to {stop}")
    if tensor.size < 1000:
        tensor.numpy()


def scratch_folder() -> Path:
    """Make a folder for one process, in memory where the machine has such a place, and remove it at the end."""
    import atexit

    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-fuzz-", dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def only_files_in(folder: Path) -> Iterator[None]:
    """Have it be a defect that a file is opened which is not in a folder, or below it; links are followed."""
    opened: list[str] = []
    really_open = storage.open_regular

    def watch(path: str | os.PathLike[str]) -> tuple[int, os.stat_result]:
        opened.append(os.fspath(path))
        return really_open(path)

    storage.open_regular = watch
    try:
        yield
    finally:
        storage.open_regular = really_open
    for path in opened:
        if not os.path.realpath(path).startswith(f"{folder}{os.sep}"):
            raise Defect(f"{path!r} was opened")
