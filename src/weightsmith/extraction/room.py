"""Memory for matrices, and working on the next one before it is asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array


class Room:
    """Bytes that matrices may take which are worked on at the same time, and how many these may be.

    One is always let in.

    Attributes:
        limit: how many bytes.
        most: how many matrices.
    """

    def __init__(self, limit: int, most: int) -> None:
        """Allow so many bytes, and so many matrices."""
        self.limit = limit
        self.most = most
        self._inside = 0
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room, and hold it."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._inside or (self._inside < self.most and self._taken + nbytes <= self.limit)
            )
            self._inside += 1
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._taken -= nbytes
                self._changed.notify_all()


class Maker(Protocol):
    """Makes several arrays at once."""

    def make(self) -> tuple[Array, ...]:
        """Make them."""
        ...


class Ahead:
    """Makes what comes next while what was made is written.

    The executor writes one large tensor at a time, on all threads. An adapter's tensors are small, and making them is
    all the work: so the makers behind the one that is asked for are run by threads of their own.
    """

    def __init__(self) -> None:
        self._order: dict[int, int] = {}
        self._makers: Sequence[Maker] = ()
        self._begun = 0
        self._threads = 1
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def working(self, makers: Sequence[Maker], threads: int) -> Iterator[None]:
        """Work ahead within the ``with``.

        Args:
            makers: in the order in which they will be asked for.
            threads: how many may run at a time.
        """
        self._makers = makers
        self._order = {id(maker): place for place, maker in enumerate(makers)}
        self._begun = 0
        self._threads = threads
        with ThreadPoolExecutor(threads, "weightsmith-extract") as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None
                pool.shutdown(wait=True, cancel_futures=True)

    def get(self, maker: Maker) -> tuple[Array, ...]:
        """Return what a maker makes, and have those behind it begun."""
        place = self._order.get(id(maker))
        with self._lock:
            pool = self._pool
            if pool is not None and place is not None:
                # What an earlier run has written is not asked for.
                first = max(self._begun, place)
                self._begun = max(self._begun, min(place + self._threads, len(self._makers)))
                for other in self._makers[first : self._begun]:
                    # An error is told when the result is asked for: it is then made anew.
                    pool.submit(RECENT.get, other, other.make)
        return RECENT.get(maker, maker.make)
