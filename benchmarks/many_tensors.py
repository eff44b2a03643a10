"""Times plans and merges of models of many small tensors, as whole processes, by the number of tensors.

The models are mixtures of experts whose every expert has weights of its own, as Mixtral and Qwen publish theirs, a
base and two fine-tunes; their matrices are tiny, so that what is measured is what a tensor costs, not what its
elements do. Time should grow with the number of tensors and no faster: the last column divides the processor time
beyond that of the smallest model by the tensors beyond it. Machines are shared and noisy: compare within one run.

    python benchmarks/many_tensors.py                           # 5,000 to 40,000 tensors
    python benchmarks/many_tensors.py --tensors 20000 --shards 20 --rows "plan linear" "merge ties"
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from merge import Cost, measure, safetensors_header

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 16, 16, 128, 64
OUTSIDE = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
BESIDE_EXPERTS = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_norm.weight": (HIDDEN,),
    "self_attn.k_norm.weight": (HIDDEN,),
    "mlp.gate.weight": (EXPERTS, HIDDEN),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
EXPERT = {
    "gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "up_proj.weight": (INTERMEDIATE, HIDDEN),
    "down_proj.weight": (HIDDEN, INTERMEDIATE),
}
PER_LAYER = len(BESIDE_EXPERTS) + EXPERTS * len(EXPERT)

RECIPES = {
    "linear": """
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.4}}}}
  - {{model: {b}, parameters: {{weight: 0.6}}}}
""",
    "ties": """
merge_method: ties
base_model: {base}
models:
  - model: {a}
    parameters:
      weight: [{{filter: self_attn, value: [0.2, 0.8]}}, {{filter: mlp, value: [0.9, 0.4, 0.1]}}, 0.5]
      density: [{{scope: {{regex: 'experts[.][0-9]+[.]down_proj'}}, value: 0.3}}, 0.5]
  - model: {b}
    parameters: {{weight: [0.8, 0.2], density: 0.4}}
parameters: {{normalize: true}}
""",
    "dare_ties": """
merge_method: dare_ties
base_model: {base}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: 0.5, density: 0.5}}
""",
    "slices": """
merge_method: slerp
base_model: {base}
slices:
  - sources: [{{model: {base}, layer_range: [0, {half}]}}, {{model: {a}, layer_range: [0, {half}]}}]
  - sources: [{{model: {base}, layer_range: [{half}, {layers}]}}, {{model: {a}, layer_range: [{half}, {layers}]}}]
parameters: {{t: [{{filter: self_attn, value: [0, 0.5, 1]}}, {{filter: mlp, value: [1, 0.5, 0]}}, 0.5]}}
""",
}
ROWS = [f"{verb} {recipe}" for recipe in RECIPES for verb in ("plan", "merge")]


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors' names and shapes of a mixture of experts."""
    found: dict[str, tuple[int, ...]] = dict(OUTSIDE)
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in BESIDE_EXPERTS.items()}
        for j in range(EXPERTS):
            found |= {f"model.layers.{i}.mlp.experts.{j}.{name}": shape for name, shape in EXPERT.items()}
    return found


def write_model(folder: Path, layers: int, seed: int, shards: int) -> None:
    """Write a model of random weights; the seed 0 makes the base, others add small noise to it."""
    folder.mkdir()
    names = shapes(layers)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = {"model.safetensors": names}
    if shards > 1:
        split = np.array_split(np.array(list(names)), shards)
        files = {
            f"model-{i:05d}-of-{shards:05d}.safetensors": {str(name): names[str(name)] for name in part}
            for i, part in enumerate(split, 1)
        }
        weight_map = {name: file for file, inside in files.items() for name in inside}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, (file, inside) in enumerate(files.items()):
        header, length = safetensors_header(inside)
        values = np.random.default_rng(number).standard_normal(length // 2, np.float32) * 0.02
        if seed:
            values += np.random.default_rng([number, seed]).standard_normal(length // 2, np.float32) * 0.002
        (folder / file).write_bytes(header + values.astype(ml_dtypes.bfloat16).tobytes())


def time_rows(folder: Path, layers: int, shards: int, rows: list[str], runs: int) -> dict[str, Cost]:
    """Make the models in a folder and time every row on them: of several runs, the one of least wall time."""
    places = {name: folder / name for name in ("base", "a", "b")}
    for seed, path in enumerate(places.values()):
        write_model(path, layers, seed, shards)
    found = {}
    for row in rows:
        verb, name = row.split()
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPES[name].format(**places, half=layers // 2, layers=layers))
        command = [sys.executable, "-m", "weightsmith", verb, str(recipe)]
        if verb == "merge":
            command += ["--quiet", "--overwrite", str(folder / "out")]
        found[row] = min(measure(command) for _ in range(runs))
    return found


def main() -> None:
    """Time every row for every number of tensors, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", nargs="+", type=int, default=[5_000, 10_000, 20_000, 40_000], help="about so many")
    parser.add_argument("--shards", type=int, default=1, help="files of each model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="'VERB RECIPE'")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the quickest is printed")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    arguments = parser.parse_args()
    layers = [max(round(count / PER_LAYER), 2) for count in arguments.tensors]
    counts = [len(shapes(count)) for count in layers]
    costs = []
    for count in layers:
        folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
        try:
            costs.append(time_rows(folder, count, arguments.shards, arguments.rows, arguments.runs))
        finally:
            shutil.rmtree(folder)
    print(f"wall s / processor s / peak MB by the number of tensors; {arguments.shards} file(s) a model")
    print(f"{'':16}" + "".join(f"{count:>20,}" for count in counts) + f"{'ms a tensor':>14}")
    for row in arguments.rows:
        cells = [f"{c[row].wall:.2f} / {c[row].processor:.2f} / {c[row].peak:.0f}" for c in costs]
        line = f"{row:16}" + "".join(f"{cell:>20}" for cell in cells)
        if counts[-1] > counts[0]:
            slope = (costs[-1][row].processor - costs[0][row].processor) / (counts[-1] - counts[0])
            line += f"{slope * 1000:14.3f}"
        print(line)


if __name__ == "__main__":
    main()
