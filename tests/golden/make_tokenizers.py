"""Makes the golden files of recipes with `tokenizer`: what mergekit 0.1.5 gives for models of different vocabularies.

Run by hand as `make.py` is, with the same interpreter:

    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 mergekit-venv/bin/python tests/golden/make_tokenizers.py

`tokenizers/models/NAME` are our own: `p`, `q`, `r` have byte-level BPE tokenizers trained on texts of their own, `q` has
rows beyond its tokenizer. Every `tokenizers/cases/NAME.yaml` is a recipe written by hand; the run adds
`NAME.safetensors`, embeddings and head, and `NAME.json`, the number of every token in it: mergekit gives the tokens of a
union numbers that change from run to run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent / "tokenizers"
sys.path.insert(0, str(HERE.parent.parent))

import trained_tokenizers as trained  # noqa: E402

TEXTS = {
    "p": [*trained.ENGLISH, "Über 猫"],
    "q": [*trained.CYRILLIC, "the thinking cat sat"],
    "r": [*trained.GERMAN, *trained.ENGLISH[:1], "Кошка"],
}
ROWS_BEYOND = {"q": 9}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_model(name: str, random: np.random.Generator) -> None:
    tokenizer = trained.byte_bpe(TEXTS[name], size=290)
    tokenizer.add_special_tokens(["<|both|>", f"<|{name}|>"])
    folder = trained.save(tokenizer, HERE / "models" / name, eos_token="<|endoftext|>")
    rows = tokenizer.get_vocab_size() + ROWS_BEYOND.get(name, 0)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": rows}, indent=1) + "\n")
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{part}_proj.weight": (4, 4) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (4, 4) for part in ("gate", "up", "down")}
    shapes |= {f"{layer}.{part}_layernorm.weight": (4,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (4,), **dict.fromkeys(TABLES, (rows, 4))}
    drawn = {key: torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for key, shape in shapes.items()}
    save_file(drawn, folder / "model.safetensors")


def write_case(recipe: Path) -> None:
    text = recipe.read_text().replace("MODELS", str(HERE / "models"))
    options = MergeOptions(write_model_card=False, quiet=True)
    with tempfile.TemporaryDirectory() as out:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
        found = {key: value for file in Path(out).glob("*.safetensors") for key, value in load_file(file).items()}
        save_file({key: found[key].clone() for key in TABLES}, recipe.with_suffix(".safetensors"))
        numbers = tokenizers.Tokenizer.from_file(str(Path(out) / "tokenizer.json")).get_vocab()
    recipe.with_suffix(".json").write_text(json.dumps(numbers, sort_keys=True) + "\n")


if __name__ == "__main__":
    generator = np.random.default_rng(20262)
    for model in TEXTS:
        if not (HERE / "models" / model).exists():
            write_model(model, generator)
    for case in sorted((HERE / "cases").glob("*.yaml")):
        write_case(case)
