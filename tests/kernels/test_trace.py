"""What cannot be recorded is refused, and nothing is recorded as something else."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from fractions import Fraction
from typing import Any

import array_api_compat
import numpy as np
import pytest
from running import each_level, elementwise, same

from weightsmith.kernels.program import Program, Store, load
from weightsmith.kernels.trace import Positions, Recorder, Symbolic, Untraceable

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Met:
    """Everything that a method can meet while it is recorded, in a block of elements or of rows."""

    def __init__(self, columns: int | None = None) -> None:
        self.xp: Any = Recorder(columns)
        self.x: Any = load(self.xp, 0, F32, F32)
        self.y: Any = load(self.xp, 1, F32, F32)
        self.wide: Any = load(self.xp, 2, F64, F64)
        self.mask: Any = self.x > 0
        self.positions: Any = Positions(self.xp)
        self.total: Any = self.xp.sum(self.wide)
        self.length: Any = self.x.shape[0]


def changed_in_place(m: Met) -> Any:
    # Every name of the array sees the sum, the input of the method among them.
    result = m.x
    result += m.y
    return result + m.x


def assigned(m: Met) -> Any:
    m.x[m.mask] = 0.0
    return m.x


def goes_on_without(m: Met) -> Any:
    try:
        return m.x if (m.x > 0).any() else m.y
    except Exception:
        return m.y


KEPT: list[Any] = []


def keeps_an_array(m: Met) -> Any:
    KEPT.append(m.x)
    return KEPT[0] + m.x


REFUSED = {
    "branch": lambda m: m.x if m.x > 0 else m.y,
    "chained comparison": lambda m: m.xp.where(0 < m.x < 1, m.x, m.y),
    "and": lambda m: m.mask and m.mask,
    "not": lambda m: not m.mask,
    "builtin max": lambda m: max(m.x, m.y),
    "builtin sum of masks": lambda m: sum([m.mask, m.mask]),
    "sorted": lambda m: sorted([m.x, m.y]),
    "in": lambda m: m.y in [m.x],
    "float": lambda m: float(m.x),
    "int": lambda m: int(m.x),
    "complex": lambda m: complex(m.x),
    "round": lambda m: round(m.x),
    "math.sqrt": lambda m: math.sqrt(m.x),
    "math.floor": lambda m: math.floor(m.x),
    "range": lambda m: range(m.x),
    "iteration": lambda m: list(m.x),
    "unpacking": lambda m: (lambda a, b: a)(*m.x),
    "length": lambda m: len(m.x),
    "index": lambda m: m.x[0],
    "slice": lambda m: m.x[1:],
    "by mask": lambda m: m.x[m.mask],
    "item": assigned,
    "in place": changed_in_place,
    "power": lambda m: m.x**2,
    "power of": lambda m: 2**m.x,
    "floor": lambda m: m.x // 2,
    "modulo": lambda m: m.x % 2,
    "divmod": lambda m: divmod(m.x, 2),
    "matrix product": lambda m: m.x @ m.y,
    "shift": lambda m: m.mask << 1,
    "plus": lambda m: +m.x,
    "hash": lambda m: {m.x: 1},
    "copy": lambda m: copy.copy(m.x),
    "deepcopy": lambda m: copy.deepcopy(m.x),
    "pickle": lambda m: pickle.dumps(m.x),
    "method": lambda m: m.x.sum(),
    "attribute": lambda m: m.x.T,
    "attribute that may be missing": lambda m: getattr(m.x, "device", None),
    "hasattr": lambda m: hasattr(m.x, "numpy"),
    "exceptions": goes_on_without,
    "kept": keeps_an_array,
    # NumPy's functions and scalars, which bring a dtype of their own.
    "np.sqrt": lambda m: np.sqrt(m.x),
    "np.where": lambda m: np.where(m.mask, m.x, m.y),
    "np.sum": lambda m: np.sum(m.x),
    "np.asarray": lambda m: np.asarray(m.x),
    "np.zeros_like": lambda m: np.zeros_like(m.x),
    "np.array of": lambda m: np.array([m.x, m.y]),
    "np.isclose": lambda m: np.isclose(m.total, 0),
    "np.float64": lambda m: np.float64(2) * m.x,
    "np.float64 on the right": lambda m: m.x * np.float64(2),
    "np.float64 compared": lambda m: np.float64(2) < m.x,
    "np.float32": lambda m: np.float32(0.1) * m.wide,
    "np.bool_": lambda m: m.x * np.True_,
    "np.int64": lambda m: m.x * np.int64(3),
    "0-D array": lambda m: m.x * np.array(3.0),
    "array": lambda m: np.ones(3) * m.x,
    "np.float64 as a bound": lambda m: m.xp.clip(m.x, np.float64(0)),
    "np.float64 everywhere": lambda m: m.xp.full_like(m.x, np.float64(0.1)),
    "np.where of a scalar": lambda m: m.xp.where(m.mask, m.x, np.float64(0.1)),
    # Numbers that NumPy treats in its own way.
    "whole numbers of more than 53 bits": lambda m: m.x * (2**54 + 2**30 + 1),
    "complex numbers": lambda m: m.x * 1j,
    "fractions": lambda m: m.x * Fraction(1, 3),
    "None": lambda m: m.x == None,  # noqa: E711
    "text": lambda m: m.x == "x",
    "a rounded constant": lambda m: m.xp.full_like(m.x, 0.1) + m.wide,
    # Masks are no numbers, and numbers no masks.
    "sum of masks": lambda m: m.mask + m.mask,
    "product of masks": lambda m: m.mask * m.mask,
    "mask and number": lambda m: m.mask + 1,
    "mask compared": lambda m: m.mask == 1,
    "masks compared": lambda m: m.mask < m.mask,
    "negative mask": lambda m: -m.mask,
    "magnitude of a mask": lambda m: abs(m.mask),
    "inverted number": lambda m: ~m.x,
    "mask and True": lambda m: m.mask & True,
    "True and mask": lambda m: True & m.mask,
    "mask and numbers": lambda m: m.mask & m.x,
    "numbers as a condition": lambda m: m.xp.where(m.x, m.x, m.y),
    "numbers to masks": lambda m: m.xp.astype(m.x, np.dtype(bool)),
    "where of numbers": lambda m: m.xp.where(m.mask, 1.0, 2.0),
    "zeros like a mask": lambda m: m.xp.zeros_like(m.mask),
    "clipped mask": lambda m: m.xp.clip(m.mask, 0.0, 1.0),
    "clip by arrays": lambda m: m.xp.clip(m.x, m.y),
    # Functions and dtypes that there are not.
    "unknown function": lambda m: m.xp.sin(m.x),
    "unknown function that may be missing": lambda m: getattr(m.xp, "sin", None),
    "version of the namespace": lambda m: m.xp.__version__,
    "asarray": lambda m: m.xp.asarray(m.x),
    "float16": lambda m: m.xp.astype(m.x, np.dtype(np.float16)),
    "int64": lambda m: m.xp.astype(m.x, np.dtype(np.int64)),
    "exp of float32": lambda m: m.xp.exp(m.x),
    "sum of float32": lambda m: m.xp.sum(m.x),
    "sum of a constant": lambda m: m.xp.sum(m.xp.ones_like(m.wide)),
    "count of a constant": lambda m: m.xp.count_nonzero(m.xp.ones_like(m.wide)),
    "sum along no rows": lambda m: m.xp.sum(m.wide, axis=-1, keepdims=True),
    "greatest of all": lambda m: m.xp.max(m.x),
    "ranks of no rows": lambda m: m.xp.rank_in_rows(m.x),
    # Lengths, positions and totals are not known.
    "length as a number": lambda m: m.x / m.length,
    "length in a branch": lambda m: m.x if m.length > 10 else m.y,
    "length compared": lambda m: m.x if m.x.shape == (10,) else m.y,
    "length in a range": lambda m: range(m.length),
    "length of an array": lambda m: np.zeros(m.length),
    "whether the length is even": lambda m: m.length % 2 == 0,
    "size": lambda m: array_api_compat.size(m.x),
    "np.size": lambda m: np.size(m.x),
    "shape of a constant": lambda m: m.xp.zeros_like(m.x).shape,
    "total in a branch": lambda m: m.x if m.total == 0 else m.y,
    "total unlike": lambda m: m.x * (m.total != 0),
    "total as truth": lambda m: m.x if m.total else m.y,
    "total as a factor": lambda m: m.x * m.total,
    "total divided": lambda m: m.total / 2,
    "total as a float": lambda m: float(m.total),
    "magnitude of a total": lambda m: abs(m.total),
    "np.float64 and total": lambda m: np.float64(2) * m.total,
    "position alike": lambda m: m.xp.where(m.positions == 3, m.x, m.y),
    "position unlike": lambda m: m.x * (m.positions != 3),
    "position before": lambda m: m.positions < 3,
    "position as a number": lambda m: m.x * m.positions,
    "position modulo": lambda m: m.positions % 2,
    "positions up to NaN": lambda m: m.positions <= math.nan,
    "positions up to infinity": lambda m: m.positions <= math.inf,
    "positions up to a scalar": lambda m: m.positions <= np.int64(3),
    "positions up to an array": lambda m: m.positions <= m.x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name):
    KEPT[:] = [load(Recorder(None), 0, F32, F32)]
    # A few are for Python, which knows no hash and no operator with nothing on one side.
    with pytest.raises((Untraceable, TypeError)):
        REFUSED[name](Met())


ROWS = {
    "along the first axis": lambda m: m.xp.sum(m.wide, axis=0, keepdims=True),
    "without the axis": lambda m: m.xp.sum(m.wide, axis=-1),
    "of the rows' values": lambda m: m.xp.sum(m.xp.sum(m.wide, axis=-1, keepdims=True), axis=-1, keepdims=True),
    "shape of the rows' values": lambda m: m.xp.max(m.x, axis=-1, keepdims=True).shape,
    "shape of zeros": lambda m: m.x / m.xp.zeros_like(m.x).shape[-1],
    "ranks of float64": lambda m: m.xp.rank_in_rows(m.wide),
    "number of rows": lambda m: m.x / m.x.shape[0],
    "one condition for a row": lambda m: m.xp.where(m.xp.max(m.x, axis=-1, keepdims=True) > 0, m.x, m.y),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_cannot_be_recorded_of_rows_is_refused(name):
    with pytest.raises(Untraceable):
        ROWS[name](Met(columns=64))


def test_no_operator_is_left_to_python():
    """A class answers for every operator itself; the operators of Python are those of its documentation."""
    operators = {name for name in dir(operator) if name.startswith("__") and callable(getattr(operator, name))}
    of_classes = {f"__{prefix}{name}__" for prefix in "ri" for name in ("add", "mul", "and", "or", "truediv", "pow")}
    internal = set(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    # Names of the module operator that are no methods of their own.
    others = {"__concat__", "__iconcat__", "__inv__", "__not__", "__call__", "__loader__"}
    missing = {name for name in (operators | of_classes) - internal - others if name not in Symbolic.__dict__}
    assert not missing


# Nothing but these: what they are not asked for here, they are not.
SHOWN = {"operation", "operands", "numbers", "place", "kind", "single", "recorder", "dtype", "shape", "ndim"}


def test_arrays_show_nothing_that_is_not_known():
    assert {name for name in dir(Met().x) if not name.startswith("_")} == SHOWN


def test_what_is_known_is_that_of_an_array():
    for columns, ndim in ((None, 1), (64, 2)):
        met = Met(columns)
        assert met.x.ndim == met.xp.zeros_like(met.x).ndim == ndim
        assert (met.x.dtype, met.wide.dtype, met.mask.dtype) == (F32, F64, np.dtype(bool))
        assert (met.x * met.wide).dtype == F64
        assert (met.x * met.mask).dtype == F32
        assert array_api_compat.array_namespace(met.x, met.y) is met.xp
    assert met.x.shape[-1] == 64


def test_equal_operations_are_recorded_once():
    met = Met()
    assert (met.x - met.y) is (met.x - met.y)
    assert (met.x - met.y) is not (met.y - met.x)
    assert (met.x * 0.0) is not (met.x * -0.0)
    assert (met.x + 1) is (met.x + 1.0)
    assert (met.x + 1) is not (met.wide + 1)


@each_level
def test_numbers_take_the_dtype_of_the_array_they_meet(library):
    x, y = np.float32([0.1, 16777216, 3.0, -2.5]), np.float64([0.1, 16777217, 3.0, -2.5])
    functions = [
        lambda xp, x, y: x + 0.1,
        lambda xp, x, y: xp.where(x < 0.1, x, y),
        lambda xp, x, y: xp.where(0.1 >= x, x, 0.3),  # noqa: SIM300
        lambda xp, x, y: y * 0.1 + x,
        lambda xp, x, y: x * 16777217,
        lambda xp, x, y: (x - y) / 3,
        lambda xp, x, y: True + x,
        lambda xp, x, y: x - xp.astype(y, xp.float32),
        lambda xp, x, y: xp.where(x == y, x, xp.zeros_like(x)),
        lambda xp, x, y: x * (y > 0.0) * 0.1,
        lambda xp, x, y: (y > 0.0) * (x * 0.1),
        lambda xp, x, y: xp.where(x > 0, x, y > 0),
        lambda xp, x, y: sum([x, x > 0, y > 1]),
    ]
    for function in functions:
        assert same(elementwise(library, function, x, y), function(np, x, y)).all()


@pytest.mark.parametrize("last", [-(2.0**61), -1, -0.5, 0, 2.5, 7, 1100, 2**62])
@each_level
def test_positions_may_be_compared_with_any_number(library, last):
    from running import run, stored

    values = np.ones(1500, np.float32)
    for start in (0, 5, 2**40):
        _, (got,) = run(library, lambda xp, at, x: stored(x * (at <= last)), [values], position=start)
        assert np.array_equal(got, values * (np.arange(start, start + 1500) <= last))


def test_an_array_of_another_block_is_no_result():
    mine, other = Recorder(None), Recorder(None)
    load(mine, 0, F32, F32)
    from weightsmith.kernels import native

    with pytest.raises(Untraceable, match="another block"):
        Program(native.library(), mine, [Store(load(other, 0, F32, F32), F32)])
