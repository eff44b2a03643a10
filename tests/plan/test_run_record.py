"""How long a merge took is kept with its result, and is no byte of it."""

from __future__ import annotations

import json
import os

import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.plan.run_record import RunRecord

ATTRIBUTE = "user.weightsmith.run"


@pytest.fixture
def merged(write_model, tmp_path):
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, ATTRIBUTE, b"x")
    except (OSError, AttributeError):
        pytest.skip("the file system keeps no attributes of files")
    models = [write_model(name, llama_tensors(seed)) for seed, name in enumerate("ab")]
    summary = ws.average(models).save(tmp_path / "out", threads=2)
    return models, tmp_path / "out", summary


def test_a_merge_says_what_it_took(merged):
    models, out, summary = merged
    record = ws.report(out).merged.run
    assert 0 < record.seconds <= summary.seconds
    nbytes = sum((model / "model.safetensors").stat().st_size for model in models)
    assert 0.5 * nbytes < record.bytes_read < nbytes
    assert record.bytes_written == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert (record.threads, record.tensors, record.resumed) == (2, summary.tensors, 0)


def test_a_single_file_says_so_as_well(merged, tmp_path):
    models, _, _ = merged
    summary = ws.average(models).save(tmp_path / "one.safetensors", threads=1)
    assert ws.report(tmp_path / "one.safetensors").merged.run.tensors == summary.tensors


def test_two_merges_are_the_same_bytes_whatever_they_took(merged, tmp_path):
    models, out, _ = merged
    ws.average(models).save(tmp_path / "again", threads=1)
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (out, tmp_path / "again"))
    assert first == second
    assert ws.report(out).merged.run != ws.report(tmp_path / "again").merged.run
    assert not ws.verify(out).problems
    assert not ws.reproduce(out).problems


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "[1]",
        lambda text: "[" * 4000,
        lambda text: text.replace('"threads": 2', '"threads": "2"'),
        lambda text: text.replace('"threads": 2', '"threads": -2'),
        lambda text: json.dumps({**json.loads(text), "seconds": float("nan")}),
        lambda text: json.dumps({**json.loads(text), "seconds": True}),
        lambda text: json.dumps({**json.loads(text), "tensors": 1 << 80}),
        None,
    ],
)
def test_what_cannot_be_understood_is_no_record(merged, change):
    _, out, _ = merged
    file = out / "weightsmith.json"
    text = os.getxattr(file, ATTRIBUTE).decode()
    assert RunRecord.of(file) is not None
    if change is None:
        os.removexattr(file, ATTRIBUTE)
    else:
        assert change(text) != text
        os.setxattr(file, ATTRIBUTE, change(text).encode())
    assert RunRecord.of(file) is None
    assert ws.report(out).merged.run is None
