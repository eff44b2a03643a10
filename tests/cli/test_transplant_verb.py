"""``weightsmith transplant``, as a person types it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import trained_tokenizers as trained
from conftest import read_safetensors
from tiny_models import llama
from weightsmith.cli import transplant as verb
from weightsmith.cli.main import main
from weightsmith.transplantation.recipe import METHODS


@pytest.fixture
def run(capsys):
    def call(*arguments: Any) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture
def pair(tmp_path):
    model = llama(tmp_path / "model", trained.metaspace_bpe(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    donor = llama(tmp_path / "donor", trained.byte_bpe(), hidden=12, seed=1, eos_token="<|endoftext|>")
    return model, donor


def test_what_became_of_the_tokens_is_printed(run, pair, tmp_path):
    code, out, err = run("transplant", *pair, tmp_path / "out", "-k", 6, "--keep-size")
    assert code == 0
    assert re.search(r"out: \d+ tensors, ", err)
    assert "warning: numbers: " in err
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert f"{name}: 500 rows become 500\n  shared     280 by text, 1 by role\n" in out
    assert out.count("  new        119 by omp of 280 anchors\n  unused     100 rows\n  residual   median 0.") == 2
    assert re.search(r"^  worst      .+ \(0\.\d+\), ", out, re.MULTILINE)
    assert re.search(r"^238 tokens searched in [\d.]+ s: [\d,]+ a second$", out, re.MULTILINE)
    assert read_safetensors(tmp_path / "out")["lm_head.weight"].shape == (500, 8)


def test_everything_as_json(run, pair, tmp_path):
    code, out, _ = run("transplant", *pair, tmp_path / "out", "--method", "subword", "--json")
    found = json.loads(out)
    assert code == 0
    assert [table["method"] for table in found["tables"]] == ["subword", "subword"]
    assert found["tokens"] == 400
    kept = json.loads((tmp_path / "out" / "transplant-report.json").read_text())
    assert kept["tables"] == found["tables"]


def test_a_dry_run_plans_and_searches_nothing(run, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("weightsmith.transplantation.search.matching_pursuit", None)
    code, out, err = run("transplant", *pair, tmp_path / "out", "-k", 6, "--dry-run")
    assert (code, err) == (0, "")
    assert "memory      about" in out
    assert "119 by omp of 280 anchors" in out
    assert "residual" not in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_as_json_is_one_document(run, pair, tmp_path):
    code, out, err = run("transplant", *pair, tmp_path / "out", "-k", 6, "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["tables"][0]["residual"] is None
    assert found["plan"]["peak_memory"] > 0
    assert [entry["shape"] for entry in found["plan"]["tensors"] if entry["name"] == "lm_head.weight"] == [[400, 8]]


def test_progress_tells_of_the_search_and_of_the_writing(run, pair, tmp_path):
    code, _, err = run("transplant", *pair, tmp_path / "out", "-k", 6, "--json-log")
    lines = [json.loads(line) for line in err.splitlines()]
    assert code == 0
    assert [line["event"] for line in lines if line["event"] in ("start", "finish")] == ["start", "finish"] * 2
    first, second = (line for line in lines if line["event"] == "start")
    assert first["total_bytes"] == 2 * 119 * 12 * 4
    ends = [line["done_bytes"] for line in lines if line["event"] == "finish"]
    assert ends == [first["total_bytes"], second["total_bytes"]]


def test_every_method_is_named_and_told_in_the_help(run):
    assert verb._METHODS == METHODS
    code, out, _ = run("transplant", "--help")
    assert code == 0
    for method in METHODS:
        assert re.search(rf"^ *(mean, )?{method}[ ,]", out, re.MULTILINE), method


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "omq"], 2, "omq"),
        (["--method", "mean", "-k", "4"], 1, "error: atoms means nothing for the method mean"),
        (["-k", "281"], 1, "give --atoms 280 or less"),
        (["--auxiliary", "nowhere.vec"], 1, "error: nowhere.vec cannot be read: No such file"),
        (["--memory", "1MB", "-k", "6"], 1, "--memory allows 1 MB"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, pair, tmp_path, more, code, message):
    found, _, err = run("transplant", *pair, tmp_path / "out", *more)
    assert found == code
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_comparison_has_no_target(run, pair, tmp_path):
    code, _, err = run("transplant", *pair, tmp_path / "out", "-k", 6, "--compare")
    assert code == 2
    assert "--compare writes nothing" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run("transplant", *pair)
    assert code == 2
    assert "Missing argument 'OUT'" in err
