"""Bundles of the zoo's three fine-tunes: what they take, how far the restored models are off, and what these can do.

python benchmarks/bundles.py    # prints the table of docs/guide/bundles.md
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import weightsmith as ws
from weightsmith.quickstart import accuracies, zoo

EXPERTS = ("shifted", "covered", "thick")
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("emr", {}),
    ("emr", {"rescaler": "tensors"}),
    ("tall", {}),
    ("tall", {"lambda": 0.6}),
    ("tsv", {}),
    ("tsv", {"rank": 8}),
    ("rmm", {}),
    ("rmm", {"basis": 3}),
    ("rmm", {"basis": 3, "rank": 16}),
    ("rmm", {"basis": 2, "rank": 16}),
    ("rmm", {"basis": 2, "rank": 16, "coefficients": "position", "centre": True}),
    ("bitdelta", {}),
    ("lossless", {}),
]


def main() -> None:
    folder = zoo()
    base, test = folder / "base", ws.open(folder / "digits-test.safetensors")

    def accuracy(model: Any, task: str) -> str:
        return f"{100 * accuracies(ws.open(model) if isinstance(model, Path) else model, test)[task]:.1f}"

    print(f"| kind | with the base | without | error of change | {' | '.join(EXPERTS)} |")
    print("|---|---|---|---|" + "---|" * len(EXPERTS))
    print("| *the models themselves* | 100 | 100 | 0 | ", end="")
    print(" | ".join(accuracy(folder / task, task) for task in EXPERTS) + " |")
    for kind, parameters in ROWS:
        with tempfile.TemporaryDirectory() as scratch:
            models = [folder / task for task in EXPERTS]
            bundle = ws.bundle.create(Path(scratch) / "out", models, base=base, kind=kind, **parameters).bundle
            sizes = bundle.sizes()
            without = sizes.shared + sum(sizes.tasks.values())
            shares = [f"{100 * size / sizes.models:.0f}" for size in (sizes.base + without, without)]
            errors = [task.error.of_change for task in bundle.description.tasks.values() if task.error]
            worst = f"{100 * max(error or 0 for error in errors):.2g}"
            found = [accuracy(bundle.task(task), task) for task in EXPERTS]
        told = ", ".join(f"{name} {value}".lower() for name, value in parameters.items())
        print(f"| `{kind}`{' ' if told else ''}{told} | {' | '.join([*shares, worst, *found])} |")


if __name__ == "__main__":
    main()
