"""Writing behind: what has been written is sent to the disk while more is computed, a bounded amount at a time.

Left to itself, Linux keeps written pages in memory for half a minute, or until they are a tenth of it; then, or when a
file is synced in the end, everything waits for the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable

from weightsmith.engine.threads import Background
from weightsmith.libc import libc_function

# Bytes written between two requests; at most twice as many wait for the disk.
_STEP = 64 << 20
# From Linux's fs.h.
_WAIT_BEFORE, _WRITE = 1, 2
# What it says where it cannot be had; nothing is lost then.
_CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP})


class WriteBehind(Background):
    """Starts the writing of files to disk each time enough has been written to them. Does nothing but on Linux."""

    def __init__(self) -> None:
        super().__init__("weightsmith-behind")
        self._written: dict[int, int] = {}
        self._total = 0
        self._send = _sync_file_range()
        self._failed: dict[int, int] = {}

    def wrote(self, handle: int, nbytes: int) -> None:
        """Note that so many bytes were written to an open file."""
        with self._changed:
            self._written[handle] = self._written.get(handle, 0) + nbytes
            self._total += nbytes
            if self._total >= _STEP:
                self._changed.notify()

    def check(self, handle: int) -> None:
        """Raise what a request for a file came back with.

        The kernel tells of a failed write once. What waits for writes in between is told, and ``fsync`` not any more.

        Raises:
            OSError: if what was written to the file did not get to the disk.
        """
        with self._changed:
            number = self._failed.get(handle)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def _run(self) -> None:
        while self._send is not None:
            with self._changed:
                while self._total < _STEP and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                handles, self._written, self._total = list(self._written), {}, 0
            for handle in handles:
                if self._send(handle, 0, 0, _WAIT_BEFORE | _WRITE) < 0 and ctypes.get_errno() not in _CANNOT:
                    with self._changed:
                        self._failed[handle] = ctypes.get_errno()


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    wide = ctypes.c_int64
    function: Callable[[int, int, int, int], int] | None = libc_function(
        "sync_file_range", ctypes.c_int, wide, wide, ctypes.c_uint
    )
    return function
