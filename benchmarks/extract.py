"""How long it takes to take an adapter out of one square matrix, exact and randomised.

python benchmarks/extract.py [--size 4096] [--rank 32] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

import weightsmith as ws


def main() -> None:
    """Write two models of one matrix, and extract in each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = write_models(Path(folder), given.size)
        for name, settings in (
            ("rank, exact", {"rank": given.rank}),
            ("rank, randomised", {"rank": given.rank, "decomposition": "randomized"}),
            ("energy 0.5, exact", {"energy": 0.5}),
            ("rank, exact, DoRA", {"rank": given.rank, "dora": True}),
            ("sparse, 5 %", {"kind": "sparse", "density": 0.05}),
            ("signs", {"kind": "sign"}),
        ):
            started = time.monotonic()
            adapter = ws.extract(tuned, base, threads=given.threads, **settings)
            adapter.save(Path(folder) / name, threads=given.threads)
            seconds = time.monotonic() - started
            print(f"{name:20} {seconds:7.2f} s  {100 * adapter.report().error:6.2f} % of the change lost")


def write_models(folder: Path, size: int) -> tuple[str, str]:
    """Write a base and a fine-tune whose change has singular values that fall off as 1 / sqrt(k)."""
    rng = np.random.default_rng(0)
    weight = (0.02 * rng.standard_normal((size, size))).astype(np.float32)
    rank = min(512, size // 2)
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)).astype(np.float32))[0] for _ in "AB")
    change = (left / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))) @ right.T
    change += 1e-5 * rng.standard_normal((size, size), np.float32)
    paths = []
    for name, values in (("base", weight), ("tuned", weight + change)):
        (folder / name).mkdir()
        safetensors.numpy.save_file(
            {"model.layers.0.mlp.up_proj.weight": values}, folder / name / "model.safetensors", {"format": "pt"}
        )
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
        (folder / name / "config.json").write_text(json.dumps(config))
        paths.append(str(folder / name))
    return paths[0], paths[1]


if __name__ == "__main__":
    main()
