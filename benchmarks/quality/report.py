"""The tables, from results that were measured: numbers in, Markdown out.

Results are compared by the *gain kept*: of what the expert of a task does better than the base, the share that the
merged model does better than the base. 100 % is as good as the expert, 0 % as the base, less is worse than the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Task -> one number for each seed.
Row = Mapping[str, Sequence[float]]
Document = Mapping[str, Any]
Array = npt.NDArray[np.float64]

# Heading -> the schemes of its rows, and the row that they are compared with, if any.
SECTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "All experts in one model": (("all",), "task_arithmetic"),
    "Two experts in one model": (("pairs", "chained pairs", "transferred pairs"), "task_arithmetic, pairs"),
    "One expert and the base": (("single",), "interpolate"),
}
BEGIN, END = "<!-- begin: written by benchmarks/quality -->", "<!-- end: written by benchmarks/quality -->"


def gain_kept(results: Array, base: Array, experts: Array) -> Array:
    """Return the share of the experts' gain over the base that is kept, in per cent; all arrays are of one shape."""
    kept: Array = 100 * (results - base) / (experts - base)
    return kept


class Zoo:
    """The results of one zoo, and what is computed from them."""

    def __init__(self, document: Document) -> None:
        """Take a zoo's part of the results.

        Args:
            document: see :func:`benchmarks.quality.table.measured`.
        """
        self.measure: str = document["measure"]
        self.digits: int = document["digits"]
        self.tasks: list[str] = document["tasks"]
        self.base_task: str = document["base_task"]
        self.rows: Mapping[str, Mapping[str, Any]] = document["rows"]
        self.base: Row = document["base"]
        self.joint: Row = document["joint"]
        self.experts: Row = document["experts"]

    def values(self, row: Row) -> Array:
        """Return the results of the experts' tasks, [tasks, seeds]."""
        return np.array([row[task] for task in self.tasks])

    def mean(self, row: Row) -> Array:
        """Return the mean over the experts' tasks, [seeds]."""
        mean: Array = self.values(row).mean(axis=0)
        return mean

    def kept(self, row: Row) -> Array:
        """Return the share of the experts' gain that is kept, in per cent, [tasks, seeds]."""
        return gain_kept(*(self.values(results) for results in (row, self.base, self.experts)))

    def worst(self, row: Row) -> tuple[float, str]:
        """Return the least gain kept, in per cent, mean over seeds, and its task."""
        kept = self.kept(row).mean(axis=1)
        return float(kept.min()), self.tasks[int(kept.argmin())]

    def better(self, row: Row, other: Row) -> tuple[float, int]:
        """Return by how many points of gain kept a row is better than another, and in how many seeds it is."""
        difference = (self.kept(row) - self.kept(other)).mean(axis=0)
        return float(difference.mean()), int(np.count_nonzero(difference > 0))


def markdown(document: Document) -> str:
    """Return all tables.

    Args:
        document: name of a zoo -> its part of the results.
    """
    sections = []
    for name, part in document.items():
        zoo = Zoo(part)
        sections += [f"### The {name} zoo", references(zoo)]
        for heading, (schemes, reference) in SECTIONS.items():
            rows = [label for label, row in zoo.rows.items() if row["scheme"] in schemes]
            if rows:
                sections += [f"#### {heading}", summary(zoo, rows, reference if reference in rows else "")]
                sections += [by_task(zoo, rows)]
    return "\n\n".join(sections)


def references(zoo: Zoo) -> str:
    """Return the table of the trained models."""
    lines = [f"| {zoo.measure} | " + " | ".join((*zoo.tasks, "mean", "gain kept, %", zoo.base_task)) + " |"]
    lines.append("|---" + "|---:" * (len(zoo.tasks) + 3) + "|")
    named = {"the base": zoo.base, "each task's expert": zoo.experts, "the joint model": zoo.joint}
    for name, row in named.items():
        cells = [spread(np.array(row[task]), zoo.digits) for task in zoo.tasks]
        cells += [spread(zoo.mean(row), zoo.digits), spread(zoo.kept(row).mean(axis=0), 1)]
        cells += [spread(np.array(row[zoo.base_task]), zoo.digits)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(zoo: Zoo, rows: Sequence[str], reference: str) -> str:
    """Return the table of some rows, the best first.

    Args:
        zoo: the results.
        rows: labels of the rows.
        reference: label of the row that the others are compared with, or nothing.
    """
    head = ["method", "mean", "gain kept, %", "best setting", "mean", "gain kept, %", "least kept, %"]
    head += [zoo.base_task, "from joint"] + ([f"from {reference.partition(',')[0]}"] if reference else [])
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|" + "---:|" * (len(head) - 4)]
    for label in sorted(rows, key=lambda row: -zoo.kept(zoo.rows[row]["chosen"]["test"]).mean()):
        published, chosen = zoo.rows[label]["published"]["test"], zoo.rows[label]["chosen"]["test"]
        least, task = zoo.worst(chosen)
        cells = [label, spread(zoo.mean(published), zoo.digits), spread(zoo.kept(published).mean(axis=0), 1)]
        cells += [setting(zoo.rows[label]), spread(zoo.mean(chosen), zoo.digits)]
        cells += [spread(zoo.kept(chosen).mean(axis=0), 1), f"{least:.1f} ({task})"]
        cells += [spread(np.array(chosen[zoo.base_task]), zoo.digits)]
        cells += [f"{float((zoo.mean(chosen) - zoo.mean(zoo.joint)).mean()):+.{zoo.digits}f}"]
        if reference:
            points, seeds = zoo.better(chosen, zoo.rows[reference]["chosen"]["test"])
            cells.append("" if label == reference else f"{points:+.1f} ({seeds} of {len(published[zoo.base_task])})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_task(zoo: Zoo, rows: Sequence[str]) -> str:
    """Return the results of each task, mean over seeds: at the published setting, and at the best where it differs."""
    tasks = [*zoo.tasks, zoo.base_task]
    lines = ["| method | " + " | ".join(tasks) + " |", "|---" + "|---:" * len(tasks) + "|"]
    for label in rows:
        both = [zoo.rows[label][which]["test"] for which in ("published", "chosen")]
        cells = [f"{np.mean(both[0][task]):.{zoo.digits}f}" for task in tasks]
        if both[0] != both[1]:
            best = [f"{np.mean(both[1][task]):.{zoo.digits}f}" for task in tasks]
            cells = [" → ".join(pair) for pair in zip(cells, best, strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting(row: Mapping[str, Any]) -> str:
    """Return the best setting in words: what differs from the published one."""
    if row["tried"] == 1:
        return "no parameters"
    published, chosen = row["published"]["parameters"], row["chosen"]["parameters"]
    given = [f"{name.rstrip('_')} {value}" for name, value in chosen.items() if published.get(name) != value]
    return ", ".join(given) or "the published one"


def spread(values: Array, digits: int) -> str:
    """Return the mean over seeds and, of several, their standard deviation."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def filled(page: str, tables: str) -> str:
    """Return a page with the tables between its two marks.

    Args:
        page: Markdown that has both marks, each on a line of its own.
        tables: what is to stand between them.
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
