"""A written checkpoint is what was written, or it is said what is not; and its recipe makes it again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, write_safetensors
from weightsmith.checkpoint import manifest as manifests
from weightsmith.checkpoint.manifest import MANIFEST_FILE, read_manifest
from weightsmith.cli.main import main
from weightsmith.errors import CheckpointError, UnsafeFileError, WeightsmithError

EVERY = bool(os.environ.get("WEIGHTSMITH_EVERY_FAULT"))


def tiny(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": rng.standard_normal((3, 2)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "model.layers.0.empty": np.zeros((0, 4), np.float32),
        "model.scale": np.float32(seed),
        "model.position_ids": np.arange(3),
    }


@pytest.fixture
def inputs(write_model) -> list[Path]:
    return [write_model(name, tiny(i)) for i, name in enumerate(("a", "b"))]


@pytest.fixture
def folder(inputs, tmp_path) -> Path:
    ws.merge("linear", inputs, weight=0.5).save(tmp_path / "out", shard_size=30)
    return tmp_path / "out"


@pytest.fixture
def file(inputs, tmp_path) -> Path:
    ws.merge("linear", inputs, weight=0.5).save(tmp_path / "out.safetensors")
    return tmp_path / "out.safetensors"


@pytest.fixture
def run(capsys):
    def call(*arguments: Any) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def found(path: Path) -> str:
    """What verify says, in one text; empty if nothing is wrong."""
    try:
        return "\n".join(map(str, ws.verify(path, threads=1).problems))
    except WeightsmithError as error:
        return str(error)


def rewritten(path: Path, change: Any) -> None:
    """Change a folder's manifest and seal it again, as somebody would who wants to deceive."""
    content = json.loads((path / MANIFEST_FILE).read_text())
    change(content)
    content["seal"] = manifests.UNKNOWN
    text = json.dumps(content, separators=(",", ":"))
    seal = manifests.hash_of(text.encode())
    (path / MANIFEST_FILE).write_text(text.replace(manifests.UNKNOWN, seal, 1) + "\n")


# -- a single flipped bit ---------------------------------------------------------------------------------------------


def bits_of(path: Path, begin: int) -> list[tuple[int, int]]:
    """All bits of the weights, and some of what is before them; with WEIGHTSMITH_EVERY_FAULT all."""
    before = [(byte, bit) for byte in range(begin) for bit in range(8)]
    weights = [(byte, bit) for byte in range(begin, path.stat().st_size) for bit in range(8)]
    return (before if EVERY else random.Random(0).sample(before, 80)) + weights


def test_every_bit_of_a_folder_is_looked_at(folder):
    assert not found(folder)
    tensors = {name: entry.file for name, entry in ws.verify(folder).manifest.tensors.items()}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
        name = path.relative_to(folder).as_posix()
        for byte, bit in bits_of(path, begin):
            changed = bytearray(content)
            changed[byte] ^= 1 << bit
            path.write_bytes(changed)
            said = found(folder)
            assert name in said, f"bit {bit} of byte {byte} of {name}: {said or 'nothing'}"
            if byte >= begin:
                assert any(f"{name}: {tensor}: " in said for tensor, home in tensors.items() if home == name)
        path.write_bytes(content)
    assert not found(folder)


def test_every_bit_of_a_file_is_looked_at(file):
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    names = list(tiny(0))
    for byte, bit in bits_of(file, begin):
        changed = bytearray(content)
        changed[byte] ^= 1 << bit
        file.write_bytes(changed)
        said = found(file)
        assert file.name in said, f"bit {bit} of byte {byte}: {said or 'nothing'}"
        if byte >= begin:
            assert any(name in said for name in names)


def test_the_name_of_the_manifest_is_looked_at_too(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"weightsmith":', b'"weightsmitH":', 1))
    assert "the header is not the one that was written" in found(file)


def test_the_command_names_file_and_tensor_and_exits_with_1(run, folder):
    assert run("verify", folder)[0] == 0
    path = next(p for p in folder.glob("*.safetensors") if b"model.scale" in p.read_bytes())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, err = run("verify", folder)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {path.name}: model.")
    assert line.endswith(": its content is not what was written")
    code, out, _ = run("verify", folder, "--json")
    assert (code, json.loads(out)["ok"], len(json.loads(out)["problems"])) == (1, False, 1)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_or_made_longer_is_found(folder, file):
    whole = [p for p in folder.rglob("*") if p.is_file()]
    for path in [*whole, file]:
        root = file if path == file else folder
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            assert path.name in found(root), f"{path.name} of {length} bytes"
        path.write_bytes(content + b"\0")
        assert path.name in found(root)
        path.write_bytes(content)
    assert not found(folder)


def test_missing_renamed_swapped_and_added_files(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 2
    for name in ("config.json", "README.md", shards[0].name, "model.safetensors.index.json"):
        moved = (folder / name).rename(folder / f"{name}.bak")
        assert name in found(folder)
        moved.rename(folder / name)
    one, other = (shard.read_bytes() for shard in shards[:2])
    shards[0].write_bytes(other)
    shards[1].write_bytes(one)
    said = found(folder)
    assert shards[0].name in said
    assert shards[1].name in said
    shards[0].write_bytes(one)
    shards[1].write_bytes(other)
    (folder / "more.txt").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    verification = ws.verify(folder)
    assert verification.ok
    assert verification.notes == ("more.txt was not written by the merge",)


def test_pipes_and_devices_and_links_to_them_do_not_keep_it_waiting(folder):
    for name in ("config.json", "model-00001-of-00002.safetensors", MANIFEST_FILE):
        path = next(iter(folder.glob(name.replace("00002", "*"))))
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert "a pipe" in found(folder)
        path.unlink()
        path.symlink_to("/dev/zero")
        assert re.search("no regular file|link out of its folder", found(folder))
        path.unlink()
        path.mkdir()
        assert path.name in found(folder)
        path.rmdir()
        path.write_bytes(content)
    assert not found(folder)


def test_a_file_may_be_given_another_name(file):
    moved = file.rename(file.with_name("other.safetensors"))
    assert not found(moved)


# -- manifests of strangers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "", ".", "a\\b", "a\0b", "\ud800", "a//b"]
)
@pytest.mark.parametrize("where", ["tensors", "files"])
def test_a_path_that_leads_out_is_never_opened(folder, name, where, monkeypatch):
    def change(content: dict[str, Any]) -> None:
        if where == "files":
            content["files"][name] = "0" * 32
        else:
            next(iter(content["tensors"].values()))["file"] = name

    rewritten(folder, change)
    opened = []
    plain = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **named: opened.append(str(path)) or plain(path, *rest, **named)
    )
    with pytest.raises(UnsafeFileError, match="which is not in its folder"):
        ws.verify(folder)
    assert set(opened) <= {str(folder / MANIFEST_FILE)}


def tensor_with(**facts: Any) -> Any:
    return lambda content: content["tensors"]["model.embed_tokens.weight"].update(facts)


HASH = "0" * 32


@pytest.mark.parametrize(
    "change",
    [
        tensor_with(xxh3=f"{HASH}:{0:010x}"),
        tensor_with(xxh3=f"{HASH}:{3:010x}"),
        tensor_with(xxh3=f"{HASH}:{25:010x}"),
        tensor_with(xxh3=f"{HASH}:-000000001"),
        tensor_with(xxh3=f"{HASH}:ffffffffff"),
        tensor_with(xxh3=f"{HASH}:{1 << 70:x}"),
        tensor_with(xxh3=HASH),
        tensor_with(xxh3=7),
        tensor_with(shape=[-1, -6]),
        tensor_with(shape=[1e3]),
        tensor_with(shape=[True]),
        tensor_with(shape="abc"),
        tensor_with(shape=[1 << 62, 1 << 62], xxh3=f"{HASH}:{4:010x}"),
        tensor_with(dtype="F4"),
        tensor_with(dtype=["F32"]),
        tensor_with(file=None),
        lambda content: content.update(tensors=[]),
        lambda content: content.update(tensors={"a": 1}),
        lambda content: content.update(files=["a"]),
        lambda content: content.update(files={"a": 1}),
        lambda content: content.update(inputs={"a": 1}),
        lambda content: content.update(inputs=[{"path": 1, "size": 1, "modified": 1, "header": ""}]),
        lambda content: content.update(inputs=[{"path": "a"}]),
        lambda content: content.update(contents={"a": []}),
        lambda content: content.update(recipe={}),
        lambda content: content.update(weightsmith=1),
        lambda content: content.update(shard_size="1"),
        lambda content: content.update(format=2),
        lambda content: content.pop("arithmetic"),
    ],
)
def test_a_manifest_of_other_types_is_refused(folder, change):
    rewritten(folder, change)
    for check in (ws.verify, ws.reproduce):
        with pytest.raises(CheckpointError, match=MANIFEST_FILE):
            check(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "1", "null", '"a"', "[" * 100_000, '{"a":' * 100_000, '{"format":1,"seal":1}', "9" * 5000],
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST_FILE).write_text(text + "\n")
    with pytest.raises(CheckpointError, match="not a manifest of weightsmith"):
        ws.verify(folder)
    with pytest.raises(CheckpointError):
        read_manifest(text, "here")


def test_a_manifest_may_know_less_or_more_tensors(folder):
    def forget(content: dict[str, Any]) -> None:
        content["tensors"].pop("model.scale")

    rewritten(folder, forget)
    assert "model.scale: it is not among the tensors that were written" in found(folder)

    def invent(content: dict[str, Any]) -> None:
        content["tensors"]["invented"] = content["tensors"]["model.embed_tokens.weight"]

    rewritten(folder, invent)
    assert "invented: the file does not hold it" in found(folder)


def test_a_manifest_says_what_a_tensor_was(folder):
    rewritten(folder, tensor_with(dtype="I32"))
    assert "it was written as I32 [3, 2], and is not that any more" in found(folder)


# -- checkpoints without one ------------------------------------------------------------------------------------------


def test_of_other_checkpoints_headers_are_checked(inputs, run):
    code, out, err = run("verify", inputs[0])
    assert (code, "headers are sound" in out, "only headers were checked" in err) == (0, True, True)
    assert run("verify", inputs[0] / "model.safetensors")[0] == 0
    path = inputs[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = run("verify", inputs[0])
    assert (code, err.startswith("error: "), len(err.splitlines())) == (1, True, 1)
    code, _, err = run("verify", inputs[0] / "nothing")
    assert (code, err) == (1, f"error: there is no file or folder {inputs[0] / 'nothing'}\n")
    code, _, err = run("reproduce", inputs[1])
    assert (code, "it was not written by weightsmith" in err) == (1, True)


# -- running it again -------------------------------------------------------------------------------------------------


def test_folder_file_and_whatever_they_were_cut_to_are_made_again(run, folder, file):
    for path in (folder, file):
        code, out, err = run("reproduce", path, "--quiet")
        assert (code, err) == (0, "")
        assert "the recipe makes the same again" in out


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in ws.reproduce(path, threads=1).problems]


def changed(path: Path) -> None:
    """Change one element of a file's weights and nothing else: neither its size nor its header."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))


@pytest.mark.parametrize("hashed", [False, True])
def test_an_input_that_changed_is_named(inputs, tmp_path, hashed):
    out = tmp_path / "out"
    ws.merge("linear", inputs, weight=0.5).save(out, verify=hashed)
    assert problems(out) == []
    path = inputs[1] / "model.safetensors"
    original = path.read_bytes()
    changed(path)
    said = "\n".join(problems(out))
    assert ("the input's content has changed" in said) == hashed
    assert "the recipe makes other numbers now" in said
    write_safetensors(path, tiny(1) | {"model.extra": np.zeros(1, np.float32)})
    with pytest.raises(WeightsmithError, match=r"model\.extra"):
        ws.reproduce(out)
    write_safetensors(path, tiny(1) | {"model.scale": np.zeros(1, np.float32)})
    with pytest.raises(WeightsmithError, match=r"model\.scale"):
        ws.reproduce(out)
    path.write_bytes(original)
    assert problems(out) == []
    shutil.rmtree(inputs[0])
    with pytest.raises(WeightsmithError, match="there is no file or folder"):
        ws.reproduce(out)


def test_an_input_of_another_size_or_header_is_named(inputs, tmp_path):
    out = tmp_path / "out"
    ws.merge("linear", inputs, weight=0.5).save(out)
    path = inputs[1] / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["more"] = "x"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert any("the input had" in problem for problem in problems(out))
    header["__metadata__"]["more"] = "y"
    text = json.dumps(header).encode()
    ws.merge("linear", inputs, weight=0.5).save(tmp_path / "two")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert problems(tmp_path / "two") == [f"{path}: the input's header has changed"]


def test_another_version_or_arithmetic_is_a_note(folder):
    rewritten(folder, lambda content: content.update(weightsmith="0.0.1", arithmetic="torch on cuda"))
    found_again = ws.reproduce(folder)
    assert found_again.ok
    assert found_again.notes[0].startswith("it was written by weightsmith 0.0.1, and this is ")
    assert found_again.notes[1].startswith("it was computed by torch on cuda, and now by ")


def test_a_recipe_that_makes_other_tensors_now(folder):
    def change(content: dict[str, Any]) -> None:
        content["recipe"] += "dtype: float16\n"

    rewritten(folder, change)
    said = "\n".join(problems(folder))
    assert "model.embed_tokens.weight: the recipe makes it F16 [3, 2] now" in said


@pytest.mark.parametrize("recipe", ["", "a: [", "merge_method: no_such\nmodels: [{model: x}]\n", "[" * 5000])
def test_a_recipe_that_is_understood_no_more_is_one_error(run, folder, recipe):
    rewritten(folder, lambda content: content.update(recipe=recipe))
    code, _, err = run("reproduce", folder, "--quiet")
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path) -> Path:
    for seed, name in enumerate(("p", "q")):
        for component, cls in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel"), ("vae", "VAE")):
            inner = tmp_path / name / component
            inner.mkdir(parents=True)
            tensors = {key: value + len(component) for key, value in llama_tensors(seed, layers=1).items()}
            write_safetensors(inner / "model.safetensors", tensors)
            (inner / "config.json").write_text(json.dumps({"_class_name": cls}))
        index = {"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["t", "C"], "vae": ["d", "V"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    merged = ws.merge("linear", [tmp_path / "p", tmp_path / "q"], weight=0.5)
    merged.save(tmp_path / "out", shard_size=1000)
    return tmp_path / "out"


def test_a_pipeline_of_several_models_is_checked_and_made_again(pipeline):
    files = sorted(pipeline.rglob("*.safetensors"))
    assert len({path.parent for path in files}) == 3
    assert len(files) > 3
    assert not found(pipeline)
    assert problems(pipeline) == []
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        component = path.parent.name
        assert f"{component}/{path.name}: {component}/" in found(pipeline)
        path.write_bytes(content)
    one, other = (next((pipeline / component).glob("*-00001-*")) for component in ("unet", "vae"))
    moved = one.rename(one.with_suffix(".bak"))
    other.rename(one)
    moved.rename(other)
    assert f"unet/{one.name}: unet/" in found(pipeline)
    assert f"vae/{other.name}: vae/" in found(pipeline)
