"""What is printed of strangers' files moves no cursor, breaks no line and hides nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import write_safetensors
from weightsmith.cli.main import main
from weightsmith.cli.terminal import printable

EVIL = "a\x1b]0;owned\x07\x1b[2J\nwarning: all is well\r\x9b31m\u202egnp.exe\x00"


@pytest.fixture
def models(tmp_path):
    """Two models whose names, configs and companions would take over a terminal."""
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        arrays = {EVIL: np.full(2, number, np.float32), f"layers.0.{EVIL}": np.zeros(2, np.float32)}
        arrays |= {f"only {name} {EVIL}": np.zeros(1, np.float32), f"shape {EVIL}": np.zeros(1 + number, np.float32)}
        write_safetensors(folder / "model.safetensors", arrays)
        config = {"architectures": [EVIL], "model_type": EVIL, "auto_map": {EVIL: EVIL}, "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
    return [str(tmp_path / name) for name in ("one", "two")]


@pytest.fixture
def printed(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        return "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize(
    "verb", ["inspect", "inspect --tensors", "inspect --json", "diff", "diff --by tensor", "diff --json", "plan --tensors",
             "plan --json", "merge", "merge --json-log", "a missing tensor"]
)  # fmt: skip
def test_nothing_but_plain_lines_reaches_the_terminal(printed, models, tmp_path, verb):
    command, *options = verb.split()
    if command == "inspect":
        found = printed(command, models[0], *options)
    elif command == "diff":
        found = printed(command, *models, *options)
    else:
        recipe = f"merge_method: linear\nmodels: [{{model: {models[0]}}}, {{model: {models[1]}}}]\n"
        recipe += "parameters: {weight: 1}\n"
        recipe += "" if command == "a" else "on_missing: first\non_shape_mismatch: first\n"
        (tmp_path / "r.yaml").write_text(recipe)
        arguments = [tmp_path / "r.yaml", *options] if command == "plan" else [tmp_path / "r.yaml", tmp_path / "out"]
        found = printed("merge" if command == "a" else command, *arguments, *(options if command == "merge" else ()))
    assert found.strip()
    assert all(letter.isprintable() or letter == "\n" for letter in found)
    assert not any(line.strip().startswith("warning: all is well") for line in found.splitlines())
    assert "owned" in found or "auto_map" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0.ü.重み", "model.layers.0.ü.重み"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\tc\x7f", "a\\nb\\tc\\x7f"),
        ("\u202e\u200b\ud800\u2028", "\\u202e\\u200b\\ud800\\u2028"),
    ],
)
def test_what_a_terminal_would_not_just_show_is_escaped(text, expected):
    assert printable(text) == expected
    printable(text).encode()


def test_a_very_long_message_is_cut():
    assert len(printable("x" * 1_000_000)) < 5000
    assert "996,000 characters more" in printable("x" * 1_000_000)
