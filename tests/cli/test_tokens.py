"""``weightsmith tokens`` on tokenizers that are trained on the spot."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import trained_tokenizers as trained
from weightsmith.cli.tokens import command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    above = tmp_path_factory.mktemp("tokenizers")
    return {name: str(trained.save(make(), above / name, eos_token="</s>")) for name, make in trained.KINDS.items()}


def run(*arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_two_tokenizers_are_shown_in_eighty_columns(folders):
    shown = run(folders["metaspace_bpe"], folders["byte_bpe"])
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.output.splitlines())
    assert "kind              BPE, metaspace                 BPE, bytes" in shown.output
    assert "  leading space   ·|·a                           ·a" in shown.output
    assert "They are of different kinds and share" in " ".join(shown.output.split())


def test_one_tokenizer_is_shown(folders):
    shown = run(folders["wordpiece"])
    assert "a text becomes    [CLS] text [SEP]" in shown.output
    assert "(lost)" in shown.output
    assert json.loads(run(folders["wordpiece"], "--json").output)["kind"] == "WordPiece"


def test_exit_code_says_whether_anything_differs(folders):
    assert run(folders["unigram"], folders["unigram"], "--exit-code").exit_code == 0
    different = run(folders["unigram"], folders["byte_bpe"], "--exit-code", "--json")
    assert different.exit_code == 1
    found = json.loads(different.output)
    assert not found["identical"]
    assert found["a"]["behaviour"]["texts"]["Thai"]["per_character"] > 0
    assert run(folders["unigram"], "--exit-code").exit_code == 2


def test_what_a_token_holds_does_not_reach_the_terminal(tmp_path):
    made = trained.byte_bpe()
    made.add_special_tokens(["\x1b[31mred\u202e"])
    folder = str(trained.save(made, tmp_path, eos_token="\x1b[31mred\u202e"))
    for shown in (run(folder), run(folder, str(trained.save(trained.byte_bpe(), tmp_path / "b")))):
        assert "\\x1b[31mred" in shown.output
        assert "\x1b" not in shown.output
        assert "\u202e" not in shown.output
