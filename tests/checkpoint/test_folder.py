"""Folders: which files are the model, which travel beside it, and which are refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.checkpoint import storage
from weightsmith.checkpoint.safetensors import natural_order
from weightsmith.errors import CheckpointError, UnsafeFileError

ONE = {"a": np.ones(2, np.float32)}
TWO = {"b": np.zeros((2, 2), np.float32)}


def shards(folder, weight_map):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model-00001-of-00002.safetensors", ONE)
    write_safetensors(folder / "model-00002-of-00002.safetensors", TWO)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


GOOD = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_shards_are_read_by_their_index_or_without(tmp_path):
    folder = shards(tmp_path / "m", GOOD)
    assert set(ws.open(folder)) == {"a", "b"}
    (folder / "model.safetensors.index.json").unlink()
    assert set(ws.open(folder)) == {"a", "b"}
    assert [os.path.basename(i.path) for i in ws.open(folder).identities] == sorted(GOOD.values())


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({**GOOD, "c": GOOD["a"]}, CheckpointError, "says that 'c' is in model-00001"),
        ({"a": GOOD["a"], "b": GOOD["a"]}, CheckpointError, "says that 'b' is in model-00001"),
        ({"a": "../a.safetensors"}, UnsafeFileError, "not in its folder"),
        ({"a": "/etc/passwd"}, UnsafeFileError, "not in its folder"),
        ({"a": "a\0b"}, UnsafeFileError, "not in its folder"),
        ({"a": "\ud800"}, CheckpointError, "not JSON in UTF-8"),
        ({"a": "..\\a.safetensors"}, UnsafeFileError, "not in its folder"),
        ({"a": "missing.safetensors"}, CheckpointError, "missing.safetensors"),
        ({"a": 3}, CheckpointError, "not an index"),
        ({}, CheckpointError, "not an index"),
        ([1], CheckpointError, "not an index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, error, message):
    with pytest.raises(error, match=message):
        ws.open(shards(tmp_path / "m", weight_map))


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path):
    for name in ("one", "two"):
        write_safetensors(tmp_path / f"{name}.safetensors", ONE)
    with pytest.raises(CheckpointError, match="'a' is in both one.safetensors and two.safetensors"):
        ws.open(tmp_path)


def test_a_link_out_of_the_folder_is_refused_but_for_the_hubs_cache(tmp_path):
    write_safetensors(tmp_path / "elsewhere", ONE)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="is a link out of its folder"):
        ws.open(tmp_path / "m")
    snapshot = tmp_path / "models--org--m" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_safetensors(blobs / "abc", ONE)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert set(ws.open(snapshot)) == {"a"}


@pytest.mark.parametrize("name", ["..", "a\\b", "a\0b"])
def test_a_server_cannot_list_what_lies_outside_its_folder(monkeypatch, name):
    """Such a name would become a folder of the output: a pipeline's components keep theirs."""

    class System:
        def ls(self, key, detail):
            return [f"{key}/model_index.json", f"{key}/{name}"]

    monkeypatch.setattr(storage, "filesystem", lambda url: (System(), "bucket/model"))
    with pytest.raises(UnsafeFileError, match="cannot be the name of a file in it"):
        ws.open("s3://bucket/model")


def test_a_pipeline_in_the_hubs_cache_is_opened(tmp_path):
    snapshot, blobs = tmp_path / "models--o--p" / "snapshots" / "0123", tmp_path / "models--o--p" / "blobs"
    (snapshot / "unet").mkdir(parents=True)
    blobs.mkdir()
    write_safetensors(blobs / "abc", ONE)
    (blobs / "index").write_text("{}")
    (snapshot / "model_index.json").symlink_to("../../blobs/index")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/abc")
    assert list(ws.open(snapshot)) == ["unet/a"]


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "additional_chat_templates/x.jinja", "model.safetensors.index.json"]
)
def test_no_file_beside_the_weights_may_be_a_link_out(tmp_path, file):
    folder = tmp_path / "m"
    (folder / file).parent.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", ONE)
    (tmp_path / "secret").write_text('{"weight_map": {"a": "model.safetensors"}}')
    (folder / file).symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        ws.open(folder)


@pytest.mark.parametrize("link", ["additional_chat_templates", "vae"])
def test_no_folder_beside_the_weights_may_be_a_link_out(tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    folder = pipeline(tmp_path / "m", 0)
    (folder / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        ws.open(folder)


def test_numbers_in_names_order_as_numbers(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {f"layers.{i}.w": np.ones(1) for i in (10, 2, 1)})
    assert list(ws.open(tmp_path)) == ["layers.1.w", "layers.2.w", "layers.10.w"]


def test_a_name_may_have_more_digits_than_a_number():
    names = ["a1", "a9", "a10", "a" + "1" * 5000, "a" + "2" * 5000, "b", "b.2", "b.2.c", "b.10"]
    assert sorted({*names}, key=natural_order) == names


def test_second_copies_of_the_weights_and_files_of_the_training_run_are_left_out(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ONE)
    write_safetensors(tmp_path / "consolidated.safetensors", TWO)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    (tmp_path / "optimizer.pt").write_bytes(b"not read")
    (tmp_path / "training_args.bin").write_bytes(b"not read")
    assert set(ws.open(tmp_path)) == {"a"}


def test_the_makers_own_layout_is_left_out_beside_that_of_transformers(tmp_path):
    write_safetensors(tmp_path / "consolidated-00001-of-00001.safetensors", TWO)
    write_safetensors(tmp_path / "model-00001-of-00001.safetensors", ONE)
    assert list(ws.open(tmp_path)) == ["a"]
    for stem, name in (("consolidated", "b"), ("model", "a")):
        index = {"weight_map": {name: f"{stem}-00001-of-00001.safetensors"}}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert list(ws.open(tmp_path)) == ["a"]


def test_the_makers_own_layout_is_read_where_there_is_no_other(tmp_path):
    write_safetensors(tmp_path / "consolidated.safetensors", TWO)
    assert list(ws.open(tmp_path)) == ["b"]


def test_vocabularies_and_templates_travel_and_an_adapters_config_does_not(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ONE)
    for name in ("vocab.bpe", "bpe.codes", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "additional_chat_templates" / "folder").mkdir(parents=True)
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
    found = ws.open(tmp_path)
    assert not found.is_adapter
    assert set(found.companions.files) == {"vocab.bpe", "bpe.codes", "additional_chat_templates/rag.jinja"}


def test_config_and_small_files_travel_and_code_and_readme_do_not(write_model):
    folder = write_model("m", ONE)
    for name in ("tokenizer.json", "generation_config.json", "merges.txt", "README.md", "modeling_x.py", "LICENSE"):
        (folder / name).write_text("{}")
    found = ws.open(folder)
    assert found.config["model_type"] == "llama"
    assert set(found.companions.files) == {"tokenizer.json", "generation_config.json", "merges.txt", "LICENSE"}


def test_a_folder_of_an_adapter_is_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_safetensors(tmp_path / "adapter_model.safetensors", ONE)
    assert ws.open(tmp_path).is_adapter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file or folder"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: (p.mkdir(), (p / "notes.md").write_text("")), "holds no weights.*notes.md"),
    ],
)
def test_nothing_to_open_is_said_plainly(tmp_path, make, message):
    make(tmp_path / "m.x")
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path / "m.x")


def test_adapters_in_folders_of_their_names_are_pointed_to(tmp_path):
    """PEFT saves adapters that are not named default so."""
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "README.md").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no weights .*; an adapter is in .*style$"):
        ws.open(tmp_path)


def test_a_revision_of_a_folder_is_refused_not_ignored(write_model):
    with pytest.raises(CheckpointError, match="leave out @v2"):
        ws.open(f"{write_model('m', ONE)}@v2")


def pipeline(folder, seed):
    rng = np.random.default_rng(seed)
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / component).mkdir(parents=True)
        weights = {"conv_in.weight": rng.standard_normal((3, 2)).astype(np.float32)}
        write_safetensors(folder / component / f"{stem}.safetensors", weights)
        kind = {"architectures": ["CLIPTextModel"]} if stem == "model" else {"_class_name": "UNet"}
        (folder / component / "config.json").write_text(json.dumps(kind))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    return folder


def test_a_diffusers_pipeline_is_merged_component_by_component(tmp_path):
    one, other = pipeline(tmp_path / "a", 0), pipeline(tmp_path / "b", 1)
    merged = ws.average([one, other])
    assert list(merged) == ["text_encoder/conv_in.weight", "unet/conv_in.weight"]
    merged.save(tmp_path / "out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "weightsmith.json",
        "weightsmith.yaml",
    ]
    for component in ("unet", "text_encoder"):
        halves = [read_safetensors(folder / component)["conv_in.weight"] for folder in (one, other)]
        found = read_safetensors(tmp_path / "out" / component)["conv_in.weight"]
        np.testing.assert_allclose(found, sum(halves) / 2, rtol=1e-6)


def test_a_single_file_merges_into_a_single_file(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_safetensors(tmp_path / f"{name}.safetensors", llama_tensors(seed))
    ws.average([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]).save(tmp_path / "out.safetensors")
    found = read_safetensors(tmp_path / "out.safetensors")
    one, other = llama_tensors(0), llama_tensors(1)
    assert all(np.allclose(found[name], (one[name] + other[name]) / 2) for name in one)
