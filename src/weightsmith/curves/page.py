"""``curve.html``: the plots and the table in one page that needs no network and runs no script.

Values show where the pointer is over a point, or where the keyboard is; colours follow light and dark.
"""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise

from weightsmith.curves.results import Result, Results, spread, write
from weightsmith.curves.scale import Scale, borders, colour, padded, texts, ticks
from weightsmith.document import document

# Of a plot, in units of its own picture.
_WIDTH, _HEIGHT = 760.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 24.0, 44.0, 56.0
_BAR = 92.0
# Most height of a map, which keeps the plane's proportions.
_MOST = 760.0

_STYLE = """
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 52rem; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; overflow: visible; }
svg text { fill: var(--ink); } svg .quiet, .quiet { fill: var(--quiet); color: var(--quiet); }
.grid { stroke: var(--grid); } .model { stroke: var(--quiet); stroke-dasharray: 4 4; }
.line { fill: none; stroke: var(--link); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--link); stroke: var(--ground); stroke-width: 1.5; } .none { stroke: var(--quiet); stroke-width: 2; }
.rim { fill: none; stroke: #ffffff; stroke-width: 6; }
.best { fill: none; stroke: var(--best); stroke-width: 2.5; }
.peak { fill: none; stroke: #b4470c; stroke-width: 3; }
.corner { fill: #ffffff; stroke: #000000; stroke-width: 1.5; }
.halo { paint-order: stroke; stroke: var(--ground); stroke-width: 4px; stroke-linejoin: round; }
.cell { fill: #000000; fill-opacity: 0; } .hollow { fill: var(--grid); }
.point .told { visibility: hidden; pointer-events: none; font-weight: 600; }
.point:hover .told, .point:focus .told { visibility: visible; }
.point:focus { outline: none; } .point:focus .dot, .point:hover .dot { stroke: var(--ink); }
.point:focus .cell, .point:hover .cell { stroke: var(--ground); stroke-width: 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--grid); padding: 0.25rem 0.75rem; text-align: right; white-space: nowrap; }
tr.best td { color: var(--best); font-weight: 600; }
"""


def page(results: Results) -> str:
    """Return the page.

    Raises:
        EvaluationError: if a metric is to be shown that was not measured.
    """
    title = f"{results.shape.capitalize()} through {', '.join(results.models)}"
    best = results.best()
    said = "No point has a finite value." if best is None else f"{str(best)[0].upper()}{str(best)[1:]}."
    plot = _map if results.shape == "plane" else _graph
    plots = [
        f"<h2>{escape(metric)}</h2>\n{plot(results, metric, f'plot{number}')}"
        for number, metric in enumerate(results.shown)
    ]
    failures = "".join(f"<li>{escape(one.reason)}</li>" for one in results.failures)
    return document(
        title,
        _STYLE,
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(said)}</p>",
            *plots,
            f"<h2>Not measured</h2>\n<ul>{failures}</ul>" if failures else "",
            "<h2>All values</h2>",
            _table(results),
        ],
    )


def told(results: Results, point: Result, metric: str) -> str:
    """Say in one line where a point is and what its value is."""
    value = point.metrics.get(metric)
    place = f"lambda {point.label}" if len(results.axes) == 1 else f"({point.label.replace(',', ', ')})"
    return f"{place}: {'no value' if value is None else write(value)}"


def _graph(results: Results, metric: str, key: str) -> str:
    """Draw a metric against lambda."""
    points = results.points
    values = [point.metrics.get(metric, math.nan) for point in points]
    lambdas = [point.coordinates[0] for point in points]
    x = Scale(*padded(min(lambdas), max(lambdas), 0.03), _LEFT, _WIDTH - _RIGHT)
    y = Scale(*padded(*spread(values), 0.1), _HEIGHT - _BOTTOM, _TOP)
    parts = [*_y_axis(y, _LEFT, _WIDTH - _RIGHT), *_x_axis(x, _HEIGHT - _BOTTOM, "lambda")]
    shown = [(one, corner[0]) for one, corner in zip(results.models, results.corners, strict=True)]
    inside = [(name, x(place)) for name, place in shown if x.low <= place <= x.high]
    for name, place in inside:
        parts.append(f'<line class="model" x1="{place:.1f}" y1="{_TOP:.1f}" x2="{place:.1f}" y2="{y.begin:.1f}"/>')
        parts.append(_text(place, _TOP - 24, _short(name), "quiet", _anchor(place)))
    parts += [f'<polyline class="line" points="{run}"/>' for run in _runs(lambdas, values, x, y)]
    best = results.best(metric)
    winners = () if best is None else best.points
    for point, value, place in zip(points, values, lambdas, strict=True):
        across = x(place)
        if math.isfinite(value):
            up = y(value)
            mark = f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="5"/>'
            if point in winners:
                mark += f'<circle class="best" cx="{across:.1f}" cy="{up:.1f}" r="9"/>'
        else:
            up = y.begin - 8
            mark = f'<path class="none" d="M{across - 4:.1f} {up - 4:.1f}l8 8m0-8l-8 8"/>'
        parts.append(_point(results, point, metric, mark, across, up - 14))
    about = f"{metric} against lambda; {len(points)} points"
    return _svg(key, about, _spoken(results, metric), _WIDTH, _HEIGHT, parts)


def _runs(lambdas: list[float], values: list[float], x: Scale, y: Scale) -> list[str]:
    """Return the stretches of a line between points without a value."""
    runs: list[list[str]] = [[]]
    for place, value in zip(lambdas, values, strict=True):
        if math.isfinite(value):
            runs[-1].append(f"{x(place):.1f},{y(value):.1f}")
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if len(run) > 1]


def _map(results: Results, metric: str, key: str) -> str:
    """Draw a metric over the plane, in the plane's own proportions."""
    edges = [borders(sorted({point.coordinates[axis] for point in results.points})) for axis in (0, 1)]
    (left, right), (low, high) = ((one[0], one[-1]) for one in edges)
    width = _WIDTH - _LEFT - _BAR - _RIGHT
    height = width * (high - low) / (right - left)
    if height > _MOST:
        width, height = width * _MOST / height, _MOST
    x, y = Scale(left, right, _LEFT, _LEFT + width), Scale(low, high, _TOP + height, _TOP)
    least, most = spread([point.metrics.get(metric, math.nan) for point in results.points])
    shade = Scale(*padded(least, most, 0.0), 0.0, 1.0) if most > least else None
    cells, points = [], []
    best = results.best(metric)
    for point in results.points:
        box = [_around(one, place) for one, place in zip(edges, point.coordinates, strict=True)]
        begin, top = x(box[0][0]), y(box[1][1])
        size = f'width="{x(box[0][1]) - begin:.2f}" height="{y(box[1][0]) - top:.2f}"'
        place = f'x="{begin:.2f}" y="{top:.2f}" {size}'
        value = point.metrics.get(metric, math.nan)
        if math.isfinite(value):
            cells.append(f'<rect {place} fill="{colour(shade(value) if shade else 0.5)}"/>')
        else:
            cells.append(f'<rect class="hollow" {place}/>')
        mark = f'<rect class="cell" {place}/>'
        across, up = x(point.coordinates[0]), y(point.coordinates[1])
        if best is not None and point in best.points:
            mark += "".join(
                f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="8"/>' for kind in ("rim", "peak")
            )
        points.append(_point(results, point, metric, mark, across, max(top - 6, 14.0)))
    corners = []
    for name, (first, second) in zip(results.models, results.corners, strict=True):
        corners.append(f'<circle class="corner" cx="{x(first):.1f}" cy="{y(second):.1f}" r="5"/>')
        corners.append(_text(x(first), y(second) + 20, _short(name), "halo", "middle"))
    parts = [f'<g shape-rendering="crispEdges">{"".join(cells)}</g>', *corners, *points]
    parts += [*_y_axis(y, _LEFT, None), *_x_axis(x, _TOP + height, results.direction, lines=False)]
    parts += _bar(least, most, x.end + 24, height)
    about = f"{metric} over the plane through {', '.join(results.models)}; {len(points)} points"
    return _svg(key, about, _spoken(results, metric), _WIDTH, _TOP + height + _BOTTOM, parts)


def _bar(least: float, most: float, left: float, height: float) -> list[str]:
    """Draw the colours of values beside a map."""
    pieces = 64
    step = height / pieces
    parts = [
        f'<rect x="{left:.1f}" y="{_TOP + height - (i + 1) * step:.2f}" width="16" height="{step + 0.5:.2f}" '
        f'fill="{colour((i + 0.5) / pieces if most > least else 0.5)}"/>'
        for i in range(pieces)
    ]
    if most <= least:
        return [*parts, _text(left + 22, _TOP + height / 2 + 4, write(least), "", "start")]
    y = Scale(least, most, _TOP + height, _TOP)
    values = ticks(least, most)
    return [
        *parts,
        *(_text(left + 22, y(value) + 4, text, "", "start") for value, text in zip(values, texts(values), strict=True)),
    ]


def _y_axis(y: Scale, left: float, right: float | None) -> list[str]:
    values = ticks(y.low, y.high)
    parts = []
    for value, text in zip(values, texts(values), strict=True):
        if right is not None:
            parts.append(f'<line class="grid" x1="{left}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}"/>')
        parts.append(_text(left - 10, y(value) + 4, text, "quiet", "end"))
    return parts


def _x_axis(x: Scale, bottom: float, name: str, *, lines: bool = True) -> list[str]:
    values = ticks(x.low, x.high, 12)
    parts = []
    for value, text in zip(values, texts(values), strict=True):
        if lines:
            parts.append(f'<line class="grid" x1="{x(value):.1f}" y1="{_TOP}" x2="{x(value):.1f}" y2="{bottom:.1f}"/>')
        parts.append(_text(x(value), bottom + 20, text, "quiet", "middle"))
    return [*parts, _text((x.begin + x.end) / 2, bottom + 42, name, "quiet", "middle")]


def _point(results: Results, point: Result, metric: str, mark: str, across: float, up: float) -> str:
    said = escape(told(results, point, metric))
    return (
        f'<g class="point" tabindex="0" role="img" aria-label="{said}"><title>{said}</title>{mark}'
        f'<text class="told halo" x="{across:.1f}" y="{up:.1f}" text-anchor="{_anchor(across)}">{said}</text></g>'
    )


def _anchor(across: float) -> str:
    """Say on which side of a place a text goes, so that it stays within the picture."""
    return "start" if across < _WIDTH / 6 else "end" if across > _WIDTH * 5 / 6 else "middle"


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(key: str, title: str, description: str, width: float, height: float, parts: list[str]) -> str:
    return "\n".join(
        [
            f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="group" aria-labelledby="{key}-t {key}-d">',
            f'<title id="{key}-t">{escape(title)}</title>',
            f'<desc id="{key}-d">{escape(description)}</desc>',
            *parts,
            "</svg>",
        ]
    )


def _spoken(results: Results, metric: str) -> str:
    best = results.best(metric)
    finite = [v for one in results.points if math.isfinite(v := one.metrics.get(metric, math.nan))]
    if best is None:
        return "No point has a finite value."
    return f"From {write(min(finite))} to {write(max(finite))}. {best}."


def _around(edges: list[float], place: float) -> tuple[float, float]:
    """Return the cell that a place lies in."""
    return next((low, high) for low, high in pairwise(edges) if low <= place <= high)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


def _table(results: Results) -> str:
    metrics = results.metrics
    best = results.best()
    winners = () if best is None else best.points
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*results.axes, *results.shares, *metrics))
    rows = []
    for one in results.points:
        values = [*map(write, one.coordinates), *(f"{share:.3f}" for share in one.coefficients)]
        values += [write(one.metrics.get(name)) for name in metrics]
        kind = ' class="best"' if one in winners else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + ("\n</tbody>\n</table></div>")
    )
