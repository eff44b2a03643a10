"""Slow tokenizers, converted: held against transformers' own conversions, its slow tokenizers, and SentencePiece.

What those give for the SentencePiece models was written down once, by slow/make.py: the tests need neither.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import trained_tokenizers as trained
from weightsmith.errors import CheckpointError
from weightsmith.tokenizer.encoding import encoder
from weightsmith.tokenizer.sentencepiece import PieceType, parse_sentencepiece
from weightsmith.tokenizer.tokenizer import Surface, read_tokenizer

SLOW = Path(__file__).parent / "slow"
EXPECTED = json.loads((SLOW / "expected.json").read_text())
TEXTS = EXPECTED["texts"]
CLASSES = {
    "llama": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "t5": "T5Tokenizer",
    "albert": "AlbertTokenizer",
    "xlnet": "XLNetTokenizerFast",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "big-bird": "BigBirdTokenizerFast",
}


def model(name):
    return (SLOW / f"{name}.model").read_bytes()


def read(name, file="tokenizer.model", **settings):
    given = {"tokenizer_class": CLASSES[name], **settings}
    return read_tokenizer({file: model(name), "tokenizer_config.json": json.dumps(given).encode()}, name)


def decoded(made, text):
    return made.decode(made.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", CLASSES)
def test_a_sentencepiece_model_splits_as_its_class_does_in_transformers(name):
    tokenizer = read(name)
    made = encoder(tokenizer)
    fast, slow = EXPECTED[f"{name} fast"], EXPECTED[f"{name} slow"]
    assert tokenizer.size == fast["size"] == slow["size"]
    assert made.encode("The cat", "the dog").ids == fast["pair"] == slow["pair"]
    for text, by_fast, by_slow, back in zip(TEXTS, fast["numbers"], slow["numbers"], fast["decoded"], strict=True):
        found = made.encode(text).ids
        # transformers' fast conversion of these two leaves spaces at the end that SentencePiece and the slow one drop.
        if name not in ("albert", "xlnet") or not text.endswith((" ", "\n")):
            assert found == by_fast, text
            assert decoded(made, text) == back, text
        # And that of Llama puts a space behind a token that a person defined.
        if "<turn>" not in text:
            assert found == by_slow, text


@pytest.mark.parametrize("name", CLASSES)
def test_a_sentencepiece_model_of_no_class_splits_as_sentencepiece_does(name):
    tokenizer = read_tokenizer({"tokenizer.model": model(name)}, name)
    made = encoder(tokenizer)
    expected = EXPECTED[f"{name} sentencepiece"]
    assert "no file names a class" in tokenizer.notes[0]
    for text, numbers, back in zip(TEXTS, expected["numbers"], expected["decoded"], strict=True):
        # SentencePiece sees no special token in a text.
        if "<" not in text:
            assert made.encode(text).ids == numbers, text
        if "⁇" not in back and "<" not in text:
            assert decoded(made, text) == back, text


def test_what_a_class_adds_is_in_the_vocabulary():
    t5 = read("t5", "spiece.model", extra_ids=3)
    assert [t5.tokens[t5.size - place] for place in (3, 2, 1)] == ["<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
    assert t5.roles == {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert "made of spiece.model, as a T5Tokenizer has it" in t5.notes[0]
    roberta = read("xlm-roberta", "sentencepiece.bpe.model")
    assert [roberta.tokens[number] for number in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert roberta.tokens[roberta.size - 1] == "<mask>"
    assert roberta.added["<mask>"]["lstrip"]


def test_settings_decide_what_is_put_around_a_text_and_before_it():
    def tokens(text, **settings):
        return encoder(read("llama", **settings)).encode(text).tokens

    plain = tokens("The cat")
    assert plain[:2] == ["<s>", "▁T"]
    assert tokens("The cat", add_bos_token=False, add_eos_token=True) == [*plain[1:], "</s>"]
    assert tokens("The cat", add_prefix_space=False) == ["<s>", "T", *plain[2:]]
    assert tokens("The cat", bos_token=None) == plain[1:]
    # Before transformers' change of that name, a space was put behind each special token too.
    assert tokens("The cat", legacy=False) == plain
    assert "▁cat" in tokens("x<turn>cat")
    assert "▁cat" not in tokens("x<turn>cat", legacy=False)


def test_a_class_is_found_in_the_config_too():
    files = {"tokenizer.model": model("llama")}
    assert read_tokenizer(files, "m", {"model_type": "mistral"}).roles["bos_token"] == "<s>"
    assert read_tokenizer(files, "m", {"tokenizer_class": "LlamaTokenizerFast"}).roles["bos_token"] == "<s>"
    with pytest.raises(CheckpointError, match=r"of m is that of a tokenizer of whale.*save_pretrained"):
        read_tokenizer(files, "m", {"model_type": "whale"})
    with pytest.raises(CheckpointError, match=r"NllbTokenizer, which is not converted here"):
        read_tokenizer({**files, "tokenizer_config.json": b'{"tokenizer_class": "NllbTokenizer"}'}, "m")
    with pytest.raises(CheckpointError, match=r"m has no file of a BertTokenizer: expected is vocab.txt"):
        read_tokenizer({**files, "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'}, "m")


def test_added_tokens_keep_their_numbers():
    size = EXPECTED["llama fast"]["size"]
    entries = {str(size): {"content": "<x>", "lstrip": True, "special": True}, "1": {"content": "<s>", "special": True}}
    tokenizer = read("llama", added_tokens_decoder=entries, pad_token="<pad>")
    assert tokenizer.vocabulary["<x>"] == size
    assert tokenizer.vocabulary["<pad>"] == size + 1
    assert tokenizer.added["<x>"]["lstrip"]
    assert encoder(tokenizer).encode("a <x>", add_special_tokens=False).ids[-1] == size
    with pytest.raises(CheckpointError, match=rf"numbers \[{size + 5}\], and not those that follow its vocabulary"):
        read("llama", added_tokens_decoder={str(size + 5): {"content": "<x>"}})
    with pytest.raises(CheckpointError, match=r"'<s>' under number 1, and its files of added tokens say 7"):
        read("llama", added_tokens_decoder={"7": {"content": "<s>"}})
    with pytest.raises(
        CheckpointError, match="added_tokens_decoder of llama's tokenizer_config.json is damaged at 'x'"
    ):
        read("llama", added_tokens_decoder={"x": {"content": "<s>"}})
    files = {"tokenizer.model": model("llama"), "added_tokens.json": json.dumps({"<y>": size}).encode()}
    assert read_tokenizer(files, "m", {"model_type": "llama"}).vocabulary["<y>"] == size


def test_bytes_and_spaces_of_a_converted_model_are_what_they_stand_for():
    llama = read("llama")
    assert llama.surface("<0x41>") == Surface("byte", b"A")
    assert llama.surface("▁the") == Surface("text", b" the")


# Merges and words: transformers 5 reads their files itself.


def vocabulary_files(folder, made):
    """Write what GPT-2's kind has for files: vocab.json and merges.txt."""
    content = json.loads(made.to_str())
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(made.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def own(folder):
    return read_tokenizer({path.name: path for path in folder.iterdir()}, folder.name)


def clip():
    made = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in sorted(letters))],
        initial_alphabet=letters,
        show_progress=False,
    )
    made.train_from_iterator(trained.MULTILINGUAL * 5, trainer)
    return made


MERGES = {
    "GPT2Tokenizer": (lambda: trained.byte_bpe(), {}),
    "CodeGenTokenizer": (lambda: trained.byte_bpe(), {}),
    "Qwen2Tokenizer": (lambda: trained.byte_bpe(digits=True), {}),
    "RobertaTokenizer": (lambda: trained.byte_bpe(special=("<s>", "<pad>", "</s>", "<unk>", "<mask>")), {}),
    "BartTokenizer": (lambda: trained.byte_bpe(special=("<s>", "<pad>", "</s>", "<unk>", "<mask>")), {}),
    "CLIPTokenizer": (clip, {}),
}


@pytest.mark.parametrize("name", MERGES)
def test_merges_split_as_transformers_has_them(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    make, settings = MERGES[name]
    vocabulary_files(tmp_path, make())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **settings}))
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    converted = own(tmp_path)
    made = encoder(converted)
    assert converted.size == len(theirs)
    for text in TEXTS:
        assert made.encode(text).ids == theirs.encode(text), text
        plain = theirs.encode(text, add_special_tokens=False)
        assert decoded(made, text) == theirs.decode(plain, clean_up_tokenization_spaces=False), text
    assert made.encode("a", "b").ids == theirs.encode("a", "b")


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_words_split_as_transformers_has_them(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    made = trained.wordpiece()
    vocabulary = sorted(made.get_vocab().items(), key=lambda entry: entry[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    converted = encoder(own(tmp_path))
    for text in TEXTS:
        assert converted.encode(text).ids == theirs.encode(text), text
    pair = converted.encode("the cat", "a dog")
    assert pair.ids == theirs("the cat", "a dog")["input_ids"]
    assert pair.type_ids == theirs("the cat", "a dog")["token_type_ids"]


def test_files_that_say_too_little_or_nothing_are_refused(tmp_path):
    vocabulary_files(tmp_path, trained.byte_bpe())
    with pytest.raises(CheckpointError, match=r"vocab.json and no file that says which class of tokenizer it is for"):
        own(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\n\nqqq z\n")
    with pytest.raises(CheckpointError, match=r"merges.txt, line 4: 'qqq z' is no pair of tokens of the vocabulary"):
        own(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 0}')
    with pytest.raises(CheckpointError, match=r"vocab.json gives one number to two tokens"):
        own(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 4294967296}')
    with pytest.raises(CheckpointError, match=r"vocab.json is no vocabulary"):
        own(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 2}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"leaves numbers out, and tokens are added behind it"):
        own(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "0"}')
    with pytest.raises(CheckpointError, match=r"vocab.json is no vocabulary"):
        own(tmp_path)


@pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "tokenizer.model"])
def test_tiktoken_is_refused_with_the_way_out(name):
    with pytest.raises(CheckpointError, match=rf"{name} of m is a tokenizer in the form of tiktoken.*save_pretrained"):
        read_tokenizer({name: b"IQ== 0\nIg== 1\n"}, "m", {"model_type": "llama"})


def test_a_model_without_any_file_of_a_tokenizer_has_none():
    assert read_tokenizer({"generation_config.json": b"{}"}, "m") is None


# The reader of SentencePiece models.


def field(number, value):
    """Write a field of Protocol Buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    written = b""
    while value > 127:
        written, value = written + bytes([value & 127 | 128]), value >> 7
    return written + bytes([value])


def piece(text, score=-1.0, kind=None):
    return field(1, field(1, text) + field(2, score) + (b"" if kind is None else field(3, kind)))


UNKNOWN = piece("<unk>", 0.0, 2)


def test_pieces_are_merged_by_their_scores_and_not_by_their_numbers():
    """Mistral's models have runs of spaces as early pieces of the lowest score; transformers 5 merges them first."""
    letters = "▁abc"
    pieces = {"▁▁": -1e9, "▁▁▁▁": -1e9, **dict.fromkeys(letters, -1000.0)}
    pieces |= {"bc": -7.0, "▁a": -1.0, "ab": -2.0, "▁ab": -5.0, "ca": -3.0, "abc": -6.0, "▁▁▁": -1e9, "▁b": -4.0}
    content = UNKNOWN + b"".join(piece(text, score) for text, score in pieces.items()) + field(2, field(3, 2))
    content += field(3, field(3, 0) + field(4, 0))
    tokenizer = read_tokenizer({"tokenizer.model": content}, "m")
    made = encoder(tokenizer)
    assert {"".join(pair) for pair in tokenizer.model["merges"]} == {text for text in pieces if len(text) > 1}

    def plainly(text):
        found = list(text.replace(" ", "▁"))
        while pairs := [i for i in range(len(found) - 1) if found[i] + found[i + 1] in pieces]:
            # Of equal scores the first in the text.
            best = max(pairs, key=lambda i: (pieces[found[i] + found[i + 1]], -i))
            found[best : best + 2] = [found[best] + found[best + 1]]
        return found

    random = np.random.default_rng(0)
    for text in ("a  b", "    a", *("".join(random.choice(list(" abc"), 12)) for _ in range(200))):
        assert made.encode(text, add_special_tokens=False).tokens == plainly(text), text


def test_fields_of_a_model_are_read_and_defaults_are_those_of_the_format():
    found = parse_sentencepiece(UNKNOWN + piece("▁a", -2.5) + piece("<c>", 0.0, 3), "m")
    assert found.pieces[1] == ("▁a", -2.5, PieceType.NORMAL)
    assert found.pieces[2].type == PieceType.CONTROL
    assert (found.kind, found.unknown, found.byte_fallback) == ("Unigram", 0, False)
    assert (found.dummy_prefix, found.remove_extra_whitespaces, found.charsmap) == (True, True, b"")
    more = field(2, field(3, 2)) + field(3, field(2, b"map") + field(3, 0) + field(4, 0)) + field(99, "what is new")
    found = parse_sentencepiece(UNKNOWN + more, "m")
    assert (found.kind, found.charsmap, found.dummy_prefix, found.remove_extra_whitespaces) == (
        "BPE",
        b"map",
        False,
        False,
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 unknown pieces"),
        (UNKNOWN + UNKNOWN, "a piece twice"),
        (UNKNOWN + piece("<u>", 0.0, 2), "2 unknown pieces"),
        (UNKNOWN + piece(""), "piece 1 has 0 characters"),
        (UNKNOWN + piece("x" * 1001), "piece 1 has 1,001 characters"),
        (UNKNOWN + piece(b"\xff"), "piece 1 is not UTF-8"),
        (UNKNOWN + piece("a", float("nan")), "the score of piece 1, 'a', is nan"),
        (UNKNOWN + piece("a", 0.0, 9), "9 is not a valid PieceType"),
        (UNKNOWN + field(2, field(3, 7)), "its kind is 7"),
        (UNKNOWN + field(2, field(35, 1)), "0 pieces for the 256 bytes"),
        (UNKNOWN[:-2], "cut short"),
        (b"\x0a\xff\xff\xff\xff\x0f", "cut short"),
        (b"\x0b", "unknown kind 3"),
        (b"\xff" * 11, "more than 64 bits"),
        (UNKNOWN + field(2, 3), "a number stands where a text or a message is expected"),
        (UNKNOWN + field(2, field(3, "x")), "field 3 is no whole number"),
    ],
)
def test_a_damaged_model_is_refused(content, told):
    with pytest.raises(CheckpointError, match="m is no SentencePiece model") as raised:
        parse_sentencepiece(content, "m")
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (field(2, field(3, 3)), "of whole words"),
        (field(2, field(3, 4)), "of single characters"),
        (field(2, field(24, 1)), "with spaces behind words"),
        (field(3, field(5, 0)), "that keeps spaces as they are"),
        (piece("a", 0.0, 5), "with unused pieces"),
        (field(5, field(2, b"map")), "that maps characters when it decodes"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_way_out(content, told):
    with pytest.raises(CheckpointError, match=rf"m is a SentencePiece model {told}.*save_pretrained"):
        parse_sentencepiece(UNKNOWN + content, "m")
