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
