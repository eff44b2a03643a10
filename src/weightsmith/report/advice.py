"""What to do about a merge, in words: each piece of advice with the figures that it rests on.

Thresholds are constants where they are used, each with its reason; those that say "inferred" were reasoned out or tried
on the models of this project, not published. Advice names methods that papers recommend for a case, and says where they
did not help on the models of ``docs/choosing.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from weightsmith.report import adding, places
from weightsmith.report.base_advice import base_first, name_base
from weightsmith.report.base_test import base_tests
from weightsmith.report.family import Family, family_of
from weightsmith.report.findings import Finding, Report
from weightsmith.report.health import LEVELS, health
from weightsmith.report.outcome import outcome

# More would not be read.
MOST = 10
# Advice to take another base: from there, all other advice would be different.
_BASE = frozenset({"base-first", "better-base"})
# In the order of importance within a level.
_ADVICE: tuple[Callable[[Report, Family], Iterator[Finding]], ...] = (
    adding.strength,
    adding.opposed,
    adding.alike,
    adding.norms,
    adding.conflict,
    adding.dare,
    places.layers,
    adding.same_entries,
    places.tables,
    places.frozen,
    places.low_rank,
)


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
    family = family_of(report)
    found = list(base_first(report, family))
    if report.kind == "merged":
        found += outcome(report)
    if not report.base_named:
        found += name_base(report)
    elif not any(one.code in _BASE for one in found):
        for say in _ADVICE:
            found += say(report, family)
    gravity = {level: min(rank, 2) for rank, level in enumerate(LEVELS)}
    return tuple(sorted(found, key=lambda one: gravity[one.level])[:MOST])
