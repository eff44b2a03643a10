"""Advice about adding task vectors up: whether to, how much of each, and what gets in the way.

Each function yields what it has to say about a report and those of its models that can be compared, or nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from weightsmith.report.family import Family
from weightsmith.report.findings import Agreement, Figure, Finding, Overlap, Report
from weightsmith.report.outcome import OVERSHOT, SHRUNKEN
from weightsmith.report.wording import cosine_text, listed, percent, times

# Task vectors of different tasks have cosines of 0 to 0.2 (arXiv:2212.04089, on CLIP), and their sum works.
ORTHOGONAL = 0.2
# With tau_i = c + s_i and s_i orthogonal, the cosine is |c|^2 / (|c|^2 + |s|^2): from here on, more of each task vector
# is common to both than its own, and a sum has the common part twice. Inferred.
ALIGNED = 0.5
# A model that takes back so much of what another learned; training apart hardly ever gives it. Inferred.
OPPOSED = -0.2
# Of n independent normal task vectors of equal norm, (1 - 1 / sqrt(n)) / 2 of the movement lies against the elected
# sign: 0.15 of two, 0.30 of six. With six models of docs/choosing.md no method kept half of what they had learned.
CONFLICT = 0.28
# So far above what independent models have by chance, they pull against each other. Inferred.
CONFLICT_EXCESS = 0.03
# At equal weights, a model with three times the norm has nine tenths of the energy of a sum of two. Inferred.
NORMS = 3.0
# The top that overlaps are judged at, and the share in it beyond which two models want the same entries: five times
# what chance gives. Inferred.
TOP, OVERLAP = 0.05, 0.25
# DARE's paper (arXiv:2311.03099) finds that dropping works on fine-tunes of language models, whose entries moved by
# some 0.002, and not after continued pre-training, where they move by up to 0.03. Their weights are of some 0.02, so
# the limit is where the top of the movement is as large as weights are. The relative form is inferred: on the image
# models of docs/choosing.md, where it is 0.4 of them, dropping did no harm.
DARE_LIMIT = 1.0


def strength(report: Report, family: Family) -> Iterator[Finding]:
    """Yield whether a recipe that was not run yet adds up too much or too little, of methods whose sum is known.

    Limits are those of a merged result, :data:`weightsmith.report.outcome.OVERSHOT` and ``SHRUNKEN``.
    """
    recipe = report.recipe
    if recipe is None or report.kind != "recipe" or recipe.method not in ("linear", "task_arithmetic"):
        return
    given = {one.model: {**recipe.parameters, **one.parameters} for one in recipe.inputs if one.model != family.base}
    weights = [_number(given.get(label, {}).get("weight", "1")) for label in family.labels]
    scale = _number(recipe.parameters.get("lambda", "1"))
    mean = recipe.method == "linear"
    normalized = recipe.parameters.get("normalize", str(mean)).lower() == "true"
    # A sum of models that is no mean scales the base too.
    if set(given) != set(family.labels) or scale is None or (mean and not normalized):
        return
    numbers = [weight for weight in weights if weight is not None]
    # Schedules and conditions are no single numbers; and what the base's own weight takes off is not known here.
    if len(numbers) != len(weights) or len(given) != len(recipe.inputs) or len(numbers) < 2:
        return
    total = math.fsum(numbers)
    if normalized and total == 0.0:
        return
    ratio = abs(scale) * family.sum_norm(numbers) / (abs(total) if normalized else 1.0) / statistics.fmean(family.norms)
    if ratio == 0.0 or SHRUNKEN < ratio < OVERSHOT:
        return
    figures = (Figure("norm of the recipe's task vector over the mean norm of its inputs'", ratio, "ratio"),)
    yield Finding(
        "strength",
        "warning",
        "The recipe adds too much" if ratio >= OVERSHOT else "The recipe keeps little",
        f"With these weights the result is {times(ratio)} as far from {family.base} as its inputs are on average. "
        "Task arithmetic with the weights below keeps that distance; choose them on held-out data.",
        figures,
        family.labels,
        action=family.recipe(
            "task_arithmetic",
            [round(scale * one / (abs(total) if normalized else 1.0) / ratio, 3) for one in numbers],
        ),
    )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def opposed(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which models take back what another one learned."""
    for pair in family.pairs:
        if pair.cosine is not None and pair.cosine <= OPPOSED:
            yield Finding(
                "opposed",
                "warning",
                f"{pair.first} and {pair.second} undo each other",
                f"The task vectors of {pair.first} and {pair.second} have a cosine of {cosine_text(pair.cosine)}: what "
                "one learned the other took back, and a merge has little of both. Take one of them.",
                (_cosine(pair),),
                (pair.first, pair.second),
            )


def alike(report: Report, family: Family) -> Iterator[Finding]:
    """Yield what the cosines of all pairs say about adding task vectors up."""
    known = [pair for pair in family.pairs if pair.cosine is not None]
    if not known:
        return
    count = len(family.labels)
    typical = statistics.fmean(family.norms)
    ratio = family.sum_norm([1.0] * count) / typical
    # At this weight the sum is as long as the inputs are on average.
    weight = round(1.0 / ratio, 2) if ratio > 1.0 else 1.0
    high = max(known, key=lambda one: one.cosine or 0.0)
    highest = cosine_text(high.cosine or 0.0)
    figures = (_cosine(high), Figure("norm of the sum over the mean norm of task vectors", ratio, "ratio"))
    if (high.cosine or 0.0) >= ALIGNED:
        alike = [one for one in known if (one.cosine or 0.0) >= ALIGNED]
        which = listed([f"{one.first} and {one.second}" for one in alike], 3)
        relative = (
            f" No pair does otherwise: {report.base.label} may not be what they come from, but a relative of it."
            if len(alike) == len(known)
            else ""
        )
        yield Finding(
            "aligned",
            "warning",
            "Average rather than sum",
            f"The task vectors of {which} point the same way (cosine up to {highest}), and the sum of all at "
            f"weight 1 is {times(ratio)} as long as one: it overshoots. Average, or keep the weights "
            f"near {weight}.{relative}",
            figures,
            tuple(dict.fromkeys(label for one in alike for label in (one.first, one.second))),
            action=family.recipe("linear", [1.0] * count),
        )
    elif all(abs(one.cosine or 0.0) <= ORTHOGONAL for one in known):
        largest = max(known, key=lambda one: abs(one.cosine or 0.0))
        # Where one outweighs the others, what is said of that has the weights.
        even = max(family.norms) < NORMS * min(family.norms)
        start = f"; a sum at weight {weight} is as long as one. Choose the weight on held-out data, from there down."
        yield Finding(
            "orthogonal",
            "good",
            "Task vectors can be summed",
            f"They are nearly orthogonal (the largest cosine is {cosine_text(largest.cosine or 0.0)}, of "
            f"{largest.first} and {largest.second}), as of models that learned different things. A mean leaves each "
            f"1/{count} of its strength{start if even else '.'}",
            (_cosine(largest), figures[1]),
            family.labels,
            action=family.recipe("task_arithmetic", [weight] * count) if even else "",
        )


def _cosine(pair: Agreement) -> Figure:
    return Figure(f"cosine of the task vectors of {pair.first} and {pair.second}", pair.cosine or 0.0, "cosine")


def norms(report: Report, family: Family) -> Iterator[Finding]:
    """Yield that one model moved much further than another, and weights under which all move as far."""
    if len(family.labels) < 2:
        return
    norms = dict(zip(family.labels, family.norms, strict=True))
    long, short = max(norms, key=lambda one: norms[one]), min(norms, key=lambda one: norms[one])
    ratio = norms[long] / norms[short]
    if ratio < NORMS:
        return
    energy = norms[long] ** 2 / math.fsum(norm**2 for norm in norms.values())
    # Two digits of each weight are enough, and must not round to nothing.
    weights = [float(f"{norms[short] / norm:.2g}") for norm in norms.values()]
    yield Finding(
        "norms",
        "warning",
        f"{long} outweighs the others",
        f"{long} moved {times(ratio)} as far as {short}: at equal weights {percent(energy)} of the energy of all task "
        "vectors is its. Give it a smaller weight; with the weights below all are equally long.",
        (
            Figure(f"norm of {long}'s task vector over that of {short}'s", ratio, "ratio"),
            Figure(f"share of the energy that is {long}'s", energy, "share"),
        ),
        (long,),
        action=family.recipe("task_arithmetic", weights),
    )


def conflict(report: Report, family: Family) -> Iterator[Finding]:
    """Yield that much movement lies against the elected sign, by itself or beyond chance.

    Chance is that of independent normal entries of these norms n_i: with S the sum of all and ``min(P, M) = (sum |a| -
    |S|) / 2``, the expected share is ``(1 - sqrt(sum n_i^2) / sum n_i) / 2``. Heavy tails make it smaller.
    """
    row = next(iter(report.conflicts.total), None)
    # The row is about all models: one that does not belong spoils it.
    if row is None or row.share is None or set(row.models) != set(family.labels):
        return
    norms = family.norms
    chance = (1.0 - math.hypot(*norms) / math.fsum(norms)) / 2.0
    excess = row.share - chance >= CONFLICT_EXCESS
    if not excess and row.share < CONFLICT:
        return
    why = (
        "more than independent models have by chance"
        if excess
        else f"as {len(norms)} independent models have by chance, since there are so many of them"
    )
    yield Finding(
        "conflict",
        "warning",
        "Signs conflict",
        f"{percent(row.share)} of all movement lies against the sign that the models elect ({percent(chance)} by "
        f"chance): {why}. Merge fewer models, or lower the weights. `ties`, `consensus` and `pcb` are made for this; "
        "on the models of docs/choosing.md they did no better than task arithmetic at its best weight, so compare.",
        (
            Figure("share of the movement against the elected sign", row.share, "share"),
            Figure("the same of independent models with these norms", chance, "share"),
        ),
        family.labels,
    )


def same_entries(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which two models changed the same entries most, if any did so far beyond chance."""

    def weight(row: Overlap) -> float:
        return row.overlap or 0.0

    rows = [row for row in report.overlaps.total if row.top == TOP and {row.first, row.second} <= set(family.labels)]
    row = max(rows, key=weight, default=None)
    if row is None or row.chance is None or weight(row) < max(OVERLAP, 3.0 * row.chance):
        return
    pair = next((one for one in family.pairs if {one.first, one.second} == {row.first, row.second}), None)
    sign = f" Where both moved, {percent(pair.same_sign)} have one sign." if pair and pair.same_sign else ""
    yield Finding(
        "same-entries",
        "note",
        f"{row.first} and {row.second} changed the same entries most",
        f"{percent(weight(row))} of the {TOP:.0%} of entries that each changed most are the same in both "
        f"({percent(row.chance)} by chance), so trimming (`ties`, `breadcrumbs`) does not take them apart.{sign} "
        "Try a mean, or a smaller weight for one of them.",
        (
            Figure(f"share of the top {TOP:.0%} that both have", weight(row), "share"),
            Figure("the same by chance", row.chance, "share"),
        ),
        (row.first, row.second),
    )


def dare(report: Report, family: Family) -> Iterator[Finding]:
    """Yield that a recipe drops entries at random whose changes are too large for that."""
    if report.recipe is None or not report.recipe.method.startswith(("dare", "della")):
        return
    wide = {}
    for row in report.histograms.total:
        total = family.totals.get(row.model)
        if row.model in family.labels and row.quantiles and total is not None and total.base_norm > 0.0:
            size = row.quantiles[0] / (total.base_norm / math.sqrt(total.entries))
            if size > DARE_LIMIT:
                wide[row.model] = size
    if wide:
        yield Finding(
            "dare",
            "warning",
            "Changes too large to drop at random",
            f"In {listed(list(wide))}, one entry in a hundred moved by more than {times(max(wide.values()))} the root "
            "mean square of the base's weights. DARE's paper finds that dropping works on fine-tunes that moved by a "
            "tenth of it, and fails where movement reaches it. Use a higher density, or task arithmetic.",
            tuple(
                Figure(f"{label}: movement that 1% of the entries exceed, over the weights' root mean square", size)
                for label, size in wide.items()
            ),
            tuple(wide),
        )
