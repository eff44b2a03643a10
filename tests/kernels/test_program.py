"""Programs, held against the same functions of NumPy's arrays."""

from __future__ import annotations

import platform
import random
from typing import Any

import array_api_compat.numpy as compat
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Reference, each_level, elementwise, hard_numbers, run, same, stored

from weightsmith.dtypes import _TABLE, DType
from weightsmith.kernels import native
from weightsmith.kernels.convert import narrow, widen
from weightsmith.kernels.program import LONGEST_ROW, SHORTEST_ROW, TILE, Program, Store, load, rounded
from weightsmith.kernels.trace import Positions, Recorder, Untraceable

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NUMBERS = ["0", "1", "-1", "3", "16777217", "True", "0.1", "-0.0", "1e300", "1e-300", "1e-42", "inf", "-inf", "nan"]


class Expressions:
    """Random expressions over everything that can be recorded, as Python writes them."""

    def __init__(self, choose: random.Random, *, rows: bool) -> None:
        self.choose, self.rows = choose, rows

    def number(self, depth: int) -> str:
        """Return an expression of numbers."""
        if depth == 0:
            return self.choose.choice("abcd")
        one = self.number(depth - 1)
        other = self.number(depth - 1) if self.choose.random() < 0.7 else f"({self.choose.choice(NUMBERS)})"
        left, right = (one, other) if self.choose.random() < 0.6 else (other, one)
        mask = self.mask(depth - 1)
        forms = [
            *(f"({left} {operator} {right})" for operator in "+-*/"),
            *(f"xp.{name}({left}, {right})" for name in ("minimum", "maximum")),
            *(f"({one} {operator} {mask})" for operator in "+-*/"),
            *(f"({mask} {operator} {one})" for operator in "+-*"),
            *(f"xp.where({mask}, {pair})" for pair in (f"{one}, {other}", f"{other}, {one}")),
            f"xp.clip({one}, {self.bound()}, {self.bound()})",
            f"(-{one})",
            f"abs({one})",
            f"xp.abs({one})",
            f"xp.sqrt({one})",
            f"xp.astype({one}, xp.float{self.choose.choice((32, 64))})",
            f"xp.astype({mask}, xp.float{self.choose.choice((32, 64))})",
            f"sum([{one}, {other}, {mask}])",
            f"xp.full_like({one}, {self.choose.choice(NUMBERS)})",
            f"({one} * xp.ones_like({other}))" if other[0] != "(" else f"({one} - xp.zeros_like({one}))",
        ]
        if self.rows:
            # The sign of the greatest of several zeros is left open; there is none of -0.0 here.
            forms += [f"({one} + xp.max({one} + 0.0, axis=-1, keepdims=True))"] * 3
            forms += [f"({one} * xp.sum(xp.astype({one}, xp.float64), axis=-1, keepdims=True))"] * 3
            single = f"xp.max({one} + 0.0, axis=-1, keepdims=True)"
            forms += [f"({one} - xp.where({single} > 0, {single}, xp.zeros_like({single})))"] * 2
        return self.choose.choice(forms)

    def mask(self, depth: int) -> str:
        """Return an expression of truth values."""
        one = self.number(max(depth - 1, 0))
        other = self.number(max(depth - 1, 0)) if self.choose.random() < 0.5 else f"({self.choose.choice(NUMBERS)})"
        left, right = (one, other) if self.choose.random() < 0.5 else (other, one)
        forms = [f"({left} {operator} {right})" for operator in ("<", "<=", ">", ">=", "==", "!=")]
        forms += [f"xp.isnan({one})", f"xp.isfinite({one})", f"(positions <= {self.choose.randint(-2, 40)})"]
        if depth > 1:
            forms += [f"(~{self.mask(depth - 1)})"]
            forms += [f"({self.mask(depth - 1)} {operator} {self.mask(depth - 1)})" for operator in "&|^"]
        return self.choose.choice(forms)

    def bound(self) -> str:
        return self.choose.choice(["None", "0.0", "-0.0", "-1", "1.0", "0.1", "inf", "nan", "1e300"])


def evaluated(expression: str, xp: Any, positions: Any, arrays: Any) -> Any:
    known = {"xp": xp, "positions": positions, "inf": float("inf"), "nan": float("nan")}
    return eval(expression, known | dict(zip("abcd", arrays, strict=True)))


@each_level
@pytest.mark.parametrize("columns", [None, 65])
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 4), wide=st.integers(0, 15))
def test_a_program_gives_the_bits_that_numpy_gives(library, columns, seed, depth, wide):
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    expression = Expressions(choose, rows=columns is not None).number(depth)
    shape = (choose.choice([1, 15, 17, TILE - 1, TILE, TILE + 1, 2100]),) if columns is None else (3, columns)
    arrays = [hard_numbers(rng, shape, np.float64 if wide >> i & 1 else np.float32) for i in range(4)]
    start = choose.choice([0, 5, 1000])
    positions = np.arange(start, start + arrays[0].size).reshape(shape)
    with np.errstate(all="ignore"):
        expected = evaluated(expression, Reference(), positions, arrays)
    try:
        _, (got,) = run(
            library,
            lambda xp, positions, *loads: stored(evaluated(expression, xp, positions, loads)),
            arrays,
            columns=columns,
            position=start,
        )
    except Untraceable:
        return
    assert same(got, np.broadcast_to(expected, shape).reshape(-1)).all(), expression


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="NumPy's zeros there may differ")
def test_numpy_decides_so_on_this_processor():
    zeros, other = np.tile(np.float32([0.0, -0.0]), 40), np.tile(np.float32([-0.0, 0.0]), 40)
    for name in ("minimum", "maximum"):
        for pair in ((zeros, other), (zeros, -0.0), (-0.0, zeros)):
            assert same(getattr(Reference(), name)(*pair), getattr(compat, name)(*pair)).all()
    for low, high in ((-0.0, None), (None, -0.0), (0.0, None), (-0.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (-1.0, -0.0)):
        assert same(Reference().clip(zeros, low, high), compat.clip(zeros, low, high)).all(), (low, high)


def test_nearly_every_expression_is_recorded():
    """What the test above passes over is little: constants of one dtype that meet the other."""
    refused = 0
    for seed in range(300):
        recorder = Recorder(65)
        loads = [load(recorder, slot, np.dtype(np.float32), np.dtype(np.float32)) for slot in range(4)]
        expression = Expressions(random.Random(seed), rows=True).number(3)
        try:
            evaluated(expression, recorder, Positions(recorder), loads)
        except Untraceable:
            refused += 1
    assert refused < 30


# -- loads and stores --------------------------------------------------------------------------------------------

FLOATS = [dtype for dtype, _ in _TABLE.values() if dtype.kind not in "iubc"]
WORKING = [np.dtype(np.float32), np.dtype(np.float64)]
STORED = [dtype for dtype in FLOATS if dtype.itemsize > 1]


def every_pattern(dtype: DType) -> Any:
    if dtype.itemsize <= 2:
        return np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2 ** (8 * dtype.itemsize), 40_000, dtype=f"u{dtype.itemsize}").view(dtype)
    return np.concatenate(
        [patterns, hard_numbers(rng, 10_000, dtype), *(near_ties(narrower) for narrower in STORED)],
        dtype=dtype,
        casting="unsafe",
    )


def near_ties(dtype: DType) -> Any:
    """Return float64 values between two neighbours of a dtype: halfway, and just off it to either side."""
    if dtype.itemsize > 2:
        dtype = np.dtype(np.float32)
        patterns = np.random.default_rng(1).integers(0, 2**32, 3000, dtype=np.uint32)
        grid = np.sort(patterns.view(dtype)[np.isfinite(patterns.view(dtype))]).astype(np.float64)
        above = np.nextafter(grid.astype(np.float32), np.float32(np.inf)).astype(np.float64)
        middle = (grid + above) / 2
    else:
        values = every_pattern(dtype).astype(np.float64)
        grid = np.unique(values[np.isfinite(values)])
        middle = (grid[:-1] + grid[1:]) / 2
    return np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])


def nonfinite(values: Any) -> int:
    return int(np.count_nonzero(~np.isfinite(values.astype(np.float64))))


@each_level
@pytest.mark.parametrize("working", WORKING, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_value_of_a_file_is_loaded_as_it_is_and_stored_rounded_once(library, dtype, working):
    if dtype == np.float64 and working == np.float32:
        pytest.skip("float64 makes the arithmetic float64")
    values = every_pattern(dtype)
    wide = widen(values, working)
    for wanted in STORED:
        found, (got,) = run(library, lambda xp, _, x, wanted=wanted: Store(x, wanted), [values], working=working)
        expected = narrow(wide, wanted)
        assert same(got, expected).all(), wanted
        assert found.values == [nonfinite(expected)]
        assert found.counts[0] == nonfinite(values)


@each_level
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("working", WORKING, ids=str)
def test_rounding_to_a_narrower_dtype_is_that_of_a_file(library, dtype, working):
    values = every_pattern(working)
    expected = widen(narrow(values, dtype), working) if dtype.itemsize <= working.itemsize else values
    _, (got,) = run(library, lambda xp, _, x: stored(rounded(xp, x, dtype)), [values])
    assert same(got, expected).all()


@each_level
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1023, 1024, 1025, 262147])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_stretch_may_have_any_length_and_lie_anywhere(library, dtype, count):
    """Files have headers of any length: elements need not begin where their size divides the address."""
    raw = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize + 1, dtype=np.uint8)
    values = np.frombuffer(raw.tobytes(), dtype, count, offset=1)
    working = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    _, (got,) = run(library, lambda xp, _, x: stored(x), [values], working=working)
    assert same(got, widen(values.copy(), working)).all()


@each_level
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_result_may_be_written_anywhere_and_nothing_beside_it(library, dtype):
    values = np.random.default_rng(0).standard_normal(1100)
    recorder = Recorder(None)
    loaded = load(recorder, 0, values.dtype, values.dtype)
    room = np.full(1100 * dtype.itemsize + 2, 0xAA, np.uint8)
    out = np.frombuffer(room.data, dtype, 1100, offset=1)
    Program(library, recorder, [Store(loaded, dtype)]).run([values], [out], 1100)
    assert same(out.copy(), narrow(values, dtype)).all()
    assert (room[0], room[-1]) == (0xAA, 0xAA)


def test_integers_are_no_floats():
    for dtype in (np.int8, np.uint8, np.int32, np.bool_):
        with pytest.raises(Untraceable, match="no loads of"):
            load(Recorder(None), 0, np.dtype(dtype), WORKING[0])


@each_level
@pytest.mark.parametrize("value", [0.0, 1e300, float("nan"), 70000.0])
def test_one_value_for_all_is_written_everywhere_and_counted_everywhere(library, value):
    count = 1500
    found, (got,) = run(
        library,
        lambda xp, _, x: Store(xp.full_like(x, value), np.dtype(np.float16)),
        [np.zeros(count, np.float32)],
    )
    expected = narrow(np.full(count, value, np.float32), np.dtype(np.float16))
    assert same(got, expected).all()
    assert found.values == [nonfinite(expected)]


# -- registers, rows and runs -------------------------------------------------------------------------------------


@each_level
def test_many_values_in_use_at_once_do_not_meet(library):
    def function(xp: Any, *arrays: Any) -> Any:
        parts = [array * (i + 1) + array for i in range(30) for array in arrays]
        return sum(a * b for a, b in zip(parts, reversed(parts), strict=True))

    arrays = list(np.random.default_rng(0).standard_normal((3, 2500)).astype(np.float32))
    assert same(elementwise(library, function, *arrays), function(np, *arrays)).all()


@pytest.mark.parametrize("columns", [1, SHORTEST_ROW - 1, LONGEST_ROW + 1])
def test_rows_that_are_too_short_or_too_long_are_refused(columns):
    recorder = Recorder(columns)
    loaded = load(recorder, 0, WORKING[0], WORKING[0])
    with pytest.raises(Untraceable, match="rows"):
        Program(native.library(), recorder, [stored(loaded)])


@each_level
def test_arrays_of_the_wrong_length_do_not_reach_the_machine(library):
    recorder = Recorder(64)
    program = Program(library, recorder, [stored(load(recorder, 0, WORKING[0], WORKING[0]))])
    whole = np.zeros(128, np.float32)
    for inputs, outputs, count in ((whole, whole, 65), (whole[:64], whole, 128), (whole, whole[:64], 128)):
        with pytest.raises(ValueError, match="other lengths"):
            program.run([inputs], [outputs], count)


def test_eight_bit_floats_are_those_of_ml_dtypes():
    """The list that the tests above run over has them all."""
    assert {np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(ml_dtypes.float8_e5m2fnuz)} < set(FLOATS)
    assert len(FLOATS) == 9
