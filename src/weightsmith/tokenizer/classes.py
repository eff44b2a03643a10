"""What transformers' tokenizer classes add to the files of a slow tokenizer.

A vocabulary alone does not say how a text is prepared, which tokens are put around it, or where a model's numbers
differ from those of its SentencePiece model: the class does. The settings are those of transformers 4.57, which are
compared with in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Format = Literal["sentencepiece", "merges", "words"]
# One text, or the first of two; the second of two; or a token by its role. Each with its kind of segment.
Slots = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TokenizerClass:
    """How the files of one class of tokenizers are meant.

    Attributes:
        format: which files it has.
        roles: the tokens that have roles where no file says so.
        bos: whether ``bos_token`` is put before a text where no file says (``add_bos_token``).
        single: what is put around one text; None where ``bos`` decides.
        pair: what is put around two.
        extra: special tokens that the class has beside those with roles.
        fairseq: the tokens that stand before the pieces where numbers are those of fairseq: roles, or tokens that are
            no role's. A mask follows the pieces then.
        skipped: how many of the model's own pieces, control pieces all, these take the place of.
        quotes: whether two backquotes or apostrophes become a quotation mark, accents go, and a comma after a digit is
            a piece by itself (ALBERT, XLNet).
        lower: whether capital letters become small where no file says; None where the class never does that.
        greedy_mask: whether the mask takes the space before it.
        pattern: how bytes are grouped before merges: GPT-2's pattern, Qwen2's or CLIP's.
        sentinels: how many ``<extra_id_…>`` follow the pieces where no file says (T5).
    """

    format: Format
    roles: Mapping[str, str]
    bos: bool = False
    single: Slots | None = None
    pair: Slots = ()
    extra: tuple[str, ...] = ()
    fairseq: tuple[str, ...] = ()
    skipped: int = 0
    quotes: bool = False
    lower: bool | None = None
    greedy_mask: bool = False
    pattern: Literal["gpt2", "qwen2", "clip"] = "gpt2"
    sentinels: int = 0


_BERT_ROLES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2_ROLES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_AROUND: Slots = (("cls_token", 0), ("A", 0), ("sep_token", 0))
_BERT_PAIR: Slots = (*_AROUND, ("B", 1), ("sep_token", 1))
# Two separators between texts, and one kind of segment.
_ROBERTA_PAIR: Slots = (*_AROUND, ("sep_token", 0), ("B", 0), ("sep_token", 0))

_BERT = TokenizerClass("words", _BERT_ROLES, single=_AROUND, pair=_BERT_PAIR, lower=True)
_ROBERTA = TokenizerClass("merges", _ROBERTA_ROLES, single=_AROUND, pair=_ROBERTA_PAIR, greedy_mask=True)
_GPT2 = TokenizerClass("merges", _GPT2_ROLES)
_LLAMA = TokenizerClass("sentencepiece", _LLAMA_ROLES, bos=True)

# fairseq's numbers begin with these; pieces that it does not use keep a place.
_FAIRSEQ = ("bos_token", "pad_token", "eos_token", "unk_token")
_UNUSED = ("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")
_CAMEMBERT = (_UNUSED[0], "pad_token", _UNUSED[1], "unk_token", _UNUSED[2])

# A SentencePiece model of no class: as SentencePiece itself splits text.
PLAIN = TokenizerClass("sentencepiece", {})
CLASSES: Mapping[str, TokenizerClass] = {
    "LlamaTokenizer": _LLAMA,
    "GemmaTokenizer": TokenizerClass(
        "sentencepiece",
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        bos=True,
    ),
    "T5Tokenizer": TokenizerClass(
        "sentencepiece",
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        single=(("A", 0), ("eos_token", 0)),
        pair=(("A", 0), ("eos_token", 0), ("B", 0), ("eos_token", 0)),
        sentinels=100,
    ),
    "AlbertTokenizer": TokenizerClass(
        "sentencepiece",
        {
            "bos_token": "[CLS]",
            "eos_token": "[SEP]",
            "unk_token": "<unk>",
            "sep_token": "[SEP]",
            "pad_token": "<pad>",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
        single=_AROUND,
        pair=_BERT_PAIR,
        quotes=True,
        lower=True,
        greedy_mask=True,
    ),
    "XLNetTokenizer": TokenizerClass(
        "sentencepiece",
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "sep_token": "<sep>",
            "pad_token": "<pad>",
            "cls_token": "<cls>",
            "mask_token": "<mask>",
        },
        single=(("A", 0), ("sep_token", 0), ("cls_token", 2)),
        pair=(("A", 0), ("sep_token", 0), ("B", 1), ("sep_token", 1), ("cls_token", 2)),
        extra=("<eop>", "<eod>"),
        quotes=True,
        lower=False,
        greedy_mask=True,
    ),
    "XLMRobertaTokenizer": TokenizerClass(
        "sentencepiece",
        _ROBERTA_ROLES,
        single=_AROUND,
        pair=_ROBERTA_PAIR,
        fairseq=_FAIRSEQ,
        skipped=3,
        greedy_mask=True,
    ),
    "CamembertTokenizer": TokenizerClass(
        "sentencepiece",
        _ROBERTA_ROLES,
        single=_AROUND,
        pair=_ROBERTA_PAIR,
        extra=_UNUSED,
        fairseq=_CAMEMBERT,
        skipped=1,
        greedy_mask=True,
    ),
    "DebertaV2Tokenizer": TokenizerClass(
        "sentencepiece",
        {"bos_token": "[CLS]", "eos_token": "[SEP]", **_BERT_ROLES},
        single=_AROUND,
        pair=_BERT_PAIR,
        lower=False,
    ),
    "BigBirdTokenizer": TokenizerClass(
        "sentencepiece",
        {**_BERT_ROLES, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        single=_AROUND,
        pair=_BERT_PAIR,
        greedy_mask=True,
    ),
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
    "LongformerTokenizer": _ROBERTA,
    "LEDTokenizer": _ROBERTA,
    "Qwen2Tokenizer": TokenizerClass(
        "merges",
        dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        pattern="qwen2",
    ),
    "CLIPTokenizer": TokenizerClass(
        "merges",
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
        single=(("bos_token", 0), ("A", 0), ("eos_token", 0)),
        pair=(("bos_token", 0), ("A", 0), ("eos_token", 0), ("eos_token", 0), ("B", 0), ("eos_token", 0)),
        pattern="clip",
    ),
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "MobileBertTokenizer": _BERT,
    "ConvBertTokenizer": _BERT,
}
# A config's model_type -> the class that transformers takes where no file names one.
BY_MODEL = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "phi3": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "albert": "AlbertTokenizer",
    "xlnet": "XLNetTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "big_bird": "BigBirdTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "codegen": "CodeGenTokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "BartTokenizer",
    "longformer": "LongformerTokenizer",
    "led": "LEDTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "clip": "CLIPTokenizer",
    "clip_text_model": "CLIPTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "mobilebert": "MobileBertTokenizer",
    "convbert": "ConvBertTokenizer",
}
