"""Small tokenizers of every kind, trained on the spot on text in several scripts."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

ENGLISH = [
    "The cat sat on the mat, and the dog ate the cat's food in 1987.",
    "She sells sea shells by the sea shore; they cost 12345 dollars.",
    "the thing that they thought through there",
]
GERMAN = [
    "Die Katze saß auf der Matte, und der Hund fraß das Futter im Jahr 1987.",
    "Über den Wäldern ziehen schöne Vögel, 12 oder 130 an der Zahl.",
]
CYRILLIC = ["Кошка сидела на коврике, а собака ела корм.", "Шла Саша по шоссе и сосала сушку 42 раза."]
MULTILINGUAL = [
    *ENGLISH,
    *GERMAN,
    *CYRILLIC,
    "猫は畳の上に座った。東京は大きい。",
    "  def f(x):\n\treturn x ** 2  # naïve 🙂",
]
SAMPLE = "The thoughtful cat cost 123456 dollars.  Schöne Grüße!\nКошка ела сушки; 猫は東京。 🙂 <tag> naïve\tx == 2"


def byte_bpe(text=None, size=400, special=("<|endoftext|>",), digits=False) -> tokenizers.Tokenizer:
    """GPT-2's and Llama 3's kind."""
    made = tokenizers.Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    single = [pre_tokenizers.Digits(individual_digits=True), own]
    made.pre_tokenizer = pre_tokenizers.Sequence(single) if digits else own
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator((text or MULTILINGUAL) * 5, trainer)
    return made


def metaspace_bpe(text=None, size=500, special=("<unk>", "<s>", "</s>")) -> tokenizers.Tokenizer:
    """Llama's and Mistral's kind: bytes where there is no token."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *fallback], show_progress=False)
    # Its words are split for training alone: no token reaches across a space.
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator((text or MULTILINGUAL) * 5, trainer)
    # A trainer adds all special tokens; bytes are tokens of the vocabulary alone.
    content = json.loads(made.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram(text=None, size=300, special=("<pad>", "</s>", "<unk>")) -> tokenizers.Tokenizer:
    """T5's kind."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator((text or MULTILINGUAL) * 5, trainer)
    return made


def wordpiece(text=None, size=300, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> tokenizers.Tokenizer:
    """BERT's kind."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    made.train_from_iterator((text or MULTILINGUAL) * 5, trainer)
    numbers = {token: made.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(numbers.items())
    )
    return made


KINDS = {"byte_bpe": byte_bpe, "metaspace_bpe": metaspace_bpe, "unigram": unigram, "wordpiece": wordpiece}


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **settings: object) -> Path:
    """Write a tokenizer as transformers finds it; ``settings`` are those of ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
