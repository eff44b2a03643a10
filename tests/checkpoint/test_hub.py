"""What is fetched of a hub's repository, and when the cache is enough."""

from __future__ import annotations

import pytest

from weightsmith.checkpoint import hub
from weightsmith.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "modeling_x.py"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], ["pytorch_model.bin"]),
        (["last.ckpt"], ["last.ckpt"]),
        (["consolidated.safetensors", "model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["model.safetensors", "onnx/model.safetensors", "checkpoint-5/model.safetensors"], ["model.safetensors"]),
        (["m.fp16-1-of-2.safetensors", "m-1-of-2.safetensors"], ["m-1-of-2.safetensors"]),
        (
            ["model_index.json", "all.safetensors", "unet/a.safetensors", "vae/b.bin"],
            ["unet/a.safetensors", "vae/b.bin"],
        ),
        (["model_index.json", "unet/a.safetensors", "unet/a.fp16.safetensors"], ["unet/a.safetensors"]),
        (["model_index.json", "unet/a.fp16.safetensors"], ["unet/a.fp16.safetensors"]),
        (
            ["weightsmith-bundle.json", "base/model.safetensors", "tasks/a/model.safetensors", "files/run.py"],
            ["base/model.safetensors", "tasks/a/model.safetensors"],
        ),
    ],
)
def test_one_copy_of_the_weights_is_fetched(names, expected):
    assert hub._weights(names) == expected


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Return a function that leaves files of a model in the cache and says whether they are enough."""
    commit = "0" * 40
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda m, **o: fetch(m, cache_dir=tmp_path, **o))

    def enough(*names):
        repository = tmp_path / "models--org--m"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        for name in names:
            (repository / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / "snapshots" / commit / name).write_bytes(b"")
        return hub._in_cache("org/m", None) is not None

    return enough


PIPELINE = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json"], False),
        (["config.json", "optimizer.pt"], False),
        (SHARDS[:1], False),
        (SHARDS[1:], False),
        (SHARDS, True),
        ([*PIPELINE, "unet/a.safetensors"], False),
        ([*PIPELINE, "unet/a.safetensors", "vae/b.bin"], True),
        (PIPELINE[:2], False),
    ],
)
def test_a_cache_without_all_weights_is_not_enough(cached, names, expected):
    """As an interrupted download leaves it: the rest is fetched instead of missed."""
    assert cached(*names) == expected


def test_a_bundle_in_the_cache_is_enough_when_all_its_parts_are_there(write_model, tmp_path, monkeypatch):
    import shutil

    import weightsmith as ws
    from conftest import llama_tensors

    models = [write_model(name, llama_tensors(i)) for i, name in enumerate(("base", "one", "two"))]
    ws.bundle.create(tmp_path / "out", models[1:], base=models[0], kind="emr")
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda m, **o: fetch(m, cache_dir=tmp_path / "hub", **o))
    repository = tmp_path / "hub" / "models--org--m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "out", snapshot)
    found = ws.open("org/m@main#two")
    assert list(found) == list(ws.open(models[2]))
    (snapshot / "tasks" / "one" / "model.safetensors").unlink()
    assert hub._in_cache("org/m", None) is None


def test_a_network_that_is_not_there_is_one_line(cached, monkeypatch):
    """HTTP libraries have errors of their own, which are no OSError."""

    class ConnectError(Exception):
        pass

    def list_repo_files(*_, **__):
        raise ConnectError("[Errno -2] Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    with pytest.raises(CheckpointError) as found:
        hub.resolve("org/m", None)
    assert str(found.value) == (
        "there is no file or folder org/m here, and the hub does not give it: [Errno -2] Name or service not known"
    )
