"""Times merges that take whole matrices apart, as whole processes, and holds what they do against what the plan says.

The model is one n x n matrix in bfloat16: a base of random weights and fine-tunes that add noise to it, so that no
singular value is small and none is equal to another. Beside each method stand the I/O floor (a process that reads every
input once and writes one output), the operations that the plan counts, how many of them are done in a second of the
processor's time, and planned and measured memory. One thread unless flags say otherwise: BLAS has one in each of ours.

    python benchmarks/matrices.py                                 # every method at 2048, four fine-tunes
    python benchmarks/matrices.py --side 8192 --models 8 --rows iso_c star --runs 1
    python benchmarks/matrices.py --side 4096 --columns 14336     # rows x columns
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from merge import floor, measure, write_model

NAME = "model.layers.0.mlp.down_proj.weight"
# Label -> method, parameters of the merge, and the most models it takes beside the base.
ROWS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}, None),
    "tsv": ("tsv", {}, None),
    "tsv, randomized": ("tsv", {"svd": "randomized"}, None),
    "iso_c": ("iso_c", {}, None),
    "iso_cts": ("iso_cts", {}, None),
    "iso_cts, randomized": ("iso_cts", {"svd": "randomized"}, None),
    "star": ("star", {}, None),
    "star, rank 64, randomized": ("star", {"rank": 64, "svd": "randomized"}, None),
    "timber": ("timber", {}, 1),
    "low_rank": ("low_rank", {"weight": 0.5}, None),
    "low_rank 64, randomized": ("low_rank", {"weight": 0.5, "keep": "rank", "rank": 64, "svd": "randomized"}, None),
    "subspace_boosting": ("subspace_boosting", {}, None),
    "knots": ("knots", {}, None),
    "knots_dare": ("knots_dare", {}, None),
    "opcm": ("opcm", {}, None),
}


def recipe_of(label: str, base: Path, tuned: list[Path]) -> tuple[dict[str, Any], int]:
    """Return a recipe, and how many fine-tunes it takes."""
    method, parameters, most = ROWS[label]
    models = [{"model": str(path)} for path in tuned[:most]]
    recipe: dict[str, Any] = {"merge_method": method, "base_model": str(base), "models": models, "dtype": "bfloat16"}
    if parameters:
        recipe["parameters"] = parameters
    return recipe, len(models)


def compare(folder: Path, label: str, base: Path, tuned: list[Path], runs: int, flags: list[str]) -> dict[str, str]:
    """Plan a merge, time it and the floor, and return a row of figures."""
    content, count = recipe_of(label, base, tuned)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    command = [sys.executable, "-m", "weightsmith"]
    planned = subprocess.run(
        [*command, "plan", str(recipe), "--json", *flags], capture_output=True, text=True, check=True
    )
    plan = json.loads(planned.stdout)
    inputs = [path / "model.safetensors" for path in (base, *tuned[:count])]
    costs, floors = [], []
    for _ in range(runs):
        floors.append(measure([sys.executable, __file__, "--floor", *map(str, inputs), str(folder / "floor")]).wall)
        merge = [*command, "merge", "--quiet", "--overwrite", *flags, str(recipe), str(folder / "out")]
        costs.append(measure(merge))
    seconds = statistics.median(cost.processor for cost in costs)
    operations = plan["matrix_operations"]
    return {
        "models": str(count),
        "decompositions": str(plan["decompositions"]),
        "floor, s": f"{statistics.median(floors):.2f}",
        "wall, s": f"{statistics.median(cost.wall for cost in costs):.1f}",
        "processor, s": f"{seconds:.1f}",
        "10^9 operations": f"{operations / 1e9:,.0f}",
        "10^9 a second": f"{operations / 1e9 / seconds:.0f}",
        "planned, MB": f"{plan['peak_memory'] / 1e6:,.0f}",
        # The kernel counts in units of 1024 bytes.
        "peak, MB": f"{max(cost.peak for cost in costs) * 1.048576:,.0f}",
    }


def main() -> None:
    """Make the inputs, run every method, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="rows of the matrix")
    parser.add_argument("--columns", type=int, help="columns of the matrix; by default as many")
    parser.add_argument("--models", type=int, default=4, help="fine-tunes beside the base")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median is printed")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=["--threads", "1"], help="flags for weightsmith")
    parser.add_argument("--floor", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor:
        floor(arguments.floor[:-1], arguments.floor[-1])
        return
    shape = (arguments.side, arguments.columns or arguments.side)
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
    try:
        base, *tuned = (folder / name for name in ("base", *(f"tuned{i}" for i in range(arguments.models))))
        for seed, path in enumerate((base, *tuned)):
            write_model(path, {NAME: shape}, seed, None if seed == 0 else base)
        for number, label in enumerate(arguments.rows):
            row = compare(folder, label, base, tuned, arguments.runs, arguments.flags)
            if number == 0:
                print(f"| {shape[0]} x {shape[1]} | " + " | ".join(row) + " |\n" + "|---" * (len(row) + 1) + "|")
            print(f"| {label} | " + " | ".join(row.values()) + " |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
