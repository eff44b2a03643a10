"""Functions of arrays as programs, and the NumPy that their results are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.numpy as compat
import numpy as np
import pytest

from weightsmith.kernels import native
from weightsmith.kernels.program import Program, Results, Store, Terminal, load
from weightsmith.kernels.trace import Positions, Recorder

LANES = 16

each_level = pytest.mark.parametrize("library", native.levels(), ids=lambda library: f"level{library.level}")


class Reference:
    """NumPy, with what it leaves open decided: the lesser of two zeros of different sign, and the order of a sum."""

    def __getattr__(self, name: str) -> Any:
        return getattr(compat, name)

    @staticmethod
    def minimum(x: Any, y: Any) -> Any:
        return compat.where((x < y) | compat.isnan(x), x, y)

    @staticmethod
    def maximum(x: Any, y: Any) -> Any:
        return compat.where((x > y) | compat.isnan(x), x, y)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        if low is None or high is None:
            return x if low is high else self.minimum(x, high) if low is None else self.maximum(x, low)
        return self.minimum(high, self.maximum(low, x))

    @staticmethod
    def sum(x: Any, *, axis: int, keepdims: bool) -> Any:
        assert (axis, keepdims) == (-1, True)
        return np.array([[in_lanes(row)] for row in x])


def in_lanes(values: Any) -> float:
    """Sum sixteen interleaved parts, each from its first element on, and join them by halves."""
    padded = np.zeros(-(-(len(values) + LANES) // LANES) * LANES)
    padded[LANES : LANES + len(values)] = values
    part = np.cumsum(padded.reshape(-1, LANES), axis=0)[-1]
    while len(part) > 1:
        part = part[: len(part) // 2] + part[len(part) // 2 :]
    return float(part[0])


def run(
    library: native.Library,
    function: Callable[..., Terminal | Sequence[Terminal]],
    arrays: Sequence[Any],
    *,
    working: Any = None,
    columns: int | None = None,
    index: int = 0,
    position: int = 0,
) -> tuple[Results, list[Any]]:
    """Run ``function(xp, positions, *arrays)``, which gives terminals; return what was found and what was written."""
    recorder = Recorder(columns)
    loads = [
        load(recorder, slot, a.dtype, np.dtype(working or (a.dtype if a.dtype == np.float64 else np.float32)), slot)
        for slot, a in enumerate(arrays)
    ]
    found = function(recorder, Positions(recorder), *loads)
    terminals = found if isinstance(found, list) else [found]
    program = Program(library, recorder, terminals, counts=len(arrays))
    count = arrays[0].size
    outputs = [np.empty(count, dtype) for dtype in program.outputs]
    flat = [arrays[slot].reshape(-1) for slot in program.inputs]
    return program.run(flat, outputs, count, index, position), outputs


def stored(value: Any) -> Store:
    return Store(value, value.dtype)


def elementwise(library: native.Library, function: Callable[..., Any], *arrays: Any, **where: Any) -> Any:
    """Return what ``function(xp, *arrays)`` computes, element by element."""
    (out,) = run(library, lambda xp, _, *loads: stored(function(xp, *loads)), arrays, **where)[1]
    return out


def same(one: Any, other: Any) -> Any:
    """Return where bits are equal; one NaN is as good as another."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype
    unsigned = f"u{one.dtype.itemsize}"
    # Not isnan: ml_dtypes has none for some formats of eight bits.
    nan = (one != one) & (other != other)
    return (one.view(unsigned) == other.view(unsigned)) | nan


def hard_numbers(rng: np.random.Generator, shape: Any, dtype: Any) -> Any:
    """Return numbers of every size, among them those that break arithmetic, and many equal ones."""
    limits = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, limits.max, -limits.max, limits.tiny, 0.5, 3.0]
    special += [limits.smallest_subnormal, -limits.smallest_subnormal, limits.tiny * 0.75, limits.eps, 1 + limits.eps]
    sizes = rng.choice([1.0, 1.0, 1e-40, 1e-20, 1e20, 1e38], shape)
    with np.errstate(over="ignore"):
        values = (rng.standard_normal(shape) * sizes).astype(dtype)
    return np.where(rng.random(shape) < 0.5, rng.choice(np.array(special, dtype), shape), values)
