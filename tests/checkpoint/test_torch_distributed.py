"""Folders of torch.distributed.checkpoint, written by it: whole, in chunks, among optimisers, and spoiled."""

from __future__ import annotations

import pickle
import pickletools
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from weightsmith.checkpoint.torch_distributed import METADATA_FILE
from weightsmith.errors import CheckpointError, UnsafeFileError

torch = pytest.importorskip("torch")


def save(state: dict[str, Any], folder: Path) -> Path:
    """Save as one process does."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def weights(seed: int = 0) -> dict[str, Any]:
    """Return a small model's state."""
    made = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(5, 7, generator=made),
        "layers.0.bias": torch.randn(5, generator=made).bfloat16(),
        "norm.num_batches_tracked": torch.tensor(3 + seed),
    }


def check(folder: Path, expected: dict[str, Any]) -> None:
    """Compare a folder as it is opened with tensors of torch."""
    found = ws.open(folder)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert np.array_equal(found[name].numpy().astype(np.float64), tensor.double().numpy()), name
        assert found[name].shape == tuple(tensor.shape)


def test_state_dict_is_read_as_saved(tmp_path: Path) -> None:
    check(save(weights(), tmp_path / "saved"), weights())


def test_model_is_taken_from_among_optimiser_and_counters(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = {"model": model.state_dict(), "optim": optimiser.state_dict(), "step": 7, "seen": torch.tensor(9)}
    check(save(state, tmp_path / "flat"), model.state_dict())
    check(save({"app": state}, tmp_path / "app"), model.state_dict())


def test_accelerates_sharded_folder_is_read_with_files_beside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save({"model": weights()}, tmp_path / "pytorch_model_fsdp_0")
    save({"optimizer": {"state": torch.zeros(3)}}, tmp_path / "optimizer_0")
    check(tmp_path, weights())
    assert ws.open(tmp_path).config == {"model_type": "llama"}


def cut(tensor: Any, cuts: dict[int, list[int]]) -> list[tuple[tuple[int, ...], Any]]:
    """Cut a tensor into chunks along some axes: offsets and parts."""
    parts = [((0,) * tensor.ndim, tensor)]
    for axis, places in cuts.items():
        edges = [0, *places, tensor.shape[axis]]
        parts = [
            (tuple(a if i == axis else o for i, o in enumerate(offsets)), part.narrow(axis, a, b - a).contiguous())
            for offsets, part in parts
            for a, b in pairwise(edges)
        ]
    return parts


def save_chunks(name: str, tensor: Any, parts: list[tuple[tuple[int, ...], Any]], folder: Path) -> Path:
    """Write chunks as ranks do, each in a file of its own, with torch's own classes for the metadata."""
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir()
    places = {}
    chunks = []
    for rank, (offsets, part) in enumerate(parts):
        file = folder / f"__{rank}_0.distcp"
        with file.open("wb") as out:
            out.write(b"x" * 13 * rank)
            torch.save(part, out)
        index = m.MetadataIndex(name, torch.Size(offsets), rank)
        places[index] = _StorageInfo(file.name, 13 * rank, file.stat().st_size - 13 * rank)
        chunks.append(m.ChunkStorageMetadata(torch.Size(offsets), part.shape))
    entry = m.TensorStorageMetadata(m.TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    metadata = m.Metadata({name: entry}, {name: (name,)}, places)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    "cuts", [{0: [2, 3]}, {1: [3]}, {2: [1, 4]}, {0: [3], 1: [1, 4]}, {0: [1], 1: [2], 2: [2]}], ids=str
)
def test_any_range_of_a_tensor_in_chunks_is_read(tmp_path: Path, cuts: dict[int, list[int]]) -> None:
    tensor = torch.arange(4 * 5 * 6, dtype=torch.int32).reshape(4, 5, 6).to(torch.float16)
    found = ws.open(save_chunks("w", tensor, cut(tensor, cuts), tmp_path / "saved"))["w"]
    flat = tensor.reshape(-1).numpy()
    for start in range(121):
        for stop in range(start, 121):
            assert np.array_equal(found.read(start, stop), flat[start:stop]), (start, stop)


def test_chunks_that_do_not_cover_the_tensor_are_refused(tmp_path: Path) -> None:
    tensor = torch.ones(4, 6)
    parts = cut(tensor, {0: [2], 1: [3]})
    with pytest.raises(CheckpointError, match=r"3 chunks do not cover that once"):
        ws.open(save_chunks("w", tensor, parts[:3], tmp_path / "lacking"))
    twice = [*parts[:3], ((0, 3), parts[3][1])]
    with pytest.raises(CheckpointError, match="does not|do not cover"):
        ws.open(save_chunks("w", tensor, twice, tmp_path / "twice"))
    beyond = [*parts[:3], ((2, 4), parts[3][1])]
    with pytest.raises(CheckpointError, match="do not cover"):
        ws.open(save_chunks("w", tensor, beyond, tmp_path / "beyond"))


def test_chunk_other_than_the_metadata_says_is_refused_when_read(tmp_path: Path) -> None:
    tensor = torch.ones(4, 6)
    folder = save_chunks("w", tensor, cut(tensor, {0: [2]}), tmp_path / "saved")
    file = folder / "__0_0.distcp"
    length = file.stat().st_size
    with file.open("wb") as out:
        torch.save(torch.ones(24)[:12].reshape(6, 2), out)
    assert file.stat().st_size == length
    with pytest.raises(CheckpointError, match=r"shape \[6, 2\].*says \[2, 6\]"):
        ws.open(folder)["w"].numpy()


def test_file_cut_short_is_refused_when_opened(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "saved")
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has .* the file is cut short"):
        ws.open(folder)


def change(metadata: bytes, old: bytes, new: bytes) -> bytes:
    """Replace a text of the same length in a pickle."""
    assert len(old) == len(new)
    assert old in metadata
    return metadata.replace(old, new)


SPOILED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("names a function", lambda b: change(b, b"torch.serialization", b"torch.serializatiom"), "which no file of"),
    ("leads elsewhere", lambda b: change(b, b"__0_0.distcp", b"../../x/disk"), "not in its folder"),
    ("is cut short", lambda b: b[:200], "damaged"),
    ("makes another object", lambda b: b"\x80\x04ccollections\nOrderedDict\n)\x81.", "makes an object"),
    ("sets a state", lambda b: b"\x80\x04]}b.", "sets attributes"),
    ("is something else", lambda b: b"\x80\x04K\x01.", "no metadata"),
]


@pytest.mark.parametrize(("spoil", "message"), [one[1:] for one in SPOILED], ids=[one[0] for one in SPOILED])
def test_spoiled_metadata_is_one_clear_error(tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    folder = save(weights(), tmp_path / "saved")
    file = folder / METADATA_FILE
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises((CheckpointError, UnsafeFileError), match=message):
        ws.open(folder)


def test_any_byte_of_the_metadata_may_be_wrong(tmp_path: Path) -> None:
    folder = save(weights(), tmp_path / "saved")
    file = folder / METADATA_FILE
    content = file.read_bytes()
    for place, new in zip(range(0, len(content), 3), np.random.default_rng(0).integers(0, 256, 10**6), strict=False):
        file.write_bytes(content[:place] + bytes([new]) + content[place + 1 :])
        try:
            for tensor in ws.open(folder).values():
                tensor.numpy()
        except CheckpointError:
            pass


def test_metadata_holds_nothing_that_torch_does_not_write(tmp_path: Path) -> None:
    # What the table allows is what torch writes: a new version that writes more must be looked at.
    content = (save({"model": weights(), "step": 3}, tmp_path / "saved") / METADATA_FILE).read_bytes()
    texts = [text for code, text, _ in pickletools.genops(content) if "UNICODE" in code.name]
    modules = {text for text in texts if str(text).startswith(("torch.", "pathlib"))}
    assert modules <= {
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.serialization",
        "torch.strided",
        "pathlib",
    }
