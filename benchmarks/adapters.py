"""Times folding adapters into a synthetic Llama, as whole processes, beside the I/O floor (see merge.py).

python benchmarks/adapters.py                      # adapters of rank 16 on every matrix of a model of 1 GB
python benchmarks/adapters.py --gigabytes 2 --runs 5
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from merge import _number, drop_from_cache, measure, shapes, write_model
from safetensors.numpy import save_file

RANK = 16
# Row of the table -> the config of each adapter that is folded.
ROWS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [{}],
    "LoRA, rank 64": [{"r": 64}],
    "three LoRAs": [{}, {}, {}],
    "DoRA": [{"use_dora": True}],
}


def write_adapter(folder: Path, names: dict[str, tuple[int, ...]], seed: int, config: dict[str, Any]) -> None:
    """Write a LoRA of random factors on every matrix of the layers."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["q_proj"], **config}
    tensors = {}
    for name, shape in names.items():
        if ".layers." in name and len(shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((settings["r"], shape[1]), np.float32) * 0.02
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((shape[0], settings["r"]), np.float32) * 0.002
            if settings.get("use_dora"):
                tensors[f"{module}.lora_magnitude_vector"] = np.full(shape[0], 0.9, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Make the inputs, time every row against the floor, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the base")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median is printed")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the inputs before each run")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
    try:
        names = shapes(arguments.gigabytes)
        write_model(folder / "base", names, 0, None)
        print("| adapters | floor, s | wall, s | times the floor | peak, MB |\n|---|---|---|---|---|")
        for row, (label, configs) in enumerate(ROWS.items()):
            adapters = [folder / f"adapter{row}-{i}" for i in range(len(configs))]
            for seed, (path, config) in enumerate(zip(adapters, configs, strict=True)):
                write_adapter(path, names, seed, config)
            inputs = [folder / "base" / "model.safetensors", *(path / "adapter_model.safetensors" for path in adapters)]
            beside = [sys.executable, str(Path(__file__).with_name("merge.py")), "--floor", *map(str, inputs)]
            ours = [sys.executable, "-m", "weightsmith", "fuse", "--quiet", "--overwrite", str(folder / "base")]
            ours += [*map(str, adapters), str(folder / "out")]
            floors, walls, peaks = [], [], []
            for _ in range(arguments.runs):
                for command, found in (([*beside, str(folder / "floor")], floors), (ours, walls)):
                    if arguments.cold:
                        drop_from_cache(inputs)
                    cost = measure(command)
                    found.append(cost.wall)
                peaks.append(cost.peak)
            low, high = statistics.median(floors), statistics.median(walls)
            print(f"| {label} | " + " | ".join(map(_number, (low, high, high / low, max(peaks)))) + " |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
