"""Layouts are written out and read back with the safetensors library."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from weightsmith.checkpoint.layout import Layout, Part, lay_out
from weightsmith.checkpoint.tensor import ArrayTensor


def tensors() -> list[ArrayTensor]:
    rng = np.random.default_rng(0)
    arrays = {
        "flags": rng.integers(0, 2, 3).astype(bool),
        "z.weight": rng.standard_normal((4, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "ünïcode": np.arange(5, dtype=np.int64),
    }
    return [ArrayTensor(name, array) for name, array in arrays.items()]


def write(layout: Layout, folder: Path, entries: list[ArrayTensor]) -> None:
    for number, shard in enumerate(layout.shards):
        content = bytearray(shard.nbytes)
        content[: len(shard.header)] = shard.header
        for tensor in entries:
            place = layout.placements[tensor.name]
            if place.shard == number:
                content[place.offset : place.offset + place.nbytes] = tensor.numpy().tobytes()
        (folder / shard.path).parent.mkdir(exist_ok=True)
        (folder / shard.path).write_bytes(content)


def test_one_file_is_read_back_by_the_reference_library(tmp_path):
    entries = tensors()
    layout = lay_out(entries)
    write(layout, tmp_path, entries)
    found = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert {name: bytes(entry["data"]) for name, entry in found.items()} == {
        t.name: t.numpy().tobytes() for t in entries
    }
    assert layout.indexes == {}


def test_every_tensor_is_aligned_to_its_dtype():
    entries = tensors()
    layout = lay_out(entries)
    for tensor in entries:
        assert layout.placements[tensor.name].offset % tensor.dtype.itemsize == 0


def test_shards_hold_at_most_what_was_asked_and_the_index_names_each_tensor_once(tmp_path):
    entries = [ArrayTensor(f"t{i}", np.full(10, i, np.float32)) for i in range(7)]
    entries.append(ArrayTensor("large", np.zeros(100, np.float32)))
    layout = lay_out(entries, shard_size=100)
    write(layout, tmp_path, entries)
    assert [shard.path for shard in layout.shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    sizes = [sum(layout.placements[n].nbytes for n in shard.tensors) for shard in layout.shards]
    assert sizes == [80, 80, 80, 40, 400]
    index = layout.indexes["model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 680
    assert list(index["weight_map"]) == [t.name for t in entries]
    for name, file in index["weight_map"].items():
        assert name in dict(safetensors.deserialize((tmp_path / file).read_bytes()))


def test_a_pipelines_components_get_folders_and_names_without_the_prefix(tmp_path):
    entries = [ArrayTensor("unet/a", np.ones(2)), ArrayTensor("text_encoder/b", np.ones(3))]
    parts = [Part("unet/", "diffusion_pytorch_model"), Part("text_encoder/")]
    layout = lay_out(entries, parts)
    write(layout, tmp_path, entries)
    unet = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    text = (tmp_path / "text_encoder" / "model.safetensors").read_bytes()
    assert [name for name, _ in safetensors.deserialize(unet)] == ["a"]
    assert [name for name, _ in safetensors.deserialize(text)] == ["b"]
