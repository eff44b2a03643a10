"""Make the tables of docs/choosing.md: train what is missing, measure what is missing, write.

    PYTHONPATH=src python -m benchmarks.quality.table --models MODELS --data CACHE

Every setting of grid.py is measured on the validation part. On the test part are measured the published setting and
the one that was best on the validation part, by the gain kept, mean over tasks and seeds, and no other. Results are
kept beside the models: a new method costs what its own merges cost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers

from benchmarks.quality.grid import GRID, Entry, Parameters, unlisted
from benchmarks.quality.report import filled, gain_kept, markdown
from benchmarks.quality.results import Scores, Seed
from benchmarks.quality.zoo import BASE, JOINT, PartName, train
from benchmarks.quality.zoos import ZOOS, arguments, seeds
from weightsmith.errors import WeightsmithError

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"


def measured(of_zoo: Sequence[Seed], labels: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the results of a zoo, and what went wrong: row -> error.

    Args:
        of_zoo: its seeds.
        labels: the rows of the grid to measure.
    """
    zoo = of_zoo[0].zoo
    rows, failed = {}, {}
    for label in labels:
        began = time.process_time()
        try:
            rows[label] = row(of_zoo, label, GRID[label])
        except WeightsmithError as error:
            failed[label] = str(error)
        print(f"{zoo.name}: {label} took {time.process_time() - began:.1f} s", flush=True)
    document = {
        "measure": zoo.measure.name,
        "digits": zoo.measure.digits,
        "base_task": zoo.base_task,
        "tasks": list(zoo.tasks),
        "seeds": [seed.number for seed in of_zoo],
        "base": by_task([seed.model(BASE, "test") for seed in of_zoo]),
        "joint": by_task([seed.model(JOINT, "test") for seed in of_zoo]),
        "experts": by_task([experts_of(seed, "test") for seed in of_zoo]),
        "rows": rows,
    }
    return document, failed


def row(of_zoo: Sequence[Seed], label: str, entry: Entry) -> dict[str, Any]:
    """Measure every setting of a row on the validation part, and two of them on the test part."""
    zoo = of_zoo[0].zoo

    def values(found: Sequence[Scores]) -> npt.NDArray[np.float64]:
        return np.array([[one[task] for task in zoo.tasks] for one in found])

    def scores(parameters: Parameters, part: PartName) -> list[Scores]:
        return [seed.merge(entry.method or label, parameters, entry.scheme, part) for seed in of_zoo]

    base = values([seed.model(BASE, "validation") for seed in of_zoo])
    experts = values([experts_of(seed, "validation") for seed in of_zoo])
    settings = entry.settings()
    kept = [gain_kept(values(scores(parameters, "validation")), base, experts).mean() for parameters in settings]
    # The first of equals, and the published one is first. A setting that broke a model is no candidate.
    chosen = settings[int(np.argmax(np.nan_to_num(kept, nan=-np.inf)))]
    tested = {"published": settings[0], "chosen": chosen}
    return {
        "scheme": entry.scheme,
        "tried": len(settings),
        **{
            name: {"parameters": dict(parameters), "test": by_task(scores(parameters, "test"))}
            for name, parameters in tested.items()
        },
    }


def experts_of(seed: Seed, part: PartName) -> Scores:
    """Return each expert's result on its own task, and of the base's task their mean."""
    found = {task: seed.model(task, part) for task in seed.zoo.tasks}
    own = {task: scores[task] for task, scores in found.items()}
    return {**own, seed.zoo.base_task: float(np.mean([scores[seed.zoo.base_task] for scores in found.values()]))}


def by_task(scores: Sequence[Scores]) -> dict[str, list[float]]:
    """Return task -> one number for each seed, to four decimals."""
    return {task: [round(found[task], 4) for found in scores] for task in scores[0]}


def main() -> None:
    """Measure and write; with ``--rows``, measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(GRID), metavar="ROW", help="measure and print these alone")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    missing = unlisted()
    if missing and not options.rows:
        parser.error(f"grid.py lacks {', '.join(missing)}")
    document: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, of_zoo in seeds(options).items():
        for seed in of_zoo:
            train(seed.zoo, seed.number, seed.folder, seed.data)
        document[name], of_this = measured(of_zoo, options.rows or list(GRID))
        failed |= {f"{name}, {label}": error for label, error in of_this.items()}
    if failed:
        parser.exit(1, "".join(f"{where}: {error}\n" for where, error in failed.items()))
    if options.rows:
        print(markdown(document))
        return
    # Read only now: another process may have measured the other zoo meanwhile.
    document = json.loads(RESULTS.read_text()) | document
    document = {name: document[name] for name in ZOOS if name in document}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), markdown(document)))


if __name__ == "__main__":
    main()
