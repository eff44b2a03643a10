"""PyTorch files: real ones from torch, and hostile ones made by hand."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from weightsmith.checkpoint.storage import LocalSource
from weightsmith.errors import CheckpointError, UnsafeFileError, WeightsmithError


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def state(torch: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    matrix = torch.randn(4, 6)
    return {
        "weight": matrix,
        "transposed": matrix.t(),
        "part": matrix[1:3, 2:5],
        "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "f8": torch.randn(6).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


def same(torch: Any, found: ws.Checkpoint, expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        values = found[name].numpy()
        assert values.shape == tuple(tensor.shape), name
        wanted = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert values.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_state_dict_is_read_as_torch_wrote_it(torch, tmp_path, ending):
    torch.save(state(torch), tmp_path / f"m{ending}")
    same(torch, ws.open(tmp_path / f"m{ending}"), state(torch))


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_where_frameworks_put_it(torch, tmp_path, nest):
    whole = {"epoch": 3, nest: state(torch), "optimizer": {"lr": 0.1, "state": [{"step": torch.tensor(1.0)}]}}
    torch.save(whole, tmp_path / "m.ckpt")
    same(torch, ws.open(tmp_path / "m.ckpt"), state(torch))


def test_a_strided_tensor_is_read_in_any_stretch(torch, tmp_path):
    matrix = torch.randn(7, 5, 3)
    torch.save({"a": matrix.permute(2, 0, 1)}, tmp_path / "m.pt")
    tensor = ws.open(tmp_path / "m.pt")["a"]
    flat = matrix.permute(2, 0, 1).reshape(-1).numpy()
    for start, stop in [(0, 105), (3, 4), (50, 99), (104, 105), (9, 9)]:
        assert np.array_equal(tensor.read(start, stop), flat[start:stop])


def test_a_transposed_tensor_read_in_blocks_reads_its_storage_once(torch, tmp_path, monkeypatch):
    matrix = torch.randn(512, 512)
    torch.save({"a": matrix.t()}, tmp_path / "m.pt")
    tensor = ws.open(tmp_path / "m.pt")["a"]
    reads = []
    read = LocalSource.read
    monkeypatch.setattr(LocalSource, "read", lambda s, a, b: reads.append(b - a) or read(s, a, b))
    found = np.concatenate([tensor.read(i, i + 4096) for i in range(0, tensor.size, 4096)])
    assert np.array_equal(found, matrix.t().reshape(-1).numpy())
    assert sum(reads) == tensor.nbytes


def test_sharded_pickles_are_read_by_their_index(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {names}}}'.replace("'", '"'))
    assert {name: tensor.shape for name, tensor in ws.open(tmp_path).items()} == {"a": (2,), "b": (3,)}


def test_a_torchscript_program_is_refused(torch, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        ws.open(tmp_path / "m.pt")


def test_the_format_before_zip_is_refused_with_advice(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6.*save it again"):
        ws.open(tmp_path / "m.pt")


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED, data: bytes = bytes(64)) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", data)
    return path


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


MARK = os.path.join(tempfile.gettempdir(), "weightsmith-was-attacked")
ATTACKS = {
    "os.system": (pickle.dumps(Calls(os.system, f"touch {MARK}")), r"asks for (posix|nt)\.system"),
    "eval": (pickle.dumps(Calls(eval, "1")), r"asks for builtins\.eval"),
    "exec, protocol 0": (pickle.dumps(Calls(exec, "1"), 0), r"asks for (__builtin__|builtins)\.exec"),
    "getattr": (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    "hidden in a list": (pickle.dumps({"a": [1, (Calls(os.system, "true"),)]}), r"asks for posix\.system"),
    "a dotted name": (
        b"\x80\x04\x8c\x0bcollections\x8c\x1eOrderedDict.__init__.__class__\x93.",
        "OrderedDict.__init__",
    ),
    "a chain of getattr": (
        b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(c__builtin__\nobject\nS'__class__'\ntRS'mro'\ntR.",
        r"asks for builtins\.getattr",
    ),
    "REDUCE on a builtin, behind a good tensor": (
        b"(dS'a'\nccollections\nOrderedDict\n(tRsS'b'\nc__builtin__\nmap\n(c__builtin__\nlen\n(ltRs.",
        r"asks for (__builtin__|builtins)\.map",
    ),
    "a name of a megabyte": (b"cposix\n" + b"x" * 1_000_000 + b"\n.", r"asks for posix\.x{100}, which"),
    "torch's own loader": (b"ctorch\nload\n.", r"torch\.load"),
    "numpy": (b"cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_asks_for_more_is_refused_by_name_and_not_run(name, tmp_path):
    content, message = ATTACKS[name]
    Path(MARK).unlink(missing_ok=True)
    with pytest.raises(UnsafeFileError, match=message):
        ws.open(archive(tmp_path / "m.pt", content))
    assert not Path(MARK).exists()


def storage(
    key: str = "0", elements: int = 16, size: str = "(I4\nI4\nt", strides: str = "(I4\nI1\nt", offset: int = 0
) -> bytes:
    """Write the pickle of ``{"a": tensor}`` in torch's form, text opcodes throughout."""
    saved = f"(S'storage'\nctorch\nFloatStorage\nS'{key}'\nS'cpu'\nI{elements}\ntQ"
    empty = "ccollections\nOrderedDict\n(tR"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({saved}I{offset}\n{size}{strides}I00\n{empty}tR"
    return f"(dS'a'\n{tensor}s.".encode()


def test_the_hand_written_pickle_is_a_good_one(tmp_path):
    data = np.arange(16, dtype=np.float32)
    pickletools.dis(storage(), io.StringIO())
    found = ws.open(archive(tmp_path / "m.pt", storage(), data=data.tobytes()))
    assert np.array_equal(found["a"].numpy(), data.reshape(4, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (storage(key="9"), "storage '9', which the file lacks"),
        (storage(size="(I400\nI400\nt"), "reaches to byte"),
        (storage(offset=13), "reaches to byte"),
        (storage(offset=-1), "shape"),
        (storage(strides="(I4\nt"), "strides"),
        (storage(strides="(I4\nI-1\nt"), "strides"),
        (b"(dS'a'\nI1\ns.", "no state dict"),
        (b"\x80\x02garbage", "damaged"),
        (b"S'x'\nQ.", "no storage"),
    ],
)
def test_a_damaged_description_is_refused(content, message, tmp_path):
    with pytest.raises(WeightsmithError, match=message):
        ws.open(archive(tmp_path / "m.pt", content))


def test_compressed_members_are_refused_unread(tmp_path):
    path = archive(tmp_path / "m.pt", storage(), compression=zipfile.ZIP_DEFLATED, data=bytes(10_000_000))
    with pytest.raises(UnsafeFileError, match="is compressed"):
        ws.open(path)


def test_encrypted_members_are_refused(tmp_path):
    path = archive(tmp_path / "m.pt", storage())
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    content[entry + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match=r"data\.pkl' is encrypted"):
        ws.open(path)


def test_a_member_before_the_start_of_the_file_is_refused(tmp_path):
    """The end of the archive says that its directory lies further on than it does, so every place moves back."""
    path = archive(tmp_path / "m.pt", storage())
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    offset = int.from_bytes(content[end + 16 : end + 20], "little") + 50
    content[end + 16 : end + 20] = offset.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="begins before|damaged"):
        ws.open(path)


def test_a_member_twice_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    archive(path, storage())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", bytes(64))
    with pytest.raises(UnsafeFileError, match="twice"):
        ws.open(path)


def test_overlapping_members_are_refused(tmp_path):
    """The directory says that two members lie at the same place."""
    path = archive(tmp_path / "m.pt", storage())
    content = bytearray(path.read_bytes())
    first = content.find(b"PK\x01\x02")
    second = content.find(b"PK\x01\x02", first + 1)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(content)
    with pytest.raises(WeightsmithError, match="overlaps|not where|reaches"):
        ws.open(path)
    assert os.path.getsize(path) < 10_000


def test_a_member_that_runs_into_the_next_ones_header_is_refused(tmp_path):
    """The directory says that it has eight bytes more than there are before that header."""
    path = archive(tmp_path / "m.pt", storage())
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    for at in (entry + 20, entry + 24):
        size = int.from_bytes(content[at : at + 4], "little") + 8
        content[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match="'archive/data/0' overlaps 'archive/data.pkl'"):
        ws.open(path)


@pytest.mark.parametrize("cut", [1, 30, 100, 200])
def test_a_truncated_archive_is_refused(cut, tmp_path):
    path = archive(tmp_path / "m.pt", storage())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="damaged"):
        ws.open(path)
