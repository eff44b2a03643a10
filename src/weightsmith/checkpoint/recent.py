"""What was made last for a tensor is kept, up to a number of bytes, for the blocks that need it next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from itertools import count
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary


class Held(Protocol):
    """What takes memory: an array, or something made of arrays."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        ...


Made = TypeVar("Made", bound=tuple[Held, ...])


class _Entry:
    """What was made for one part of an owner, and when it was used last."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.used = 0

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.future.result())


class Recent:
    """Keeps what was made for the owners used last; for many threads at once.

    An owner is a tensor, or whatever several tensors are made from. What was made last is kept whatever its size, so
    that a sweep over one tensor never makes it twice.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self._limit = limit
        self._lock = threading.Lock()
        self._uses = count()
        # An owner that is gone takes its arrays with it.
        self._kept: WeakKeyDictionary[object, dict[Hashable, _Entry]] = WeakKeyDictionary()

    def get(self, owner: object, make: Callable[[], Made], part: Hashable = None) -> Made:
        """Return the arrays of an owner, made by ``make`` in one thread, while others that want them wait.

        Args:
            owner: what they are made for.
            make: makes them.
            part: which of the owner's arrays, where they are made a part at a time.
        """
        with self._lock:
            parts = self._kept.setdefault(owner, {})
            known = parts.get(part)
            entry = parts.setdefault(part, _Entry())
            entry.used = next(self._uses)
        if known is None:
            try:
                entry.future.set_result(make())
            except BaseException as error:
                with self._lock:
                    del parts[part]
                entry.future.set_exception(error)
            else:
                self._forget(entry)
        made: Made = entry.future.result()
        return made

    def keep(self, owner: object, made: tuple[Held, ...], part: Hashable = None) -> None:
        """Keep other arrays for a part from now on; none if there are none."""
        with self._lock:
            parts = self._kept.get(owner, {})
            entry = parts.pop(part, None)
            if entry is not None and made:
                parts[part] = _Entry()
                parts[part].used = entry.used
                parts[part].future.set_result(made)

    def _forget(self, newest: _Entry) -> None:
        """Drop the arrays used longest ago until the rest keeps to the limit."""
        with self._lock:
            entries = [
                (entry.used, entry.nbytes, part, parts)
                for parts in self._kept.values()
                for part, entry in parts.items()
                if entry.future.done()
            ]
            total = sum(nbytes for _, nbytes, _, _ in entries)
            for used, nbytes, part, parts in sorted(entries, key=lambda entry: entry[0]):
                if total <= self._limit:
                    break
                if used != newest.used:
                    del parts[part]
                    total -= nbytes


# One bound for the whole process.
RECENT = Recent(256_000_000)
