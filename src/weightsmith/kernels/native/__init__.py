"""The compiled part: one shared library, built from the C beside it for several levels of the instruction set.

It is plain C behind ctypes, which lets go of the interpreter's lock during a call, needs no headers of any Python,
and costs nothing at start-up. Where it was not built, everything runs on NumPy, slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
LIBRARY = Path(__file__).with_name(f"weightsmith_kernels.{_SUFFIX}")


@dataclass(frozen=True)
class Library:
    """The compiled kernels of the best level that this processor runs.

    Attributes:
        level: 0 for the baseline of the processor's family; on x86-64 also 3 (AVX2) and 4 (AVX-512).
        operations: name of an operation -> its number.
        run: see ``ws_run`` in ``machine.c``.
        pursue: see ``ws_pursue`` in ``pursuit.c``.
        measure: see ``ws_measure`` in ``measure.c``.
        rows: see ``ws_rows`` there.
    """

    level: int
    operations: Mapping[str, int] = field(repr=False)
    run: Callable[..., int] = field(repr=False)
    pursue: Callable[..., int] = field(repr=False)
    measure: Callable[..., int] = field(repr=False)
    rows: Callable[..., None] = field(repr=False)


@cache
def library() -> Library | None:
    """Load the kernels, or return None where there are none.

    The environment variable ``WEIGHTSMITH_KERNELS`` chooses: ``numpy`` for none, or a level's number for that
    level and no higher one.
    """
    wanted = os.environ.get("WEIGHTSMITH_KERNELS", "")
    if wanted == "numpy" or not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        level = loaded.ws_level()
        if wanted.isdecimal():
            level = max(known for known in (0, 3, 4) if known <= min(level, int(wanted)))
        return _of_level(loaded, level)
    except (OSError, AttributeError):
        # Not a library of this platform, or not this one.
        return None


def levels() -> list[Library]:
    """Return the kernels of every level that this processor runs, for tests that compare them."""
    if library() is None:
        return []
    loaded = ctypes.CDLL(str(LIBRARY))
    return [_of_level(loaded, level) for level in (0, 3, 4) if level <= loaded.ws_level()]


def _of_level(loaded: Any, level: int) -> Library:
    name_of = loaded[f"ws_name_{level}"]
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    operations: dict[str, int] = {}
    while (name := name_of(len(operations))) is not None:
        operations[name.decode()] = len(operations)
    run = loaded[f"ws_run_{level}"]
    number, address = ctypes.c_int64, ctypes.c_void_p
    run.restype = ctypes.c_int
    run.argtypes = [
        *(address, number, number, number, number, number, number, address, address),
        *(address, number, address, number, address, number, number),
    ]
    pursue = loaded[f"ws_pursue_{level}"]
    pursue.restype, pursue.argtypes = ctypes.c_int, [address, number, number]
    measure = loaded[f"ws_measure_{level}"]
    measure.restype = ctypes.c_int
    measure.argtypes = [number, number, address, address, number, address, number, address, number, address]
    rows = loaded[f"ws_rows_{level}"]
    rows.restype, rows.argtypes = None, [address, number, number, ctypes.c_uint64, address, address]
    return Library(level, operations, run, pursue, measure, rows)
