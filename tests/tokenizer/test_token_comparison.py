"""Two tokenizers compared: each pair differs in one thing that is known."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import normalizers

import trained_tokenizers as trained
import weightsmith as ws
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.components import describe, template
from weightsmith.tokenizer.facts import tokenizer_facts


def changed(made, change):
    content = json.loads(made.to_str())
    change(content)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def counts(found):
    return [getattr(found, name).count for name in ("same", "renumbered", "renamed", "only_a", "only_b")]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return trained.save(trained.byte_bpe(), tmp_path_factory.mktemp("gpt"), eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", trained.KINDS)
def test_a_tokenizer_is_identical_to_itself(tmp_path, kind):
    folder = trained.save(trained.KINDS[kind](), tmp_path)
    found = ws.compare_tokenizers(folder, folder / "tokenizer.json")
    assert found.identical
    assert counts(found) == [found.a.tokens, 0, 0, 0, 0]
    assert found.differences == found.warnings == ()
    assert "the same: merge their models as they are" in found.verdict


def test_added_tokens_are_added_and_no_number_changes(gpt, tmp_path):
    made = trained.byte_bpe()
    made.add_special_tokens(["<x>", "<y>"])
    other = trained.save(made, tmp_path, eos_token="<|endoftext|>")
    found = ws.compare_tokenizers(gpt, other)
    assert counts(found) == [400, 0, 0, 0, 2]
    assert [example[2:] for example in found.only_b.examples] == [("<x>", 400), ("<y>", 401)]
    assert found.differences == ("special in B alone: <x>, <y>",)
    assert "B adds 2 tokens to A and changes no number: merge with tokenizer: {source: union}" in found.verdict
    back = ws.compare_tokenizers(other, gpt)
    assert counts(back) == [400, 0, 0, 2, 0]
    assert "A adds 2 tokens to B" in back.verdict


def test_models_of_other_widths_are_not_advised_to_be_merged(tmp_path):
    for name, width, make in (("a", 4, trained.byte_bpe), ("b", 6, trained.metaspace_bpe)):
        trained.save(make(), tmp_path / name)
        rows = np.zeros((make().get_vocab_size(), width), np.float32)
        safetensors.numpy.save_file({"model.embed_tokens.weight": rows}, tmp_path / name / "model.safetensors")
    found = ws.compare_tokenizers(tmp_path / "a", tmp_path / "b")
    assert (found.a.width, found.b.width) == (4, 6)
    assert "Rows of A's model have 4 elements and those of B's 6, so that they cannot be merged." in found.verdict
    assert "weightsmith transplant" in found.verdict
    assert "union" not in found.verdict


def test_tokens_under_other_numbers_are_told_with_both(gpt, tmp_path):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    other = trained.save(changed(trained.byte_bpe(), swap), tmp_path, eos_token="<|endoftext|>")
    found = ws.compare_tokenizers(gpt, other)
    assert counts(found) == [398, 2, 0, 0, 0]
    one, number, two, place = found.renumbered.examples[0]
    assert (one, two) == ("a", "a")
    assert number == trained.byte_bpe().token_to_id("a")
    assert place == trained.byte_bpe().token_to_id("b")
    assert "without it rows of different tokens are mixed" in found.verdict


def test_other_kinds_share_tokens_under_other_spellings(gpt, tmp_path):
    other = trained.save(trained.metaspace_bpe(), tmp_path, eos_token="</s>", bos_token="<s>")
    found = ws.compare_tokenizers(gpt, other)
    assert sum(counts(found)[:4]) == found.a.tokens
    pairs = {(one, two) for one, _, two, _ in ws.compare_tokenizers(gpt, other).renamed.examples}
    assert ("<|endoftext|>", "</s>") in pairs
    assert "of different kinds" in found.verdict
    assert "weightsmith transplant" in found.verdict
    assert "eos_token is <|endoftext|> (0) in A and </s> (2) in B" in found.differences
    assert "bos_token is not set in A and <s> (1) in B" in found.differences
    assert "B puts a space before a text, the other does not" in found.differences


def test_other_ways_to_split_numbers_are_a_warning(gpt, tmp_path):
    other = trained.save(trained.byte_bpe(digits=True), tmp_path, eos_token="<|endoftext|>")
    found = ws.compare_tokenizers(gpt, other)
    told = [text for text in found.warnings if "2506.06607" in text]
    assert len(told) == 1
    assert "A splits numbers freely" in told[0]
    assert "B digit by digit" in told[0]
    assert found.a.digits[2] > 0
    assert found.b.digits == {1: found.b.digits[1], 2: 0, 3: 0, 4: 0}


def test_what_is_done_to_text_is_compared_in_words(gpt, tmp_path):
    made = trained.byte_bpe()
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")])
    found = ws.compare_tokenizers(gpt, trained.save(made, tmp_path, eos_token="<|endoftext|>"))
    assert counts(found) == [400, 0, 0, 0, 0]
    assert "normalizer: A: nothing | B: NFC; 'a' becomes 'b'" in found.differences
    assert "the same tokens under the same numbers and differ in how they are used" in found.verdict
    assert not found.identical


def test_flags_of_added_tokens_merges_and_settings_are_compared(gpt, tmp_path):
    def change(content):
        content["added_tokens"][0]["lstrip"] = True
        content["model"]["merges"] = content["model"]["merges"][::-1]
        content["model"]["ignore_merges"] = True

    made = changed(trained.byte_bpe(), change)
    found = ws.compare_tokenizers(gpt, trained.save(made, tmp_path, eos_token="<|endoftext|>"))
    assert "added tokens are lstrip in B and not in A: <|endoftext|>" in found.differences
    assert "merges differ: A has 143, B 143, 143 are shared in another order" in found.differences
    assert "ignore_merges of the BPE model is False in A and True in B" in found.differences


def test_scores_of_unigram_pieces_are_compared(tmp_path):
    def change(content):
        content["model"]["vocab"][10][1] -= 1

    one = trained.save(trained.unigram(), tmp_path / "a")
    content = json.loads((one / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "b.json").write_text(json.dumps(content))
    found = ws.compare_tokenizers(one, tmp_path / "b.json")
    token = content["model"]["vocab"][10][0]
    assert f"scores differ of 1 tokens that both have: {token}" in found.differences


def test_chat_templates_are_compared(gpt, tmp_path):
    other = trained.save(trained.byte_bpe(), tmp_path, eos_token="<|endoftext|>", chat_template="{{ messages }}")
    assert ws.compare_tokenizers(gpt, other).differences == ("B alone has a chat template",)


def model(folder, rows, **config):
    """Write a model of one table of embeddings beside a tokenizer."""
    weights = {"model.embed_tokens.weight": np.zeros((rows, 4), np.float32)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows, **config}))
    return folder


def test_padding_and_ids_of_the_model_beside_it_are_checked(tmp_path):
    folder = trained.save(trained.metaspace_bpe(), tmp_path / "a", eos_token="</s>", bos_token="<s>")
    model(folder, 512, eos_token_id=2, bos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    found = tokenizer_facts(folder)
    assert (found.size, found.rows, found.padding) == (500, 512, 12)
    assert found.contradictions == (
        "generation_config.json gives eos_token_id 0 (<unk>), 3 (<0x00>); the tokenizer's eos_token is </s>, number 2",
        "config.json gives bos_token_id 7 (<0x04>); the tokenizer's bos_token is <s>, number 1",
    )
    small = model(trained.save(trained.metaspace_bpe(), tmp_path / "b"), 490)
    told = ws.compare_tokenizers(small, ws.open(folder)).warnings
    assert "A: 10 numbers of tokens are beyond the 490 rows of its model" in told
    assert f"B: {found.contradictions[1]}" in told


def test_without_the_library_the_rest_is_compared(gpt, tmp_path, monkeypatch):
    other = trained.save(trained.metaspace_bpe(), tmp_path)
    full = ws.compare_tokenizers(gpt, other)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    found = ws.compare_tokenizers(gpt, other)
    assert counts(found) == counts(full)
    assert found.a.behaviour is None
    assert "how text is split is left out" in found.a.notes[0]
    json.dumps(found.to_json())


def test_a_place_without_a_tokenizer_is_told_so(tmp_path):
    folder = model(tmp_path, 4)
    with pytest.raises(CheckpointError, match="has no tokenizer: neither tokenizer.json, nor a SentencePiece model"):
        ws.compare_tokenizers(folder, folder)
    (tmp_path / "tekken_1.json").write_text("{}")
    with pytest.raises(CheckpointError, match="in the form of tiktoken"):
        tokenizer_facts(tmp_path / "tekken_1.json")


def test_parts_are_described_whatever_they_hold():
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert describe("pre_tokenizer", steps) == "cut at /a+/, isolated; ByteLevel (use_regex off)"
    assert describe("decoder", {"type": "ByteLevel", "use_regex": False}) == "ByteLevel"
    assert describe("post_processor", {"type": "ByteLevel", "use_regex": False}) == "nothing"
    maps = [describe("normalizer", {"type": "Precompiled", "precompiled_charsmap": letter * 99}) for letter in "xy"]
    assert all(text.startswith("Precompiled (precompiled_charsmap of 99 characters (") for text in maps)
    assert maps[0] != maps[1]
    for odd in (None, 3, [], {}, {"type": []}, {"type": "Split"}, {"type": "Sequence", "decoders": [1, {"type": 2}]}):
        assert isinstance(describe("decoder", odd), str)
    bert = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    assert template(bert) == (("[CLS]",), ("[SEP]",))
    assert template({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}]}) == (
        ("<s>",),
        (),
    )
