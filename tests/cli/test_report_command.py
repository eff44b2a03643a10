"""``weightsmith report`` on real folders."""

from __future__ import annotations

import errno
import json
import sys

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.cli.main import main
from weightsmith.report.findings import Report
from weightsmith.report.frames import tables


@pytest.fixture
def family(write_model):
    rng = np.random.default_rng(0)
    base = llama_tensors(0, hidden=16)
    models = {"base": base}
    for label in "xy":
        models[label] = {
            name: array + 0.01 * rng.standard_normal(array.shape).astype(np.float32) for name, array in base.items()
        }
    return {label: str(write_model(label, one)) for label, one in models.items()}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["report", *map(str, arguments)])
    output = capsys.readouterr()
    return exit.value.code, output.out, output.err


def test_json_is_the_whole_report(family, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, family["x"], family["y"], "--base", family["base"], "--json")
    assert code == 0
    content = json.loads(out)
    found = ws.report(family["x"], family["y"], base=family["base"]).to_json()
    for report in (content, found):
        assert report.pop("timings")
    assert content == found
    # Nothing is written that was not asked for.
    assert not list(tmp_path.glob("*.html"))


def test_a_page_is_written_whole_and_never_over_another(family, capsys, tmp_path):
    page = tmp_path / "page.html"
    command = [family["x"], "--base", family["base"], "-o", page]
    assert run(capsys, *command, "--quiet") == (0, "", "")
    text = page.read_text("utf-8")
    assert text.lower().startswith("<!doctype html>")
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "page.html exists" in err
    assert page.read_text("utf-8") == text
    assert run(capsys, *command, "--overwrite")[0] == 0
    assert [file.name for file in tmp_path.iterdir() if "page" in file.name] == ["page.html"]


def test_a_saved_report_is_shown_without_its_models(family, capsys, tmp_path):
    saved = tmp_path / "saved.json"
    assert run(capsys, family["x"], "--base", family["base"], "-o", saved)[0] == 0
    report = Report.from_json(json.loads(saved.read_text()))
    assert report.changes.total[0].model == "x"
    code, out, _ = run(capsys, saved, "--text")
    assert code == 0
    assert "x" in out
    saved.write_text("[1]")
    assert run(capsys, saved, "--text")[2].startswith("error: ")
    content = report.to_json()
    content["changes"]["total"][0]["mass"] = float("inf")
    saved.write_text(json.dumps(content))
    assert "is no JSON" in run(capsys, saved, "--text")[2]
    saved.write_text("{")
    assert "is no JSON" in run(capsys, saved, "--text")[2]


def test_a_saved_report_is_not_measured_again(family, capsys, tmp_path):
    saved = tmp_path / "saved.json"
    assert run(capsys, family["x"], "--base", family["base"], "-o", saved)[0] == 0
    for more in (["--base", family["base"]], ["--exact"], ["--matrices", "*"]):
        code, _, err = run(capsys, saved, "--text", *more)
        assert code == 2
        assert "was measured when it was saved" in err
    assert "name a saved report alone" in run(capsys, saved, family["x"], "--text")[2]


def test_a_saved_report_that_somebody_changed_is_one_line(family, capsys, tmp_path):
    saved = tmp_path / "saved.json"
    assert run(capsys, family["x"], family["y"], "--base", family["base"], "-o", saved)[0] == 0
    content = json.loads(saved.read_text())
    content["spectra"][0]["energies"] = []
    saved.write_text(json.dumps(content))
    code, _, err = run(capsys, saved, "--text")
    assert code == 1
    assert err.startswith(f"error: {saved} does not fit together (")


def test_json_that_is_no_report_is_named(family, capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert "config.json is no report of weightsmith; models are named by their folders" in run(capsys, config)[2]
    config.write_text('{"format": 99}')
    assert "config.json: a report of format 99; this version reads 1" in run(capsys, config)[2]


def test_where_a_report_goes_is_checked_before_anything_is_read(capsys, tmp_path):
    """Nothing of the models is there, so a check that came after them would not be reached."""

    def told(name):
        code, _, err = run(capsys, tmp_path / "nowhere", "-o", tmp_path / name)
        assert code == 1
        return err

    assert "findings.txt is to be a page (.html) or JSON (.json)" in told("findings.txt")
    (tmp_path / "file").write_text("")
    assert "file is no folder that may be written in" in told("file/report.html")
    (tmp_path / "report.html").write_text("")
    assert "report.html exists" in told("report.html")
    assert "nowhere" in told("new.html")


def test_a_folder_is_made_and_a_page_that_cannot_be_written_leaves_nothing(family, capsys, tmp_path, monkeypatch):
    page = tmp_path / "reports" / "page.html"
    command = [family["x"], "--base", family["base"], "-o", page]

    def full(file, text, encoding):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        code, _, err = run(capsys, *command)
    assert (code, err) == (1, f"error: cannot write {page}: No space left on device\n")
    assert not list(page.parent.iterdir())
    assert run(capsys, *command)[0] == 0
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]


def test_text_of_a_recipe_and_of_what_it_made(family, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {family['base']}\n"
        f"models: [{{model: {family['x']}}}, {{model: {family['y']}}}]\nparameters: {{weight: 0.5}}\n"
    )
    assert run(capsys, recipe, "--text", "--quiet", "--threads", 1)[0] == 0
    ws.merge_recipe(recipe).save(tmp_path / "out")
    code, out, _ = run(capsys, tmp_path / "out", "--text", "--quiet", "--exact", "--matrices", "*q_proj*")
    assert code == 0
    assert "task_arithmetic" in out


def test_wrong_usage_is_told_of(family, capsys, tmp_path):
    assert run(capsys)[0] == 2
    assert run(capsys, family["x"], "--json", "--text")[0] == 2
    code, _, err = run(capsys, family["x"], "--json", "--base", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in err
    assert "no matrix" in run(capsys, family["x"], "--base", family["base"], "--json", "--matrices", "nothing")[2]


def test_every_table_is_a_frame(family, tmp_path, monkeypatch):
    ws.merge("task_arithmetic", [family["x"], family["y"]], base=family["base"], weight=0.5).save(tmp_path / "out")
    report = ws.report(tmp_path / "out")
    found = tables(report)
    assert found["changes"][0]["per"] == "total"
    assert [row["model"] for row in found["composition"][:2]] == ["x", "y"]
    assert found["composition"][1]["coefficient"] == report.composition.total[0].coefficients[1]
    assert [row["label"] for row in found["models"]] == ["base", "x", "y", "out"]
    assert all(row.keys() == rows[0].keys() for rows in found.values() for row in rows)
    with pytest.raises(ws.WeightsmithError, match=r"'panda' makes no data frames here \(did you mean 'pandas'\?\)"):
        report.frames("panda")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ws.WeightsmithError, match="pip install polars"):
        report.frames("polars")


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_hold_what_the_tables_hold(family, library):
    pytest.importorskip(library)
    report = ws.report(family["x"], family["y"], base=family["base"])
    found = report.frames(library)
    for name, rows in tables(report).items():
        assert found[name].shape == (len(rows), len(rows[0]))
    assert list(found["changes"]["delta_norm"]) == [row["delta_norm"] for row in tables(report)["changes"]]
