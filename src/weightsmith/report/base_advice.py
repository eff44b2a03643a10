"""Advice about the base: that task vectors from another one would say more."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from weightsmith.report.base_test import Candidate, better_base, nearness
from weightsmith.report.family import Family
from weightsmith.report.findings import Figure, Finding, Report
from weightsmith.report.wording import cosine_text, have, listed


def base_first(report: Report, family: Family) -> Iterator[Finding]:
    """Yield that the base, or some models beside it, are the wrong ones, and which base would fit."""
    found = better_base(report)
    if family.strangers and len(family.strangers) == len(report.models):
        fits = "" if found is None else f" {found.label} among them would fit: {_fit(found)}."
        yield Finding(
            "base-first",
            "error",
            "Settle the base first",
            f"{listed(family.strangers)} {have(family.strangers)} nothing to do with {report.base.label}, so every "
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
            f"{listed(family.strangers)} {have(family.strangers)} nothing to do with {report.base.label}; a merge "
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


def _shares_figures(report: Report, labels: Sequence[str]) -> tuple[Figure, ...]:
    near = nearness(report)
    return tuple(
        Figure(f"median cosine of a matrix of {label} with the base's", near[label].cosine, "cosine")
        for label in labels
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
    references = {model.label: model.reference for model in (report.base, *report.models)}
    # A step is a model in its own recipe alone.
    if report.recipe is not None and {references[one] for one in (*found.models, found.label)} & {*report.recipe.steps}:
        return ""
    names = {label: shlex.quote(reference) for label, reference in references.items()}
    return f"weightsmith report {' '.join(names[one] for one in found.models)} --base {names[found.label]}"


def name_base(report: Report) -> Iterator[Finding]:
    """Yield that a base should be named, and which of the models would fit."""
    if not report.models:
        return
    found = better_base(report)
    fits = "" if found is None else f" {found.label} would fit: {_fit(found)}."
    where = "with --base" if report.kind == "models" else "as base_model in the recipe"
    distance = {row.model: row.relative or 0.0 for row in report.changes.total}
    yield Finding(
        "name-base",
        "note",
        "Name the base",
        f"No base was named, so figures say how models differ from {report.base.label}, not what training did, and "
        f"there is no advice on signs, strengths and ranks. Name {where} what they were trained from.{fits}",
        tuple(
            Figure(f"{label}: distance from {report.base.label} over its norm", value, "ratio")
            for label, value in distance.items()
        )
        + _fit_figures(found),
        action=_other_base(report, found),
    )
