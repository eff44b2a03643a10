"""The output's files of weights while they are written: at full length from the start, filled in any order."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from weightsmith.checkpoint.layout import Layout, Shard
from weightsmith.checkpoint.staging import make_folder, sync_folder
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.engine.writeback import WriteBehind


class Sink(ABC):
    """Where the bytes of tensors go. Safe to use from several threads."""

    @abstractmethod
    def write(self, shard: int, values: Array, offset: int) -> None:
        """Write an array's bytes at a place in a file.

        Raises:
            OSError: if they cannot be written.
        """

    @abstractmethod
    def copy(self, shard: int, tensor: Tensor, start: int, stop: int, offset: int) -> bool:
        """Copy elements of a stored tensor without reading them; return whether that was possible."""

    @abstractmethod
    def sync(self, shards: Iterable[int]) -> None:
        """Return when all that was written to these files is on disk."""

    @abstractmethod
    def __enter__(self) -> Sink: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...


class Nowhere(Sink):
    """Lets everything go: for computing what an output would be."""

    def write(self, shard: int, values: Array, offset: int) -> None:
        """Write nothing."""

    def copy(self, shard: int, tensor: Tensor, start: int, stop: int, offset: int) -> bool:
        """Copy nothing, and say that there is nothing left to do."""
        return True

    def sync(self, shards: Iterable[int]) -> None:
        """Return at once."""

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Shards(Sink):
    """Files in a folder, as a layout has them. What an earlier run wrote into them stays."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self._layout = layout
        self._folder = folder
        self._files: list[int] = []
        self._behind = WriteBehind()

    def write(self, shard: int, values: Array, offset: int) -> None:
        """See :meth:`Sink.write`."""
        _write_all(self._files[shard], values, offset)
        self._behind.wrote(self._files[shard], values.nbytes)

    def copy(self, shard: int, tensor: Tensor, start: int, stop: int, offset: int) -> bool:
        """See :meth:`Sink.copy`."""
        try:
            copied = tensor.copy_to(start, stop, self._files[shard], offset)
        except OSError:
            # Of the input or of the output? Reading and writing fail each under its own name.
            return False
        if copied:
            self._behind.wrote(self._files[shard], (stop - start) * tensor.dtype.itemsize)
        return copied

    def sync(self, shards: Iterable[int]) -> None:
        """See :meth:`Sink.sync`."""
        for shard in sorted(set(shards)):
            os.fsync(self._files[shard])
            self._behind.check(self._files[shard])

    def __enter__(self) -> Shards:
        try:
            for shard in self._layout.shards:
                self._files.append(_open(self._folder / shard.path, shard))
            for folder in {(self._folder / shard.path).parent for shard in self._layout.shards}:
                sync_folder(folder)
        except BaseException:
            self._close()
            raise
        self._behind.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._behind.__exit__()
        self._close()

    def _close(self) -> None:
        for handle in self._files:
            os.close(handle)
        self._files = []


def complete(layout: Layout, folder: Path) -> list[bool]:
    """Return for each file whether it is there at its full length, as a run that wrote into it has left it."""
    found = []
    for shard in layout.shards:
        try:
            found.append((folder / shard.path).stat().st_size == shard.nbytes)
        except OSError:
            found.append(False)
    return found


def _open(path: Path, shard: Shard) -> int:
    """Open a file for writing, at its full length, with its header in place."""
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(handle).st_size != shard.nbytes:
            os.ftruncate(handle, shard.nbytes)
        _reserve(handle, shard.nbytes)
        _write_all(handle, np.frombuffer(shard.header, np.uint8), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _reserve(handle: int, nbytes: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        # Some filesystems cannot reserve; there a full disk shows itself at the write.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(handle: int, values: Array, offset: int) -> None:
    left = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    while left:
        written = os.pwrite(handle, left, offset)
        offset += written
        left = left[written:]
