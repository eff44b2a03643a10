"""``curve.png``: the plots as a picture, drawn by matplotlib (the extra ``weightsmith[plot]``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from weightsmith.curves.results import Results
from weightsmith.curves.scale import borders

_INCHES, _DPI = (8.0, 4.0), 150
# Values beyond it are left out: matplotlib's own arithmetic overflows near the largest doubles.
_LARGEST = 1e100


def draw(results: Results, path: Path) -> None:
    """Draw every metric that is shown, one below the other.

    Args:
        results: what was measured; one point at least.
        path: the file to write.

    Raises:
        EvaluationError: if a metric is to be shown that was not measured.
        OSError: if the file cannot be written.
    """
    # Without pyplot, which holds state of its own and may look for a screen.
    from matplotlib.figure import Figure

    metrics = results.shown
    plane = results.shape == "plane"
    height = _INCHES[0] * 0.8 if plane else _INCHES[1]
    figure = Figure(figsize=(_INCHES[0], height * len(metrics)), layout="constrained")
    for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics, strict=True):
        # A name from elsewhere is text, and no formula.
        axes.set_title(metric, loc="left", parse_math=False, pad=6 if plane else 18)
        (_map if plane else _graph)(figure, axes, results, metric)
    figure.savefig(path, dpi=_DPI)


def _graph(figure: Any, axes: Any, results: Results, metric: str) -> None:
    lambdas = [point.coordinates[0] for point in results.points]
    values = [_drawn(point.metrics.get(metric)) for point in results.points]
    axes.plot(lambdas, values, marker="o", markersize=5, color="#1f6feb")
    best = results.best(metric)
    if best is not None:
        places = [point.coordinates[0] for point in best.points]
        axes.plot(places, [_drawn(best.value)] * len(places), "o", markersize=12, fillstyle="none", color="#b4470c")
    for name, (place,) in zip(results.models, results.corners, strict=True):
        if min(lambdas) <= place <= max(lambdas):
            axes.axvline(place, color="#5f6972", linestyle="--", linewidth=0.8)
            axes.annotate(
                name,
                (place, 1),
                (0, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color="#5f6972",
                parse_math=False,
            )
    axes.set_xlabel("lambda")
    axes.grid(color="#e3e6e9")
    axes.set_axisbelow(True)


def _map(figure: Any, axes: Any, results: Results, metric: str) -> None:
    import numpy as np

    xs, ys = (sorted({point.coordinates[axis] for point in results.points}) for axis in (0, 1))
    values = np.full((len(ys), len(xs)), np.nan)
    for point in results.points:
        x, y = point.coordinates
        values[ys.index(y), xs.index(x)] = _drawn(point.metrics.get(metric))
    shown = np.ma.masked_invalid(values)
    axes.set_facecolor("#e3e6e9")
    mesh = axes.pcolormesh(borders(xs), borders(ys), shown, cmap="viridis")
    figure.colorbar(mesh, ax=axes)
    if min(shown.shape) > 2 and shown.count() == shown.size and shown.max() > shown.min():
        axes.contour(xs, ys, shown, colors="white", linewidths=0.6, alpha=0.7)
    best = results.best(metric)
    if best is not None:
        places = [point.coordinates for point in best.points]
        axes.plot(*zip(*places, strict=True), "o", markersize=10, fillstyle="none", color="#b4470c", markeredgewidth=2)
    for name, (x, y) in zip(results.models, results.corners, strict=True):
        axes.plot([x], [y], "o", color="white", markeredgecolor="black", markersize=7)
        label = axes.annotate(name, (x, y), (0, -14), textcoords="offset points", ha="center", parse_math=False)
        label.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5})
    axes.set_aspect("equal")
    axes.set_xlabel(results.direction, parse_math=False)


def _drawn(value: float | None) -> float:
    """Return a value as it is drawn: NaN where it is not."""
    return math.nan if value is None or not abs(value) < _LARGEST else value
