"""A tensor with more or fewer rows, against the whole array."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.checkpoint.resized import resized
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.expression import carried, is_made

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64]


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def stored(request, tmp_path):
    array = np.random.default_rng(0).standard_normal((5, 3)).astype(request.param)
    write_safetensors(tmp_path / "t.safetensors", {"t": array, "u": array})
    return ws.open(tmp_path / "t.safetensors")["t"], array


@pytest.mark.parametrize("rows", [0, 2, 5, 9])
def test_every_stretch_is_that_of_the_whole(stored, rows):
    tensor, array = stored
    whole = np.zeros((rows, 3), array.dtype)
    whole[: min(rows, 5)] = array[:rows]
    other = resized(tensor, rows)
    assert (other.shape, other.size, other.dtype) == (whole.shape, whole.size, array.dtype)
    assert np.array_equal(other.numpy().view(np.uint8), whole.view(np.uint8))
    for start in range(whole.size):
        for stop in range(start + 1, whole.size + 1):
            expected = whole.reshape(-1)[start:stop].view(np.uint8)
            assert np.array_equal(other.read(start, stop).view(np.uint8), expected)
            buffer = np.full((stop - start) * array.dtype.itemsize, 255, np.uint8)
            assert np.array_equal(other.read_into(start, stop, buffer).view(np.uint8), expected)


def test_what_the_file_has_is_copied_and_asked_for_ahead_and_nothing_else(stored, tmp_path):
    tensor, array = stored
    longer = resized(tensor, 9)
    width = array.dtype.itemsize
    with (tmp_path / "out").open("w+b") as file:
        copied = longer.copy_to(3, 15, file.fileno(), 2)
        assert copied == tensor.copy_to(3, 15, file.fileno(), 2)
        assert not longer.copy_to(3, 16, file.fileno(), 2)
        assert not longer.copy_to(15, 18, file.fileno(), 2)
        if copied:
            assert os.pread(file.fileno(), 12 * width, 2) == array.reshape(-1)[3:].tobytes()
    assert longer.prefetch(0, 27) == tensor.prefetch(0, 15)
    assert not longer.prefetch(15, 27)
    # It is what a file holds, so an output may take its bytes as they are.
    assert not is_made(longer)
    assert carried(longer, longer.dtype) is longer


def test_what_arithmetic_made_is_not_rounded_on_the_way():
    class Made(ArrayTensor):
        def read_wide(self, start, stop):
            return self.numpy().reshape(-1)[start:stop].astype(np.float32) + np.float32(2**-20)

    tensor = Made("t", np.ones((2, 2), ml_dtypes.bfloat16))
    longer = resized(tensor, 3)
    assert is_made(longer)
    expected = np.array([1 + 2**-20] * 3 + [0, 0], np.float32)
    assert np.array_equal(longer.read_wide(1, 6), expected)
    assert np.array_equal(longer.read_wide(4, 6), np.zeros(2))
    assert np.array_equal(resized(tensor, 1).read_wide(0, 2), expected[:2])
