"""Programs of one form: compiled once, each with numbers of its own."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.kernels import native, program
from weightsmith.kernels.program import Collect, Histogram, Program, Store, load
from weightsmith.kernels.trace import Positions, Recorder, Untraceable

F32 = np.dtype(np.float32)
X = np.linspace(-2, 2, 1500, dtype=np.float32)

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels")


def compiled(make) -> Program:
    recorder = Recorder(None)
    terminals = make(recorder, load(recorder, 0, F32, F32))
    return Program(native.library(), recorder, terminals)


def stored(found: Program, index: int = 0) -> np.ndarray:
    out = np.empty(len(X), np.float32)
    found.run([X], [out], len(X), index, 0)
    return out


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    known: dict = {}
    monkeypatch.setattr(program, "_FORMS", known)
    return known


def test_constants_are_those_of_each_program(forms):
    programs = [compiled(lambda r, x, f=f: [Store(x * f + 1.0, F32)]) for f in (3.0, -0.5, 0.0, -0.0)]
    assert len(forms) == 1
    for found, factor in zip(programs, (3.0, -0.5, 0.0, -0.0), strict=True):
        np.testing.assert_array_equal(stored(found), X * np.float32(factor) + np.float32(1))


def test_constants_that_are_equal_by_chance_make_another_form(forms):
    programs = [compiled(lambda r, x, a=a, b=b: [Store(x * a + b, F32)]) for a, b in ((2.0, 3.0), (2.0, 2.0))]
    assert len(forms) == 2
    np.testing.assert_array_equal(stored(programs[1]), X * np.float32(2) + np.float32(2))


def test_positions_and_keys_are_those_of_each_program(forms):
    def draw(r, key):
        return r.record("uniform", (), kind="f32", single=False, numbers=key)

    cut = [compiled(lambda r, x, n=n: [Store(x * (Positions(r) <= n), F32)]) for n in (3, 70)]
    drawn = [compiled(lambda r, x, key=key: [Store(draw(r, key) + x, F32)]) for key in ((1, 2), (3, 4), (1, 2))]
    assert len(forms) == 2
    for found, last in zip(cut, (3, 70), strict=True):
        np.testing.assert_array_equal(stored(found), np.where(np.arange(len(X)) <= last, X, 0 * X))
    first, second, again = (stored(found) for found in drawn)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


def test_ranges_are_those_of_each_program(forms):
    patterns = np.sort(np.abs(X).view(np.uint32))
    for low, high in ((patterns[10], patterns[40]), (patterns[700], patterns[800])):
        found = compiled(lambda r, x, low=low, high=high: [Collect(abs(x), int(low), int(high))])
        ((above, within),) = found.run([X], [], len(X)).values
        assert above == np.count_nonzero(patterns > high)
        np.testing.assert_array_equal(np.sort(within), patterns[(patterns >= low) & (patterns <= high)])
    for shift in (16, 20):
        (counts,) = compiled(lambda r, x, shift=shift: [Histogram(abs(x), 0, shift)]).run([X], [], len(X)).values
        np.testing.assert_array_equal(counts, np.bincount(patterns >> shift, minlength=1 << 16))
    assert len(forms) == 2


def test_an_array_of_another_record_is_not_taken_for_the_one_in_its_place():
    other = load(Recorder(None), 0, F32, F32)
    for make in (lambda r, x: [Store(x + other, F32)], lambda r, x: [Store(other, F32)]):
        with pytest.raises(Untraceable, match="another block"):
            compiled(make)


def test_known_forms_are_bounded(forms, monkeypatch):
    monkeypatch.setattr(program, "_MOST_FORMS", 3)
    for count in range(1, 9):
        compiled(lambda r, x, count=count: [Store(x, F32)] * count)
        assert len(forms) <= 3
