"""What was measured along a curve: values by point, and the best of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import EvaluationError, did_you_mean


@dataclass(frozen=True)
class Result:
    """What was measured at a point.

    Attributes:
        label: how the point is called.
        coordinates: lambda, or x and y.
        coefficients: how much of every model it has.
        metrics: metric -> value, which may be NaN or infinite.
        seconds: how long it took to make and measure the model.
    """

    label: str
    coordinates: tuple[float, ...]
    coefficients: tuple[float, ...]
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A point that could not be measured, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Best:
    """The best value of a metric.

    Attributes:
        metric: the metric.
        minimize: whether the best value is the least.
        value: the best value.
        points: the points that have it, in order; more than one where they tie.
    """

    metric: str
    minimize: bool
    value: float
    points: tuple[Result, ...]

    def __str__(self) -> str:
        """Name the value and its points in one line."""
        first, *others = (one.label for one in self.points)
        tied = f" (the same at {', '.join(others[:5])}{' …' if len(others) > 5 else ''})" if others else ""
        return f"{'least' if self.minimize else 'greatest'} {self.metric}: {write(self.value)} at {first}{tied}"


@dataclass(frozen=True)
class Results:
    """What was measured along a curve.

    Attributes:
        shape: ``line``, ``polygon`` or ``plane``.
        axes: the names of the coordinates.
        models: the models' names.
        corners: the models' coordinates.
        points: the points that were measured, in order.
        failures: those that could not be.
        chosen: the metrics that a person asked for, the one that decides first; empty for all, of which the first that
            was ever given decides.
        minimize: whether less is better.
    """

    shape: str
    axes: tuple[str, ...]
    models: tuple[str, ...]
    corners: tuple[tuple[float, ...], ...]
    points: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    chosen: tuple[str, ...] = ()
    minimize: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, in the order in which they first came."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.metrics))

    @property
    def shares(self) -> tuple[str, ...]:
        """What the coefficients are called: a metric may be called as a model is."""
        return tuple(f"of {name}" for name in self.models)

    @property
    def direction(self) -> str:
        """What the first coordinate of a plane is."""
        return f"distance from {self.models[0]} towards {self.models[1]}"

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics to show: those that were asked for, or all.

        Raises:
            EvaluationError: if one that was asked for is not among them.
        """
        known = self.metrics
        for name in self.chosen if known else ():
            if name not in known:
                raise EvaluationError(
                    f"there is no metric {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
                )
        return self.chosen or known

    def best(self, metric: str | None = None, *, minimize: bool | None = None) -> Best | None:
        """Return the best value of a metric and the points that have it; None where no value is finite.

        Args:
            metric: the metric; by default the first that is shown.
            minimize: whether less is better; by default as these results say.
        """
        names = self.shown
        name = metric if metric is not None else names[0] if names else None
        least = self.minimize if minimize is None else minimize
        finite = [one for one in self.points if name is not None and math.isfinite(one.metrics.get(name, math.nan))]
        if name is None or not finite:
            return None
        value = (min if least else max)(one.metrics[name] for one in finite)
        return Best(name, least, value, tuple(one for one in finite if one.metrics[name] == value))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; NaN and infinities are texts, which JSON has no numbers for."""
        best = self.best()
        return {
            "shape": self.shape,
            "models": [
                {"name": name, "coordinates": dict(zip(self.axes, corner, strict=True))}
                for name, corner in zip(self.models, self.corners, strict=True)
            ],
            "points": [self._to_json(point) for point in self.points],
            "failures": [vars(failure) for failure in self.failures],
            "best": None
            if best is None
            else {
                "metric": best.metric,
                "minimize": best.minimize,
                "value": best.value,
                "points": [one.label for one in best.points],
            },
        }

    def _to_json(self, point: Result) -> dict[str, Any]:
        return {
            "point": point.label,
            **dict(zip(self.axes, point.coordinates, strict=True)),
            "coefficients": list(point.coefficients),
            "metrics": {name: number_to_json(value) for name, value in point.metrics.items()},
            "seconds": point.seconds,
        }

    def to_csv(self) -> str:
        """Return a table: a row for each point, columns for coordinates, coefficients by model, metrics and seconds."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        metrics = self.metrics
        table.writerow(["point", *self.axes, *self.shares, *metrics, "seconds"])
        for one in self.points:
            values = [one.metrics.get(name, "") for name in metrics]
            table.writerow([one.label, *one.coordinates, *one.coefficients, *values, one.seconds])
        return text.getvalue()


def number_to_json(value: float) -> float | str:
    """Return a number as JSON has it; one that is not finite as a text, which ``float`` reads."""
    return value if math.isfinite(value) else str(value)


def write(value: float | None) -> str:
    """Write a number for people: six digits at most, a dash for none."""
    return "-" if value is None else f"{value:.6g}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest of the finite values, for an axis; 0 and 1 where there are none."""
    # Beyond this the width of an axis would be infinite.
    finite = [min(max(value, -1e300), 1e300) for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)
