"""What is kept for the next block, and what is not."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from weakref import ref

import numpy as np
import pytest

from weightsmith.checkpoint.recent import Recent
from weightsmith.checkpoint.tensor import ArrayTensor


def tensor() -> ArrayTensor:
    return ArrayTensor("a", np.zeros(1))


def test_the_last_used_are_kept_within_the_limit():
    made = []
    recent = Recent(200)
    tensors = {name: tensor() for name in "abc"}

    def make(name):
        made.append(name)
        return (np.zeros(80, np.uint8),)

    for name in "abacab":
        recent.get(tensors[name], partial(make, name))
    assert made == ["a", "b", "c", "b"]


def test_one_thing_larger_than_the_limit_is_made_once():
    made = []
    recent, one = Recent(10), tensor()
    for _ in range(3):
        recent.get(one, lambda: made.append(1) or (np.zeros(80, np.uint8),))
    assert len(made) == 1


def test_what_was_made_for_a_tensor_goes_with_it():
    recent, one = Recent(1000), tensor()
    array = ref(recent.get(one, lambda: (np.zeros(80),))[0])
    assert array() is not None
    del one
    gc.collect()
    assert array() is None


def test_threads_that_want_the_same_wait_for_one_of_them():
    started, go, made = Event(), Event(), []

    def make():
        made.append(1)
        started.set()
        assert go.wait(10)
        return (np.ones(3),)

    recent, one = Recent(1000), tensor()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(recent.get, one, make) for _ in range(4)]
        assert started.wait(10)
        go.set()
        assert all(future.result()[0].sum() == 3 for future in waiting)
    assert len(made) == 1


def test_a_failure_is_not_kept():
    recent, one = Recent(1000), tensor()
    with pytest.raises(ZeroDivisionError):
        recent.get(one, lambda: 1 / 0)
    assert recent.get(one, lambda: (np.ones(2),))[0].sum() == 2


def test_parts_of_one_owner_are_made_and_dropped_one_by_one():
    made = []
    recent, one = Recent(200), tensor()

    def make(part):
        made.append(part)
        return (np.full(80, part, np.uint8),)

    for part in (0, 1, 0, 2, 0, 1):
        assert recent.get(one, partial(make, part), part)[0][0] == part
    assert made == [0, 1, 2, 1]


def test_what_is_put_in_place_of_what_was_made_is_what_is_kept():
    recent, one = Recent(100), tensor()
    recent.get(one, lambda: (np.zeros(80, np.uint8), np.ones(8, np.uint8)), "tile")
    recent.keep(one, (np.zeros(0, np.uint8), np.ones(8, np.uint8)), "tile")
    recent.get(one, lambda: (np.zeros(80, np.uint8),), "next")
    assert [len(array) for array in recent.get(one, lambda: 1 / 0, "tile")] == [0, 8]
    recent.keep(one, (), "tile")
    with pytest.raises(ZeroDivisionError):
        recent.get(one, lambda: 1 / 0, "tile")
