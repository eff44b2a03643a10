"""What is written beside the weights, and what is refused."""

from __future__ import annotations

import json
import os

import pytest

from weightsmith.checkpoint import companions
from weightsmith.checkpoint.companions import other_files, tokenizer_files, write_companions
from weightsmith.errors import CheckpointError, UnsafeFileError


@pytest.fixture
def folders(tmp_path):
    """An input and an output folder."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    return tmp_path / "in", tmp_path / "out"


def put(folder, name, content="{}"):
    (folder / name).write_text(content)
    return {name: folder / name}


def test_config_and_files_are_written_as_they_are(folders):
    source, out = folders
    config = {"z": 1, "a": {"ü": [1]}}
    assert write_companions(out, config, put(source, "generation_config.json", '{"x":  1}')) == []
    assert (out / "config.json").read_text("utf-8") == '{\n  "z": 1,\n  "a": {\n    "ü": [\n      1\n    ]\n  }\n}\n'
    assert (out / "generation_config.json").read_text() == '{"x":  1}'


def test_tokenizer_files_are_told_from_others():
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model", "source.spm",
                 "chat_template.jinja", "additional_chat_templates/tools.jinja", "qwen.tiktoken", "tokenizer_2/merges.txt",
                 "special_tokens_map.json", "tokenizer.model.v3"]  # fmt: skip
    others = [
        "generation_config.json",
        "preprocessor_config.json",
        "unet/config.json",
        "LICENSE",
        "text_encoder/config.json",
    ]
    files = dict.fromkeys(tokenizer + others)
    assert list(tokenizer_files(files)) == tokenizer
    assert list(other_files(files)) == others


def test_links_of_a_hub_cache_are_written_as_files(folders):
    source, out = folders
    (source / "blob").write_text("content")
    (source / "vocab.json").symlink_to(source / "blob")
    write_companions(out, {}, {"vocab.json": source / "vocab.json"})
    assert not (out / "vocab.json").is_symlink()
    assert (out / "vocab.json").read_text() == "content"


def test_code_is_never_copied_and_said_to_be_missing(folders):
    source, out = folders
    notes = write_companions(out, {"auto_map": {"AutoModel": "modeling_x.X"}}, put(source, "modeling_x.py"))
    assert not (out / "modeling_x.py").exists()
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_x.X"}
    assert "auto_map" in notes[0]


def test_a_tokenizer_that_names_code_is_carried_and_said(folders):
    source, out = folders
    text = '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}'
    notes = write_companions(out, {}, put(source, "tokenizer_config.json", text))
    assert (out / "tokenizer_config.json").read_text() == text
    assert notes[0].startswith("tokenizer_config.json names code")
    assert write_companions(out, {}, put(source, "preprocessor_config.json", "[" * 100_000)) == []


@pytest.mark.parametrize(
    "name", ["../evil.json", "{folder}/evil.json", "a/../../evil.json", "..\\evil.json", "", "a\0.json"]
)
def test_a_path_out_of_the_folder_is_refused(folders, name):
    source, out = folders
    with pytest.raises(UnsafeFileError, match="leads out"):
        write_companions(out, {}, {name.format(folder=source): put(source, "x.json")["x.json"]})
    assert [path.name for path in out.parent.rglob("*") if path.is_file()] == ["x.json"]


def test_a_pipe_is_refused_without_waiting_for_it(folders):
    source, out = folders
    os.mkfifo(source / "vocab.json")
    with pytest.raises(UnsafeFileError, match="no regular file"):
        write_companions(out, {}, {"vocab.json": source / "vocab.json"})


def test_a_device_behind_a_link_is_refused(folders):
    source, out = folders
    (source / "vocab.json").symlink_to("/dev/zero")
    with pytest.raises(UnsafeFileError, match="no regular file"):
        write_companions(out, {}, {"vocab.json": source / "vocab.json"})


def test_a_file_that_is_gone_or_too_large_is_named(folders, monkeypatch):
    source, out = folders
    with pytest.raises(CheckpointError, match=r"gone\.json was there"):
        write_companions(out, {}, {"gone.json": source / "gone.json"})
    monkeypatch.setattr(companions, "_LARGEST", 3)
    with pytest.raises(CheckpointError, match="has 4 bytes; at most 3"):
        write_companions(out, {}, put(source, "big.json", "1234"))


def test_a_template_is_written_where_every_reader_looks(folders):
    source, out = folders
    files = put(source, "tokenizer_config.json", '{"bos": "<s>", "chat_template": "old"}')
    files |= put(source, "chat_template.json", '{"chat_template": "old"}')
    assert write_companions(out, {}, files, chat_template="new") == []
    assert (out / "chat_template.jinja").read_text() == "new"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"bos": "<s>", "chat_template": "new"}
    assert not (out / "chat_template.json").exists()


def test_templates_for_other_uses_stay(folders):
    source, out = folders
    tools = {"name": "tool_use", "template": "t"}
    own = {"chat_template": [{"name": "default", "template": "old"}, tools]}
    write_companions(out, {}, put(source, "tokenizer_config.json", json.dumps(own)), chat_template="new")
    written = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert written == [{"name": "default", "template": "new"}, tools]


@pytest.mark.parametrize("content", ["[", "[1]", "[" * 100_000])
def test_a_broken_tokenizer_config_does_not_lose_a_finished_merge(folders, content):
    source, out = folders
    notes = write_companions(out, {}, put(source, "tokenizer_config.json", content), chat_template="new")
    assert "chat_template.jinja alone" in notes[0]
    assert (out / "tokenizer_config.json").read_text() == content
