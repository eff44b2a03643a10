"""Symbolic arrays: a method that runs on them leaves behind the program of what it computes.

A method is written once, against the array API. Run on these arrays it computes nothing; every operation is recorded,
equal ones once, and :mod:`weightsmith.kernels.program` turns the record into one fused loop. What cannot be recorded
(a value that Python must know, a function that is not among those here) raises :class:`Untraceable`, and the method
runs on NumPy, as it is written.

The namespace follows the array API as far as it goes, and NumPy where that leaves a choice: a Python number takes the
dtype of the array it meets.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from weightsmith.dtypes import DType

# No position is beyond it, and none overflows when it is compared.
_FARTHEST = 2**62
# Larger ones are rounded twice, to float64 and to float32, where NumPy may round them once.
_LARGEST_WHOLE = 2**53

Kind = Literal["f32", "f64", "m32"]

_KINDS: dict[DType, Kind] = {
    np.dtype(np.float32): "f32",
    np.dtype(np.float64): "f64",
    np.dtype(np.bool_): "m32",
}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}


class Untraceable(BaseException):
    """An operation has no place in a fused program.

    No :class:`Exception`: a method that catches those would go on, and what it does instead would be recorded.
    """


class Symbolic:
    """What a method meets while it is recorded; whatever a kind of it does not define is refused.

    Python is willing to do without most operators (``==`` compares identities, ``+=`` falls back to ``+`` and leaves
    the array under its other names as it was), and would go on with a result that the method does not have.
    """

    # NumPy's own functions must not take these for sequences of objects.
    __array_ufunc__ = None

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Untraceable(f"{name} is not known while a method is recorded")


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Symbolic, *_: Any, **__: Any) -> NoReturn:
        raise Untraceable(f"{name} of a {type(self).__name__} has no place in a fused program")

    return refuse


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_REFUSED = (
    *(prefix + name for prefix in ("", "r", "i") for name in _BINARY),
    *("divmod", "rdivmod", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"),
    *("bool", "int", "float", "complex", "index", "round", "trunc", "floor", "ceil"),
    *("iter", "len", "getitem", "setitem", "delitem", "contains", "array", "reduce_ex"),
)
for _name in _REFUSED:
    setattr(Symbolic, f"__{_name}__", _refused(f"__{_name}__"))
# As for NumPy's arrays.
Symbolic.__hash__ = None  # type: ignore[assignment]


class Unknown(Symbolic):
    """A number that is not known while a method is recorded: programs run on stretches of any length, anywhere."""


class Total(Symbolic):
    """A number over a whole stretch: a sum or a count.

    Attributes:
        operation: ``sum``, ``dot`` or ``count``.
        operands: what is summed, multiplied and summed, or counted.
    """

    def __init__(self, operation: str, operands: tuple[Lazy, ...]) -> None:
        self.operation = operation
        self.operands = operands


class Lazy(Symbolic):
    """A symbolic array: the result of one operation on others.

    Attributes:
        operation: the name of the operation, without its type.
        operands: the arrays it works on.
        numbers: its immediate operands, two 64-bit integers.
        kind: what its elements are: float32, float64 or a mask.
        single: whether it is one value for the whole tile: a constant, or a value for each row.
        place: how many operations were recorded before it.
    """

    def __init__(
        self,
        recorder: Recorder,
        operation: str,
        operands: tuple[Lazy, ...],
        kind: Kind,
        single: bool,
        numbers: tuple[int, int] = (0, -1),
        place: int = 0,
    ) -> None:
        self.recorder = recorder
        self.operation = operation
        self.operands = operands
        self.kind = kind
        self.single = single
        self.numbers = numbers
        self.place = place

    def __array_namespace__(self, api_version: str | None = None) -> Recorder:
        return self.recorder

    @property
    def dtype(self) -> DType:
        """The dtype of the elements."""
        return _DTYPES[self.kind]

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape; the first length is unknown."""
        if self.single:
            # Zeros like a block and a Python number are one thing here, and a method can tell them apart.
            raise Untraceable("the shape of a single value")
        return (Unknown(),) if self.recorder.columns is None else (Unknown(), self.recorder.columns)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 1 if self.recorder.columns is None else 2

    def __neg__(self) -> Lazy:
        return self.recorder.record("neg", _floats(self))

    def __abs__(self) -> Lazy:
        return self.recorder.abs(self)

    def __invert__(self) -> Lazy:
        return self.recorder.record("not", _masks(self))

    def __add__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Lazy:
        return self.recorder.multiply(self, other)

    def __rmul__(self, other: Any) -> Lazy:
        return self.recorder.multiply(other, self)

    def __truediv__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("div", self, other)

    def __rtruediv__(self, other: Any) -> Lazy:
        return self.recorder.arithmetic("div", other, self)

    def __lt__(self, other: Any) -> Lazy:
        return self.recorder.compare("lt", self, other)

    def __le__(self, other: Any) -> Lazy:
        return self.recorder.compare("le", self, other)

    def __gt__(self, other: Any) -> Lazy:
        return self.recorder.compare("lt", other, self)

    def __ge__(self, other: Any) -> Lazy:
        return self.recorder.compare("le", other, self)

    def __eq__(self, other: Any) -> Lazy:  # type: ignore[override]
        return self.recorder.compare("eq", self, other)

    def __ne__(self, other: Any) -> Lazy:  # type: ignore[override]
        return self.recorder.compare("ne", self, other)

    def __and__(self, other: Any) -> Lazy:
        return self.recorder.record("and", _masks(self, other))

    def __or__(self, other: Any) -> Lazy:
        return self.recorder.record("or", _masks(self, other))

    def __xor__(self, other: Any) -> Lazy:
        return self.recorder.record("xor", _masks(self, other))


class Positions(Symbolic):
    """The indices of a block's elements in the scope: all that can be asked is which are at or below a number."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __le__(self, last: Any) -> Lazy:
        if type(last) not in (int, float) or not abs(last) <= _FARTHEST:
            raise Untraceable(f"positions up to {last}")
        return self.recorder.record("position_le", (), kind="m32", single=False, numbers=(math.floor(last), 0))


# Operations whose immediate operands may be others in the next program of the same form.
FREE = frozenset({"constant", "position_le", "uniform"})


class Recorder:
    """The namespace of symbolic arrays, and the record of their operations.

    Attributes:
        columns: length of a row where blocks are rows, None where they are any elements.
        steps: the operations, in the order in which they were recorded.
        form: what tells the record from others, but for the numbers in it: an entry for each operation.
    """

    float32 = np.dtype(np.float32)
    float64 = np.dtype(np.float64)
    # array_api_compat tells namespaces apart by it.
    __name__ = __name__

    def __init__(self, columns: int | None) -> None:
        """Start a record.

        Args:
            columns: length of a row where blocks are rows, None where they are any elements.
        """
        self.columns = columns
        self.steps: list[Lazy] = []
        self.form: list[tuple[Any, ...]] = []
        self._known: dict[Any, Lazy] = {}

    def forget(self) -> None:
        """Let go of the operations: they know their recorder, and would be freed by the collector of cycles alone."""
        self.steps.clear()
        self._known.clear()

    def __getattr__(self, name: str) -> NoReturn:
        raise Untraceable(f"{name} has no place in a fused program")

    # -- what makes arrays ----------------------------------------------------------------------------------

    def record(
        self,
        operation: str,
        operands: Sequence[Lazy],
        *,
        kind: Kind | None = None,
        single: bool | None = None,
        numbers: tuple[int, int] = (0, -1),
    ) -> Lazy:
        """Record an operation, or return its result where it is recorded already.

        Args:
            operation: the name, without its type.
            operands: the arrays it works on.
            kind: of the result; by default that of the last operand.
            single: whether the result is one value a tile; by default it is where all operands are.
            numbers: immediate operands.
        """
        operands = tuple(operands)
        kind = kind or operands[-1].kind
        if single is None:
            single = bool(operands)
            for operand in operands:
                single = single and operand.single
        places = []
        for operand in operands:
            if operand.recorder is not self:
                raise Untraceable("an array of another block")
            places.append(operand.place)
        key = (operation, kind, numbers, single, *places)
        found = self._known.get(key)
        if found is None:
            found = Lazy(self, operation, operands, kind, single, numbers, len(self.steps))
            self._known[key] = found
            self.steps.append(found)
            self.form.append((operation, kind, single) if operation in FREE else key)
        return found

    def constant(self, value: Any, kind: Kind) -> Lazy:
        """Return a number as an array of one value."""
        if type(value) not in (int, float, bool):
            # A NumPy scalar brings a dtype of its own; float64 is among the subclasses of float.
            raise Untraceable(f"{type(value).__name__} is neither an array nor a Python number")
        if type(value) is int and abs(value) > _LARGEST_WHOLE:
            raise Untraceable(f"a whole number of {value.bit_length()} bits")
        if kind == "m32":
            raise Untraceable("there are no constant masks")
        (bits,) = struct.unpack("<q", struct.pack("<d", float(value)))
        return self.record("constant", (), kind=kind, single=True, numbers=(bits, -1))

    # -- operators ------------------------------------------------------------------------------------------

    def arithmetic(self, operation: str, left: Any, right: Any) -> Lazy:
        """Record an operation on two numbers."""
        return self.record(operation, self._promoted(left, right))

    def multiply(self, left: Any, right: Any) -> Lazy:
        """Record a product; a mask counts as 0 and 1."""
        for value, mask in ((left, right), (right, left)):
            if isinstance(mask, Lazy) and mask.kind == "m32" and isinstance(value, Lazy) and value.kind != "m32":
                if mask.single:
                    break
                return self.record("gate", (value, mask), kind=value.kind, single=False)
        for value, factor in ((left, right), (right, left)):
            if isinstance(value, Lazy) and value.kind != "m32" and type(factor) in (int, float) and factor == 1:
                return value
        return self.arithmetic("mul", left, right)

    def compare(self, operation: str, left: Any, right: Any) -> Lazy:
        """Record a comparison: a mask."""
        one, other = self._promoted(left, right)
        return self.record(operation, (one, other), kind="m32")

    def _promoted(self, left: Any, right: Any) -> tuple[Lazy, Lazy]:
        if isinstance(left, Lazy) and isinstance(right, Lazy) and left.kind == right.kind != "m32":
            return left, right
        kinds = [value.kind for value in (left, right) if isinstance(value, Lazy)]
        wanted: Kind = "f64" if "f64" in kinds else "f32"
        if "f32" not in kinds and "f64" not in kinds:
            raise Untraceable("arithmetic on masks")
        return self._as(left, wanted), self._as(right, wanted)

    def _as(self, value: Any, kind: Kind) -> Lazy:
        if not isinstance(value, Lazy):
            return self.constant(value, kind)
        if value.kind == kind:
            return value
        if value.kind == "m32":
            return self.record("float", (value,), kind=kind)
        if kind == "f64":
            if value.operation == "constant":
                raise Untraceable("a rounded constant that is widened")
            return self.record("widen", (value,), kind="f64")
        if kind == "f32":
            return self.record("narrow", (value,), kind="f32")
        raise Untraceable("numbers as masks")

    # -- functions of the array API -------------------------------------------------------------------------

    def astype(self, x: Lazy, dtype: DType, *, copy: Any = True) -> Lazy:
        """Convert to another dtype."""
        kind = _KINDS.get(np.dtype(dtype))
        if kind is None:
            raise Untraceable(f"no arrays of {dtype}")
        return self._as(x, kind)

    def abs(self, x: Lazy) -> Lazy:
        """Return magnitudes."""
        return self.record("abs", _floats(x))

    def sqrt(self, x: Lazy) -> Lazy:
        """Return square roots."""
        return self.record("sqrt", _floats(x))

    def exp(self, x: Lazy) -> Lazy:
        """Return e to the power of float64 values."""
        return self.record("exp", _doubles(x))

    def log(self, x: Lazy) -> Lazy:
        """Return natural logarithms of float64 values."""
        return self.record("log", _doubles(x))

    def isnan(self, x: Lazy) -> Lazy:
        """Return where values are NaN."""
        return self.record("isnan", _floats(x), kind="m32")

    def isfinite(self, x: Lazy) -> Lazy:
        """Return where values are neither NaN nor infinite."""
        return self.record("isfinite", _floats(x), kind="m32")

    def minimum(self, x: Any, y: Any) -> Lazy:
        """Return the lesser of two values, the second of equal ones; NaN where one is NaN."""
        return self.record("min", self._promoted(x, y))

    def maximum(self, x: Any, y: Any) -> Lazy:
        """Return the greater of two values, the second of equal ones; NaN where one is NaN."""
        return self.record("max", self._promoted(x, y))

    def clip(self, x: Lazy, min: Any = None, max: Any = None) -> Lazy:
        """Return values moved into a range; zeros of either sign at its ends are treated as NumPy treats them."""
        (found,) = _floats(x)
        for bound in (min, max):
            if bound is not None and type(bound) not in (int, float):
                raise Untraceable("a range that is not of numbers")
        if min is None or max is None:
            return found if min is max else self.minimum(found, max) if min is None else self.maximum(found, min)
        return self.minimum(max, self.maximum(min, found))

    def where(self, condition: Lazy, x: Any, y: Any) -> Lazy:
        """Return one value where a mask is set, another where it is not."""
        (condition,) = _masks(condition)
        one, other = self._promoted(x, y)
        if condition.single and not (one.single and other.single):
            raise Untraceable("one condition for many elements")
        return self.record("where", (condition, one, other), single=condition.single)

    def zeros_like(self, x: Lazy) -> Lazy:
        """Return zeros."""
        return self.full_like(x, 0.0)

    def ones_like(self, x: Lazy) -> Lazy:
        """Return ones."""
        return self.full_like(x, 1.0)

    def full_like(self, x: Lazy, fill_value: float) -> Lazy:
        """Return a value everywhere."""
        return self.constant(fill_value, x.kind)

    def sum(self, x: Lazy, *, axis: int | None = None, keepdims: Any = False) -> Any:
        """Sum float64 values, over everything or along the rows."""
        (x,) = _doubles(x)
        if x.single:
            raise Untraceable("a sum of single values")
        if axis is None:
            if x.operation == "mul" and not any(part.single for part in x.operands):
                return Total("dot", tuple(_narrowest(part) for part in x.operands))
            return Total("sum", (_narrowest(x),))
        return self._along_rows("row_sum", x, axis, keepdims)

    def max(self, x: Lazy, *, axis: int | None = None, keepdims: Any = False) -> Lazy:
        """Return the greatest value of each row."""
        return self._along_rows("row_max", _floats(x)[0], axis, keepdims)

    def count_nonzero(self, x: Lazy, *, axis: None = None) -> Total:
        """Count what is neither zero nor false."""
        if axis is not None or x.single:
            raise Untraceable("counts along an axis")
        return Total("count", (x,))

    def _along_rows(self, operation: str, x: Lazy, axis: int | None, keepdims: Any) -> Lazy:
        if self.columns is None or x.single or axis not in (-1, 1) or not keepdims:
            raise Untraceable("a reduction that is not along the rows")
        return self.record(operation, (x,), single=True)

    def rank_in_rows(self, magnitudes: Lazy) -> Lazy:
        """Return the rank of every non-negative value within its row, from 0; equal ones by position."""
        if self.columns is None or magnitudes.kind != "f32" or magnitudes.single:
            raise Untraceable("ranks are those of float32 values in rows")
        return self.record("row_rank", (magnitudes,))


def _narrowest(x: Lazy) -> Lazy:
    # Sums run in float64 whatever they are given; float32 need not be widened beforehand.
    return x.operands[0] if x.operation == "widen" else x


def _floats(x: Any) -> tuple[Lazy]:
    if not isinstance(x, Lazy) or x.kind == "m32":
        raise Untraceable("a number is needed")
    return (x,)


def _doubles(x: Any) -> tuple[Lazy]:
    if not isinstance(x, Lazy) or x.kind != "f64":
        raise Untraceable("a float64 value is needed")
    return (x,)


def _masks(*values: Any) -> tuple[Lazy, ...]:
    for value in values:
        if not isinstance(value, Lazy) or value.kind != "m32":
            raise Untraceable("masks are needed")
    return values
