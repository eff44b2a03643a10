"""Times reports on a synthetic Llama and fine-tunes of it, beside the floor: every input read once, nothing computed.

python benchmarks/report.py                      # a base and three fine-tunes of 1 GB
python benchmarks/report.py --models 1 2 4 8 --cold
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from merge import _number, drop_from_cache, measure, shapes, write_model

# Reads its arguments, and says how long that took without its own start.
FLOOR = """
import sys, time
buffer = bytearray(8 << 20)
started = time.perf_counter()
for path in sys.argv[2:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
open(sys.argv[1], "w").write(str(time.perf_counter() - started))
"""


def main() -> None:
    """Make the inputs, time reports against the floor, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each model")
    parser.add_argument("--models", type=int, nargs="+", default=[3], help="fine-tunes beside the base")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median is printed")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the inputs before each run")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-benchmark-", dir=arguments.folder))
    try:
        names = shapes(arguments.gigabytes)
        models = [folder / name for name in ("base", *(f"tuned{i}" for i in range(max(arguments.models))))]
        for seed, path in enumerate(models):
            write_model(path, names, seed, models[0] if seed else None)
        print(
            "| fine-tunes | floor, s | all entries, s | times the floor | singular values, s | process, s | peak, MB |"
        )
        print("|---|---|---|---|---|---|---|")
        for count in arguments.models:
            row = _row(folder, models[: count + 1], arguments.runs, arguments.cold)
            print(f"| {count} | " + " | ".join(map(_number, row)) + " |", flush=True)
    finally:
        shutil.rmtree(folder)


def _row(folder: Path, models: list[Path], runs: int, cold: bool) -> list[float]:
    inputs = [path / "model.safetensors" for path in models]
    noted, saved = folder / "floor", folder / "report.json"
    beside = [sys.executable, "-c", FLOOR, str(noted), *map(str, inputs)]
    ours = [sys.executable, "-m", "weightsmith", "report", "--quiet", "--overwrite", "-o", str(saved)]
    ours += ["--base", *map(str, models)]
    found = []
    for _ in range(runs):
        if cold:
            drop_from_cache(inputs)
        measure(beside)
        if cold:
            drop_from_cache(inputs)
            time.sleep(1)
        cost = measure(ours)
        stages = {one["stage"]: one["seconds"] for one in json.loads(saved.read_text())["timings"]}
        low = float(noted.read_text())
        read = stages["read and measure"]
        found.append([low, read, read / low, stages["singular values"], cost.wall, cost.peak])
    return [statistics.median(column) for column in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
