"""How tokenizers split numbers, white space and texts: each is built to split in a known way."""

from __future__ import annotations

import sys

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import trained_tokenizers as trained
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.behaviour import observe
from weightsmith.tokenizer.encoding import TokenizersMissingError, encoder
from weightsmith.tokenizer.samples import DIGITS, TEXTS
from weightsmith.tokenizer.tokenizer import Tokenizer, read_tokenizer

GROUPS = {size: [str(number).zfill(size) for number in range(10**size)] for size in (1, 2, 3)}


def loaded(tmp_path, made):
    folder = trained.save(made, tmp_path)
    found = read_tokenizer({path.name: path for path in folder.iterdir()}, "m")
    assert found is not None
    return found


def of_numbers(pattern):
    """Take as tokens all numbers of one, two and three digits, cut by a pattern."""
    tokens = ["?", *GROUPS[1], *GROUPS[2], *GROUPS[3]]
    made = tokenizers.Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return made


@pytest.mark.parametrize(
    ("pattern", "grouping", "longest", "pieces"),
    [
        (r"\d", "single", 1, ("1", "2", "3", "4", "5", "6", "7")),
        (r"\d{1,3}", "left", 3, ("123", "456", "7")),
        (r"\d{1,2}", "left", 2, ("12", "34", "56", "7")),
        (r"\d{1,3}(?=(\d{3})*(\D|$))", "right", 3, ("1", "234", "567")),
        (r"1(?=2)|23|\d{1,3}", "free", 3, ("1", "23", "456", "7")),
        (r"\d+", "unknown", 0, ("?",)),
    ],
)
def test_groups_of_digits_are_told_by_where_they_begin(tmp_path, pattern, grouping, longest, pieces):
    found = observe(loaded(tmp_path, of_numbers(pattern))).numerals
    assert (found.grouping, found.longest) == (grouping, longest)
    assert found.pieces["1234567"] == pieces


def test_a_digit_in_bytes_is_a_digit(tmp_path):
    # No text that it was trained on has digits.
    made = trained.metaspace_bpe(text=trained.CYRILLIC[:1])
    found = observe(loaded(tmp_path, made)).numerals
    assert (found.grouping, found.longest) == ("single", 1)
    assert found.pieces["42"] == ("<0x34>", "<0x32>")


def test_samples_tell_groups_from_the_left_from_those_from_the_right():
    for size in (2, 3, 4):
        assert any(len(text) % size for text in DIGITS)


def test_white_space_is_seen_as_it_is_split_and_lost(tmp_path):
    llama = observe(loaded(tmp_path / "a", trained.metaspace_bpe())).spaces
    assert llama.prefix
    assert llama.pieces["leading space"] == (" ", " a")
    assert llama.lost == ()
    gpt = observe(loaded(tmp_path / "b", trained.byte_bpe())).spaces
    assert not gpt.prefix
    assert gpt.pieces["leading space"] == (" a",)
    assert gpt.lost == ()
    bert = observe(loaded(tmp_path / "c", trained.wordpiece())).spaces
    assert {"tab", "newline", "two spaces", "trailing space"} <= set(bert.lost)


def test_texts_are_counted_as_the_library_splits_them(tmp_path):
    for name, make in trained.KINDS.items():
        made = make()
        found = observe(loaded(tmp_path / name, made)).texts
        assert list(found) == list(TEXTS)
        for language, text in TEXTS.items():
            ids = made.encode(text, add_special_tokens=False).ids
            unknown = [token for token in ("<unk>", "[UNK]") if made.token_to_id(token) is not None]
            assert found[language].numbers == tuple(ids)
            assert found[language].per_character == len(ids) / len(text)
            assert found[language].unknown == sum(ids.count(made.token_to_id(token)) for token in unknown)
            assert found[language].exact == (made.decode(ids, skip_special_tokens=False) == text)
    assert observe(loaded(tmp_path / "x", trained.byte_bpe())).texts["Thai"].exact


def test_texts_are_neither_cut_nor_padded(tmp_path):
    made = trained.byte_bpe()
    made.enable_truncation(3)
    made.enable_padding(length=40)
    assert len(encoder(loaded(tmp_path, made)).encode("the sea shells by the shore")) > 3
    assert len(encoder(loaded(tmp_path, made)).encode("a")) == 1


def test_without_the_library_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    tokenizer = loaded(tmp_path, trained.byte_bpe())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizersMissingError, match=r"pip install 'weightsmith\[tokenizers\]'"):
        encoder(tokenizer)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0}, "merges": "x"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "WordLevel", "vocab": {"a": 0}},
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5},
        {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 0},
        {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []},
    ],
)
def test_what_the_library_refuses_is_one_error(model):
    with pytest.raises(CheckpointError, match="the tokenizers library refuses the tokenizer of m: "):
        observe(Tokenizer("m", {"version": "1.0", "added_tokens": [], "model": model}))


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_replacements_that_would_fill_the_memory_are_refused_unseen(part):
    """Six replacements of a letter by fifty make one of it 15,625,000,000."""
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
    key = {"normalizer": "normalizers", "decoder": "decoders"}[part]
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    content[part] = {"type": "Sequence", key: [longer, {"type": "Sequence", key: [longer] * 5}]}
    with pytest.raises(CheckpointError, match=f"the {part} of m replaces letters by long texts"):
        observe(Tokenizer("m", content))


def test_a_panic_of_the_library_is_an_error_too(tmp_path):
    made = trained.byte_bpe()
    # Stripping from the end of what is empty is what the library does not expect.
    nothing = decoders.Replace(tokenizers.Regex(".*"), "")
    made.decoder = decoders.Sequence([nothing, decoders.Strip(" ", 0, 1)])
    with pytest.raises(BaseException, match="index out of bounds") as raised:
        made.decode(made.encode("a").ids)
    assert not isinstance(raised.value, Exception)
    with pytest.raises(CheckpointError, match="refuses the tokenizer of m: index out of bounds"):
        observe(loaded(tmp_path, made))


def test_an_unknown_token_has_no_text_of_its_own(tmp_path):
    made = trained.wordpiece()
    made.normalizer = normalizers.Sequence([])
    found = observe(loaded(tmp_path, made))
    assert found.texts["Thai"].unknown > 0
    assert "?" in found.numerals.pieces["2026-11-21"]
