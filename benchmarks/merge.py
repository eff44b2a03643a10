"""Times merges of synthetic Llama checkpoints as whole processes, start-up included, and their peak memory.

Beside each stands the I/O floor: a process that reads every input once and writes and syncs the output, and computes
nothing. Machines are shared and noisy: compare ratios within one run, not seconds between runs.

    python benchmarks/merge.py                                  # every method: a base and four fine-tunes of 0.5 GB
    python benchmarks/merge.py --methods linear ties --models 8
    python benchmarks/merge.py --cold                           # inputs are dropped from the page cache before each run
    python benchmarks/merge.py --scaling                        # by size of the models, and by their number
    python benchmarks/merge.py --against path/to/mergekit-yaml  # the same recipes, run by mergekit
    python benchmarks/merge.py --flags --device cuda            # what follows goes to weightsmith
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 5632, 32000, 32
MERGED = {"weight": 0.5}
TRIMMED = {"weight": 0.5, "density": 0.5}


@dataclass(frozen=True)
class Row:
    """A method of the table.

    Attributes:
        per_model: parameters of every model.
        overall: parameters of the merge.
        models: the most models it takes beside the base, or None.
        base: whether the recipe names a base.
    """

    per_model: dict[str, float] | None = None
    overall: dict[str, Any] | None = None
    models: int | None = None
    base: bool = True


ROWS = {
    "linear": Row(MERGED, base=False),
    "task_arithmetic": Row(MERGED),
    "slerp": Row(overall={"t": 0.4}, models=1),
    "nuslerp": Row(MERGED, models=2),
    "nearswap": Row(overall={"t": 0.001}, models=1),
    "passthrough": Row(models=1, base=False),
    "ties": Row(TRIMMED),
    "dare_linear": Row(TRIMMED),
    "dare_ties": Row(TRIMMED),
    "breadcrumbs": Row(TRIMMED),
    "breadcrumbs_ties": Row(TRIMMED),
    "sce": Row(overall={"select_topk": 0.5}),
    "model_stock": Row(),
    "ram": Row(),
    "ramplus_tl": Row(),
    "della": Row(TRIMMED),
    "della_linear": Row(TRIMMED),
    "karcher": Row(base=False),
    "multislerp": Row(MERGED),
    "arcee_fusion": Row(models=1),
}


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Return tensor names and shapes of a Llama of about this size in bfloat16."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    per_layer = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    outside = 2 * 2 * VOCABULARY * HIDDEN
    for i in range(max(round((gigabytes * 1e9 - outside) / per_layer), 1)):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def safetensors_header(names: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """Return the first bytes of a safetensors file of bfloat16 tensors, and how many bytes of tensors follow."""
    header, position = {}, 0
    for name, shape in names.items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def write_model(folder: Path, names: dict[str, tuple[int, ...]], seed: int, base: Path | None) -> None:
    """Write a model of random weights, or a fine-tune of one: the base plus small noise."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 4,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in names),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, position = safetensors_header(names)
    rng = np.random.default_rng(seed)
    source = None if base is None else (base / "model.safetensors").open("rb")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        if source is not None:
            source.seek(8 + int.from_bytes(source.read(8), "little"))
        for start in range(0, position // 2, 1 << 24):
            count = min(1 << 24, position // 2 - start)
            values = rng.standard_normal(count, np.float32) * (0.02 if source is None else 0.002)
            if source is not None:
                values += np.frombuffer(source.read(2 * count), ml_dtypes.bfloat16).astype(np.float32)
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    if source is not None:
        source.close()


def floor(inputs: list[Path], target: Path) -> None:
    """Read every input and write one output of an input's size, computing nothing."""
    buffer = bytearray(8 << 20)
    with target.open("wb") as out:
        for number, path in enumerate(inputs):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    if number == 0:
                        out.write(memoryview(buffer)[:count])
        out.flush()
        os.fsync(out.fileno())


# Starts a command and reports its wall time, peak memory and processor time. The kernel counts what a process held
# before it became the command, so the command is started from a process that holds next to nothing, not from this one.
LAUNCHER = """
import os, sys, time
started = time.monotonic()
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(time.monotonic() - started, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)
sys.exit(status != 0)
"""


class Cost(NamedTuple):
    """What a process took: wall time in seconds, peak resident memory in MB, processor time in seconds."""

    wall: float
    peak: float
    processor: float


def measure(command: list[str]) -> Cost:
    """Run a command to its end; a failure ends this program."""
    launched = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launched, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return Cost(*map(float, done.stdout.split()))


def drop_from_cache(paths: list[Path]) -> None:
    """Have the kernel forget the contents of files, as far as they are on disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@dataclass(frozen=True)
class Bench:
    """A folder with checkpoints, and how to run merges of them."""

    folder: Path
    arguments: argparse.Namespace

    def models(self, gigabytes: float, count: int) -> tuple[Path, list[Path]]:
        """Return a base of a size and so many fine-tunes, written if they are not there yet."""
        names = shapes(gigabytes)
        home = self.folder / f"{gigabytes:g}"
        home.mkdir(exist_ok=True)
        base, *tuned = (home / name for name in ("base", *(f"tuned{i}" for i in range(count))))
        for seed, path in enumerate((base, *tuned)):
            if not path.exists():
                write_model(path, names, seed, None if seed == 0 else base)
        return base, tuned

    def compare(self, method: str, base: Path, tuned: list[Path]) -> dict[str, float]:
        """Time a method, the floor and, if asked for, another tool, in turns; return medians."""
        row = ROWS[method]
        tuned = tuned[: row.models]
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(method, base, tuned), indent=1))
        inputs = [path / "model.safetensors" for path in ([base] if row.base else []) + tuned]
        ours = [sys.executable, "-m", "weightsmith", "merge", "--quiet", "--overwrite", str(recipe)]
        ours += [str(self.folder / "out"), *self.arguments.flags]
        beside = [sys.executable, __file__, "--floor", *map(str, inputs), str(self.folder / "floor")]
        floors, walls, peaks = [], [], []
        for _ in range(self.arguments.runs):
            for command, found in ((beside, floors), (ours, walls)):
                if self.arguments.cold:
                    drop_from_cache(inputs)
                cost = measure(command)
                found.append(cost.wall)
            peaks.append(cost.peak)
        low, high = statistics.median(floors), statistics.median(walls)
        figures = {"floor s": low, "wall s": high, "first s": walls[0], "x floor": high / low}
        figures |= {"x (floor + 1)": high / (low + 1), "peak MB": max(peaks)}
        if self.arguments.against:
            theirs = measure([self.arguments.against, str(recipe), str(self.folder / "theirs")])
            shutil.rmtree(self.folder / "theirs")
            figures |= {"theirs s": theirs.wall, "theirs MB": theirs.peak, "times faster": theirs.wall / high}
        return figures


def recipe_of(method: str, base: Path, tuned: list[Path]) -> dict[str, Any]:
    """Return a recipe that weightsmith and mergekit read alike."""
    row = ROWS[method]
    per_model = {"parameters": row.per_model} if row.per_model else {}
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    recipe["models"] = [{"model": str(path), **per_model} for path in tuned]
    if row.base:
        recipe["base_model"] = str(base)
    if row.overall:
        recipe["parameters"] = row.overall
    return recipe


def table(bench: Bench, title: str, rows: list[tuple[str, str, float, int]]) -> None:
    """Time rows of label, method, gigabytes a model and number of fine-tunes, and print them in Markdown."""
    head = False
    for label, method, gigabytes, count in rows:
        figures = bench.compare(method, *bench.models(gigabytes, count))
        if not head:
            print(f"\n| {title} | " + " | ".join(figures) + " |")
            print("|---" * (len(figures) + 1) + "|")
            head = True
        print(f"| {label} | " + " | ".join(_number(value) for value in figures.values()) + " |", flush=True)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    """Make the inputs, time every method against the floor, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each model")
    parser.add_argument("--models", type=int, default=4, help="fine-tunes beside the base")
    parser.add_argument("--methods", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="METHOD")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median is printed")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the inputs before each run")
    parser.add_argument("--scaling", action="store_true", help="by size and number of models, of the methods given")
    parser.add_argument("--against", help="the program mergekit-yaml, to run the same recipes once")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags for weightsmith; the last flag")
    parser.add_argument("--floor", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor:
        floor(arguments.floor[:-1], arguments.floor[-1])
        return
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
    bench = Bench(folder, arguments)
    try:
        if arguments.scaling:
            for method in arguments.methods:
                by_size = [(f"{size:g} GB", method, size, arguments.models) for size in (0.25, 0.5, 1.0, 2.0)]
                table(bench, f"{method}, {arguments.models} models", by_size)
                by_number = [(str(count), method, arguments.gigabytes, count) for count in (2, 4, 8, 16)]
                table(bench, f"{method}, models of {arguments.gigabytes:g} GB", by_number)
        else:
            rows = [(method, method, arguments.gigabytes, arguments.models) for method in arguments.methods]
            table(bench, "method", rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
