"""Measure models of any origin on the tasks of a zoo: its own, or a merge that lies in a folder.

PYTHONPATH=src python -m benchmarks.quality.evaluate --data CACHE --zoo text --part validation MODEL...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import weightsmith as ws
from benchmarks.quality.zoo import weights_of
from benchmarks.quality.zoos import ZOOS


def main() -> None:
    """Print a table, models down and tasks across."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the data of packages")
    parser.add_argument("--zoo", choices=list(ZOOS), required=True)
    parser.add_argument("--part", choices=["validation", "test"], default="validation")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="anything that weightsmith opens")
    options = parser.parse_args()

    zoo = ZOOS[options.zoo]
    evaluator = zoo.evaluator(options.part, options.data)
    tasks = (zoo.base_task, *zoo.tasks)
    print(f"{zoo.measure.name}, {options.part} part\n")
    print("| model | " + " | ".join(tasks) + " |\n|---" + "|---:" * len(tasks) + "|")
    for reference in options.models:
        checkpoint = ws.open(reference)
        found = evaluator(weights_of(checkpoint), checkpoint.config, tasks)
        print(f"| {reference} | " + " | ".join(f"{value:.{zoo.measure.digits}f}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    main()
