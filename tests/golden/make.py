"""Makes the golden files: what mergekit 0.1.5 gives on our own tiny random models.

Run by hand, with an interpreter that has mergekit; nothing in the package or its tests imports it:

    python3 -m venv mergekit-venv
    mergekit-venv/bin/pip install torch==2.13.0 && mergekit-venv/bin/pip install mergekit==0.1.5
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 mergekit-venv/bin/python tests/golden/make.py

Every `cases/NAME.yaml` is a recipe written by hand. Its first comment line says what it shows, a line
`# differs:` where the method departs from its publication. The run adds `cases/NAME.safetensors`, or
`cases/NAME.error.txt` where mergekit refuses the recipe or gives numbers that are not finite. The models
are stored and reused, so that no later change of NumPy's random streams can reach the files; `--models`
draws them anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
MODELS, CASES, RANDOM = HERE / "models", HERE / "cases", HERE / "random"
STATISTICS = RANDOM / "statistics.json"
SEEDS = range(24)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FINE_TUNES = {"a": 0.03, "b": 0.02, "c": 0.05}  # name: standard deviation of its own change
SHARED_CHANGE = 0.02  # what the fine-tunes have in common, so that cosines are not all near zero
UNTOUCHED = 0.1  # share of the entries that a fine-tune leaves exactly as they are
UNTOUCHED_TENSOR = ("c", "model.layers.3.mlp.up_proj.weight")  # one task vector that is zero all over

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama checkpoint of this configuration."""
    hidden, inner, vocabulary = 8, 16, 24
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for projection in "qkvo":
            yield f"{prefix}self_attn.{projection}_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def draw_models(rng: np.random.Generator) -> dict[str, Arrays]:
    """A base, three fine-tunes of it, and two independent models."""

    def gaussian(deviation: float) -> Arrays:
        return {name: rng.normal(0.0, deviation, shape) for name, shape in shapes()}

    def independent() -> Arrays:
        return {name: values + ("norm" in name) for name, values in gaussian(0.3).items()}

    base, shared = independent(), gaussian(SHARED_CHANGE)
    models = {"base": base}
    for name, deviation in FINE_TUNES.items():
        models[name] = {}
        for tensor, own in gaussian(deviation).items():
            touched = rng.random(own.shape) >= UNTOUCHED
            if (name, tensor) == UNTOUCHED_TENSOR:
                touched = np.zeros_like(touched)
            models[name][tensor] = base[tensor] + touched * (own + shared[tensor])
    return models | {"x": independent(), "y": independent()}


def write_models() -> None:
    for name, arrays in draw_models(np.random.default_rng(20261)).items():
        folder = MODELS / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: torch.from_numpy(values.astype(np.float32)) for key, values in arrays.items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def merge(recipe: Path, seed: int | None = None) -> Tensors:
    """Run one recipe through mergekit on the CPU; the working directory holds the models."""
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, random_seed=seed, quiet=True)
    configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    with tempfile.TemporaryDirectory() as out:
        run_merge(configuration, out, options)
        tensors: Tensors = {}
        for shard in sorted(Path(out).glob("*.safetensors")):
            tensors |= {name: tensor.clone() for name, tensor in load_file(shard).items()}
    return tensors


def write_case(recipe: Path) -> None:
    """Store the merged tensors in the dtype that mergekit wrote, or the reason why there are none."""
    result, refusal = recipe.with_suffix(".safetensors"), recipe.with_suffix(".error.txt")
    result.unlink(missing_ok=True)
    refusal.unlink(missing_ok=True)
    try:
        tensors = merge(recipe)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ArithmeticError("the result is not finite")
        save_file(tensors, result)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        refusal.write_text(f"{type(error).__name__}: {error}\n")
        print(f"refused {recipe.stem}: {error}")


def measure_random(recipe: Path) -> dict[str, float | int]:
    """Statistics of a random mask over all seeds: one fine-tune of weight 1, so output - base is its delta.

    `kept` is the share of changed entries that survive, `kept_small` and `kept_large` the same for the
    smaller and the larger half of each row by magnitude, `scale` the mean of kept / original, over all
    kept entries, and `l1_ratio` the mean over tensors of the L1 norm after / before.
    """
    base, tuned = (load_file(MODELS / name / "model.safetensors") for name in ("base", "a"))
    kept, small, large, scale, ratios = [], [], [], [], []
    for seed in SEEDS:
        merged = merge(recipe, seed)
        for name in base:
            delta = torch.atleast_2d((tuned[name] - base[name]).double())
            after = (merged[name] - base[name]).double().reshape(delta.shape)
            changed = delta != 0
            survives = (after != 0) & changed
            is_large = delta.abs() > delta.abs().median(dim=1, keepdim=True).values
            kept.append(survives[changed])
            large.append(survives[changed & is_large])
            small.append(survives[changed & ~is_large])
            scale.append((after / delta)[survives])
            ratios.append((after.abs().sum() / delta.abs().sum())[None])
    means = {"kept": kept, "kept_small": small, "kept_large": large, "scale": scale, "l1_ratio": ratios}
    entries = sum(part.numel() for part in kept)
    return {"seeds": len(SEEDS), "changed_entries": entries} | {
        name: round(float(torch.cat(parts).double().mean()), 5) for name, parts in means.items()
    }


def comment(recipe: Path, key: str = "") -> str:
    """The first comment line of a recipe, or the one that starts with `key:`."""
    lines = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ")]
    return next((line.removeprefix(f"{key}: ") for line in lines if not key or line.startswith(key)), "")


README = """# Golden files: mergekit's numbers

Written by `make.py`; change that file or a recipe, not this one.

`models/NAME` are our own random models in the layout of Llama (hidden 8, inner 16, 4 layers, 2 heads,
vocabulary 24, float32, no tokenizer): `base`; `a`, `b`, `c`, fine-tunes of it, in which a tenth of the
entries, and all of {frozen} of `c`, equal the base; `x` and `y`, independent models.
`cases/NAME.yaml` is a recipe, `cases/NAME.safetensors` what mergekit made of it on the CPU, in the dtype
that it wrote, and `cases/NAME.error.txt` its message where it refused, or ours where its numbers are not
finite. `random/` holds recipes with random masks, of which only statistics can be compared
(`random/statistics.json`, explained in `make.py`). `tokenizers/` holds models of
different vocabularies and recipes with `tokenizer` (`make_tokenizers.py`).

Made with {versions}. To make them again:

    python3 -m venv mergekit-venv
    mergekit-venv/bin/pip install torch==2.13.0 && mergekit-venv/bin/pip install mergekit==0.1.5
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 mergekit-venv/bin/python tests/golden/make.py [NAME ...]

"Differs" says where the case departs from the published method, or from mergekit's own documents.

| Case | Shows | Differs |
|---|---|---|
{cases}

| Random case | Shows | Differs |
|---|---|---|
{random}
"""


def write_readme() -> None:
    def rows(folder: Path, note: Callable[[Path], str]) -> str:
        recipes = sorted(folder.glob("*.yaml"))
        return "\n".join(f"| {r.stem} | {comment(r)}{note(r)} | {comment(r, 'differs')} |" for r in recipes)

    def refused(recipe: Path) -> str:
        return " **(no result)**" if recipe.with_suffix(".error.txt").exists() else ""

    packages = ("mergekit", "torch", "numpy", "safetensors", "transformers", "pydantic")
    versions = ", ".join(["Python " + platform.python_version(), *(f"{p} {version(p)}" for p in packages)])
    text = README.format(
        frozen=f"`{UNTOUCHED_TENSOR[1]}`",
        versions=versions,
        cases=rows(CASES, refused),
        random=rows(RANDOM, lambda _: ""),
    )
    (HERE / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases to make again (default: all, and the statistics)")
    parser.add_argument("--models", action="store_true", help="draw the models anew")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.models or not MODELS.exists():
        write_models()
    os.chdir(MODELS)
    for recipe in sorted(CASES.glob("*.yaml")):
        if not arguments.names or recipe.stem in arguments.names:
            write_case(recipe)
    if not arguments.names:
        statistics = {recipe.stem: measure_random(recipe) for recipe in sorted(RANDOM.glob("*.yaml"))}
        STATISTICS.write_text(json.dumps(statistics, indent=1) + "\n")
    write_readme()


if __name__ == "__main__":
    main()
