"""A union of tokenizers splits text as its parts did, as the tokenizers library reads it."""

from __future__ import annotations

import json

import pytest
import tokenizers

import trained_tokenizers as trained
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.tokenizer import read_tokenizer
from weightsmith.tokenizer.union import alike, unite, with_tokens

ENOUGH = 10**6
FIRST, SECOND = [*trained.ENGLISH, "Über 猫"], [*trained.CYRILLIC, *trained.GERMAN, "the thinking cat"]
NEW = "Кошка сидела на коврике, и собака ела корм."
SAMPLES = [trained.SAMPLE, *trained.MULTILINGUAL, NEW, "", " ", "<|new|> x <|new|>", "  two  spaces\n\n"]


def parsed(tokenizer, owner="m", **settings):
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return read_tokenizer(files, owner)


def library(tokenizer):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.content))


def pair(kind, first=FIRST, second=SECOND):
    one, other = trained.KINDS[kind](first), trained.KINDS[kind](second)
    one.add_special_tokens(["<|own|>"])
    other.add_special_tokens(["<|new|>"])
    return one, other


@pytest.mark.parametrize("kind", trained.KINDS)
def test_numbers_stay_and_the_library_reads_what_the_file_says(kind):
    one, other = pair(kind)
    united, _ = unite(parsed(one), [(parsed(other, "b"), ENOUGH)])
    read = library(united)
    assert read.get_vocab() == united.vocabulary
    assert {token: read.token_to_id(token) for token in one.get_vocab()} == one.get_vocab()
    assert set(united.vocabulary) == set(one.get_vocab()) | set(other.get_vocab())
    assert sorted(united.vocabulary.values()) == list(range(len(united.vocabulary)))
    new = sorted((number, token) for token, number in other.get_vocab().items() if token not in one.get_vocab())
    assert [token for _, token in sorted((united.vocabulary[token], token) for _, token in new)] == [t for _, t in new]


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace_bpe"])
def test_text_without_new_pieces_is_split_as_before(kind):
    """Merges of the second come behind those of the first, which are all done by then."""
    one, other = pair(kind)
    united, _ = unite(parsed(one), [(parsed(other, "b"), ENOUGH)])
    read = library(united)
    new = set(united.vocabulary) - set(one.get_vocab())
    kept = 0
    for text in [*SAMPLES, *(word for line in trained.MULTILINGUAL for word in line.split())]:
        found, before = read.encode(text).tokens, one.encode(text).tokens
        if not new & set(found):
            kept += 1
            assert found == before, text
    assert kept > 30


@pytest.mark.parametrize("kind", trained.KINDS)
def test_new_pieces_are_found_and_text_comes_back(kind):
    one, other = pair(kind)
    united, _ = unite(parsed(one), [(parsed(other, "b"), ENOUGH)])
    read = library(united)
    new = set(united.vocabulary) - set(one.get_vocab())
    assert new & set(read.encode(NEW).tokens)
    if kind != "unigram":  # There what is unknown is one token, however long.
        assert len(read.encode(NEW).ids) <= len(one.encode(NEW).ids)
    assert read.decode(read.encode(NEW).ids) == other.decode(other.encode(NEW).ids)
    assert read.token_to_id("<|new|>") in read.encode("Кошка <|new|>").ids


def test_a_union_with_itself_is_itself():
    one = parsed(trained.byte_bpe())
    assert unite(one, [(parsed(trained.byte_bpe(), "b"), ENOUGH)]) == (one, [])


def test_pieces_of_unigram_keep_their_scores_and_the_unknown_its_price():
    one, other = pair("unigram")
    united, _ = unite(parsed(one), [(parsed(other, "b"), ENOUGH)])
    pieces = united.model["vocab"]
    scores = dict(json.loads(other.to_str())["model"]["vocab"])
    own = json.loads(one.to_str())["model"]["vocab"]
    assert pieces[: len(own)] == own
    assert pieces[united.vocabulary["<|own|>"]] == ["<|own|>", min(score for _, score in own)]
    fresh = [token for token in other.get_vocab() if token not in one.get_vocab() and token != "<|new|>"]
    assert fresh
    assert all(pieces[united.vocabulary[token]] == [token, scores[token]] for token in fresh)


def test_tokens_beyond_the_rows_of_their_model_are_left_out():
    one, other = pair("byte_bpe")
    rows = other.token_to_id("<|new|>")
    united, _ = unite(parsed(one), [(parsed(other, "b"), rows)])
    assert "<|new|>" not in united.vocabulary
    assert len(united.vocabulary) > len(one.get_vocab())


def test_merges_keep_their_form():
    one, other = pair("byte_bpe")
    first, second = parsed(one), parsed(other, "b")
    for form in (list, " ".join):
        content = json.loads(json.dumps(first.content))
        content["model"]["merges"] = [form(merge) for merge in content["model"]["merges"]]
        old = read_tokenizer({"tokenizer.json": json.dumps(content).encode()}, "m")
        merges = unite(old, [(second, ENOUGH)])[0].model["merges"]
        assert {type(merge) for merge in merges} == {type(merges[0])}
        assert merges[: len(content["model"]["merges"])] == content["model"]["merges"]
        assert len(merges) > len(content["model"]["merges"])


@pytest.mark.parametrize(("first", "second"), [("byte_bpe", "metaspace_bpe"), ("unigram", "byte_bpe"), ("wordpiece", "unigram")])  # fmt: skip
def test_tokens_of_another_kind_match_by_text_and_the_rest_are_cut_out_whole(first, second):
    one, other = trained.KINDS[first](FIRST), trained.KINDS[second](SECOND)
    other.add_special_tokens(["<|new|>"])
    a, b = parsed(one), parsed(other, "b")
    assert not alike(a, b)
    united, notes = unite(a, [(b, ENOUGH)])
    read = library(united)
    assert read.get_vocab() == united.vocabulary
    assert {token: read.token_to_id(token) for token in one.get_vocab()} == one.get_vocab()
    added = set(united.added) - set(a.added)
    # Every added token is found as the text that it stands for.
    special = {text for text in added if united.added[text]["special"]}
    assert "<|new|>" in special
    longest = max(added - special, key=len)
    assert read.encode(longest).tokens.count(longest) == 1
    assert any("added whole, and are cut out of every text" in note for note in notes)
    # What stands for the same text is no second token.
    assert not {a.surface(token) for token in a.vocabulary} & {b.surface(text) for text in added & set(b.vocabulary)}


def test_what_differs_is_told():
    one, other = trained.byte_bpe(FIRST), trained.byte_bpe(FIRST, digits=True)
    other.add_special_tokens([tokenizers.AddedToken("<|own|>", lstrip=True)])
    one.add_special_tokens(["<|own|>"])
    a = parsed(one, "a", eos_token="<|endoftext|>", pad_token="<|own|>")
    b = parsed(other, "b", pad_token="<|endoftext|>")
    _, notes = unite(a, [(b, ENOUGH)])
    assert "b has another pre_tokenizer than a, whose own is taken" in notes
    assert "'<|endoftext|>' is the pad_token of b and the eos_token of a, which is taken" in notes
    assert any(note.startswith("b finds '<|own|>' in another way") for note in notes)


def test_new_tokens_are_found_whole_and_known_ones_stay():
    one = trained.metaspace_bpe(FIRST)
    first = parsed(one)
    more = with_tokens(first, ["<tool>", "</s>"])
    assert more.vocabulary == {**first.vocabulary, "<tool>": first.size}
    assert library(more).encode("cat<tool>").ids[-1] == first.size
    assert with_tokens(first, ["</s>"]) is first


@pytest.mark.parametrize("merges", [5, [["a"]], [[1, 2]], ["a b c"], {"a": "b"}])
def test_merges_that_are_none_are_refused(merges):
    one, other = pair("byte_bpe")
    content = json.loads(other.to_str())
    content["model"]["merges"] = merges
    broken = read_tokenizer({"tokenizer.json": json.dumps(content).encode()}, "b")
    with pytest.raises(CheckpointError, match="has the merge .*; a merge is of two pieces"):
        unite(parsed(one), [(broken, ENOUGH)])


def test_scores_that_are_none_are_refused():
    one, other = pair("unigram")
    content = json.loads(other.to_str())
    content["model"]["vocab"][5] = ["x"]
    broken = read_tokenizer({"tokenizer.json": json.dumps(content).encode()}, "b")
    with pytest.raises(CheckpointError, match=r"b has \['x'\] for token and score"):
        unite(parsed(one), [(broken, ENOUGH)])
