"""What tokens stand for, and which of two tokenizers' stand for the same: tokenizers are trained on the spot."""

from __future__ import annotations

import json

import numpy as np
import pytest

import trained_tokenizers as trained
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import Surface, read_tokenizer


def read(folder):
    return read_tokenizer({path.name: path for path in folder.iterdir()}, folder.name)


def loaded(tmp_path, name, made, **settings):
    return read(trained.save(made, tmp_path / name, **settings))


@pytest.mark.parametrize(
    ("name", "alphabet", "kind"),
    [
        ("byte_bpe", "bytes", "BPE"),
        ("metaspace_bpe", "metaspace", "BPE"),
        ("unigram", "metaspace", "Unigram"),
        ("wordpiece", "words", "WordPiece"),
    ],
)
def test_surfaces_put_together_are_the_text_that_was_split(tmp_path, name, alphabet, kind):
    made = trained.KINDS[name]()
    tokenizer = loaded(tmp_path, name, made)
    assert (tokenizer.alphabet, tokenizer.kind) == (alphabet, kind)
    assert tokenizer.vocabulary == made.get_vocab()
    assert tokenizer.size == made.get_vocab_size()
    for text in (
        "The cat sat on the mat",
        "der Hund und die Katze",
        "猫は畳の上に座った" if kind == "BPE" else "the sea",
    ):
        pieces = [tokenizer.surface(token) for token in made.encode(text, add_special_tokens=False).tokens]
        assert "special" not in {piece.kind for piece in pieces}
        assert b"".join(piece.text for piece in pieces).decode().strip() == text


def test_a_surface_says_what_kind_of_token_it_is(tmp_path):
    llama = loaded(tmp_path, "llama", trained.metaspace_bpe(), bos_token="<s>")
    assert llama.surface("<0x41>") == Surface("byte", b"A")
    assert llama.surface("▁the") == Surface("text", b" the")
    assert llama.surface("<s>") == Surface("special", b"<s>")
    gpt = loaded(tmp_path, "gpt", trained.byte_bpe())
    assert gpt.surface("Ġthe") == Surface("text", b" the")
    assert gpt.surface("é") == Surface("byte", b"\xe9")
    bert = loaded(tmp_path, "bert", trained.wordpiece())
    assert bert.surface("the") == Surface("text", b" the")
    assert bert.surface("##e") == Surface("text", b"e")


def test_tokens_match_whatever_the_kinds_of_their_tokenizers(tmp_path):
    gpt = loaded(tmp_path, "gpt", trained.byte_bpe(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    for name, spelled in (("metaspace_bpe", "▁the"), ("unigram", "▁the"), ("wordpiece", "the")):
        roles = {"eos_token": "</s>"} if name != "wordpiece" else {}
        other = loaded(tmp_path, name, trained.KINDS[name](), **roles)
        found = match(gpt, other)
        assert found[gpt.vocabulary["Ġthe"]] == other.vocabulary[spelled]
        assert (found >= 0).sum() > 20
        for number in np.flatnonzero(found >= 0):
            own, theirs = gpt.surface(gpt.tokens[number]), other.surface(other.tokens[found[number]])
            assert own == theirs or (own.kind == theirs.kind == "special")
        expected = other.vocabulary["</s>"] if roles else -1
        assert found[gpt.vocabulary["<|endoftext|>"]] == expected


def test_a_tokenizer_matches_itself_number_for_number(tmp_path):
    for name, make in trained.KINDS.items():
        own = loaded(tmp_path, name, make())
        found = match(own, own)
        # A byte-level alphabet spells some bytes in one way only; nothing else has two tokens for one text.
        assert np.array_equal(found, np.arange(own.size))


def test_bytes_match_letters_where_that_is_asked_for(tmp_path):
    llama = loaded(tmp_path, "llama", trained.metaspace_bpe())
    gpt = loaded(tmp_path, "gpt", trained.byte_bpe(text=trained.GERMAN))
    newline = llama.vocabulary["<0x0A>"]
    assert match(llama, gpt)[newline] == -1
    assert match(llama, gpt, bytes_as_text=True)[newline] == gpt.vocabulary["Ċ"]
    # What no UTF-8 character is alone is a byte in both.
    assert match(llama, gpt)[llama.vocabulary["<0xE3>"]] == gpt.vocabulary["ã"]


def test_roles_are_found_in_either_file(tmp_path):
    folder = trained.save(trained.metaspace_bpe(), tmp_path / "m", bos_token={"content": "<s>", "lstrip": False})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "older"}))
    assert read(folder).roles == {"eos_token": "</s>", "bos_token": "<s>"}
