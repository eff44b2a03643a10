"""Memory that a thread uses again for every block."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import numpy as np

from weightsmith.checkpoint.tensor import Array

# Blocks start at a line of the cache, so that vectors do not straddle two.
_ALIGNMENT = 64


class Scratch(threading.local):
    """Buffers by name, for each thread its own; they grow as needed and live as long as the thread."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Array] = {}

    def get(self, name: Hashable, nbytes: int) -> Array:
        """Return ``[nbytes]`` uint8, whatever it holds from its last use by that name."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < nbytes:
            memory = self._allocate(nbytes + _ALIGNMENT)
            skipped = -memory.ctypes.data % _ALIGNMENT
            buffer = self._buffers[name] = memory[skipped : skipped + nbytes]
        return buffer[:nbytes]

    def _allocate(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)
