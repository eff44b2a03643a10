"""Chat templates are rendered with Jinja; vocabularies are read from tokenizers trained on the spot."""

from __future__ import annotations

import json

import jinja2
import pytest

from weightsmith.errors import CheckpointError, PlanError
from weightsmith.tokenizer.chat_template import BUILT_IN, choose_template, read_template
from weightsmith.tokenizer.facts import open_tokenizer
from weightsmith.tokenizer.tokenizer import read_tokenizer

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "So"},
]
SYSTEM = [{"role": "system", "content": "Be brief"}]


def render(name, messages, **more):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(BUILT_IN[name])
    return template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, **more)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("alpaca", "### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nSo\n\n### Response:\n"),
        ("llama3", "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
         "\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSo<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s>[INST] Hi [/INST] Hello</s>[INST] So [/INST]"),
        ("exaone", "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]So\n[|assistant|]"),
    ],
)  # fmt: skip
def test_a_known_format_renders_as_its_models_expect(name, expected):
    assert render(name, TURNS) == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_system_message_is_part_of_the_prompt(name):
    assert "Be brief" in render(name, SYSTEM + TURNS)


def test_auto_takes_the_most_common_and_of_equals_the_first():
    assert choose_template("auto", ["a{", "b{", None, "b{"]) == "b{"
    assert choose_template("auto", ["a{", "b{"]) == "a{"
    assert choose_template("auto", [None]) is None
    assert choose_template(None, ["a{"]) is None
    assert choose_template("{{ messages }}", []) == "{{ messages }}"
    with pytest.raises(PlanError, match="did you mean 'chatml'"):
        choose_template("chatlm", [])


def test_a_template_is_found_in_whichever_file_holds_it(tmp_path):
    for name, content in {
        "chat_template.jinja": "one",
        "chat_template.json": '{"chat_template": "two"}',
        "tokenizer_config.json": '{"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "three"}]}',
    }.items():
        (tmp_path / name).write_text(content)
    files = {path.name: path for path in tmp_path.iterdir()}
    for expected in ("one", "two", "three"):
        assert read_template(files) == expected
        files.pop(next(n for n in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json") if n in files))
    assert read_template(files) is None


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram"])
def test_a_vocabulary_is_that_of_the_tokenizers_library(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, kind)())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = getattr(tokenizers.trainers, {"BPE": "BpeTrainer"}.get(kind, f"{kind}Trainer"))(
        vocab_size=60, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the cat's food"] * 5, trainer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, "m").vocabulary == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"model": 3}',
        '{"model": {"vocab": [3]}}',
        '{"model": {"vocab": {}, "end_of_word_suffix": 3}}',
        "{" * 10_000,
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        read_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, "m")
    assert read_tokenizer({}, "m") is None
    assert json.dumps(content)


def test_what_a_file_lacks_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"vocab_size": 3}')
    with pytest.raises(CheckpointError, match=r"config.json is not a tokenizer.json .*: it has no 'model'$"):
        open_tokenizer(path)
    (tmp_path / "tekken_1.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^.*tekken_1.json is a tokenizer in the form of tiktoken"):
        open_tokenizer(tmp_path / "tekken_1.json")


def test_a_template_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is no chat template: .*UTF-8"):
        read_template({"chat_template.jinja": tmp_path / "chat_template.jinja"})


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000])
def test_a_broken_tokenizer_config_holds_no_template(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert read_template({"tokenizer_config.json": tmp_path / "tokenizer_config.json"}) is None


def test_a_number_that_is_none_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": Infinity}}}')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        read_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, "m")
