"""What a pickle may do to its reader: nothing. And a file that torch wrote, read where torch is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from weightsmith.checkpoint import torch_unpickler
from weightsmith.errors import CheckpointError, UnsafeFileError

SAVED = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI16\ntQ"
EMPTY = b"ccollections\nOrderedDict\n(tR"


def view(size: bytes = b"(I4\nI4\nt", strides: bytes = b"(I4\nI1\nt", metadata: bytes = b"") -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + SAVED + b"I0\n"
    return head + size + strides + b"I00\n" + EMPTY + metadata + b"tR"


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", np.arange(16, dtype=np.float32).tobytes())
    return path


def nested_tuples(depth: int) -> bytes:
    """Write a tuple of the tuple before it, twice, ``depth`` times: small to write, 2**depth to walk."""
    made = b"\x80\x02)q\x000"
    for i in range(depth):
        made += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0"
    return made + b"h" + bytes([depth])


def test_a_file_that_torch_wrote_is_read_without_torch():
    script = "import sys; sys.modules['torch'] = None; import weightsmith as ws; print(len(ws.open(sys.argv[1])))"
    path = Path(__file__).parent / "data" / "torch_2_13.bin"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8"
    found = {name: tensor.numpy() for name, tensor in ws.open(path).items()}
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "matrix": matrix,
        "shared": matrix[1:3],
        "transposed": matrix.T,
        "bfloat": (np.arange(8) / 4).astype(ml_dtypes.bfloat16).reshape(2, 4),
        "half": np.arange(3, dtype=np.float16),
        "f8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "count": np.array(7),
        "flags": np.array([True, False]),
    }
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


def test_what_was_checked_cannot_be_set_afterwards(tmp_path):
    """An offset of -20 would read what lies before the storage."""
    attack = b"(dS'a'\n" + view() + b"(dS'offset'\nI-20\nsbs."
    with pytest.raises(UnsafeFileError, match="sets attributes of a View"):
        ws.open(archive(tmp_path / "m.pt", attack))


def test_what_the_table_holds_cannot_be_changed_for_the_next_file(tmp_path):
    """BUILD with a pair sets attributes of the object below: here, of one of the reader's own functions."""
    attack = b"ctorch._utils\n_rebuild_parameter\n(N(dS'__name__'\nS'owned'\nstb."
    with pytest.raises(UnsafeFileError, match="sets attributes of a function"):
        ws.open(archive(tmp_path / "m.pt", attack))
    assert torch_unpickler._rebuild_parameter.__name__ == "_rebuild_parameter"


def test_attributes_of_a_state_dict_are_left_out(tmp_path):
    """torch sets ``_metadata`` so; ``items`` set so must not stand in for the method."""
    content = EMPTY + b"(dS'items'\nI1\nsbS'a'\n" + view() + b"s."
    assert list(ws.open(archive(tmp_path / "m.pt", content))) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"(ios\nsystem\n.", "instruction INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "instruction BYTEARRAY8"),
    ],
)
def test_instructions_that_torch_never_writes_are_refused(tmp_path, content, message):
    with pytest.raises(UnsafeFileError, match=message):
        ws.open(archive(tmp_path / "m.pt", content))


@pytest.mark.parametrize("content", [b"S'x'\n(tR.", SAVED + b"(tR.", b"ctorch\nfloat32\n(tR."])
def test_nothing_but_the_tables_functions_can_be_called(tmp_path, content):
    with pytest.raises(CheckpointError, match="not callable"):
        ws.open(archive(tmp_path / "m.pt", content))


def mappings_in_one_another(depth: int) -> bytes:
    return b"}U\x05model" * depth + b"}" + b"s" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mappings_in_one_another(5000) + b".", "holds no state dict"),
        (b"\x80\x02}q\x00U\x05modelh\x00s.", "holds no state dict"),
        (nested_tuples(80) + b"0}hPK\x01s.", "key is a nested tuple"),
        (nested_tuples(80) + b"Q.", "no storage"),
        (nested_tuples(80) + b"0(dS'a'\n" + view(strides=b"(hPhPt") + b"s.", r"strides \(\(\(\(\.\.\.\)"),
        (b"(dS'a'\n" + view(b"(L4611686018427387903L\nI4\nt", b"(I0\nI0\nt") + b"s.", "larger than any file"),
        (b"(dS'a'\n" + view(metadata=b"(dS'neg'\nI01\ns") + b"s.", "negative view"),
    ],
)
def test_what_would_take_for_ever_or_read_wrongly_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        ws.open(archive(tmp_path / "m.pt", content))


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    """Python's unpickler in C makes room for every index up to the one named: here 16 GB."""
    path = archive(tmp_path / "m.pt", b"\x80\x02}r" + (10**9).to_bytes(4, "little") + b"U\x01a" + view() + b"s.")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "import weightsmith as ws; print(list(ws.open(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout.strip() == "['a']", done.stderr


def test_a_step_counter_beside_the_model_does_not_hide_it(tmp_path):
    inner = b"(dS'w'\n" + view() + b"s"
    both = archive(tmp_path / "m.pt", b"(dS'step'\n" + view() + b"sS'model'\n" + inner + b"s.")
    assert list(ws.open(both)) == ["w"]
