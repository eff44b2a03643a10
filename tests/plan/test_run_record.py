"""How long a merge took is kept beside its result, and is no part of it."""

from __future__ import annotations

import json

import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.checkpoint.folder import RUN_FILE
from weightsmith.plan.run_record import RunRecord


@pytest.fixture
def merged(write_model, tmp_path):
    models = [write_model(name, llama_tensors(seed)) for seed, name in enumerate("ab")]
    summary = ws.average(models).save(tmp_path / "out", threads=2)
    return models, tmp_path / "out", summary


def test_a_merge_says_what_it_took(merged):
    models, out, summary = merged
    record = RunRecord.read(out)
    assert 0 < record.seconds <= summary.seconds
    nbytes = sum((model / "model.safetensors").stat().st_size for model in models)
    assert 0.5 * nbytes < record.bytes_read < nbytes
    assert record.bytes_written == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert (record.threads, record.tensors, record.resumed) == (2, summary.tensors, 0)
    found = ws.report(out).merged
    assert found.run == record


def test_two_merges_differ_in_it_alone(merged, tmp_path):
    models, out, _ = merged
    ws.average(models).save(tmp_path / "again", threads=1)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    differing = {name for name in names if (out / name).read_bytes() != (tmp_path / "again" / name).read_bytes()}
    assert differing == {RUN_FILE}
    assert not ws.verify(out).problems
    assert not ws.verify(out).notes
    assert not ws.reproduce(out).problems


def test_it_goes_with_no_other_result(merged, tmp_path):
    models, out, _ = merged
    before = (out / RUN_FILE).read_bytes()
    assert RUN_FILE not in ws.open(out).companions.files
    ws.average([out, models[0]]).save(tmp_path / "next")
    assert (tmp_path / "next" / RUN_FILE).read_bytes() != before
    ws.average(models).save(tmp_path / "one.safetensors")
    assert ws.report(tmp_path / "one.safetensors").merged.run is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "[1]",
        lambda text: text.replace('"threads": 2', '"threads": "2"'),
        lambda text: text.replace('"threads": 2', '"threads": -2'),
        lambda text: json.dumps({**json.loads(text), "seconds": float("nan")}),
        lambda text: json.dumps({**json.loads(text), "seconds": True}),
        lambda text: json.dumps({**json.loads(text), "tensors": 1 << 80}),
        lambda text: text + " " * 20_000,
        None,
    ],
)
def test_what_cannot_be_understood_is_no_record(merged, change):
    _, out, _ = merged
    text = (out / RUN_FILE).read_text()
    (out / RUN_FILE).unlink()
    if change is not None:
        (out / RUN_FILE).write_text(change(text))
    assert RunRecord.read(out) is None
    assert ws.report(out).merged.run is None
