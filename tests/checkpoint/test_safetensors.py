"""Headers: every dtype against the reference library, and every way in which a header can lie."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.errors import CheckpointError, WeightsmithError

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int64,
    np.int32,
    np.uint8,
    np.bool_,
]


def test_every_dtype_is_read_as_the_reference_library_wrote_it(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {np.dtype(d).name: (rng.standard_normal((3, 5)) * 4).astype(d) for d in DTYPES}
    arrays |= {"scalar": np.float32(3.5).reshape(()), "empty": np.zeros((0, 7), np.float16)}
    write_safetensors(tmp_path / "m.safetensors", arrays)
    found = ws.open(tmp_path / "m.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].numpy().tobytes() == array.tobytes()
        assert found[name].read(0, array.size).tobytes() == array.tobytes()


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
ATTACKS = {
    "too short": (b"abc", "too few for a safetensors file"),
    "header beyond the file": ((10**6).to_bytes(8, "little") + b"{}", "cut short"),
    "huge header": ((2**62).to_bytes(8, "little") + b"{}", "at most 100,000,000"),
    "not an object": (raw([1]), "does not begin with"),
    "not JSON": (raw(b'{"a": '), "not JSON"),
    "bad UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "nested bomb": (raw(b'{"a":' * 50_000), "not JSON"),
    "a name twice": (raw(TWICE), "names 'a' twice"),
    "unknown dtype": (raw({"a": entry("F33")}), "unknown dtype 'F33'"),
    "packed dtype": (raw({"a": entry("F4")}), "packed below a byte"),
    "negative length": (raw({"a": entry(shape=[-2])}), "whole numbers from 0"),
    "fractional length": (raw({"a": entry(shape=[2.0])}), "whole numbers from 0"),
    "boolean length": (raw({"a": entry(shape=[True, 2])}), "whole numbers from 0"),
    "overflowing shape": (raw({"a": entry(shape=[2**40, 2**40])}), "larger than any file"),
    "bytes that do not fit": (raw({"a": entry(shape=[3])}), "takes 12 bytes"),
    "beyond the end": (raw({"a": entry(offsets=[8, 16])}), "cut short"),
    "backwards": (raw({"a": entry(offsets=[8, 0])}), "span -8"),
    "three offsets": (raw({"a": entry(offsets=[0, 4, 8])}), "two whole numbers"),
    "overlap": (raw({"a": entry(), "b": entry()}), "overlap"),
    "a gap": (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "leave a gap"),
    "bytes left over": (raw({"a": entry()}, bytes(9)), "the tensors end at"),
    "extra key": (raw({"a": {**entry(), "exec": "x"}}), "not described by"),
    "metadata that is not text": (raw({"__metadata__": {"a": 1}, "a": entry()}), "not a map of texts"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_header_that_lies_is_refused_with_the_reason(name, tmp_path):
    content, message = ATTACKS[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path / "m.safetensors")


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_but_our_errors(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsmithError):
        ws.open(path)


@pytest.mark.parametrize("length", range(0, 150, 7))
def test_a_file_cut_short_is_refused(length, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {"a": np.ones((4, 4), np.float32)})
    whole = (tmp_path / "m.safetensors").read_bytes()
    assert length < len(whole)
    (tmp_path / "m.safetensors").write_bytes(whole[: len(whole) - 1 - length])
    with pytest.raises(CheckpointError, match="m.safetensors"):
        ws.open(tmp_path / "m.safetensors")


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": np.ones(1000, np.float32)})
    tensor = ws.open(path)["a"]
    with path.open("r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match=r"m\.safetensors ends at byte 500.*has been changed since"):
        tensor.numpy()
