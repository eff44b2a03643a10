"""Files of a tokenizer that was made, as transformers loads them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers

import trained_tokenizers as trained
from weightsmith.tokenizer.files import files_of
from weightsmith.tokenizer.tokenizer import read_tokenizer

CLASSES = {
    "byte_bpe": ("GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"),
    "metaspace_bpe": ("LlamaTokenizerFast", "GemmaTokenizer"),
    "unigram": ("T5Tokenizer", "XLMRobertaTokenizer"),
    "wordpiece": ("BertTokenizer", "DistilBertTokenizerFast"),
}
MODEL_TYPES = {"byte_bpe": "gpt2", "metaspace_bpe": "llama", "unigram": "t5", "wordpiece": "bert"}


def made(folder, kind, **settings):
    own = trained.KINDS[kind]()
    own.add_tokens(["<tag>", "猫は"])
    trained.save(own, folder, **settings)
    files = {path.name: path for path in folder.iterdir()}
    return own, read_tokenizer(files, "m"), files


def write(folder, files, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, file in files.items():
        (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    return folder


@pytest.mark.parametrize(("kind", "own"), [(kind, own) for kind, classes in CLASSES.items() for own in classes])
def test_transformers_encodes_as_the_file_says_whatever_class_the_model_had(tmp_path, kind, own):
    from transformers import AutoTokenizer

    plain, tokenizer, files = made(tmp_path / "m", kind, tokenizer_class=own)
    config = {"model_type": MODEL_TYPES[kind]}
    beside, notes = files_of(tokenizer, files, config, rebuilt=False)
    loaded = AutoTokenizer.from_pretrained(write(tmp_path / "out", beside, config))
    assert notes == []
    assert loaded(trained.SAMPLE)["input_ids"] == plain.encode(trained.SAMPLE).ids
    assert loaded.get_vocab() == plain.get_vocab()
    assert ("token_type_ids" in loaded(trained.SAMPLE)) == (own == "BertTokenizer")


def test_older_files_of_the_vocabulary_are_left_out_and_templates_stay(tmp_path):
    _, tokenizer, files = made(tmp_path / "m", "byte_bpe", auto_map={"AutoTokenizer": ["x.Y", None]}, from_slow=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja"):
        files[name] = b"{}"
    files["special_tokens_map.json"] = b'{"eos_token": "<|endoftext|>"}'
    files["preprocessor_config.json"] = b"{}"
    beside, _ = files_of(tokenizer, files, {}, rebuilt=False)
    assert set(beside) == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    }  # fmt: skip
    settings = json.loads(beside["tokenizer_config.json"])
    assert not {"auto_map", "from_slow"} & set(settings)
    assert settings["model_max_length"] == 1024
    added = settings["added_tokens_decoder"]
    assert {entry["content"] for entry in added.values()} == {"<|endoftext|>", "<tag>", "猫は"}
    assert json.loads(beside["tokenizer.json"]) == tokenizer.content
    assert beside == files_of(tokenizer, files, {}, rebuilt=False)[0]


def test_half_a_character_is_escaped(tmp_path):
    _, tokenizer, files = made(tmp_path / "m", "byte_bpe")
    content = json.loads(json.dumps(tokenizer.content))
    content["model"]["vocab"]["\ud800"] = 9999
    beside, _ = files_of(replace(tokenizer, content=content), files, {}, rebuilt=False)
    assert json.loads(beside["tokenizer.json"].decode("utf-8"))["model"]["vocab"]["\ud800"] == 9999


def test_classes_that_do_more_than_the_file_says_stay_and_are_told(tmp_path):
    _, tokenizer, files = made(tmp_path / "m", "unigram", tokenizer_class="NllbTokenizer")
    beside, notes = files_of(tokenizer, files, {}, rebuilt=False)
    assert json.loads(beside["tokenizer_config.json"])["tokenizer_class"] == "NllbTokenizer"
    assert "NllbTokenizer" in notes[0]


def test_kinds_of_models_that_transformers_loads_by_their_own_class_are_told(tmp_path):
    _, tokenizer, files = made(tmp_path / "m", "metaspace_bpe")
    assert "qwen2" in files_of(tokenizer, files, {"model_type": "qwen2"}, rebuilt=True)[1][0]
    assert files_of(tokenizer, files, {"model_type": "llama"}, rebuilt=True)[1] == []


def test_the_made_file_is_read_by_the_tokenizers_library(tmp_path):
    plain, tokenizer, files = made(tmp_path / "m", "unigram")
    beside, _ = files_of(tokenizer, files, {}, rebuilt=False)
    read = tokenizers.Tokenizer.from_str(beside["tokenizer.json"].decode())
    assert read.encode(trained.SAMPLE).ids == plain.encode(trained.SAMPLE).ids
