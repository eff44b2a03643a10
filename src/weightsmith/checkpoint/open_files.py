"""Which input files are open: no more at a time than leaves the process room for others."""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import Protocol

# Where the system does not tell its limit.
_USUAL_LIMIT = 256
# Half of what a process may open is left to outputs, libraries and sockets.
_SHARE = 2
_LEAST = 8


class Reopened(Protocol):
    """A file that can be closed and opened again.

    Attributes:
        handle: its descriptor, or -1 while it is closed.
        users: how many threads read from it now.
        used: when it was used last, counted in uses of any file.
    """

    handle: int
    users: int
    used: int

    def open(self) -> None:
        """Open it, and see that it is what it was."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class OpenFiles:
    """Keeps files open until there are too many, and then closes those used longest ago that nobody reads from.

    A merge of 64 models of 10 shards has 640 input files, and a laptop lets a process open 256. Files of one tensor are
    read together, so that few are opened again and again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = count()
        # By weak references: a source that nobody has any more closes its file by itself.
        self._open: list[weakref.ref[Reopened]] = []

    def acquire(self, file: Reopened) -> int:
        """Return a file's descriptor, which stays open until :meth:`release`.

        Raises:
            CheckpointError: if it cannot be opened again, or is another file by now.
        """
        with self._lock:
            if file.handle < 0:
                file.open()
                self._open.append(weakref.ref(file))
            file.users += 1
            file.used = next(self._uses)
            if len(self._open) > _SHARE * _LEAST:
                self._make_room()
            return file.handle

    def release(self, file: Reopened) -> None:
        """Say that a descriptor is not needed for now."""
        with self._lock:
            file.users -= 1

    def _make_room(self) -> None:
        limit = _limit()
        if len(self._open) <= limit:
            return
        known = [file for file in (one() for one in self._open) if file is not None and file.handle >= 0]
        idle = sorted((file for file in known if not file.users), key=lambda file: file.used)
        # A quarter at once, so that this is not done for every file.
        excess = len(known) - limit
        for file in idle[: excess + limit // 4 if excess > 0 else 0]:
            file.close()
        self._open = [weakref.ref(file) for file in known if file.handle >= 0]


def _limit() -> int:
    try:
        import resource
    except ImportError:
        allowed = _USUAL_LIMIT
    else:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if allowed == resource.RLIM_INFINITY:
            allowed = 1 << 20
    return max(allowed // _SHARE, _LEAST)


OPEN_FILES = OpenFiles()
