"""Numbers of tokens in configs, from one tokenizer to another."""

from __future__ import annotations

import json

import numpy as np
import pytest

from weightsmith.tokenizer.ids import with_ids
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import Tokenizer


def tokenizer(tokens, special=(), **roles):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    added = [{"id": vocabulary[token], "content": token, "special": True} for token in special]
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": added}
    return Tokenizer("m", content, roles=roles)


BEFORE = tokenizer(["a", "b", "</s>", "<s>", "<gone>"], ["</s>", "<s>", "<gone>"], eos_token="</s>", bos_token="<s>")
AFTER = tokenizer(["<s>", "x", "<end>", "b", "a"], ["<s>", "<end>"], eos_token="<end>", bos_token="<s>")
MOVED = match(BEFORE, AFTER)


def mapped(content, **more):
    return with_ids(content, BEFORE, AFTER, MOVED, **more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bos_token_id": 3, "eos_token_id": 2, "hidden_size": 2}, {"bos_token_id": 0, "eos_token_id": 2, "hidden_size": 2}),
        ({"eos_token_id": [2, 0, 2]}, {"eos_token_id": [2, 4]}),
        ({"decoder_start_token_id": 1, "image_token_index": 0}, {"decoder_start_token_id": 3, "image_token_index": 4}),
        ({"pad_token_id": None, "audio_token_id": -1}, {"pad_token_id": None, "audio_token_id": -1}),
        ({"suppress_tokens": [0, 1], "begin_suppress_tokens": []}, {"suppress_tokens": [4, 3], "begin_suppress_tokens": []}),
        ({"bad_words_ids": [[0, 1], [1]]}, {"bad_words_ids": [[4, 3], [3]]}),
        ({"forced_decoder_ids": [[1, 0], [2, None]]}, {"forced_decoder_ids": [[1, 4], [2, None]]}),
        ({"sequence_bias": [[[0, 1], -2.0]]}, {"sequence_bias": [[[4, 3], -2.0]]}),
        ({"lang_to_id": {"<|a|>": 0}}, {"lang_to_id": {"<|a|>": 4}}),
        ({"text_config": {"eos_token_id": 0}}, {"text_config": {"eos_token_id": 4}}),
        ({"use_cache": True, "max_new_tokens": 2, "num_image_tokens": 1}, {"use_cache": True, "max_new_tokens": 2, "num_image_tokens": 1}),
        # Numbers of codes of sound, and of another tower.
        ({"codec_eos_token_id": 2, "vision_config": {"pad_token_id": 1}}, {"codec_eos_token_id": 2, "vision_config": {"pad_token_id": 1}}),
    ],
)  # fmt: skip
def test_numbers_follow_their_tokens(given, expected):
    before = json.dumps(given)
    assert mapped(given) == (expected, [])
    assert json.dumps(given) == before


def test_what_is_gone_is_dropped_and_told():
    content = {
        "pad_token_id": 4,
        "suppress_tokens": [0, 4],
        "bad_words_ids": [[0, 4], [1]],
        "lang_to_id": {"<|g|>": 4, "<|a|>": 0},
        "forced_decoder_ids": [[1, 4]],
    }
    changed, notes = mapped(content, name="generation_config.json")
    assert changed == {
        "pad_token_id": None,
        "suppress_tokens": [4],
        "bad_words_ids": [[3]],
        "lang_to_id": {"<|a|>": 4},
        "forced_decoder_ids": [],
    }
    assert len(notes) == 5
    assert notes[0] == (
        "generation_config.json: pad_token_id 4 (<gone>) is no token of the new tokenizer, and is left out"
    )


def test_what_is_gone_or_missing_is_taken_from_the_model_that_the_tokenizer_is_from():
    changed, notes = mapped({"pad_token_id": 4}, other={"pad_token_id": 1, "eos_token_id": [2, 3], "hidden_size": 8})
    assert (changed, notes) == ({"pad_token_id": 1, "eos_token_id": [2, 3]}, [])
    assert mapped({"pad_token_id": 4}, other={"pad_token_id": 99})[0] == {"pad_token_id": None}
    assert mapped({"pad_token_id": None}, other={"pad_token_id": 3})[0] == {"pad_token_id": 3}


def test_a_number_beyond_the_tokenizer_is_no_token():
    changed, notes = mapped({"pad_token_id": 700, "mask_token_id": 10**30})
    assert changed == {"pad_token_id": None, "mask_token_id": None}
    assert "pad_token_id 700 is no token" in notes[0]


def test_the_role_decides_where_the_text_is_gone():
    after = tokenizer(["<end>", "q"], ["<end>"], eos_token="<end>")
    none = np.full(BEFORE.size, -1, np.int64)
    assert with_ids({"eos_token_id": 2}, BEFORE, after, none) == ({"eos_token_id": 0}, [])
    assert with_ids({"eos_token_id": [2]}, BEFORE, after, none)[0] == {"eos_token_id": 0}


def test_forms_of_other_programs_stay():
    content = {
        "bad_words_ids": "none",
        "sequence_bias": {"(1,)": 2.0},
        "eos_token_id": "</s>",
        "suppress_tokens": [1.5],
    }
    assert mapped(content) == (content, [])


def test_a_token_of_two_roles_becomes_the_token_of_each():
    before = tokenizer(["a", "<end>"], ["<end>"], bos_token="<end>", eos_token="<end>")
    after = tokenizer(["</s>", "<s>", "a"], ["</s>", "<s>"], bos_token="<s>", eos_token="</s>")
    given = {"bos_token_id": 1, "eos_token_id": [1], "pad_token_id": 1}
    found, _ = with_ids(given, before, after, match(before, after))
    assert found == {"bos_token_id": 1, "eos_token_id": [0], "pad_token_id": 0}
