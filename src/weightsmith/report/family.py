"""The models of a report whose task vectors can be compared with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.report.base_test import nearness
from weightsmith.report.findings import Agreement, Change, Report
from weightsmith.report.health import duplicates, unmoved
from weightsmith.report.recipe_text import recipe_text, yaml_text
from weightsmith.report.wording import listed


@dataclass(frozen=True)
class Family:
    """Models whose task vectors can be compared.

    Attributes:
        labels: theirs, in the report's order.
        strangers: labels of those that have nothing to do with the base.
        totals: how far each is from the base.
        pairs: how each two lie to each other.
        references: how to name each in a recipe; the base too.
        base: the base's label.
        steps: names of the recipe's steps, some of which may be models here.
    """

    labels: tuple[str, ...]
    strangers: tuple[str, ...]
    totals: dict[str, Change]
    pairs: tuple[Agreement, ...]
    references: dict[str, str]
    base: str
    steps: tuple[str, ...] = ()

    @property
    def norms(self) -> list[float]:
        """Norms of the task vectors, in the order of the labels."""
        return [self.totals[label].delta_norm for label in self.labels]

    def sum_norm(self, weights: Sequence[float]) -> float:
        """Return the norm of a weighted sum of the task vectors."""
        lengths = [weight * norm for weight, norm in zip(weights, self.norms, strict=True)]
        place = {label: number for number, label in enumerate(self.labels)}
        mixed = (lengths[place[one.first]] * lengths[place[one.second]] * (one.cosine or 0.0) for one in self.pairs)
        return math.sqrt(max(0.0, math.fsum(length**2 for length in lengths) + 2.0 * math.fsum(mixed)))

    def recipe(self, method: str, weights: Sequence[float], rules: Sequence[str] = ()) -> str:
        """Return a recipe for these models; see :func:`weightsmith.report.recipe_text.recipe_text`."""
        models = {self.references[label]: weight for label, weight in zip(self.labels, weights, strict=True)}
        text = recipe_text(method, self.references[self.base], models, rules)
        named = [one for one in (self.references[self.base], *models) if one in self.steps]
        # A step is a model in its own recipe alone.
        return f"# beside the steps that make {listed(list(map(yaml_text, named)))}\n{text}" if named else text


def family_of(report: Report) -> Family:
    """Return those models of a report whose figures say something about merging.

    Left out are models that have nothing to do with the base, wholly or in part, those that are the base, and copies of
    another one.
    """
    near = nearness(report)
    strangers = tuple(label for label, one in near.items() if one.shares is False)
    left_out = {*strangers, *(label for label, one in near.items() if one.mixed), *unmoved(report)}
    for pair in duplicates(report):
        first, second = (model.label for model in report.models if model.label in pair)
        if first not in left_out:
            left_out.add(second)
    totals = {row.model: row for row in report.changes.total if row.delta_norm > 0.0}
    labels = tuple(one.label for one in report.models if one.label in totals and one.label not in left_out)
    return Family(
        labels,
        strangers,
        totals,
        tuple(row for row in report.agreements.total if row.first in labels and row.second in labels),
        {model.label: model.reference for model in (report.base, *report.models)},
        report.base.label,
        () if report.recipe is None else report.recipe.steps,
    )
