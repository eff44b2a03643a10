"""What was made last for a tensor is kept, up to a number of bytes, for the blocks that need it next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from weakref import WeakKeyDictionary

from weightsmith.checkpoint.tensor import Array, Tensor

Made = tuple[Array, ...]


class Recent:
    """Keeps what was made for the tensors used last; for many threads at once.

    What was made last is kept whatever its size, so that a sweep over one tensor never makes it twice.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self._limit = limit
        self._lock = threading.Lock()
        # In the order of their last use. A tensor that is gone takes its arrays with it.
        self._kept: WeakKeyDictionary[Tensor, Future[Made]] = WeakKeyDictionary()

    def get(self, tensor: Tensor, make: Callable[[], Made]) -> Made:
        """Return the arrays of a tensor, made by ``make`` in one thread, while others that want them wait."""
        with self._lock:
            known = self._kept.pop(tensor, None)
            future: Future[Made] = known or Future()
            self._kept[tensor] = future
        if known is None:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    del self._kept[tensor]
                future.set_exception(error)
            else:
                self._forget(tensor)
        return future.result()

    def _forget(self, newest: Tensor) -> None:
        """Drop the arrays used longest ago until the rest keeps to the limit."""
        with self._lock:
            sizes = {tensor: _nbytes(future) for tensor, future in self._kept.items() if future.done()}
            total = sum(sizes.values())
            for tensor, size in sizes.items():
                if total <= self._limit:
                    break
                if tensor is not newest:
                    del self._kept[tensor]
                    total -= size


def _nbytes(future: Future[Made]) -> int:
    return sum(array.nbytes for array in future.result())


# One bound for the whole process.
RECENT = Recent(256_000_000)
