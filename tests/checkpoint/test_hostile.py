"""Files made to exhaust memory or patience, opened in a process that says how much it took; and files that are none."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.checkpoint import manifest
from weightsmith.errors import CheckpointError, UnsafeFileError, WeightsmithError
from weightsmith.verification import reproduce, verify

MB = 1_000_000
# Opens a model with at most so much memory beyond what the imports took, and tells peak growth, time and outcome.
MEASURE = """
import json, resource, sys, time
import weightsmith.api, weightsmith.checkpoint.torch_pickle, weightsmith.adapters.fold
from weightsmith.errors import CheckpointError
ours = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (ours + int(sys.argv[2]),) * 2)
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    outcome = f"opened {len(weightsmith.api.open(sys.argv[1]))}"
except CheckpointError as error:
    outcome = str(error)
growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps([outcome, growth, time.monotonic() - began]))
"""


def measured(path: Path, allowed: int) -> tuple[str, int, float]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(allowed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, growth, seconds = json.loads(done.stdout)
    return outcome, growth, seconds


def header(text: bytes, *, claims: int | None = None) -> bytes:
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text


MANY = 2_000_000
FLOOD = 500_000
HEADERS = {
    "claims 99 MB and has one kB": (header(b"{}" + b" " * 1000, claims=99 * MB), "has only 1,002"),
    "claims 2**63": (header(b"{}", claims=2**63), "at most 100,000,000"),
    "lists": (header(b'{"a":[' + b"[]," * MANY + b"[]]}"), "not JSON"),
    "numbers for tensors": (header(b"{" + b",".join(b'"%x":0' % i for i in range(MANY // 5)) + b"}"), "not JSON"),
    "metadata": (header(b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(MANY // 5)) + b"}}"), "100,000"),
    "one long name": (header(b'{"' + b"x" * MANY * 2 + b'":{}}'), "4,000,000 characters"),
    "letters of four bytes": (header(b'{"' + "\U0001f600".encode() * MANY + b'":{}}'), "2,000,000 characters"),
    "nested": (header(b'{"a":' * (MANY // 2)), "not JSON"),
    "a million lengths": (header(b'{"a":{"dtype":"F32","shape":[' + b"1," * MANY + b"1]}}"), "not JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_refused_takes_memory_by_its_own_size(name, tmp_path):
    content, message = HEADERS[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    outcome, growth, seconds = measured(tmp_path / "m.safetensors", 100 * MB)
    assert message in outcome
    # Its bytes, and as a text of up to four bytes a letter, twice while it is decoded.
    assert growth < 8 * len(content) + 8 * MB
    assert seconds < 5


def test_a_good_header_takes_memory_by_its_own_size(tmp_path):
    text = b"{" + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000)) + b"}"
    (tmp_path / "m.safetensors").write_bytes(header(text))
    outcome, growth, _ = measured(tmp_path / "m.safetensors", 200 * MB)
    assert outcome == "opened 60000"
    assert growth < 20 * len(text)


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, data: bytes = bytes(64)) -> bytes:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", data)
    return path.read_bytes()


def claiming(path: Path, size: int) -> None:
    """Write an archive whose directory says, in zip64's form, that its pickle has so many bytes."""
    content = bytearray(archive(path, b"\x80\x02}."))
    entry, end = content.find(b"PK\x01\x02"), content.rfind(b"PK\x05\x06")
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    content[entry + 20 : entry + 28] = b"\xff" * 8
    content[entry + 30 : entry + 32] = len(extra).to_bytes(2, "little")
    place = entry + 46 + len("archive/data.pkl")
    directory = int.from_bytes(content[end + 12 : end + 16], "little") + len(extra)
    content[end + 12 : end + 16] = directory.to_bytes(4, "little")
    content[place:place] = extra
    path.write_bytes(content)


def with_a_hole_for_a_directory(path: Path) -> None:
    """Write an archive whose directory has a gigabyte, all of it a hole that no disk holds."""
    content = archive(path, b"\x80\x02}.")
    end = bytearray(content[content.rfind(b"PK\x05\x06") :])
    end[12:16] = (2**30).to_bytes(4, "little")
    with path.open("r+b") as file:
        file.truncate(2**30 + len(content))
        file.seek(0, os.SEEK_END)
        file.write(end)


ZIPS = {
    "a member of 2**40 bytes": (lambda path: claiming(path, 2**40), "reaches beyond the end"),
    "a deflate bomb": (
        lambda path: archive(path, bytes(50 * MB), zipfile.ZIP_DEFLATED),
        "is compressed, which torch.save never does; it was not unpacked",
    ),
    "a directory of a gigabyte": (with_a_hole_for_a_directory, "claims a directory of 1,073,741,"),
    "lists": (lambda path: archive(path, b"\x80\x02" + b"]" * FLOOD), "damaged"),
    "dictionaries": (lambda path: archive(path, b"\x80\x02" + b"}" * FLOOD), "damaged"),
    "marks": (lambda path: archive(path, b"\x80\x02" + b"(" * FLOOD), "damaged"),
    "memo": (lambda path: archive(path, b"\x80\x04]" + b"\x94" * FLOOD), "damaged"),
    "tuples in one another": (lambda path: archive(path, b"\x80\x02)" + b"\x85" * MANY + b"."), "no state dict"),
    "a number of 2 MB": (
        lambda path: archive(path, b"\x80\x02\x8b" + struct.pack("<i", MANY) + b"\x7f" * MANY + b"."),
        "no state dict",
    ),
    "more instructions than any": (lambda path: archive(path, b"\x80\x02N" + b"20" * MANY * 2), "instructions"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_an_archive_that_is_refused_takes_memory_by_its_own_size(name, tmp_path):
    make, message = ZIPS[name]
    make(tmp_path / "m.pt")
    outcome, growth, seconds = measured(tmp_path / "m.pt", 500 * MB)
    assert message in outcome
    # Objects of Python take a hundred times an instruction's byte.
    assert growth < 150 * min(os.path.getsize(tmp_path / "m.pt"), MANY) + 8 * MB
    assert seconds < 20


def expanded(shape: str, strides: str) -> bytes:
    storage = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI16\ntQ"
    view = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{shape}{strides}I00\nccollections\nOrderedDict\n(tR"
    return f"(dS'a'\n{view}tRs.".encode()


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ("(L1099511627776L\nt", "(I0\nt", "repeats its storage of 64 bytes to 4,398,046,511,104"),
        ("(I0\nL4611686018427387903L\nt", "(I1\nI1\nt", "larger than any file"),
        ("(" + "I1\n" * 65 + "t", "(" + "I1\n" * 65 + "t", "65 axes"),
    ],
)
def test_a_view_that_no_array_can_be_is_refused(tmp_path, shape, strides, message):
    archive(tmp_path / "m.pt", expanded(shape, strides))
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path / "m.pt")


ONE = {"a": np.ones(2, np.float32)}
SPECIAL = {
    "a pipe": (os.mkfifo, "a pipe"),
    "a socket": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "a device or a socket"),
    "a folder": (os.mkdir, "a folder"),
    "a link to itself": (lambda path: os.symlink(path.name, path), "symbolic links"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "model.safetensors.index.json", "adapter_config.json"]
)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, kind, file, monkeypatch):
    make, message = SPECIAL[kind]
    monkeypatch.chdir(tmp_path)
    if file != "model.safetensors":
        name = "adapter_model.safetensors" if file.startswith("adapter") else "model.safetensors"
        write_safetensors(tmp_path / name, ONE)
    # A socket's address has at most 108 characters.
    make(Path(file) if kind == "a socket" else tmp_path / file)
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_what_is_no_regular_file_does_not_travel(tmp_path, kind, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", ONE)
    SPECIAL[kind][0](Path(file) if kind == "a socket" else tmp_path / file)
    assert dict(ws.open(tmp_path).companions.files) == {}


def test_a_device_behind_a_link_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UnsafeFileError, match="link out of its folder|a device"):
            ws.open(path)


CONFIGS = {
    "nested": ("[" * 100_000, "not JSON"),
    "nested as deep as Python parses": ('{"a":' + "[" * 500 + "]" * 500 + "}", "more than 64 levels"),
    "a key twice": ('{"model_type": "a", "model_type": "b"}', "names 'model_type' twice"),
    "half a character": ('{"a": "\\ud83d"}', "surrogates not allowed"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    "a list": ("[1]", "does not hold a JSON object"),
    "not UTF-8": ('{"a": "\udcff"}', "not JSON in UTF-8"),
    "huge": ('{"a": "' + "x" * 17 * MB + '"}', "at most 16,000,000 are read"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", ["config.json", "unet/config.json"])
def test_a_config_that_nobody_could_write_again_is_refused(tmp_path, name, file):
    text, message = CONFIGS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path.parent / "model.safetensors", ONE)
    if file != "config.json":
        (tmp_path / "model_index.json").write_text("{}")
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path)


def test_infinity_in_a_config_travels(write_model, tmp_path):
    """transformers writes it: ``time_step_limit`` of Mamba 2."""
    folder = write_model("m", llama_tensors(0), {"num_hidden_layers": 2, "time_step_limit": [0.0, float("inf")]})
    ws.average([folder, folder]).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "9" * 5000, "1e999", "1.5"])
def test_what_is_no_number_in_a_header_or_an_index_is_refused(tmp_path, token):
    text = f'{{"a": {{"dtype": "F32", "shape": [{token}], "data_offsets": [0, 8]}}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(header(text) + bytes(8))
    with pytest.raises(CheckpointError, match="not JSON|whole numbers from 0"):
        ws.open(tmp_path)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", ONE)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "y", "a": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        ws.open(tmp_path)


ODD = ["a\nb", "a\0b", "\x1b[2Ja", "a\u202eb", "\x9b31m", "x" * 1000, " ", "../a", "/a", "a'\"\\", "\u2028"]


def test_any_text_can_be_a_tensors_name_and_comes_back(tmp_path):
    arrays = {name: np.full(3, number, np.float32) for number, name in enumerate(ODD)}
    write_safetensors(tmp_path / "a.safetensors", arrays)
    ws.average([tmp_path / "a.safetensors"] * 2).save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    assert {name: values[0] for name, values in found.items()} == {name: number for number, name in enumerate(ODD)}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "a.safetensors", "model.safetensors", "README.md", "weightsmith.yaml", "weightsmith.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"), [("x" * 1001, "1,001 characters"), ("9" * 5000, "5,000"), ("\\ud800", "half a character")]
)
def test_a_name_that_could_not_be_written_or_shown_is_refused(tmp_path, name, message):
    text = f'{{"{name}": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(header(text) + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path)
    content = f"(dV{name}\n".encode() + expanded("(I4\nt", "(I1\nt").split(b"\n", 1)[1]
    archive(tmp_path / "m.pt", content)
    with pytest.raises(CheckpointError, match=message):
        ws.open(tmp_path / "m.pt")


def test_a_tokenizer_or_template_that_is_replaced_by_a_pipe_is_not_waited_for(tmp_path):
    from weightsmith.tokenizer.chat_template import read_template
    from weightsmith.tokenizer.tokenizer import read_tokenizer

    for name in ("tokenizer.json", "chat_template.jinja"):
        os.mkfifo(tmp_path / name)
        read = read_template if name == "chat_template.jinja" else lambda files: read_tokenizer(files, "m")
        with pytest.raises(WeightsmithError, match="a pipe"):
            read({name: tmp_path / name})


@pytest.fixture
def resealed(write_model, tmp_path):
    """Return a function that writes an output whose manifest says something else, under a seal that fits."""

    def write(change):
        folder = write_model("m", llama_tensors(0))
        ws.average([folder, folder]).save(tmp_path / "out")
        path = tmp_path / "out" / manifest.MANIFEST_FILE
        content = json.loads(path.read_text())
        change(content)
        text = json.dumps({**content, "seal": manifest.UNKNOWN}, separators=(",", ":"))
        seal = f'"seal":"{manifest.hash_of(text.encode())}"'
        path.write_text(text.replace(f'"seal":"{manifest.UNKNOWN}"', seal) + "\n")
        return tmp_path / "out"

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../m/config.json": "0" * 32}), "not in its folder"),
        (lambda m: m["files"].update({"/etc/hostname": "0" * 32}), "not in its folder"),
        (lambda m: m["tensors"]["lm_head.weight"].update(file="../m/model.safetensors"), "not in its folder"),
        (lambda m: m["tensors"]["lm_head.weight"].update(file=3), "str expected, not int"),
        (lambda m: m["tensors"]["lm_head.weight"].update(shape="ab"), "list expected, not str"),
        (lambda m: m.update(recipe="/etc/hostname"), "the recipe is no recipe"),
        (lambda m: m.update(shard_size=-1), "below what it can be"),
        (lambda m: m.update(tensors=[]), "not a manifest"),
    ],
)
def test_a_manifest_that_somebody_made_leads_nowhere(resealed, change, message):
    out = resealed(change)
    for check in (verify, reproduce):
        with pytest.raises(CheckpointError, match=message):
            check(out)


def test_files_that_a_manifest_names_are_not_waited_for_nor_followed_out(resealed, tmp_path):
    def change(content):
        content["files"] |= {"pipe": "0" * 32, "zeros.json": "0" * 32, "far.json": "0" * 32}

    out = resealed(change)
    os.mkfifo(out / "pipe")
    (out / "zeros.json").symlink_to("/dev/zero")
    (out / "far.json").symlink_to(tmp_path / "m" / "config.json")
    found = {problem.file: problem.text for problem in verify(out).problems}
    assert "a pipe" in found["pipe"]
    assert "link out of its folder" in found["zeros.json"]
    assert "link out of its folder" in found["far.json"]
    (out / manifest.MANIFEST_FILE).unlink()
    os.mkfifo(out / manifest.MANIFEST_FILE)
    with pytest.raises(CheckpointError, match="a pipe"):
        verify(out)
