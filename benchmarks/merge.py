"""Times merges of synthetic Llama checkpoints as whole processes, beside the I/O floor, and their peak memory.

The floor is a process that reads every input once and writes the output once, and computes nothing. Machines
are shared and noisy: compare ratios within one run, not seconds between runs.

    python benchmarks/merge.py                                 # 0.5 GB a model, a base and two fine-tunes
    python benchmarks/merge.py --gigabytes 2 --models 2 --methods linear ties
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
SETTINGS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
    "karcher": {},
    "ram": {},
}
ONE_MODEL = {"slerp", "nearswap", "arcee_fusion"}


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


def write_model(folder: Path, names: dict[str, tuple[int, ...]], seed: int, base: Path | None) -> None:
    """Write a model of random weights, or a fine-tune of one: the base plus small noise."""
    folder.mkdir()
    layers = sum(name.endswith("q_proj.weight") for name in names)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    header, position = {}, 0
    for name, shape in names.items():
        length = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    source = None if base is None else (base / "model.safetensors").open("rb")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
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


# Starts a command and reports its wall time and peak memory. The kernel counts what a process held before it became
# the command, so the command is started from a process that holds next to nothing, not from this one.
LAUNCHER = """
import os, sys, time
started = time.monotonic()
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(time.monotonic() - started, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time in seconds and its peak resident memory in MB."""
    launched = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launched, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    """Make the inputs, time every method against the floor, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each model")
    parser.add_argument("--models", type=int, default=2, help="fine-tunes beside the base")
    parser.add_argument("--methods", nargs="*", default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median is printed")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--floor", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor:
        floor(arguments.floor[:-1], arguments.floor[-1])
        return
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
    try:
        run(arguments, folder)
    finally:
        shutil.rmtree(folder)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the benchmark in a folder."""
    names = shapes(arguments.gigabytes)
    base = folder / "base"
    write_model(base, names, 0, None)
    tuned = [folder / f"tuned{i}" for i in range(arguments.models)]
    for i, path in enumerate(tuned):
        write_model(path, names, i + 1, base)
    size = (base / "model.safetensors").stat().st_size
    print(f"{size / 1e9:.2f} GB a model, bfloat16, {len(names)} tensors; a base and {len(tuned)} fine-tunes")
    print(f"{'method':16}{'floor s':>9}{'wall s':>9}{'x floor':>9}{'peak MB':>9}")
    for method in arguments.methods:
        models = tuned[:1] if method in ONE_MODEL else tuned
        command = [sys.executable, "-m", "weightsmith", "merge", "--quiet", "--overwrite", "--method", method]
        command += ["--base", str(base)] + [part for path in models for part in ("--model", str(path))]
        command += [part for name, value in SETTINGS.get(method, {}).items() for part in ("-p", f"{name}={value}")]
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        inputs = [str(path / "model.safetensors") for path in (base, *models)]
        beside = [sys.executable, __file__, "--floor", *inputs, str(folder / "floor")]
        floors, walls, peaks = [], [], []
        for _ in range(arguments.runs):
            floors.append(measure(beside)[0])
            wall, peak = measure([*command, str(folder / "out")])
            walls.append(wall)
            peaks.append(peak)
        low, high = statistics.median(floors), statistics.median(walls)
        print(f"{method:16}{low:9.2f}{high:9.2f}{high / low:9.1f}{max(peaks):9.0f}", flush=True)


if __name__ == "__main__":
    main()
