"""What became of every token: which the two shared, which were made anew, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weightsmith.transplantation.held_out import HeldOut
from weightsmith.transplantation.layout import Layout, Made
from weightsmith.transplantation.search import Found
from weightsmith.transplantation.tokens import NEW, SHARED, UNTRAINED, UNUSED

# Shares of the new tokens whose residual is told, and how many of the worst tokens are.
_QUANTILES, _WORST = (0.5, 0.9, 0.99, 1.0), 20


@dataclass(frozen=True)
class TableReport:
    """What became of one table.

    Attributes:
        name: the tensor.
        part: ``embeddings`` or ``head``.
        method: how the rows of new tokens were made.
        rows_before: rows that it had.
        rows: rows that it has.
        shared: how many tokens took a row of the model, by what they share: ``surface``, their text; ``role``, such as
            the end of a text; ``byte``; ``prefix``.
        made: tokens whose rows were made.
        averaged: those of them that took the mean of all rows, for want of anything to make them of.
        untrained: tokens that became zeros, because they look untrained.
        unused: rows that no token has.
        anchors: tokens that the new ones could be made of; None where the method takes none.
        residual: share of the new tokens -> the largest residual of so many: ``||d - sum_j w_j d_j|| / ||d||`` in the
            donor's space. None where the method rebuilds nothing.
        worst: the tokens with the largest residuals, the largest first.
        held_out: how near shared tokens come to their own rows when they are made as if they were new; None where the
            method looks at no donor's space, too few are shared, or for a bias.
    """

    name: str
    part: str
    method: str
    rows_before: int
    rows: int
    shared: Mapping[str, int]
    made: int
    averaged: int
    untrained: int
    unused: int
    anchors: int | None
    residual: Mapping[str, float] | None
    worst: tuple[tuple[str, float], ...]
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Report:
    """What became of every token.

    Attributes:
        model: the model.
        donor: where its tokenizer is from.
        tokens: how many tokens the result has.
        digits: ``model`` and ``donor`` -> number of digits -> how many tokens are numbers of so many.
        tables: what became of each table.
        searched: tokens for which the donor's space was searched in this run.
        seconds: how long that took.
    """

    model: str
    donor: str
    tokens: int
    digits: Mapping[str, Mapping[int, int]]
    tables: tuple[TableReport, ...]
    searched: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """Tokens that were searched in a second; None where none was."""
        return self.searched / self.seconds if self.seconds else None

    def notes(self) -> list[str]:
        """Return what a person should know of how rows were made."""
        return [
            f"{one.name}: {one.method} brings shared tokens that it is not told of no nearer to their own rows "
            f"(error {one.held_out.error:.3g}) than the mean of all rows does ({one.held_out.mean_error:.3g}), so the "
            "rows of new tokens are hardly worth more: --compare tells how other methods do with this donor"
            for one in self.tables
            if one.held_out is not None and one.held_out.error >= one.held_out.mean_error
        ]

    def to_json(self, *, seconds: bool = True) -> dict[str, Any]:
        """Return it as JSON values.

        Args:
            seconds: whether to tell times, which differ from run to run.
        """
        found = asdict(self)
        if not seconds:
            del found["seconds"], found["searched"]
        else:
            found["tokens_per_second"] = self.rate
        return found


def report_of(
    layout: Layout, model: str, donor: str, digits: Mapping[str, Mapping[int, int]], *, search: bool
) -> Report:
    """Return what becomes of every token.

    Args:
        layout: where the rows come from.
        model: the model's name.
        donor: the donor's.
        digits: see :class:`Report`.
        search: whether to find first what is not found yet; residuals are left out otherwise.

    Raises:
        CheckpointError: if a row cannot be read, or is not finite.
    """
    found = [(one.find(), len(one.targets)) for one in layout.searches] if search else []
    timed = [(one.seconds, count) for one, count in found if one.seconds]
    return Report(
        model,
        donor,
        len(layout.new.tokens),
        digits,
        tuple(_table(layout, made, search=search) for made in layout.tables),
        sum(count for _, count in timed),
        round(sum(seconds for seconds, _ in timed), 3),
    )


def _table(layout: Layout, made: Made, *, search: bool) -> TableReport:
    matches, known = made.matches, made.search if search else None
    residual, worst = (None, ()) if known is None else _residuals(layout, known.targets, known.find())
    return TableReport(
        made.table.tensor.name,
        made.table.part,
        made.way.method,
        made.table.rows,
        made.rows,
        {name: matches.count(how) for how, name in SHARED.items()},
        matches.count(NEW),
        made.averaged,
        matches.count(UNTRAINED),
        matches.count(UNUSED) + max(made.rows - len(matches.how), 0),
        made.anchors,
        residual,
        worst,
        made.held_out if search else None,
    )


def _residuals(
    layout: Layout, targets: Any, found: Found
) -> tuple[dict[str, float] | None, tuple[tuple[str, float], ...]]:
    values = found.combinations.residual
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return None, ()
    # A quantile that some token has: nothing is interpolated.
    quantiles = np.quantile(values[known], _QUANTILES, method="inverted_cdf")
    order = known[np.argsort(-values[known], kind="stable")[:_WORST]]
    worst = tuple((layout.new.tokens[int(targets[place])], _short(values[place])) for place in order)
    return {f"{share:g}": _short(value) for share, value in zip(_QUANTILES, quantiles, strict=True)}, worst


def _short(value: Any) -> float:
    # Six digits: the last ones of a float64 would pretend to mean something.
    return float(f"{float(value):.6g}")
