"""Merges of models with different tokenizers, as transformers loads them: encoded, decoded and generated from."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
import tokenizers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import trained_tokenizers as trained  # noqa: E402
import weightsmith as ws  # noqa: E402
from conftest import read_safetensors  # noqa: E402
from weightsmith.cli.main import main  # noqa: E402

TEXTS = {"a": [*trained.ENGLISH, "Über 猫"], "b": [*trained.CYRILLIC, *trained.GERMAN, "the thinking cat 🙂"]}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

# name -> (tokenizer, its class, config class, model class, settings)
MODELS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "llama": ("metaspace_bpe", "LlamaTokenizer", "LlamaConfig", "LlamaForCausalLM", {**TEXT}),
    "llama3": ("byte_bpe", "PreTrainedTokenizerFast", "LlamaConfig", "LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "gpt2": ("byte_bpe", "GPT2Tokenizer", "GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "bert": ("wordpiece", "BertTokenizer", "BertConfig", "BertForMaskedLM", {**TEXT}),
    "bart": ("byte_bpe", "BartTokenizer", "BartConfig", "BartForConditionalGeneration", {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    }),
    "t5": ("unigram", "T5Tokenizer", "T5Config", "T5ForConditionalGeneration", {
        "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2,
    }),
}  # fmt: skip
ROLES = {
    "metaspace_bpe": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "byte_bpe": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    "wordpiece": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"},
    "unigram": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}  # fmt: skip


def make(folder, name, which):
    """Write a model with a tokenizer trained on texts of its own; return the tokenizer."""
    kind, own_class, config_class, model_class, settings = MODELS[name]
    tokenizer = trained.KINDS[kind](TEXTS[which])
    tokenizer.add_special_tokens(["<|both|>"])
    tokenizer.add_tokens([f"<|{which}|>"])
    size = tokenizer.get_vocab_size()
    number = tokenizer.token_to_id
    ids = {role + "_id": number(token) for role, token in ROLES[kind].items() if role.split("_")[0] in ("bos", "eos", "pad")}  # fmt: skip
    if "Conditional" in model_class:
        ids["decoder_start_token_id"] = number(ROLES[kind]["eos_token"])
    config = getattr(transformers, config_class)(vocab_size=size, **{"bos_token_id": None, **ids}, **settings)
    torch.manual_seed(ord(which))
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    trained.save(tokenizer, folder, tokenizer_class=own_class, **ROLES[kind])
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return tokenizer


def rows_of(folder, rows):
    return {name: array for name, array in read_safetensors(folder).items() if rows in array.shape}


@pytest.mark.parametrize("name", MODELS)
def test_a_union_loads_encodes_and_generates(tmp_path, name):
    own = {which: make(tmp_path / which, name, which) for which in "ab"}
    model_class = getattr(transformers, MODELS[name][3])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {tmp_path}/a, parameters: {{weight: 0.75}}}}\n"
        f"- {{model: {tmp_path}/b, parameters: {{weight: 0.25}}}}\ntokenizer: {{source: union, pad_to_multiple_of: 32}}\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"])
    assert end.value.code == 0
    out = tmp_path / "out"
    read = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    for text in (trained.SAMPLE, "<|both|> x <|a|><|b|> Кошка", *trained.MULTILINGUAL):
        found = loaded(text)["input_ids"]
        assert found == read.encode(text).ids
        assert loaded.decode(found, clean_up_tokenization_spaces=False) == read.decode(found, skip_special_tokens=False)
    assert loaded.get_vocab() == read.get_vocab()
    for role, token in ROLES[MODELS[name][0]].items():
        assert getattr(loaded, role) == token
    model, info = model_class.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    vocabulary = read.get_vocab()
    size = -(-len(vocabulary) // 32) * 32
    assert model.config.vocab_size == size > own["a"].get_vocab_size()
    ids = torch.tensor([loaded("Кошка <|both|> the cat")["input_ids"]])
    if name == "bert":
        assert model(ids).logits.shape == (1, ids.shape[1], size)
    else:
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 1
    # Every row of every table is the weighted mean of what the models have for its token.
    tables = rows_of(out, size)
    assert len(tables) == len(rows_of(tmp_path / "a", own["a"].get_vocab_size()))
    before = {which: rows_of(tmp_path / which, own[which].get_vocab_size()) for which in "ab"}
    for table, array in tables.items():
        flat = array.reshape(size, -1) if array.shape[0] == size else array.T
        parts = {w: before[w][table].reshape(own[w].get_vocab_size(), -1).astype(float) for w in "ab"}
        for token, number in vocabulary.items():
            rows = {which: parts[which][n] for which in "ab" if (n := own[which].token_to_id(token)) is not None}
            one, other = rows.get("a", rows.get("b")), rows.get("b", rows.get("a"))
            np.testing.assert_allclose(flat[number], 0.75 * one + 0.25 * other, rtol=1e-5, atol=1e-6)


def test_the_tokenizer_of_another_model_gives_its_ids_and_its_text(tmp_path):
    make(tmp_path / "a", "gpt2", "a")
    other = make(tmp_path / "b", "gpt2", "b")
    merged = ws.merge("slerp", [tmp_path / "b"], tmp_path / "a", t=0.5, tokenizer_source=tmp_path / "b")
    merged.save(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded(trained.SAMPLE)["input_ids"] == other.encode(trained.SAMPLE).ids
    eos = other.token_to_id("<|endoftext|>")
    assert model.config.eos_token_id == eos == model.generation_config.eos_token_id
    assert model.config.vocab_size == other.get_vocab_size()
