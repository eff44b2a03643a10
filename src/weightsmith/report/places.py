"""Advice about parts of models: layers, embeddings and heads, what did not change, and what fits an adapter.

Each function yields what it has to say about a report and those of its models that can be compared, or nothing.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator

from weightsmith.architecture.components import TOKEN_TABLES
from weightsmith.report.family import Family
from weightsmith.report.findings import Change, Figure, Finding, Report, Scope
from weightsmith.report.recipe_text import yaml_text
from weightsmith.report.wording import counted, have, listed, percent, times, verb

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
# How sentences call components whose names are no nouns.
_PARTS = {"other": "other tensors", "conv": "convolutions"}


def layers(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which few layers hold more conflict than the others."""
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
    top, first = worst[0].share or 0.0, str(worst[0].scope.layer)
    names = [str(row.scope.layer) for row in rows if row in worst]
    patterns = ", ".join(yaml_text(f"{name}.*") for name in names)
    yield Finding(
        "layers",
        "note",
        "A few layers hold the conflict",
        f"{listed(names)} {have(names)} up to {percent(top)} of the movement against the "
        f"elected sign, all layers together {percent(total.share)}. Take less of the models there, or one model alone.",
        (
            Figure(f"share of the movement against the elected sign in {first}", top, "share"),
            Figure("the same over everything", total.share, "share"),
        ),
        family.labels,
        Scope(layer=first),
        action=family.recipe(
            "task_arithmetic",
            [0.5] * len(family.labels),
            (f"scope: {{names: [{patterns}]}}  # there half as much", "parameters: {lambda: 0.5}"),
        ),
    )


def tables(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which models changed their embeddings or their head much more than the rest."""
    for row in report.changes.components:
        part, total = row.scope.component, family.totals.get(row.model)
        if part not in TOKEN_TABLES or row.model not in family.labels or total is None:
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


def frozen(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which models left a large part of their tensors as they were."""
    rows: dict[str, list[Change]] = {label: [] for label in family.labels}
    for row in report.changes.tensors:
        if row.model in rows:
            rows[row.model].append(row)
    for label, found in rows.items():
        entries = sum(row.entries for row in found)
        moved = [row for row in found if row.delta_norm > 0.0]
        still = 1.0 - sum(row.entries for row in moved) / entries if entries else 0.0
        if still >= FROZEN:
            parts = list(dict.fromkeys(_PARTS.get(part, part) for row in moved if (part := str(row.scope.component))))
            count = len(found) - len(moved)
            yield Finding(
                "frozen",
                "note",
                f"{label} changed only some tensors",
                f"Training left {counted(count, 'tensor')} of {len(found):,} as {verb(count, 'it was', 'they were')}, "
                f"{percent(still)} of the entries; it changed {listed(parts)}. A merge needs nothing else of it: "
                "`models` of a rule names which models take part where.",
                (
                    Figure("tensors changed", len(moved), "tensors"),
                    Figure("share of entries in tensors that did not change", still, "share"),
                ),
                (label,),
            )


def low_rank(report: Report, family: Family) -> Iterator[Finding]:
    """Yield which models' changes a small adapter could say."""
    # What is an adapter on the base need not be made one.
    computed = {model.label for model in report.models if model.computed}
    for label in family.labels:
        if label in computed:
            continue
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
            f"Rank {max(ranks)} holds {rows[0].energies[0]:.0%} of the energy of {label}'s change in each of the "
            f"{counted(len(rows), 'matrix', 'matrices')} looked at. A LoRA of that rank says nearly the same in "
            "little space, and methods on singular vectors (`tsv`, `iso_c`, `knots`) have something to work with.",
            (
                Figure(f"largest rank for {rows[0].energies[0]:.0%} of the energy", max(ranks), "rank"),
                Figure("median of that rank over the smaller side", statistics.median(shares), "share"),
            ),
            (label,),
            action=f"weightsmith extract {shlex.quote(family.references[label])} "
            f"{shlex.quote(family.references[family.base])} {shlex.quote(label + '-lora')} --rank {max(ranks)}",
        )
