"""The zoos of the benchmark, and where their models lie."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.images import Images
from benchmarks.quality.results import Seed
from benchmarks.quality.text import Language
from benchmarks.quality.zoo import Zoo

ZOOS: dict[str, Zoo] = {zoo.name: zoo for zoo in (Images(), Language())}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all scripts are told: which zoos and seeds, and where things lie."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained models and their results")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the data of packages")
    parser.add_argument("--zoos", nargs="+", choices=list(ZOOS), default=list(ZOOS), metavar="ZOO")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    return parser


def seeds(options: argparse.Namespace) -> dict[str, list[Seed]]:
    """Return the seeds of each zoo that a script is told."""
    return {
        name: [Seed(ZOOS[name], number, options.models / name / str(number), options.data) for number in options.seeds]
        for name in options.zoos
    }
