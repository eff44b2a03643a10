"""Where the points of a curve lie: their coordinates, and how much of every model each of them has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from weightsmith.errors import MethodError

# More is a mistake.
_MOST_POINTS, _MOST_ON_AXIS = 10_001, 201


@dataclass(frozen=True)
class Position:
    """A place on a curve.

    Attributes:
        label: how it is called in tables and as a folder: ``0.30``, or ``1.25,-0.4`` on a plane.
        coordinates: lambda, or the two coordinates on a plane.
        coefficients: how much of every model it has; they sum to 1.
        edge: the index of the model that its edge begins at, and lambda along that edge; None on a plane.
    """

    label: str
    coordinates: tuple[float, ...]
    coefficients: tuple[float, ...]
    edge: tuple[int, float] | None = None


def steps(points: int) -> list[float]:
    """Return so many lambdas from 0 to 1, each the double nearest to ``i / (points - 1)``.

    Raises:
        MethodError: if there are fewer than two, or very many.
    """
    if not 2 <= points <= _MOST_POINTS:
        raise MethodError(f"points is {points}; a curve has 2 at least, and at most {_MOST_POINTS:,}")
    return [i / (points - 1) for i in range(points)]


def along_edges(models: int, lambdas: Iterable[float]) -> list[Position]:
    """Return the points of a chain of models, where whole lambdas are the models.

    Args:
        models: number of models; 2 for a line.
        lambdas: from 0, the first model, to ``models - 1``, the last; beyond them the outer edges are extrapolated.

    Raises:
        MethodError: if a lambda is not finite, there is none, or one is given twice.
    """
    found = []
    for one in _checked(lambdas):
        start = min(max(math.floor(one), 0), models - 2)
        # Of the decimal that was written: 1.3 is 0.3 after the second model, and not 0.30000000000000004.
        found.append((one, start, float(Decimal(repr(one)) - start)))
    return _labelled_edges(models, found)


def evenly_along_edges(models: int, points: int) -> list[Position]:
    """Return evenly spaced points of a chain of models: so many for each edge, the models at its ends among them."""
    shares = steps(points)
    inner = [(start + share, start, share) for start in range(models - 1) for share in shares[:-1]]
    return _labelled_edges(models, [*inner, (float(models - 1), models - 2, 1.0)])


def _labelled_edges(models: int, found: Sequence[tuple[float, int, float]]) -> list[Position]:
    labels = labels_of([one for one, _, _ in found])
    positions = []
    for label, (one, start, share) in zip(labels, found, strict=True):
        coefficients = [0.0] * models
        coefficients[start], coefficients[start + 1] = 1.0 - share, share
        positions.append(Position(label, (one,), tuple(coefficients), (start, share)))
    return positions


def _checked(lambdas: Iterable[float]) -> list[float]:
    # Adding 0.0 makes -0.0 what it is.
    found = sorted(float(one) + 0.0 for one in lambdas)
    if not found:
        raise MethodError("no lambda is given; give at least one, such as 0.5")
    for one in found:
        if not math.isfinite(one):
            raise MethodError(f"lambda {one} is not finite; give numbers such as 0, 0.25 and 1.2")
    for one, other in pairwise(found):
        if one == other:
            raise MethodError(f"lambda {one} is given twice")
    return found


def labels_of(values: Sequence[float]) -> list[str]:
    """Return a short text for every number, different for different ones: ``0.30``, ``0.125``, ``0.333333``."""
    return _distinct(values, _short)


def _short(value: float) -> str:
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.6f}".rstrip("0")


def _distinct(values: Sequence[float], write: Callable[[float], str]) -> list[str]:
    texts = [write(value) for value in values]
    different: dict[str, set[float]] = {}
    for text, value in zip(texts, values, strict=True):
        different.setdefault(text, set()).add(value)
    return [repr(value) if len(different[text]) > 1 else text for text, value in zip(texts, values, strict=True)]


@dataclass(frozen=True)
class Plane:
    """The plane through three models A, B and C, with the coordinates of Garipov et al., 2018 (arXiv:1802.10026).

    ``u = B - A``, and v is what ``C - A`` has at right angles to it: ``v = C - A - u <C - A, u> / <u, u>``. The point
    (x, y) is ``A + x u / |u| + y v / |v|``: x and y are Euclidean distances between weights, and A lies at (0, 0).

    Attributes:
        along: length of ``B - A``: B lies at (along, 0).
        across: C's first coordinate.
        height: C's second coordinate, above 0.
    """

    along: float
    across: float
    height: float

    @property
    def corners(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """The coordinates of A, B and C."""
        return (0.0, 0.0), (self.along, 0.0), (self.across, self.height)

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """Return how much of A, B and C a point has: its barycentric coordinates, which sum to 1."""
        c = y / self.height
        b = (x - c * self.across) / self.along
        return 1.0 - b - c, b, c

    def grid(self, points: int, margin: float) -> list[Position]:
        """Return a grid over the triangle's bounding box, by rows of constant y, lowest first.

        The box is made wider by the margin, as a share of its width, on either side, and higher likewise. The authors'
        box is that of A, B and the right angle; it is this one where C lies above the edge from A to B.

        Args:
            points: number of points along either axis.
            margin: 0 for none.

        Raises:
            MethodError: see :func:`check_grid`.
        """
        check_grid(points, margin)
        xs, ys = (_spread([corner[axis] for corner in self.corners], steps(points), margin) for axis in (0, 1))
        names = [_distinct(axis, lambda value: f"{value:.4g}") for axis in (xs, ys)]
        return [
            Position(f"{first},{second}", (x, y), self.coefficients(x, y))
            for y, second in zip(ys, names[1], strict=True)
            for x, first in zip(xs, names[0], strict=True)
        ]


def check_grid(points: int, margin: float) -> None:
    """Check the settings of a grid on a plane.

    Raises:
        MethodError: if there are fewer than two points, or very many, or the margin is negative or not finite.
    """
    if not 2 <= points <= _MOST_ON_AXIS:
        raise MethodError(f"points is {points}; a plane has its square: give 2 to {_MOST_ON_AXIS} along an axis")
    if not (math.isfinite(margin) and margin >= 0):
        raise MethodError(f"margin is {margin}; give a share of the triangle's width, 0 or more")


def _spread(corners: Sequence[float], shares: Sequence[float], margin: float) -> list[float]:
    low, width = min(corners), max(corners) - min(corners)
    return [low + width * (share * (1.0 + 2.0 * margin) - margin) + 0.0 for share in shares]
