"""What the page carries of a report: figures in columns, rounded to what it shows.

A table of figures is dense: for each measure one list per subject (a model, a pair of models), with one value per
place (a layer, a component, a cell of a heat map, a tensor). Places and subjects are said once, by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from weightsmith.report.findings import (
    TOPS,
    Agreement,
    Change,
    Composition,
    Conflict,
    Figure,
    Finding,
    Model,
    Overlap,
    Report,
    Scope,
    Scoped,
)

Row = TypeVar("Row")
# What the page shows of a row: what it is about, and of each the name of a measure -> its value.
Subjects = Iterable[tuple[Any, Mapping[str, float | None]]]
Figures = Callable[[Row], Subjects]
Cells = dict[str, list[list[float | None]]]

# Figures of pairs of models per tensor are left out above this many of them: the page must open at once.
MOST_PAIR_VALUES = 400_000


def embedded(report: Report) -> dict[str, Any]:
    """Return what the page carries, as JSON values.

    Args:
        report: all that was found.
    """
    layers = {one.key: number for number, one in enumerate(report.layers)}
    components = {one: number for number, one in enumerate(report.components)}
    cells = _cells(report)
    places = _Places(list(layers), list(components), cells, [one.name for one in report.tensors])
    labels = [one.label for one in report.models]
    changed = [*labels, *([report.result.label] if report.result else [])]
    models = [report.base, *report.models, *([report.result] if report.result else [])]
    numbers = {one.label: number for number, one in enumerate(models)}
    # A report may have been read from a file that says anything: rows about models that are not in it are left out.
    found = dict.fromkeys((one.first, one.second) for one in _all(report.agreements))
    pairs = [pair for pair in found if numbers.keys() >= set(pair)]
    tops = [(*pair, top) for pair in pairs for top in TOPS]
    pair_tensors = len(pairs) * len(report.tensors) <= MOST_PAIR_VALUES
    return {
        "kind": report.kind,
        "version": report.version,
        "exact": report.exact,
        "baseNamed": report.base_named,
        "models": [_model(one) for one in models],
        "inputs": [numbers[label] for label in labels],
        "result": numbers[report.result.label] if report.result else None,
        "changed": [numbers[label] for label in changed],
        "pairs": [[numbers[first], numbers[second]] for first, second in pairs],
        "tops": list(TOPS),
        "layers": [
            {"key": one.key, "where": one.where, "stack": one.stack, "index": one.index} for one in report.layers
        ],
        "components": list(report.components),
        "cells": [[layers[layer], components[part]] for layer, part in cells],
        "changes": places.table(report.changes, changed, _change),
        "agreements": places.table(report.agreements, pairs, _agreement, tensors=pair_tensors),
        "conflicts": places.table(report.conflicts, [None], _conflict),
        "overlaps": places.table(report.overlaps, tops, _overlap, tensors=False),
        "composition": places.table(report.composition, labels, _contributions, tensors=False),
        "explained": places.table(report.composition, [None], _explained, tensors=False),
        "subspaces": [
            {
                "tensor": one.tensor,
                "pair": pairs.index((one.first, one.second)),
                "rank": one.rank,
                "left": rounded(one.left),
                "right": rounded(one.right),
                "chanceLeft": rounded(one.chance_left),
                "chanceRight": rounded(one.chance_right),
            }
            for one in report.subspaces
            if (one.first, one.second) in pairs
        ],
        "spectra": [
            {
                "tensor": one.tensor,
                "layer": layers.get(one.layer),
                "component": components.get(one.component),
                "model": numbers[one.model],
                "shape": list(one.shape),
                "norm": rounded(one.norm),
                "indices": list(one.indices),
                "values": _rounded(one.values),
                "effectiveRank": rounded(one.effective_rank),
                "stableRank": rounded(one.stable_rank),
                "ranks": list(one.ranks),
                "energies": list(one.energies),
                "computed": one.computed,
                "exact": one.exact,
            }
            for one in report.spectra
            if one.model in numbers
        ],
        "histograms": [
            {
                "component": None if one.scope.component is None else components[one.scope.component],
                "model": numbers[one.model],
                "entries": one.entries,
                "weight": rounded(one.weight),
                "zero": rounded(one.zero),
                "edges": _rounded(one.edges),
                "positive": _rounded(one.positive),
                "negative": _rounded(one.negative),
                "mean": rounded(one.mean),
                "deviation": rounded(one.deviation),
                "kurtosis": rounded(one.kurtosis),
                "quantiles": _rounded(one.quantiles),
                "tops": list(one.tops),
            }
            for one in _all(report.histograms)
            if one.model in numbers and (one.scope.component is None or one.scope.component in components)
        ],
        "health": asdict(report.health),
        "recipe": None if report.recipe is None else asdict(report.recipe),
        "merged": None if report.merged is None else asdict(report.merged),
        "sampling": [asdict(one) for one in report.sampling],
        "timings": [asdict(one) for one in report.timings],
        "notes": list(report.notes),
        "baseTests": [
            {"model": one.model, "shares": one.shares, "p": rounded(one.p), "figures": _figures(one.figures)}
            for one in report.base_tests
        ],
        "findings": [_finding(one) for one in report.findings],
        "advice": [_finding(one) for one in report.advice],
        "tensors": _tensors(report, layers, components, numbers),
        "pairTensorsLeftOut": bool(pairs) and not pair_tensors,
    }


def rounded(value: float | None) -> float | None:
    """Return a number with the digits that a page shows: four significant ones, or five decimals near 1.

    What is not finite has no number in JSON, and becomes None.
    """
    if value is None or not math.isfinite(value):
        return None
    short = round(value, 5) if 0.1 < abs(value) < 10 else float(f"{value:.4g}")
    return int(short) if short == int(short) else short


class _Places:
    """All places that figures are given for, in the order of the page."""

    def __init__(
        self, layers: list[str], components: list[str], cells: list[tuple[str, str]], tensors: list[str]
    ) -> None:
        self._numbers: dict[str, dict[Any, int]] = {
            name: {place: number for number, place in enumerate(places)}
            for name, places in (
                ("total", [None]),
                ("components", components),
                ("layers", layers),
                ("cells", cells),
                ("tensors", tensors),
            )
        }

    def table(
        self, rows: Scoped[Row], subjects: Sequence[Any], figures: Figures[Row], *, tensors: bool = True
    ) -> dict[str, Cells]:
        """Return the figures of rows, dense: kind of scope -> measure -> subject -> place.

        Args:
            rows: the rows of the report.
            subjects: what rows are about, in the order of the lists.
            figures: gives a row's subjects, each with its values.
            tensors: whether figures of single tensors are among them.
        """
        return {
            name: self._dense(name, getattr(rows, name), subjects, figures)
            for name in self._numbers
            if name != "tensors" or tensors
        }

    def _dense(self, name: str, rows: Iterable[Any], subjects: Sequence[Any], figures: Figures[Any]) -> Cells:
        places = self._numbers[name]
        order = {one: number for number, one in enumerate(subjects)}
        found: Cells = {}
        for row in rows:
            place = places.get(_place(name, row.scope))
            for who, values in figures(row):
                for measure, value in values.items():
                    if value is None or place is None or who not in order:
                        continue
                    if measure not in found:
                        found[measure] = [[None] * len(places) for _ in subjects]
                    found[measure][order[who]][place] = rounded(value)
        return found


def _place(name: str, scope: Scope) -> Any:
    if name == "cells":
        return scope.layer, scope.component
    return {"total": None, "components": scope.component, "layers": scope.layer, "tensors": scope.tensor}[name]


def _cells(report: Report) -> list[tuple[str, str]]:
    known = {one.key for one in report.layers}, set(report.components)
    found = dict.fromkeys((one.layer, one.component) for one in report.tensors)
    return [(layer, part) for layer, part in found if layer in known[0] and part in known[1]]


def _all(rows: Scoped[Row]) -> tuple[Row, ...]:
    return (*rows.total, *rows.components, *rows.layers, *rows.cells, *rows.tensors)


def _change(row: Change) -> Subjects:
    values = {
        "relative": row.relative,
        "norm": row.delta_norm,
        "changed": row.changed,
        "largest": row.largest,
        "against": row.against,
    }
    if row.scope.tensor is None:
        values |= {"baseNorm": row.base_norm, "deltaCosineBase": row.delta_cosine_base}
    return [(row.model, values)]


def _agreement(row: Agreement) -> Subjects:
    values = {"cosine": row.cosine, "sameSign": row.same_sign, "conflict": row.conflict}
    if row.scope.tensor is None:
        values |= {"bothMoved": row.both_moved, "equal": row.equal, "distance": row.distance}
    return [((row.first, row.second), values)]


def _conflict(row: Conflict) -> Subjects:
    return [(None, {"share": row.share, "contested": row.contested})]


def _overlap(row: Overlap) -> Subjects:
    return [((row.first, row.second, row.top), {"overlap": row.overlap, "chance": row.chance})]


def _contributions(row: Composition) -> Subjects:
    columns = zip(row.models, row.coefficients, row.cosines, row.contributions, strict=False)
    return [
        (model, {"coefficient": coefficient, "cosine": cosine, "contribution": contribution})
        for model, coefficient, cosine, contribution in columns
    ]


def _explained(row: Composition) -> Subjects:
    return [(None, {"rSquared": row.r_squared, "norm": row.delta_norm, "residual": row.residual_norm})]


def _tensors(
    report: Report, layers: Mapping[str, int], components: Mapping[str, int], models: Mapping[str, int]
) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    held = [[-1] * len(report.tensors) for _ in models]
    for number, one in enumerate(report.tensors):
        for label, dtype in one.dtypes.items():
            if label in models:
                held[models[label]][number] = dtypes.setdefault(dtype, len(dtypes))
    return {
        "names": [one.name for one in report.tensors],
        "layers": [layers.get(one.layer) for one in report.tensors],
        "components": [components.get(one.component) for one in report.tensors],
        "shapes": [list(one.shape) for one in report.tensors],
        "dtypeNames": list(dtypes),
        "dtypes": held,
    }


def _model(one: Model) -> dict[str, Any]:
    content = asdict(one)
    return {
        "label": content["label"],
        "reference": content["reference"],
        "tensors": content["tensors"],
        "parameters": content["parameters"],
        "bytes": content["nbytes"],
        "dtypes": content["dtypes"],
        "modelType": content["model_type"],
        "architectures": content["architectures"],
        "layers": content["layers"],
        "tied": content["tied"],
        "embeddingRows": content["embedding_rows"],
        "vocabulary": content["vocabulary"],
        "computed": content["computed"],
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "code": one.code,
        "level": one.level,
        "title": one.title,
        "text": one.text,
        "figures": _figures(one.figures),
        "models": list(one.models),
        "scope": asdict(one.scope),
        "action": one.action,
    }


def _figures(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"name": one.name, "value": rounded(one.value), "unit": one.unit} for one in figures]


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [rounded(value) for value in values]
