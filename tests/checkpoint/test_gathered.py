"""A tensor put together from rows of others, against the whole array."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.checkpoint.gathered import AVERAGE, MEAN, ZERO, Origins, gathered, resized
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.expression import carried, is_made
from weightsmith.errors import CheckpointError

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


def two(tmp_path, dtype, width=3, rows=(40, 25)):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((count, width)).astype(dtype) for count in rows]
    write_safetensors(tmp_path / "two.safetensors", {"a": arrays[0], "b": arrays[1]})
    checkpoint = ws.open(tmp_path / "two.safetensors")
    return [checkpoint["a"], checkpoint["b"]], arrays


def some_origins(rng, count, rows=(40, 25), groups=6):
    sizes = rng.integers(1, 5, groups)
    source = rng.choice([0, 1, ZERO, MEAN, AVERAGE], count, p=[0.5, 0.2, 0.1, 0.15, 0.05])
    row = np.zeros(count, np.int64)
    for number, length in enumerate(rows):
        # Some neighbours, some rows twice.
        row[source == number] = np.sort(rng.integers(0, length, (source == number).sum()))[:: rng.choice([-1, 1])]
    row[source == MEAN] = rng.integers(0, groups, (source == MEAN).sum())
    row[source == AVERAGE] = rng.integers(0, 2, (source == AVERAGE).sum())
    members = rng.integers(0, 2, sizes.sum())
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Origins(source, row, starts, members, rng.integers(0, np.array(rows)[members]))


def plainly(arrays, origins, dtype):
    """Row after row, in float64."""
    made = []
    for source, row in zip(origins.source, origins.row, strict=True):
        if source == ZERO:
            made.append(np.zeros_like(arrays[0][0], np.float64))
        elif source == AVERAGE:
            made.append(arrays[row].astype(np.float64).mean(0))
        elif source == MEAN:
            span = range(origins.starts[row], origins.starts[row + 1])
            rows = [arrays[origins.member_source[m]][origins.member_row[m]].astype(np.float64) for m in span]
            made.append(sum(rows) / len(rows))
        else:
            made.append(arrays[source][row].astype(np.float64))
    return np.array(made).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
@pytest.mark.parametrize("width", [1, 3, 700])
def test_every_row_is_what_its_origin_says(tmp_path, dtype, width):
    tensors, arrays = two(tmp_path, dtype, width)
    origins = some_origins(np.random.default_rng(width), 120)
    tensor = gathered("g", tensors, origins, (120, width))
    expected = plainly(arrays, origins, dtype).reshape(-1)
    assert tensor.dtype == dtype
    assert np.allclose(tensor.numpy().reshape(-1).astype(float), expected.astype(float), rtol=0, atol=1e-15)
    whole = tensor.numpy().reshape(-1).view(np.uint8).reshape(-1, tensor.dtype.itemsize)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, tensor.size + 1, (60, 2)), axis=1).tolist():
        assert np.array_equal(tensor.read(start, stop).view(np.uint8), whole[start:stop].reshape(-1))
        buffer = np.full((stop - start) * tensor.dtype.itemsize, 255, np.uint8)
        assert np.array_equal(tensor.read_into(start, stop, buffer).view(np.uint8), whole[start:stop].reshape(-1))


def test_rows_of_another_dtype_are_rounded_once(tmp_path):
    one, two_ = np.random.default_rng(3).standard_normal((2, 8, 4))
    tensors = [ArrayTensor("a", one.astype(ml_dtypes.bfloat16)), ArrayTensor("b", two_)]
    origins = Origins(np.array([0, 1, 1]), np.array([2, 7, 6]))
    narrow = gathered("g", tensors, origins, (3, 4), np.dtype(ml_dtypes.bfloat16)).numpy()
    assert np.array_equal(narrow[1:], two_[[7, 6]].astype(ml_dtypes.bfloat16))
    wide = gathered("g", tensors, origins, (3, 4)).numpy()
    assert wide.dtype == np.float64
    assert np.array_equal(wide[0], one.astype(ml_dtypes.bfloat16)[2].astype(np.float64))
    assert np.array_equal(wide[1:], two_[[7, 6]])


def test_a_bias_in_one_row_is_gathered_by_element():
    bias = np.arange(6, dtype=np.float32).reshape(1, 6)
    origins = Origins(np.array([0, 0, ZERO, 0]), np.array([5, 0, 0, 1]))
    tensor = gathered("final_logits_bias", [ArrayTensor("b", bias)], origins, (1, 4))
    assert tensor.numpy().tolist() == [[5, 0, 0, 1]]


def test_bits_pass_through_unchanged():
    bits = np.random.default_rng(0).integers(0, 1 << 16, (50, 8), np.uint16)
    tensor = ArrayTensor("t", bits.view(ml_dtypes.bfloat16))
    order = np.random.default_rng(1).permutation(50)
    made = gathered("t", [tensor], Origins(np.zeros(50, np.int64), order), (50, 8)).numpy()
    assert np.array_equal(made.view(np.uint16), bits[order])


def test_means_of_what_arithmetic_made_are_of_values_that_were_not_rounded():
    class Made(ArrayTensor):
        def read_wide(self, start, stop):
            return self.numpy().reshape(-1)[start:stop].astype(np.float32) + np.float32(2**-20)

    tensors = [Made("t", np.ones((2, 2), ml_dtypes.bfloat16)), ArrayTensor("u", np.full((1, 2), 3, np.float32))]
    origins = Origins(np.array([1, MEAN, 0]), np.array([0, 0, 1]), np.array([0, 2]), np.array([0, 1]), np.array([0, 0]))
    tensor = gathered("t", tensors, origins, (3, 2), np.dtype(ml_dtypes.bfloat16))
    assert is_made(tensor)
    assert tensor.read_wide(0, 6).tolist() == [3, 3, 2 + 2**-21, 2 + 2**-21, 1 + 2**-20, 1 + 2**-20]
    assert tensor.read(1, 5).astype(float).tolist() == [3, 2, 2, 1]


def test_an_average_of_all_rows_is_read_once():
    class Counted(ArrayTensor):
        reads = 0

        def read(self, start, stop):
            self.reads += 1
            return super().read(start, stop)

    values = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    source = Counted("t", values)
    tensor = gathered("t", [source], Origins.first(12, 9, AVERAGE), (12, 4))
    assert np.array_equal(tensor.read(36, 48).reshape(3, 4), [values.astype(float).mean(0).astype(np.float32)] * 3)
    tensor.read(40, 44)
    assert source.reads == 1


def test_rows_that_lie_far_apart_do_not_bring_what_is_between_them():
    class Measured(ArrayTensor):
        most = 0

        def read(self, start, stop):
            self.most = max(self.most, stop - start)
            return super().read(start, stop)

    source = Measured("t", np.arange(1 << 22, dtype=np.float32).reshape(-1, 1024))
    picked = np.array([0, 4095, 7, 2000, 8])
    tensor = gathered("t", [source], Origins(np.zeros(5, np.int64), picked), (5, 1024))
    assert np.array_equal(tensor.numpy()[:, 0], picked * 1024)
    assert source.most <= 2 * 1024


def test_a_file_that_was_cut_short_is_named(tmp_path):
    tensors, _ = two(tmp_path, np.float32, 1 << 13)
    picked = np.arange(0, 40, 8)
    tensor = gathered("g", tensors, Origins(np.zeros(5, np.int64), picked), (5, 1 << 13))
    tensor.numpy()
    os.truncate(tmp_path / "two.safetensors", 32 * (1 << 13) * 4)
    with pytest.raises(CheckpointError, match="two.safetensors ends before byte .* it is cut short"):
        tensor.numpy()
