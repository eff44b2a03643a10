"""``weightsmith bundle``, as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import llama_tensors, read_safetensors
from weightsmith.bundle.kind import kinds
from weightsmith.cli import bundle as verb
from weightsmith.cli.main import main


@pytest.fixture
def folders(write_model) -> list[Path]:
    base = llama_tensors(0)
    found = [write_model("base", base)]
    for i, name in enumerate(("code", "maths"), 1):
        change = llama_tensors(i, scale=0.1)
        found.append(write_model(name, {k: v + change[k] for k, v in base.items()}))
    return found


@pytest.fixture
def run(capsys):
    def call(*arguments: Any) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def create(folders: list[Path], target: Path, *more: Any) -> list[Any]:
    return ["bundle", "create", target, "--base", folders[0], *folders[1:], "--kind", *(more or ("emr",))]


def test_a_bundle_is_made_looked_at_and_opened(run, folders, tmp_path):
    code, out, err = run(*create(folders, tmp_path / "experts"))
    assert code == 0
    assert re.search(r"experts: \d+ tensors, ", err)
    assert out.startswith("kind        emr, 2 tasks: rescaler model\n")
    assert re.search(r"^code +\d+ B  error [\d.]+ % of the model, [\d.]+ % of its change$", out, re.MULTILINE)
    assert re.search(r"^total .* % of the .* that the weights of the models take by themselves$", out, re.MULTILINE)
    assert run("bundle", "inspect", tmp_path / "experts")[1] == out
    code, out, err = run("bundle", "open", tmp_path / "experts", "--task", "maths", tmp_path / "maths-again")
    assert (code, out) == (0, "")
    assert set(read_safetensors(tmp_path / "maths-again")) == set(llama_tensors(0))
    assert json.loads((tmp_path / "maths-again" / "config.json").read_text())["model_type"] == "llama"
    assert run("verify", tmp_path / "experts")[0] == 0
    assert run("reproduce", tmp_path / "experts")[0] == 0
    code, out, _ = run("diff", f"{tmp_path / 'experts'}#maths", tmp_path / "maths-again", "--json")
    assert json.loads(out)["identical"] is True


def test_every_kind_is_named_and_told_in_the_help(run):
    assert tuple(kinds()) == verb._KINDS
    out = run("bundle", "create", "--help")[1]
    for name in kinds():
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE)
    assert "create" in run("bundle", "--help")[1]


def test_inspect_as_json(run, folders, tmp_path):
    assert run(*create(folders, tmp_path / "out", "rmm", "-p", "basis=1", "-p", "centre=true", "--quiet")) == (
        0,
        "",
        "",
    )
    code, out, _ = run("bundle", "inspect", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "rmm"
    assert found["parameters"] == {
        "basis": 1,
        "centre": True,
        "rank": None,
        "coefficients": "layer",
        "decomposition": "exact",
    }
    assert found["base"]["stored"] is True
    assert set(found["tasks"]) == {"code", "maths"}
    assert found["tasks"]["code"]["forms"] == {"change": len(llama_tensors(0))}
    assert set(found["tasks"]["code"]["error"]) == {"relative", "of_change", "largest", "equal"}
    parts = [found["base"]["bytes"], found["shared_bytes"], found["beside_bytes"]]
    assert found["total_bytes"] == sum(parts) + sum(task["bytes"] for task in found["tasks"].values())


def test_names_parameters_and_a_base_by_reference(run, folders, tmp_path):
    out = tmp_path / "out"
    assert run(*create(folders, out, "tall", "-p", "lambda=[0.2,0.6]", "--name", "c", "--name", "m", "--quiet"))[0] == 0
    assert "kind        tall, 2 tasks: lambda 0.2 0.6" in run("bundle", "inspect", out)[1]
    by_reference = create(folders, out, "emr", "--base-by-reference", "--overwrite", "--name", "c", "--name", "m")
    assert run(*by_reference)[0] == 0
    assert f"by reference: {folders[0]}" in run("bundle", "inspect", out)[1]
    code, _, err = run("bundle", "open", out, tmp_path / "c", "--task", "c")
    assert (code, "with --base" in err) == (1, True)
    assert run("bundle", "open", out, tmp_path / "c", "--task", "c", "--base", folders[0])[0] == 0
    named = f"{folders[0]}+{out}#c"
    assert run("merge", "--method", "linear", "--model", named, "-p", "weight=1", tmp_path / "m")[0] == 0
    found, other = read_safetensors(tmp_path / "c"), read_safetensors(tmp_path / "m")
    assert all(np.array_equal(found[name], values) for name, values in other.items())


def test_a_model_that_comes_back_to_the_bit_is_said_to(run, folders, tmp_path):
    assert run(*create(folders, tmp_path / "out", "lossless"))[1].count("the model to the bit") == 2


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["emr", "--name", "a"], 2, "1 names for 2 models"),
        (["emr", "--name", "a", "--name", "a"], 2, "two of the names are the same"),
        (["emr", "--name", "a/b", "--name", "c"], 1, "a task cannot be named 'a/b'"),
        (["em"], 2, "'em' is not one of"),
        (["emr", "-p", "lambda=1"], 1, "has no parameter 'lambda'"),
        (["tall", "-p", "lambda=x"], 1, "lambda of the kind 'tall' is 'x'"),
        (["emr", "-p", "base=2"], 1, "has no parameter 'base'"),
        (["emr", "-p", "lambda"], 2, "write NAME=VALUE"),
        (["emr", "--dtype", "int8"], 1, "not a floating dtype"),
        (["emr", "--base", "nowhere"], 1, "there is no file or folder nowhere"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, folders, tmp_path, more, code, message):
    found, out, err = run(*create(folders, tmp_path / "out", *more))
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "phases"), [("emr", 2), ("rmm", 3), ("lossless", 3)])
def test_progress_as_json_lines_tells_of_reading_writing_and_comparing(run, folders, tmp_path, kind, phases):
    code, out, err = run(*create(folders, tmp_path / "out", kind, "--json-log"))
    assert (code, out) == (0, "")
    events = [json.loads(line) for line in err.splitlines()]
    totals = [event["total_bytes"] for event in events if event["event"] == "start"]
    assert len(totals) == phases
    # What is read to plan, and what is compared, is every model.
    assert (
        totals[-1] == totals[phases - 3 if phases == 3 else -1] == 2 * sum(v.nbytes for v in llama_tensors(0).values())
    )
    assert [event["done_bytes"] for event in events if event["event"] == "finish"] == totals
    assert events[-1]["event"] == "done"
