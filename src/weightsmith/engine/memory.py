"""What a process does with memory: freed blocks are kept while a run lasts, and plans are made without collections.

Blocks come and go by the thousand, each of half a megabyte. glibc gives such memory back to the kernel when it is
freed and faults it in again, zeroed, for the next block: on a base and two fine-tunes of 0.5 GB that was 2.4 million
page faults and three quarters of the time. Memory held stays the same: what one block frees, the next one takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from functools import cache

from weightsmith.libc import libc_function

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks of up to 32 MB for reuse; does nothing under other C libraries."""
    mallopt = libc_function("mallopt", ctypes.c_int, ctypes.c_int)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    mallopt(_M_TOP_PAD, 16 << 20)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector of cycles while objects are made that stay.

    A plan is many small objects, none of which can be freed before it is carried out. Looking through them again and
    again as they became more took a third of the time that planning takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
