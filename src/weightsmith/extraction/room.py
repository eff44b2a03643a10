"""Memory for matrices, and working on the next one before it is asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

    @property
    def memory(self) -> int:
        """Bytes that are held while they are made, at most."""
        ...

    def make(self) -> tuple[Array, ...]:
        """Make them."""
        ...


class Ahead:
    """Makes what comes next while what was made is written.

    The executor reads the tensors of an adapter one behind the other, and making them is all the work: so the makers
    behind the one that is asked for are run by threads of their own. What they made is kept until those a few places
    further on are asked for.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._makers: Sequence[Maker] = ()
        self._made: dict[int, Future[tuple[Array, ...]]] = {}
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
        self._places = {id(maker): place for place, maker in enumerate(makers)}
        self._threads = threads
        with ThreadPoolExecutor(threads, "weightsmith-ahead") as pool:
            self._pool = pool
            try:
                yield
            finally:
                with self._lock:
                    self._pool = None
                    self._made.clear()
                pool.shutdown(wait=True, cancel_futures=True)

    def get(self, maker: Maker) -> tuple[Array, ...]:
        """Return what a maker makes, and have those behind it begun."""
        with self._lock:
            pool, place = self._pool, self._places.get(id(maker))
            if pool is None or place is None:
                wanted = None
            else:
                for done in [other for other in self._made if other < place - 2 * self._threads]:
                    del self._made[done]
                for other in range(place, min(place + self._threads, len(self._makers))):
                    if other not in self._made:
                        self._made[other] = pool.submit(self._makers[other].make)
                wanted = self._made[place]
        return wanted.result() if wanted is not None else RECENT.get(maker, maker.make)
