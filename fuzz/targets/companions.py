"""What lies beside the weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, scratch_folder
from weightsmith.architecture import config as configs
from weightsmith.architecture.stacks import analyse
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError
from weightsmith.inspection import inspect
from weightsmith.tokenizer.chat_template import read_template
from weightsmith.tokenizer.components import PARTS, describe, template
from weightsmith.tokenizer.files import files_of
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import Tokenizer, read_tokenizer
from weightsmith.tokenizer.union import unite, with_tokens

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja")
_WORDS = b'"model_type" "llama" "architectures" "num_hidden_layers" 3 "layer_types" "text_config" "auto_map" "dtype"'
_WORDS += (
    b' "model" "vocab" "added_tokens" "content" "id" "chat_template" "name" "default" "template" [1,2,3] { } [ ] : ,'
)
_WORDS += b' "first_k_dense_replace" "num_nextn_predict_layers" "max_window_layers" "sliding_window_pattern"'
_GOOD = b"""{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
 "added_tokens": [{"id": 3, "content": "<s>", "special": true}], "pre_tokenizer": {"type": "ByteLevel"}}"""
# Larger ones are refused beside a model, which has fewer rows.
_MOST = 10_000
_NAMES = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)))


def run(content: bytes) -> None:
    """Give these bytes to whatever reads the file that the first byte chooses, and to what writes it again."""
    if not content:
        return
    name = _FILES[content[0] % len(_FILES)]
    try:
        if name == "config.json":
            _use(parse_object(content[1:], name))
            return
        (_folder() / "in" / name).write_bytes(content[1:])
        files = {name: _folder() / "in" / name}
        if name == "tokenizer.json":
            tokenizer = read_tokenizer(files, "fuzzed")
            if tokenizer is not None:
                match(tokenizer, tokenizer, bytes_as_text=True)
                for part in PARTS:
                    describe(part, tokenizer.content.get(part))
                template(tokenizer.content.get("post_processor"))
                if tokenizer.size < _MOST:
                    _unite(tokenizer)
        elif read_template(files) is not None or content[0] > 127:
            write_companions(_folder() / "out", {}, files, chat_template="{{ new }}")
    except CheckpointError:
        return


def _unite(tokenizer: Tokenizer) -> None:
    """Put a tokenizer together with a good one, both ways, and read what comes of it."""
    other = read_tokenizer({"tokenizer.json": _GOOD}, "good")
    assert other is not None
    for first, second in ((tokenizer, other), (other, tokenizer)):
        united, _ = unite(first, [(second, second.size)])
        made, _ = files_of(with_tokens(united, ["<new>"]), {}, {}, rebuilt=True)
        again = read_tokenizer(made, "united")
        if again is None or not first.vocabulary.items() <= again.vocabulary.items():
            raise Defect("a union changed the numbers of its first tokenizer")


def _use(config: dict[str, object]) -> None:
    tensors = {name: ArrayTensor(name, np.zeros(1, np.float32)) for name in _NAMES}
    json.dumps(inspect(Checkpoint("fuzzed", tensors, Companions(config))).to_json())
    architecture = analyse(tensors, config)
    changed, notes = configs.with_layers(config, architecture.stacks[0], [0, 1, 1, 2], architecture)
    changed = configs.untie(configs.with_dtype(changed, "bfloat16"))
    json.dumps(changed, indent=2, ensure_ascii=False).encode()
    if not all(isinstance(note, str) for note in notes):
        raise Defect("a note that is no text")


@cache
def _folder() -> Path:
    folder = scratch_folder()
    for name in ("in", "out"):
        (folder / name).mkdir()
    return folder


def seeds() -> Sequence[bytes]:
    """One good file of each kind, and configs of several layouts."""
    model = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 3,
        "torch_dtype": "bfloat16",
    }
    parts = {
        "text_config": {**model, "layer_types": ["a", "b", "c"], "max_window_layers": 2},
        "tie_word_embeddings": True,
    }
    ends = {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "mlp_only_layers": [0, 2],
    }
    settings = {"chat_template": [{"name": "default", "template": "x"}, {"name": "tools", "template": "y"}]}
    tokens = {
        "model": {"vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"content": "<x>", "id": 2}],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}],
        },
        "post_processor": {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]},
    }
    unigram = {"model": {"vocab": [["a", -1.5], ["b", -2]]}}
    chosen = [(0, model), (0, parts), (0, ends), (1, tokens), (1, unigram), (2, settings), (3, {"chat_template": "x"})]
    texts = [bytes([number]) + json.dumps(content).encode() for number, content in chosen]
    return [*texts, b"\4{{ messages }}", b"\x84{{ messages }}", b"\x82" + texts[5][1:], b"\0" + b"[" * 2000]


TARGET = Target("companions", run, seeds, text_mutator(_WORDS.split()))
