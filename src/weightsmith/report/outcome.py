"""What came of a merge, in words: how much of each input is in the result, and what to change in the recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from weightsmith.report.findings import Composition, Figure, Finding, Report, Scope
from weightsmith.report.wording import listed, percent, times

# An input that makes up less of the result's change, and less than a quarter of its equal part, is hardly there.
# Inferred; so are the others where nothing else is said.
ABSENT, ABSENT_PART = 0.05, 1 / 4
# A coefficient so far below the largest says that the weights or the method left the input out, not its length.
UNTAKEN = 0.1
# The result is one input: its coefficient this near to 1, and nothing else in it.
SAME, ALONE = 0.02, 0.999
# The mean of four orthogonal task vectors of one length is half as long as they are. On the image models of
# docs/choosing.md, the mean of six (0.41) keeps 16% of what they learned, and a sum of three quarters their length 27%.
SHRUNKEN = 0.5
# Longer than the sum of two task vectors that point the same way.
OVERSHOT = 2.0
# A layer whose change is so much of one input, which over everything has less than the second share.
DOMINATED, UNDOMINATED = 0.8, 0.6
# Below it, most of the result's change is in no input's direction.
UNEXPLAINED = 0.5
# What sentences call the rows that are no layers.
_PLACES = {"before": "what lies before the layers", "after": "what lies after them"}


def outcome(report: Report) -> tuple[Finding, ...]:
    """Return what there is to say about a merged result; nothing if the report has none.

    Args:
        report: its composition and changes are looked at.
    """
    total = next(iter(report.composition.total), None)
    if report.result is None or total is None or not total.models:
        return ()
    if total.delta_norm == 0.0:
        return (_nothing(report),)
    alone = _alone(report, total)
    if alone is not None:
        return (alone,)
    found = [
        *_absent(report, total),
        *_length(report, total),
        *_dominated(report, total),
        *_unexplained(report, total),
    ]
    return tuple(found) if any(one.code == "absent" for one in found) else (*found, _present(report, total))


def _part(row: Composition, number: int) -> float:
    """Return the share of the explained part of the change that is an input's."""
    return (row.contributions[number] or 0.0) / row.r_squared if row.r_squared else 0.0


def _nothing(report: Report) -> Finding:
    return Finding(
        "unchanged",
        "warning",
        f"The result is {report.base.label}",
        f"The result has {report.base.label}'s values in all entries compared: the weights are zero, or every change "
        "was trimmed away. Raise weights or density.",
        (Figure("norm of the result's change", 0.0),),
    )


def _alone(report: Report, total: Composition) -> Finding | None:
    for number, label in enumerate(total.models):
        if (
            (total.r_squared or 0.0) >= ALONE
            and abs(total.coefficients[number] - 1.0) <= SAME
            and _part(total, number) >= ALONE
        ):
            return Finding(
                "single-input",
                "warning",
                f"The result is {label}",
                f"{percent(_part(total, number))} of the result's change is {label}'s, at a coefficient of "
                f"{total.coefficients[number]:.2f}: of the other inputs there is nothing in it.",
                (
                    Figure(f"share of the result's change that is {label}'s", _part(total, number), "share"),
                    Figure(f"coefficient of {label}", total.coefficients[number]),
                ),
                (label,),
            )
    return None


def _absent(report: Report, total: Composition) -> Iterator[Finding]:
    most = max(map(abs, total.coefficients))
    for number, label in enumerate(total.models):
        share = _part(total, number)
        if share >= min(ABSENT, ABSENT_PART / len(total.models)):
            continue
        coefficient = total.coefficients[number]
        if abs(coefficient) <= UNTAKEN * most:
            why = "The method took hardly anything of it: raise its weight, or its density."
        elif share < 0.0:
            why = "What others changed runs against it: merge fewer models."
        else:
            why = "Its task vector is short: raise its weight, or bring all to one length."
        yield Finding(
            "absent",
            "warning",
            f"{label} is hardly in the result",
            f"Of what inputs explain of the result's change, {percent(max(share, 0.0))} is {label}'s (coefficient "
            f"{coefficient:.2f}). {why}",
            (
                Figure(f"share of the explained change that is {label}'s", share, "share"),
                Figure(f"coefficient of {label}", coefficient),
            ),
            (label,),
        )


def _length(report: Report, total: Composition) -> Iterator[Finding]:
    norms = [row.delta_norm for row in report.changes.total if row.model in total.models and row.delta_norm > 0.0]
    # How far a mean of models is from the first of them says nothing.
    if not norms or not report.base_named:
        return
    ratio = total.delta_norm / statistics.fmean(norms)
    figures = (Figure("norm of the result's change over the mean norm of its inputs'", ratio, "ratio"),)
    if ratio <= SHRUNKEN:
        orthogonal = math.hypot(*norms) / math.fsum(norms)
        yield Finding(
            "shrunken",
            "warning",
            "The result moved less than its inputs",
            f"The result is {times(ratio)} as far from {report.base.label} as its inputs are on average (the mean of "
            f"orthogonal task vectors would be {times(orthogonal)}): changes cancel, or weights are small. Weights or "
            f"`lambda` {times(1.0 / ratio)} as large would keep the distance; choose on held-out data.",
            figures,
        )
    elif ratio >= OVERSHOT:
        yield Finding(
            "overshot",
            "warning",
            "The result moved further than its inputs",
            f"The result is {times(ratio)} as far from {report.base.label} as its inputs are on average. Models so far "
            f"out often fail altogether: lower weights or `lambda`, to {1.0 / ratio:.2f} of what they are.",
            figures,
        )


def _dominated(report: Report, total: Composition) -> Iterator[Finding]:
    for number, label in enumerate(total.models):
        whole = _part(total, number)
        rows = [
            row
            for row in report.composition.layers
            if label in row.models and len(row.models) > 1 and _part(row, row.models.index(label)) >= DOMINATED
        ]
        if not rows or whole >= UNDOMINATED:
            continue
        shares = [_part(row, row.models.index(label)) for row in rows]
        names = [_PLACES.get(str(row.scope.layer), str(row.scope.layer)) for row in rows]
        yield Finding(
            "dominated",
            "note",
            f"{label} alone makes some layers",
            f"Of what inputs explain of the change of {listed(names)}, up to {percent(max(shares))} is {label}'s, of "
            f"the whole result's {percent(whole)}. Where that is not meant, lower its weight in these layers.",
            (
                Figure(f"largest share of a layer's explained change that is {label}'s", max(shares), "share"),
                Figure(f"share of the explained change that is {label}'s", whole, "share"),
            ),
            (label,),
            Scope(layer=rows[shares.index(max(shares))].scope.layer),
        )


def _unexplained(report: Report, total: Composition) -> Iterator[Finding]:
    if total.r_squared is not None and total.r_squared < UNEXPLAINED:
        yield Finding(
            "unexplained",
            "note",
            "Most of the change is no input's",
            f"Sums of the inputs' task vectors explain {percent(total.r_squared)} of the result's change. Dropping, "
            "trimming and electing signs leave such a rest; much of it is noise, and a higher density makes less.",
            (Figure("share of the result's change that its inputs explain", total.r_squared, "share"),),
        )


def _present(report: Report, total: Composition) -> Finding:
    if report.base_named:
        what, unit = "Shares of what inputs explain of the result's change", "share"
        parts = {label: _part(total, number) for number, label in enumerate(total.models)}
        told = listed([f"{label} {percent(one)}" for label, one in parts.items()], 8)
    else:
        # The first model is an input like the others; all coefficients add up to 1 where the result is a mean.
        what, unit = "Coefficients of the models in the result", ""
        parts = dict(zip(total.models, total.coefficients, strict=True))
        parts = {report.base.label: 1.0 - math.fsum(total.coefficients), **parts}
        told = listed([f"{label} {one:.2f}" for label, one in parts.items()], 8)
    return Finding(
        "present",
        "good",
        "All inputs are in the result",
        f"{what}: {told}.",
        tuple(Figure(f"{what}: {label}", one, unit) for label, one in parts.items()),
        tuple(parts),
    )
