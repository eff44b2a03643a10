"""What to do about a merge, in words: each piece of advice with the figures that it rests on.

Thresholds are named here, each with its reason; those that say "inferred" were reasoned out or tried on the models of
this project, not published. Advice names methods that papers recommend for a case, and says where they did not help on
the models of ``docs/choosing.md``.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from weightsmith.report.base_test import Candidate, base_tests, better_base
from weightsmith.report.findings import Agreement, Change, Figure, Finding, Overlap, Report, Scope
from weightsmith.report.health import LEVELS, duplicates, health, unmoved
from weightsmith.report.outcome import outcome
from weightsmith.report.recipe_text import recipe_text, yaml_text
from weightsmith.report.wording import cosine_text, counted, listed, percent, times

# More would not be read.
MOST = 10
# Task vectors of different tasks have cosines of 0 to 0.2 (arXiv:2212.04089, figure 5), and their sum works.
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
TOP = 0.05
OVERLAP = 0.25
# DARE's paper: task vectors of fine-tuning lie within 0.002; where they reach 0.03, as after continued pre-training,
# dropping does not work (arXiv:2311.03099).
DARE_LIMIT = 0.03
# An adapter of an eighth of the smaller side has at most a quarter of a square matrix's parameters. Inferred.
LOW_RANK = 1 / 8
# A tenth of the whole range of the share of conflicting mass, above the models' own average. Inferred.
LAYER_EXCESS = 0.05
# Where so many layers stand out, none does.
LAYER_PART = 1 / 3
# Tables of tokens that moved so much further than the rest, relative to the base's norm. Inferred.
TABLES = 2.0
# From this share of the entries on, what training left alone is worth saying. Inferred.
FROZEN = 0.25
# What a recipe's task vector should be as long as, over the mean norm of its inputs'. Adding more than two whole task
# vectors' length leaves the neighbourhood in which models were seen to work; inferred.
LONG, SHORT = 2.0, 0.4


def with_conclusions(report: Report) -> Report:
    """Return a report with its base tests, findings and advice: what follows from its tables.

    Findings say what is wrong with the models; advice says what to do about merging them. Nothing is in both.

    Args:
        report: what was measured.
    """
    return replace(report, base_tests=base_tests(report), findings=health(report), advice=advice(report))


def advice(report: Report) -> tuple[Finding, ...]:
    """Return what to do, the most important first: problems, then warnings, then the rest; at most ten pieces.

    Models that have nothing to do with the base, that are the base, or that are another model again take no part:
    their figures say nothing about merging.

    Args:
        report: its tables; its own base tests, findings and advice are not looked at.
    """
    family = _family(report)
    found = list(_base_first(report, family))
    if report.kind == "merged":
        found += outcome(report)
    if not report.base_named:
        found += _name_base(report)
    # From another base, all of the following would be different.
    elif not any(one.code in _BASE for one in found):
        for say in _ADVICE:
            found += say(report, family)
    gravity = {level: min(rank, 2) for rank, level in enumerate(LEVELS)}
    return tuple(sorted(found, key=lambda one: gravity[one.level])[:MOST])


@dataclass(frozen=True)
class _Family:
    """Models whose task vectors can be compared.

    Attributes:
        labels: theirs, in the report's order.
        strangers: labels of those that have nothing to do with the base.
        totals: how far each is from the base.
        pairs: how each two lie to each other.
        references: how to name each in a recipe; the base too.
        base: the base's label.
    """

    labels: tuple[str, ...]
    strangers: tuple[str, ...]
    totals: dict[str, Change]
    pairs: tuple[Agreement, ...]
    references: dict[str, str]
    base: str

    @property
    def norms(self) -> list[float]:
        return [self.totals[label].delta_norm for label in self.labels]

    def sum_norm(self, weights: Sequence[float]) -> float:
        """Return the norm of a weighted sum of the task vectors."""
        lengths = [weight * norm for weight, norm in zip(weights, self.norms, strict=True)]
        place = {label: number for number, label in enumerate(self.labels)}
        mixed = (lengths[place[one.first]] * lengths[place[one.second]] * (one.cosine or 0.0) for one in self.pairs)
        return math.sqrt(max(0.0, math.fsum(length**2 for length in lengths) + 2.0 * math.fsum(mixed)))

    def recipe(self, method: str, weights: Sequence[float], rules: Sequence[str] = ()) -> str:
        models = {self.references[label]: weight for label, weight in zip(self.labels, weights, strict=True)}
        return recipe_text(method, self.references[self.base], models, rules)


def _family(report: Report) -> _Family:
    strangers = tuple(one.model for one in base_tests(report) if one.shares is False)
    left_out = {*strangers, *unmoved(report)}
    for pair in duplicates(report):
        later = [model.label for model in report.models if model.label in pair]
        # Of copies the first stays in.
        if later[0] not in left_out:
            left_out.add(later[-1])
    totals = {row.model: row for row in report.changes.total if row.delta_norm > 0.0}
    labels = tuple(one.label for one in report.models if one.label in totals and one.label not in left_out)
    return _Family(
        labels,
        strangers,
        totals,
        tuple(row for row in report.agreements.total if row.first in labels and row.second in labels),
        {model.label: model.reference for model in (report.base, *report.models)},
        report.base.label,
    )


def _base_first(report: Report, family: _Family) -> Iterator[Finding]:
    found = better_base(report)
    if family.strangers and len(family.strangers) == len(report.models):
        fits = "" if found is None else f" {found.label} among them would fit: {_fit(found)}."
        yield Finding(
            "base-first",
            "error",
            "Settle the base first",
            f"{listed(family.strangers)} {_verb(family.strangers)} nothing to do with {report.base.label}, so every "
            "task vector is mostly the way back from it: until the base is right, cosines, signs and overlaps "
            f"here say nothing about merging.{fits}",
            _shares_figures(report, family.strangers) + _fit_figures(found),
            family.strangers,
            action=_other_base(report, found),
        )
    elif family.strangers:
        yield Finding(
            "leave-out",
            "error",
            f"Leave {listed(family.strangers)} out",
            f"{listed(family.strangers)} {_verb(family.strangers)} nothing to do with {report.base.label}; a merge "
            "with the others would break them. What follows is about the others.",
            _shares_figures(report, family.strangers),
            family.strangers,
        )
    elif found is not None and report.base_named:
        yield Finding(
            "better-base",
            "warning",
            f"{found.label} is a better base than {report.base.label}",
            f"{listed(found.models)} were rather trained from {found.label}: {_fit(found)}. With "
            f"{report.base.label}, each task vector holds the same way from there, and a sum has it "
            f"{len(found.models)} times. What to do next, the report from there says.",
            _fit_figures(found),
            (found.label,),
            action=_other_base(report, found),
        )


def _verb(labels: Sequence[str]) -> str:
    return "has" if len(labels) == 1 else "have"


def _shares_figures(report: Report, labels: Sequence[str]) -> tuple[Figure, ...]:
    return tuple(
        Figure(f"{one.model}: {figure.name}", figure.value, figure.unit)
        for one in base_tests(report)
        if one.model in labels
        for figure in one.figures
        if figure.unit == "cosine" and "median" in figure.name
    )


def _fit(found: Candidate) -> str:
    named = "" if found.named is None else f", from the base {cosine_text(found.named)}"
    return f"the mean cosine of the others' task vectors is {cosine_text(found.cosine)} from it{named}"


def _fit_figures(found: Candidate | None) -> tuple[Figure, ...]:
    if found is None:
        return ()
    figures = (Figure(f"mean cosine of task vectors from {found.label}", found.cosine, "cosine"),)
    if found.named is None:
        return figures
    return (*figures, Figure("mean cosine of task vectors from the base", found.named, "cosine"))


def _other_base(report: Report, found: Candidate | None) -> str:
    if found is None:
        return ""
    names = {model.label: shlex.quote(model.reference) for model in report.models}
    return f"weightsmith report {' '.join(names[one] for one in found.models)} --base {names[found.label]}"


def _name_base(report: Report) -> Iterator[Finding]:
    if not report.models:
        return
    found = better_base(report)
    fits = "" if found is None else f" {found.label} would fit: {_fit(found)}."
    distance = {row.model: row.relative or 0.0 for row in report.changes.total}
    yield Finding(
        "name-base",
        "note",
        "Name the base",
        f"No base was named, so figures say how models differ from {report.base.label}, not what training did, and "
        f"there is no advice on signs, strengths and ranks. Name with --base what they were trained from.{fits}",
        tuple(
            Figure(f"{label}: distance from {report.base.label} over its norm", value, "ratio")
            for label, value in distance.items()
        )
        + _fit_figures(found),
        action=_other_base(report, found),
    )


def _opposed(report: Report, family: _Family) -> Iterator[Finding]:
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


def _alike(report: Report, family: _Family) -> Iterator[Finding]:
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
            f" All pairs do: {report.base.label} may be a fine-tune too, or have one that they come from; name that one."
            if len(alike) == len(known) and count > 2
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
            f"{largest.first} and {largest.second}), as of models that learned different things. A mean leaves each 1/{count} of its "
            f"strength{start if even else '.'}",
            (_cosine(largest), figures[1]),
            family.labels,
            action=family.recipe("task_arithmetic", [weight] * count) if even else "",
        )


def _cosine(pair: Agreement) -> Figure:
    return Figure(f"cosine of the task vectors of {pair.first} and {pair.second}", pair.cosine or 0.0, "cosine")


def _conflict(report: Report, family: _Family) -> Iterator[Finding]:
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


def _norms(report: Report, family: _Family) -> Iterator[Finding]:
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


def _layers(report: Report, family: _Family) -> Iterator[Finding]:
    total = next(iter(report.conflicts.total), None)
    if total is None or total.share is None or set(total.models) != set(family.labels):
        return
    layers = {layer.key for layer in report.layers if layer.where == "layer"}
    rows = [row for row in report.conflicts.layers if row.scope.layer in layers and row.share is not None]
    worst = sorted(
        (row for row in rows if (row.share or 0.0) >= total.share + LAYER_EXCESS), key=lambda row: -(row.share or 0.0)
    )
    if not worst or len(worst) > LAYER_PART * len(rows):
        return
    names = [str(row.scope.layer) for row in worst]
    top = worst[0].share or 0.0
    patterns = ", ".join(f'"{name}.*"' for name in names)
    yield Finding(
        "layers",
        "note",
        "A few layers hold the conflict",
        f"{listed(names)} {'has' if len(names) == 1 else 'have'} up to {percent(top)} of the movement against the "
        f"elected sign, all layers together {percent(total.share)}. Take less of the models there, or one model alone.",
        (
            Figure(f"share of the movement against the elected sign in {names[0]}", top, "share"),
            Figure("the same over everything", total.share, "share"),
        ),
        family.labels,
        Scope(layer=names[0]),
        action=family.recipe(
            "task_arithmetic",
            [0.5] * len(family.labels),
            (f"scope: {{names: [{patterns}]}}  # there half as much", "parameters: {lambda: 0.5}"),
        ),
    )


def _same_entries(report: Report, family: _Family) -> Iterator[Finding]:
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
        f"{percent(weight(row))} of the {percent(TOP)} of entries that each changed most are the same in both "
        f"({percent(row.chance)} by chance), so trimming (`ties`, `breadcrumbs`) does not take them apart.{sign} "
        "Try a mean, or a smaller weight for one of them.",
        (
            Figure(f"share of the top {percent(TOP)} that both have", weight(row), "share"),
            Figure("the same by chance", row.chance, "share"),
        ),
        (row.first, row.second),
    )


def _dare(report: Report, family: _Family) -> Iterator[Finding]:
    if report.recipe is None or not report.recipe.method.startswith(("dare", "della")):
        return
    wide = {
        row.model: row.quantiles[0]
        for row in report.histograms.total
        if row.model in family.labels and row.quantiles and row.quantiles[0] > DARE_LIMIT
    }
    if wide:
        yield Finding(
            "dare",
            "warning",
            "Changes too large to drop at random",
            f"In {listed(list(wide))}, one entry in a hundred moved by more than {max(wide.values()):.2g}. DARE's "
            f"paper finds that dropping works where entries moved by some 0.002, and fails from {DARE_LIMIT} on. Use a "
            "higher density, or task arithmetic.",
            tuple(Figure(f"{label}: movement that 1% of the entries exceed", value) for label, value in wide.items()),
            tuple(wide),
        )


def _strength(report: Report, family: _Family) -> Iterator[Finding]:
    """Yield whether a recipe before it is run adds up too much or too little, of methods whose sum is known."""
    recipe = report.recipe
    if recipe is None or report.kind != "recipe" or recipe.method not in ("linear", "task_arithmetic"):
        return
    given = {one.model: {**recipe.parameters, **one.parameters} for one in recipe.inputs if one.model != family.base}
    weights = [_number(given.get(label, {}).get("weight", "1")) for label in family.labels]
    scale = _number(recipe.parameters.get("lambda", "1"))
    normalized = recipe.parameters.get("normalize", "true" if recipe.method == "linear" else "false") == "true"
    if set(given) != set(family.labels) or scale is None:
        return
    numbers = [weight for weight in weights if weight is not None]
    # Schedules and conditions are no single numbers; and what the base's own weight takes off is not known here.
    if len(numbers) != len(weights) or len(given) != len(recipe.inputs) or len(numbers) < 2:
        return
    total = math.fsum(numbers)
    if normalized and total == 0.0:
        return
    ratio = abs(scale) * family.sum_norm(numbers) / (abs(total) if normalized else 1.0) / statistics.fmean(family.norms)
    if SHORT < ratio < LONG:
        return
    figures = (Figure("norm of the recipe's task vector over the mean norm of its inputs'", ratio, "ratio"),)
    yield Finding(
        "strength",
        "warning",
        "The recipe adds too much" if ratio >= LONG else "The recipe keeps little",
        f"With these weights the result is {times(ratio)} as far from {family.base} as its inputs are on average. "
        f"Weights {times(1.0 / ratio)} as large{' and `normalize: false`' if normalized else ''} would keep "
        "the distance; choose on held-out data.",
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


def _tables(report: Report, family: _Family) -> Iterator[Finding]:
    for row in report.changes.components:
        part, total = row.scope.component, family.totals.get(row.model)
        if part not in ("embedding", "head") or row.model not in family.labels or total is None:
            continue
        if not row.relative or not total.relative or row.relative < TABLES * total.relative:
            continue
        ratio = row.relative / total.relative
        names = ", ".join(yaml_text(one.name) for one in report.tensors if one.component == part)
        yield Finding(
            "tables",
            "note",
            f"{row.model} changed its {part} most",
            f"Relative to the base, {row.model}'s {part} moved {times(ratio)} as far as all its weights "
            f"({percent(row.relative)}, {percent(total.relative)}), as when it learned tokens or classes of its own. "
            f"Take the {part} from the model whose tokens or classes you need.",
            (
                Figure(f"relative norm of the change of the {part}", row.relative, "ratio"),
                Figure("relative norm of the whole change", total.relative, "ratio"),
            ),
            (row.model,),
            row.scope,
            action=family.recipe(
                "task_arithmetic",
                [1.0] * len(family.labels),
                (
                    f"scope: {{names: [{names}]}}",
                    "merge_method: passthrough",
                    f"models: [{{model: {yaml_text(family.references[row.model])}}}]",
                ),
            ),
        )


def _frozen(report: Report, family: _Family) -> Iterator[Finding]:
    rows: dict[str, list[Change]] = {label: [] for label in family.labels}
    for row in report.changes.tensors:
        if row.model in rows:
            rows[row.model].append(row)
    for label, found in rows.items():
        entries = sum(row.entries for row in found)
        moved = [row for row in found if row.delta_norm > 0.0]
        still = 1.0 - sum(row.entries for row in moved) / entries if entries else 0.0
        if still >= FROZEN:
            parts = list(dict.fromkeys(str(row.scope.component) for row in moved))
            yield Finding(
                "frozen",
                "note",
                f"{label} changed only some tensors",
                f"Training left {counted(len(found) - len(moved), 'tensor')} of {len(found)} as they were, "
                f"{percent(still)} of the entries; it changed {listed(parts)}. A merge needs nothing else of it: "
                "`models` of a rule names which models take part where.",
                (
                    Figure("tensors changed", len(moved), "tensors"),
                    Figure("share of entries in tensors that did not change", still, "share"),
                ),
                (label,),
            )


def _low_rank(report: Report, family: _Family) -> Iterator[Finding]:
    for label in family.labels:
        rows = [row for row in report.spectra if row.model == label and row.norm > 0.0]
        ranks = [row.ranks[0] for row in rows if row.ranks[0] is not None]
        if not rows or len(ranks) < len(rows):
            continue
        shares = [rank / min(row.shape) for rank, row in zip(ranks, rows, strict=True)]
        if statistics.median(shares) > LOW_RANK:
            continue
        yield Finding(
            "low-rank",
            "note",
            f"{label} fits an adapter",
            f"Rank {max(ranks)} holds {percent(rows[0].energies[0])} of the energy of {label}'s change in each of the "
            f"{counted(len(rows), 'matrix', 'matrices')} looked at. A LoRA of that rank says nearly the same in "
            "little space, and methods on singular vectors (`tsv`, `iso_c`, `knots`) have something to work with.",
            (
                Figure(f"largest rank for {percent(rows[0].energies[0])} of the energy", max(ranks), "rank"),
                Figure("median of that rank over the smaller side", statistics.median(shares), "share"),
            ),
            (label,),
            action=f"weightsmith extract {shlex.quote(family.references[label])} "
            f"{shlex.quote(family.references[family.base])} {shlex.quote(label + '-lora')} --rank {max(ranks)}",
        )


# Advice to take another base.
_BASE = frozenset({"base-first", "better-base"})
# In the order of importance within a level.
_ADVICE: tuple[Callable[[Report, _Family], Iterator[Finding]], ...] = (
    _strength,
    _opposed,
    _alike,
    _norms,
    _conflict,
    _dare,
    _layers,
    _same_entries,
    _tables,
    _frozen,
    _low_rank,
)
