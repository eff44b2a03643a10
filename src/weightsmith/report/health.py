"""What is wrong with the models of a report, or does not fit together, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from weightsmith.architecture.components import TOKEN_TABLES, component
from weightsmith.report.base_test import RELATED, Nearness, nearness
from weightsmith.report.findings import Agreement, Difference, Figure, Finding, Level, Model, Nonfinite, Report, Rows
from weightsmith.report.wording import cosine_text, counted, have, listed, percent, verb

# The gravest first, as findings and advice are sorted.
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "good")
# Two models whose difference is so small a part of the lesser task vector hold the same training: the next checkpoint
# of a run, or a copy that was rounded or saved again. Inferred.
NEARLY = 0.05
# Significant bits of the dtypes that weights are rounded to.
_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}
# Rounding to p bits moves weights by 2^-p / sqrt(8 ln 2) of their norm: errors are uniform within half a unit in the
# last place, E err^2 = x^2 4^-p / (3 m^2) for a mantissa m in [1, 2), and mantissas are spread evenly over log m.
_ROUNDING = 1.0 / math.sqrt(8.0 * math.log(2.0))
# Beyond this share of its energy, a task vector says as much about rounding as about training. Inferred.
_ROUNDED = 0.1


def health(report: Report) -> tuple[Finding, ...]:
    """Return what is remarkable in the health of a report's models, the gravest first.

    Each finding is about one kind of trouble and names all models that have it; a single good one says that there is
    none. What to do about merging is not said here: see :func:`weightsmith.report.advice.advice`.

    Args:
        report: its tables; its own findings and base tests are not looked at.
    """
    found = [
        *_nonfinite(report),
        *_incomparable(report),
        *_strangers(report),
        *_unmoved(report),
        *_alike(report),
        *_tokens(report),
        *_shapes(report),
        *_dtypes(report),
        *_rows(report),
        *_tied(report),
    ]
    if all(one.level == "note" for one in found):
        found.append(_healthy(report))
    return tuple(sorted(found, key=lambda one: LEVELS.index(one.level)))


def _healthy(report: Report) -> Finding:
    if report.models or report.result is not None:
        number, done = len(report.tensors), "compared"
        text = "no NaN or infinity, no copies, nothing foreign to the base"
    else:
        number, done = report.base.tensors, "looked at"
        text = "no NaN or infinity"
    figure = Figure(f"tensors {done}", number, "tensors")
    return Finding("healthy", "good", "Nothing is broken", f"{counted(number, 'tensor')} {done}: {text}.", (figure,))


def base_name(report: Report) -> str:
    """Return what sentences call the base: its label, said to be the first model where nobody named a base."""
    return report.base.label if report.base_named else f"{report.base.label} (the first model; no base was named)"


def duplicates(report: Report) -> dict[frozenset[str], bool]:
    """Return the pairs of models that are the same, or nearly so -> whether they are the same in every entry."""
    norms = {row.model: row.delta_norm for row in report.changes.total}
    return {
        frozenset((row.first, row.second)): row.equal == 1.0
        for row in report.agreements.total
        if row.equal == 1.0 or (_moved(row, norms) and row.distance <= NEARLY * _least(row, norms))
    }


def unmoved(report: Report) -> tuple[str, ...]:
    """Return the labels of models that are the base in every entry that was compared."""
    result = report.result.label if report.result else None
    rows = [row for row in report.changes.total if row.entries and row.model != result]
    return tuple(row.model for row in rows if row.delta_norm == 0.0)


def _least(row: Agreement, norms: Mapping[str, float]) -> float:
    return min(norms.get(row.first, 0.0), norms.get(row.second, 0.0))


def _moved(row: Agreement, norms: Mapping[str, float]) -> bool:
    return row.entries > 0 and _least(row, norms) > 0.0


def _nonfinite(report: Report) -> Iterator[Finding]:
    models: dict[str, list[Nonfinite]] = {}
    for row in report.health.nonfinite:
        models.setdefault(row.model, []).append(row)
    for label, rows in models.items():
        nan, infinite = sum(row.nan for row in rows), sum(row.infinite for row in rows)
        yield Finding(
            "nonfinite",
            "error",
            f"{label} has entries that are no numbers",
            f"{counted(nan, 'entry is', 'entries are')} NaN and {infinite:,} infinite in "
            f"{listed([row.tensor for row in rows])} of {label}. Most merges would write them into the result: "
            f"take another copy of {label}, or leave it out.",
            (Figure("NaN", nan, "entries"), Figure("infinite", infinite, "entries")),
            (label,),
        )


def _without_common_tensors(report: Report) -> list[str]:
    """Return the labels of models that hold no tensor of the base in its shape."""
    # Entries compared do not tell it alone: a tensor of nothing but NaN is there, and has none.
    shared = {label for one in report.tensors for label in one.dtypes}
    shared |= {row.model for row in report.changes.total if row.entries}
    return [model.label for model in report.models if model.label not in shared]


def _incomparable(report: Report) -> Iterator[Finding]:
    labels = _without_common_tensors(report)
    if labels:
        base = report.base.label
        yield Finding(
            "incomparable",
            "error",
            f"{listed(labels)} {have(labels)} no tensor of {base}",
            f"No tensor of floating-point numbers of {listed(labels)} has the name and the shape of one of "
            f"{base_name(report)}. Another architecture, or weights that are quantised to integers, cannot be merged "
            "with it as they are.",
            (Figure("entries compared", 0, "entries"),),
            tuple(labels),
        )


def _strangers(report: Report) -> Iterator[Finding]:
    found = nearness(report).values()
    unrelated = [one for one in found if one.shares is False]
    for permuted in (True, False):
        if alike := [one for one in unrelated if one.permuted is permuted]:
            yield _unrelated(report, alike)
    for one in found:
        if one.mixed:
            yield _mixed(report, one)
        elif one.shares is None:
            yield _far(report, one)


def _unrelated(report: Report, found: Sequence[Nearness]) -> Finding:
    labels = tuple(one.label for one in found)
    if found[0].permuted:
        why = "Norms are the same in both, so they may be the same with units in another order: put them in one order."
    elif report.base_named:
        why = "They come from another base, or from none: name the right one, or leave them out."
    else:
        why = "Models that were not trained from one base cannot be averaged."
    cosine = max((one.cosine for one in found), key=abs)
    return Finding(
        "unrelated",
        "error",
        f"{listed(labels)} {have(labels)} nothing to do with {report.base.label}",
        f"{percent(min(one.unrelated for one in found))} of the weights of {listed(labels)} lie in matrices that are "
        f"no nearer to those of {base_name(report)} than to a stranger's: the median cosine is "
        f"{cosine_text(cosine, 3)}, where fine-tunes have more than {RELATED}. {why}",
        tuple(
            replace(figure, name=f"{one.label}: {figure.name}" if len(found) > 1 else figure.name)
            for one in found
            for figure in (_near_figures(one) if len(found) == 1 else _near_figures(one)[:2])
        ),
        labels,
    )


def _mixed(report: Report, one: Nearness) -> Finding:
    why = (
        "They have the same norms in both, so their units may be in another order."
        if one.permuted
        else "They may have been replaced, or trained anew."
    )
    return Finding(
        "partly-unrelated",
        "warning",
        f"A part of {one.label} has nothing to do with {report.base.label}",
        f"{percent(one.unrelated)} of {one.label}'s weights lie in matrices that have nothing to do with those of "
        f"{base_name(report)}: {listed(one.strangers)}. {why} Merge the rest alone, or leave {one.label} out.",
        _near_figures(one),
        (one.label,),
    )


def _far(report: Report, one: Nearness) -> Finding:
    return Finding(
        "far",
        "warning",
        f"{one.label} is far from {report.base.label}",
        f"The median cosine of {one.label}'s matrices with those of {base_name(report)} is {cosine_text(one.cosine)}: "
        "too much for chance, too little for a fine-tune. It was trained very long, or from a relative of the base; a "
        "merge at such distances seldom keeps what either model can do.",
        _near_figures(one),
        (one.label,),
    )


def _near_figures(one: Nearness) -> tuple[Figure, ...]:
    return (
        Figure("median cosine of a matrix with the base's", one.cosine, "cosine"),
        Figure("share of entries in matrices that have nothing to do with the base's", one.unrelated, "share"),
        Figure("distance from the base over the base's norm", one.relative, "ratio"),
        Figure("combined z value of the cosines", one.z, "z"),
    )


def _unmoved(report: Report) -> Iterator[Finding]:
    for label in unmoved(report):
        yield Finding(
            "unmoved",
            "warning",
            f"{label} is {report.base.label}",
            f"{label} has the values of {report.base.label} in all entries compared: it adds nothing to a sum of task "
            "vectors, and pulls an average back to the base. Leave it out, unless that is what you want.",
            (Figure("share of entries changed", 0.0, "share"),),
            (label,),
        )


def _alike(report: Report) -> Iterator[Finding]:
    still = set(unmoved(report))
    norms = {row.model: row.delta_norm for row in report.changes.total}
    pairs = {frozenset((row.first, row.second)): row for row in report.agreements.total}
    for pair, same in duplicates(report).items():
        row = pairs[pair]
        # Two copies of the base are said to be the base, and that is enough.
        if pair <= still:
            continue
        least = _least(row, norms)
        figures = (
            Figure("share of entries that are equal", row.equal or 0.0, "share"),
            Figure("distance over the smaller task vector's norm", row.distance / least if least else 0.0, "ratio"),
        )
        measure = (
            "have the same values in all entries compared"
            if same
            else f"differ by {percent(row.distance / least)} of what training changed"
        )
        yield Finding(
            "identical" if same else "nearly-identical",
            "warning",
            f"{row.first} and {row.second} are {'' if same else 'nearly '}the same",
            f"{row.first} and {row.second} {measure}: in a merge this one model counts twice. Drop one of them.",
            figures,
            (row.first, row.second),
        )


def _tokens(report: Report) -> Iterator[Finding]:
    # A result is no input: its tokens are what the recipe made of theirs.
    told = {model.label for model in report.models}.difference(_without_common_tensors(report))
    for row in report.health.tokens:
        if row.model not in told:
            continue
        figures = (
            Figure("tokens added", row.added, "tokens"),
            Figure("tokens removed", row.removed, "tokens"),
            Figure("tokens under another id", row.moved, "tokens"),
        )
        parts = [
            text
            for number, text in (
                (row.moved, f"{counted(row.moved, 'token has', 'tokens have')} another id"),
                (row.added, f"{counted(row.added, 'token is', 'tokens are')} added"),
                (row.removed, f"{counted(row.removed, 'is', 'are')} missing"),
            )
            if number
        ]
        if not parts:
            continue
        such = f" (such as {listed(row.examples)})" if row.examples else ""
        said = f"In {row.model}, {listed(parts)}{such}."
        title = f"{row.model} has another vocabulary than {report.base.label}"
        if _by_tokens(report):
            text = f"{said} The recipe's tokenizer has their embeddings and heads merged by tokens."
            yield Finding("vocabulary", "note", title, text, figures, (row.model,))
            continue
        yield Finding(
            "vocabulary",
            "warning",
            title,
            f"{said} Rows of embeddings and head are merged by number, so "
            f"{'rows of different tokens would be mixed' if row.moved else 'rows that one model lacks do not fit'}: "
            "merge by tokens.",
            figures,
            (row.model,),
            action=f"weightsmith tokens {_reference(report, report.base.label)} {_reference(report, row.model)}\n"
            "# in the recipe:\ntokenizer: {source: union}",
        )


def _by_tokens(report: Report) -> bool:
    return report.recipe is not None and report.recipe.by_tokens


def _reference(report: Report, label: str) -> str:
    import shlex

    return next(shlex.quote(one.reference) for one in (report.base, *report.models) if one.label == label)


def _differences(report: Report, *kinds: str) -> dict[str, list[Difference]]:
    """Return the differences of some kinds by model; the result is no input, and is left out."""
    result = report.result.label if report.result else None
    found: dict[str, list[Difference]] = {}
    for row in report.health.differences:
        if row.kind in kinds and row.model != result:
            found.setdefault(row.model, []).append(row)
    return found


def _shapes(report: Report) -> Iterator[Finding]:
    strangers = _without_common_tensors(report)
    for label, rows in _differences(report, "missing", "extra", "shape").items():
        if _by_tokens(report):
            # Tables of tokens are brought to one shape by the recipe.
            rows = [row for row in rows if row.kind != "shape" or component(row.tensor) not in TOKEN_TABLES]
        if label in strangers or not rows:
            continue
        kinds = {kind: [row for row in rows if row.kind == kind] for kind in ("shape", "missing", "extra")}
        parts = [
            f"{counted(len(found), 'tensor')} {text} ({listed([row.tensor for row in found], 2)})"
            for kind, text in (("shape", "of other shapes"), ("missing", "missing"), ("extra", "more"))
            if (found := kinds[kind])
        ]
        # What a model has besides the base's tensors takes no part in a merge; what it lacks stops one.
        yield Finding(
            "tensors",
            "warning" if kinds["shape"] or kinds["missing"] else "note",
            f"{label} does not have the tensors of {report.base.label}",
            f"{label} has {listed(parts)} than {report.base.label}. They are in no figure here"
            f"{'; tell the recipe what to do with them' if kinds['shape'] or kinds['missing'] else ''}.",
            tuple(Figure(f"tensors: {kind}", len(found), "tensors") for kind, found in kinds.items() if found),
            (label,),
            action="on_shape_mismatch: base  # or first, pad, crop" if kinds["shape"] else "",
        )


def _dtypes(report: Report) -> Iterator[Finding]:
    relative = {row.model: row.relative for row in report.changes.total}
    models = {model.label: model for model in report.models}
    harmless: dict[str, list[str]] = {}
    for label, rows in _differences(report, "dtype").items():
        kinds = listed(sorted({f"{row.base} to {row.found}" for row in rows}))
        error, moved = _rounding(report.base, models[label]) if label in models else 0.0, relative.get(label)
        share = min(1.0, (error / moved) ** 2) if error and moved else 0.0
        if share < _ROUNDED:
            harmless.setdefault(kinds, []).append(label)
            continue
        yield Finding(
            "rounded",
            "warning",
            f"Rounding is a large part of {label}'s change",
            f"{label} has {counted(len(rows), 'tensor')} of another dtype than {report.base.label} ({kinds}), and "
            f"rounding alone explains about {percent(share)} of the energy of its task vector. Take both in one dtype, "
            "the finer one if it is to be had.",
            (
                Figure("tensors of another dtype", len(rows), "tensors"),
                Figure("share of the task vector's energy that rounding explains", share, "share"),
            ),
            (label,),
        )
    tensors = {label: len(rows) for label, rows in _differences(report, "dtype").items()}
    for kinds, labels in harmless.items():
        yield Finding(
            "dtype",
            "note",
            f"{listed(labels)} {have(labels)} other dtypes than {report.base.label}",
            f"Up to {counted(max(tensors[label] for label in labels), 'tensor')} went from {kinds}. Merges compute in "
            "float32 and round once, so this does no harm; `dtype` in the recipe says what the result has.",
            tuple(Figure(f"{label}: tensors of another dtype", tensors[label], "tensors") for label in labels),
            tuple(labels),
        )


def _rounding(base: Model, model: Model) -> float:
    """Return the norm of rounding errors, relative to the weights', where one model is of a coarser dtype."""
    bits = [_BITS.get(one.dtypes[0].dtype) if one.dtypes else None for one in (base, model)]
    if bits[0] is None or bits[1] is None or bits[0] == bits[1]:
        return 0.0
    return _ROUNDING * math.ldexp(1.0, -min(bits[0], bits[1]))


def _rows(report: Report) -> Iterator[Finding]:
    tables = [row for row in report.health.rows if component(row.tensor) in TOKEN_TABLES]
    matrices = [row for row in report.health.rows if component(row.tensor) not in TOKEN_TABLES]
    broken = [row for row in matrices if row.new_dead]
    for label in dict.fromkeys(row.model for row in broken):
        rows = [row for row in broken if row.model == label]
        dead, of = sum(row.new_dead for row in rows), sum(row.rows for row in rows)
        yield Finding(
            "dead-rows",
            "warning",
            f"Rows of {label} became zero",
            f"{counted(dead, 'row')} of {of:,} in {listed([row.tensor for row in rows])} of {label} "
            f"{verb(dead, 'is zero and was', 'are zero and were')} not in {report.base.label}: it was pruned, or its "
            "file is damaged. A merge fills them again from the other models.",
            (Figure("rows that became zero", dead, "rows"), Figure("rows of these tensors", of, "rows")),
            (label,),
        )
    yield from _still_rows(matrices, "matrices", "Whoever pruned or tied them did so before these models were trained.")
    yield from _still_rows(tables, "tables", "That is normal for tokens that were never trained and for padding.")


def _still_rows(rows: Sequence[Rows], where: str, why: str) -> Iterator[Finding]:
    """Yield what there is to say of rows that are zero or double, but not by a model's training."""
    rows = [row for row in rows if row.duplicated or (row.dead and (where == "tables" or not row.new_dead))]
    if not rows:
        return
    dead, double = max(row.dead for row in rows), max(row.duplicated for row in rows)
    what = listed([f"up to {counted(n, 'row')} {text}" for n, text in ((dead, "of zeros"), (double, "twice")) if n])
    names = list(dict.fromkeys(row.tensor for row in rows))
    place = "Embeddings and heads" if where == "tables" else "Matrices"
    yield Finding(
        f"{'token' if where == 'tables' else 'same'}-rows",
        "note",
        f"{place} have rows that are zero or double",
        f"{listed(names)} {verb(len(names), 'holds', 'hold')} {what} in "
        f"{listed(list(dict.fromkeys(row.model for row in rows)))}. {why}",
        (Figure("most rows of zeros", dead, "rows"), Figure("most rows that are there twice", double, "rows")),
        tuple(dict.fromkeys(row.model for row in rows)),
    )


def _tied(report: Report) -> Iterator[Finding]:
    heads: dict[bool, list[str]] = {}
    for label, rows in _differences(report, "tied").items():
        heads.setdefault(any(row.found for row in rows), []).append(label)
    base = report.base.label
    for own, labels in heads.items():
        who = listed(labels)
        text = (
            f"The base ties its head to its embeddings; {who} {verb(len(labels), 'holds', 'hold')} one apart."
            if own
            else f"The base holds a head of its own; {who} {verb(len(labels), 'leaves', 'leave')} it out."
        )
        yield Finding(
            "head",
            "note",
            f"The head of {who} is {'separate' if own else 'tied'}, that of {base} is not",
            f"{text} A tied head is read as what it means, the embeddings.",
            (Figure("models whose head differs so", len(labels), "models"),),
            tuple(labels),
        )
