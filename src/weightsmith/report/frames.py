"""A report's tables as data frames."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from weightsmith.errors import ReportError, did_you_mean
from weightsmith.report.findings import Report, Scope, Scoped

LIBRARIES = ("pandas", "polars")
# Tables that hold a row for each scope.
_SCOPED = ("changes", "agreements", "conflicts", "overlaps", "histograms", "composition")
_PLAIN = ("models", "layers", "tensors", "subspaces", "spectra", "sampling", "timings", "findings", "advice")
_HEALTH = ("nonfinite", "rows", "differences", "tokens")


def frames(report: Report, library: str = "pandas") -> dict[str, Any]:
    """Return every table of a report as a data frame.

    Tables that hold a row for each scope have the columns ``per`` (``total``, ``components``, ``layers``, ``cells`` or
    ``tensors``), ``layer``, ``component`` and ``tensor``. Of composition, there is a row for each model. ``models``
    begins with the base and ends with the merged result. Tables without rows are left out, and values that are not
    there are missing.

    Args:
        report: the report.
        library: ``pandas`` or ``polars``: whose data frames are wanted.

    Raises:
        ReportError: if the library is another, or not installed.
    """
    if library not in LIBRARIES:
        raise ReportError(
            f"{library!r} makes no data frames here{did_you_mean(library, LIBRARIES)}; use pandas or polars"
        )
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise ReportError(f"data frames need {library} ({error}): pip install {library}") from error
    found = {}
    for name, rows in tables(report).items():
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        # Rows of strings, numbers and tuples: a column is of one kind throughout, or has values missing.
        found[name] = module.DataFrame(columns) if library == "pandas" else module.DataFrame(columns, strict=False)
    return found


def tables(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Return every table of a report as rows of column -> value; tables without rows are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in _SCOPED:
        scoped: Scoped[Any] = getattr(report, name)
        found[name] = [
            {"per": per.name, **row}
            for per in fields(Scoped)
            for one in getattr(scoped, per.name)
            for row in _rows(one)
        ]
    for name in _PLAIN:
        found[name] = [row for one in getattr(report, name) for row in _rows(one)]
    for name in _HEALTH:
        found[name] = [row for one in getattr(report.health, name) for row in _rows(one)]
    sides = [report.base, *report.models, *([] if report.result is None else [report.result])]
    found["models"] = [row for one in sides for row in _rows(one)]
    return {name: rows for name, rows in found.items() if rows}


def _rows(one: Any) -> list[dict[str, Any]]:
    """Return a row as columns: a scope takes three; of lists that go by model, each model has a row of its own."""
    row: dict[str, Any] = {}
    for field in fields(one):
        value = getattr(one, field.name)
        row |= (
            {part.name: getattr(value, part.name) for part in fields(Scope)}
            if isinstance(value, Scope)
            else {field.name: value}
        )
    if "coefficients" not in row:
        return [row]
    by_model = {name: row.pop(name) for name in ("models", "coefficients", "cosines", "contributions")}
    singular = {"models": "model", "coefficients": "coefficient", "cosines": "cosine", "contributions": "contribution"}
    return [
        {**row, **{singular[name]: value for name, value in zip(by_model, values, strict=True)}}
        for values in zip(*by_model.values(), strict=True)
    ]
