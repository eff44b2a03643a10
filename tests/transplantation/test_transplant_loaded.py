"""Models with another tokenizer, as transformers loads them: they encode, decode, compute and generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import trained_tokenizers as trained
from tiny_models import renumbered
from weightsmith.transplantation.create import transplant

ROLES = {
    "byte_bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "metaspace_bpe": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    "unigram": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "wordpiece": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


def make(kind: str, **settings):
    """Return a model of random weights."""
    torch.manual_seed(settings["vocab_size"])
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=4, **settings))
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, **settings))
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **settings))
    if kind == "bart":
        made = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **settings))
        made.final_logits_bias.normal_()
        return made
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **settings))


def write(folder: Path, kind: str, tokens: str, tokenizer=None, rows: int = 0, **settings) -> Path:
    own = trained.KINDS[tokens]() if tokenizer is None else tokenizer
    trained.save(own, folder, **ROLES[tokens])
    roles = {f"{role}_id": own.token_to_id(token) for role, token in ROLES[tokens].items() if role != "mask_token"}
    ids = {role: number for role, number in roles.items() if role[:3] in ("bos", "eos", "pad")}
    start = {"decoder_start_token_id": own.token_to_id(ROLES[tokens]["pad_token"])} if kind in ("t5", "bart") else {}
    model = make(kind, vocab_size=rows or own.get_vocab_size(), **ids, **start, **settings)
    model.save_pretrained(folder)
    return folder


CASES = {
    "llama": ("metaspace_bpe", "llama", "byte_bpe", {}),
    "llama-tied": ("byte_bpe", "llama", "metaspace_bpe", {"tie_word_embeddings": True}),
    "gpt2": ("byte_bpe", "bert", "wordpiece", {}),
    "bert": ("wordpiece", "gpt2", "byte_bpe", {}),
    "bart": ("byte_bpe", "t5", "unigram", {}),
    "t5": ("unigram", "llama", "metaspace_bpe", {"tie_word_embeddings": False}),
    "t5-tied": ("unigram", "llama", "byte_bpe", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("method", ["omp", "subword"])
def test_transformers_loads_the_result_with_the_donors_tokenizer(tmp_path, case, method):
    kind = case.split("-")[0]
    own, other, tokens, settings = CASES[case]
    model = write(tmp_path / "model", kind, own, rows=640, **settings)
    donor = write(tmp_path / "donor", other, tokens)
    made = transplant(model, donor, method, **({"atoms": 8} if method == "omp" else {}))
    made.save(tmp_path / "out")
    plain = tokenizers.Tokenizer.from_file(str(donor / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded(trained.SAMPLE)["input_ids"]
    assert ids == plain.encode(trained.SAMPLE).ids
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == plain.decode(ids, skip_special_tokens=False)
    assert loaded.get_vocab() == plain.get_vocab()
    before, after = (
        getattr(transformers, made.config["architectures"][0]).from_pretrained(folder).eval()
        for folder in (model, tmp_path / "out")
    )
    rows = plain.get_vocab_size()
    assert after.config.vocab_size == rows == after.get_input_embeddings().weight.shape[0]
    assert after.get_output_embeddings().weight.shape[0] == rows
    for role, token in ROLES[tokens].items():
        if hasattr(after.config, f"{role}_id") and getattr(before.config, f"{role}_id", None) is not None:
            assert getattr(after.config, f"{role}_id") == plain.token_to_id(token), role
    text = torch.tensor([ids])
    with torch.no_grad():
        if kind == "bert":
            assert after(text).logits.shape == (1, len(ids), rows)
        else:
            found = after.generate(text, max_new_tokens=8, do_sample=False)
            assert loaded.decode(found[0]) is not None
            assert int(found.max()) < rows


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
def test_a_model_says_the_same_of_the_same_text_under_new_numbers(tmp_path, kind):
    plain = trained.byte_bpe()
    other, order = renumbered(plain)
    model = write(tmp_path / "model", kind, "byte_bpe", plain, rows=512)
    donor = write(tmp_path / "donor", "llama", "byte_bpe", other)
    transplant(model, donor, atoms=8).save(tmp_path / "out")
    architecture = type(make(kind, vocab_size=8))
    one, two = (architecture.from_pretrained(folder).eval() for folder in (model, tmp_path / "out"))
    ids, moved = (torch.tensor([one.encode(trained.SAMPLE).ids]) for one in (plain, other))
    assert np.array_equal(order[moved[0].numpy()], ids[0].numpy())
    more = ({"decoder_input_ids": ids}, {"decoder_input_ids": moved}) if kind != "llama" else ({}, {})
    with torch.no_grad():
        expected, found = one(ids, **more[0]).logits, two(moved, **more[1]).logits
    torch.testing.assert_close(found, expected[..., torch.from_numpy(order)])
