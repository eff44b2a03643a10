"""A pool of threads that maps in order and never runs far ahead of its reader."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from weightsmith.engine.memory import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads() -> int:
    """Return how many threads to use: one per core that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ThreadMapper:
    """Maps functions over items on a pool of threads; with one thread, in the calling thread.

    At most two results per thread are computed ahead of what has been taken, so memory stays bounded.
    """

    def __init__(self, threads: int, *, matrices: bool = False) -> None:
        """Start a pool.

        Args:
            threads: how many threads to use.
            matrices: whether functions work on whole matrices. Linear algebra brings threads of its own. It is kept
                to one in each of ours: sums that it divides among threads depend on their number in the last digit,
                and threads times threads on few cores wait for each other.
        """
        keep_freed_memory()
        self.threads = max(threads, 1)
        self._pool = ThreadPoolExecutor(self.threads, "weightsmith") if self.threads > 1 else None
        self._limits: Any = None
        if matrices:
            from threadpoolctl import threadpool_limits

            self._limits = threadpool_limits(1, user_api="blas")

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """Yield the function's results in the order of the items."""
        return self._map(function, items, 2 * self.threads)

    def limited(self, count: int) -> Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]:
        """Return a mapper on this pool that works on so many items at a time, at most."""
        return lambda function, items: self._map(function, items, count)

    def _map(self, function: Callable[[Item], Result], items: Iterable[Item], outstanding: int) -> Iterator[Result]:
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                if len(pending) >= outstanding:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function on the pool; with one thread, at once."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[Result] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> ThreadMapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._limits is not None:
            self._limits.restore_original_limits()


class Background(ABC):
    """A thread that does something beside the work within a ``with``, and ends with it.

    What it shares with others is guarded by ``_changed``; notified, it looks whether there is something to do, or
    ``_ended`` is set.
    """

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Do it, until ``_ended`` is set."""
