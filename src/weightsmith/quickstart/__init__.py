"""Merges small trained models that come with weightsmith, and shows what each input and each merge can do."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import weightsmith
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import widen
from weightsmith.plan.merged import LazyCheckpoint
from weightsmith.quickstart import vit

FINE_TUNES = ("shifted", "covered", "thick")
# Name in the table -> method, fine-tunes and parameters. The parameters were chosen on the validation part of
# the digits (examples/zoo/README.md), never on the test part that the table is made from.
MERGES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "average": ("linear", FINE_TUNES, {"weight": 1.0}),
    "slerp": ("slerp", ("covered", "thick"), {"t": 0.5}),
    "task arithmetic": ("task_arithmetic", FINE_TUNES, {"weight": 0.6}),
    "ties": ("ties", FINE_TUNES, {"weight": 1.0, "density": 0.5}),
    "dare": ("dare_linear", FINE_TUNES, {"weight": 0.6, "density": 0.9}),
}


def zoo() -> Path:
    """Return the folder of the small models: in the installed package, or in the repository.

    Raises:
        CheckpointError: if it is in neither place.
    """
    here = Path(__file__).parent
    for folder in (here / "zoo", here.parents[2] / "examples" / "zoo"):
        if (folder / "base" / "config.json").is_file():
            return folder
    raise CheckpointError("the quickstart's models are missing; they come with the package and the repository")


def merges(folder: Path) -> dict[str, LazyCheckpoint]:
    """Return the table's merges, not computed yet.

    Args:
        folder: the zoo.
    """
    found = {}
    for name, (method, models, parameters) in MERGES.items():
        if method == "slerp":
            # SLERP runs from one model to another: the first stands where other methods have the base.
            first, second = models
            found[name] = weightsmith.merge(method, [folder / second], folder / first, **parameters)
        else:
            base = None if method == "linear" else folder / "base"
            found[name] = weightsmith.merge(method, [folder / m for m in models], base, **parameters)
    return found


def accuracies(checkpoint: Checkpoint, part: Checkpoint) -> dict[str, float]:
    """Return the share of digits that a model classifies rightly, 0 to 1, by task.

    Args:
        checkpoint: the model.
        part: the digits: ``images`` ``[n, 8, 8]`` and ``labels`` ``[n]``.
    """
    weights = {
        name: widen(tensor.numpy().reshape(-1), np.dtype(np.float32)).reshape(tensor.shape)
        for name, tensor in checkpoint.items()
    }
    images, labels = part["images"].numpy(), part["labels"].numpy()
    return {
        task: vit.accuracy(weights, checkpoint.config, transform(images), labels)
        for task, transform in vit.TASKS.items()
    }


def run(*, keep: str | None = None, as_json: bool = False) -> None:
    """Merge, measure and print the table.

    Args:
        keep: a folder for the merged models; by default they are deleted again.
        as_json: whether to print JSON instead of a table.
    """
    folder = zoo()
    test = weightsmith.open(folder / "digits-test.safetensors")
    with tempfile.TemporaryDirectory(prefix="weightsmith-") as scratch:
        target = Path(keep or scratch)
        inputs = {name: accuracies(weightsmith.open(folder / name), test) for name in ("base", *FINE_TUNES)}
        merged = {}
        for name, checkpoint in merges(folder).items():
            saved = target / name.replace(" ", "-")
            checkpoint.save(saved, overwrite=True)
            merged[name] = accuracies(weightsmith.open(saved), test)
    if as_json:
        print(json.dumps({"inputs": inputs, "merges": merged}, indent=2))
        return
    print("Accuracy on held-out digits, in %. The inputs are one small vision transformer (base) and three")
    print("fine-tunes of it, each for one way in which images of digits can be changed.\n")
    _table("input", inputs)
    print()
    _table("merge", merged)
    print("\nThe same from the command line, TIES for one:\n")
    print(_command(folder))
    if keep:
        print(f"\nThe merged models are in {target}.")


def _command(folder: Path) -> str:
    """Return the command line of the table's TIES merge."""
    method, models, parameters = MERGES["ties"]
    near = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    lines = [f"  weightsmith merge --method {method} --base {near / 'base'}"]
    lines.append("    " + " ".join(f"--model {near / model}" for model in models))
    lines.append("    " + " ".join(f"-p {name}={value}" for name, value in parameters.items()) + " out/")
    return " \\\n".join(lines)


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{title:16}" + "".join(f"{task:>10}" for task in vit.TASKS) + f"{'mean':>10}")
    for name, row in rows.items():
        mean = sum(row.values()) / len(row)
        print(f"{name:16}" + "".join(f"{100 * value:10.1f}" for value in row.values()) + f"{100 * mean:10.1f}")
