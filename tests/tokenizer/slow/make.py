"""Makes the small SentencePiece models of this folder, and what transformers 4.57 and SentencePiece make of texts.

Run by hand, with an interpreter that has them; nothing in the package or its tests imports it:

    python3 -m venv slow-venv
    slow-venv/bin/pip install transformers==4.57.1 sentencepiece==0.2.3 protobuf
    slow-venv/bin/python tests/tokenizer/slow/make.py

NAME.model is a SentencePiece model as that class of tokenizers has it. expected.json holds for each the numbers and the
decoded text of the class's slow tokenizer and of the fast one that transformers converts it to, and for models of no
class those of SentencePiece itself.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import sentencepiece
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import trained_tokenizers as trained  # noqa: E402

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()

TEXTS = [
    *trained.MULTILINGUAL,
    trained.SAMPLE,
    *(
        "",
        " ",
        "a",
        " a",
        "a ",
        "  a   b ",
        "\n",
        "a\tb\n\nc",
        "１２３ ＡＢＣ ﬁne",
        "``quoted'' naïve",
        "1,234,567.89, 3,",
    ),
    *("日本語と한국어와 ไทย", "🙂🙂 zzz", "<tag>x</tag>", "The <turn> cat</s> sat", "ÄÖÜ äöü ß", "X\u00a0Y\u3000Z"),
]
_RULES = {"FF21": "41", "FF22": "42", "FF23": "43", "FF11": "31", "FF12": "32", "FF13": "33", "FB01": "66 69"}
_RULES |= {"9": "20", "A": "20", "3000": "20", "A0": "20"}
_BPE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}
_SPECIALS = ["[CLS]", "[SEP]", "[MASK]"]
MODELS = {
    "llama": {**_BPE, "vocab_size": 480, "user_defined_symbols": ["<turn>"]},
    "gemma": {
        **_BPE,
        "vocab_size": 440,
        "add_dummy_prefix": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
    },
    "t5": {"vocab_size": 200, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "albert": {"vocab_size": 200, "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": _SPECIALS},
    "xlnet": {
        "vocab_size": 200,
        "control_symbols": ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"],
    },
    "xlm-roberta": {"vocab_size": 200},
    "camembert": {"vocab_size": 200},
    "deberta-v2": {
        "vocab_size": 200,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": "[PAD]",
        "bos_piece": "[CLS]",
        "eos_piece": "[SEP]",
        "unk_piece": "[UNK]",
    },
    "big-bird": {"vocab_size": 200, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 6, "control_symbols": _SPECIALS},
}
CLASSES = {"llama": "Llama", "gemma": "Gemma", "t5": "T5", "albert": "Albert", "xlnet": "XLNet"}
CLASSES |= {"xlm-roberta": "XLMRoberta", "camembert": "Camembert", "deberta-v2": "DebertaV2", "big-bird": "BigBird"}
FILES = {"llama": "tokenizer.model", "gemma": "tokenizer.model", "deberta-v2": "spm.model"}
FILES |= {"xlm-roberta": "sentencepiece.bpe.model", "camembert": "sentencepiece.bpe.model"}


def train(name: str) -> bytes:
    """Train a small model, on the texts that other tests train on."""
    made = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text("".join(f"{source}\t{target}\n" for source, target in _RULES.items()))
        own = {} if name in ("llama", "gemma") else {"normalization_rule_tsv": str(rules)}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(trained.MULTILINGUAL * 5),
            model_writer=made,
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
            **{**MODELS[name], **own},
        )
    return made.getvalue()


def main() -> None:
    """Make everything."""
    found: dict[str, object] = {"texts": TEXTS}
    for name in MODELS:
        path = HERE / f"{name}.model"
        if not path.exists() or "--models" in sys.argv:
            path.write_bytes(train(name))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILES.get(name, "spiece.model")).write_bytes(path.read_bytes())
            for kind, ending in (("slow", "Tokenizer"), ("fast", "TokenizerFast")):
                made = getattr(transformers, CLASSES[name] + ending).from_pretrained(folder)
                numbers = [made.encode(text) for text in TEXTS]
                plain = [made.encode(text, add_special_tokens=False) for text in TEXTS]
                decoded = [made.decode(one, clean_up_tokenization_spaces=False) for one in plain]
                pairs = made.encode("The cat", "the dog")
                found[f"{name} {kind}"] = {"numbers": numbers, "decoded": decoded, "pair": pairs, "size": len(made)}
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        found[f"{name} sentencepiece"] = {
            "numbers": [processor.encode(text) for text in TEXTS],
            "decoded": [processor.decode(processor.encode(text)) for text in TEXTS],
        }
    text = json.dumps(found, ensure_ascii=False)
    (HERE / "expected.json").write_text(text.replace(', "', ',\n"') + "\n")


if __name__ == "__main__":
    main()
