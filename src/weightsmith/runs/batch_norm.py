"""Running statistics of batch norm, which no average of weights makes right."""

from __future__ import annotations

from collections.abc import Iterable

_STATISTICS = ("running_mean", "running_var")


def statistics_within(names: Iterable[str]) -> list[str]:
    """Return those of some tensors' names that are of batch-norm statistics."""
    return [name for name in names if name.rpartition(".")[2] in _STATISTICS]


def warnings_of(names: Iterable[str]) -> list[str]:
    """Return the warning for an average that holds such statistics, by its tensors' names; none if it holds none."""
    found = statistics_within(names)
    if not found:
        return []
    return [
        f"{len(found)} tensors of batch-norm statistics ({found[0]}{', …' if len(found) > 1 else ''}) are averaged, "
        "and do not fit the averaged weights: re-estimate them by running the model over training data in training "
        "mode, without changing weights"
    ]
