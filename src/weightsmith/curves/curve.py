"""Curves through models: points on a line, a polygon or a plane, each of them a checkpoint that is not computed yet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from weightsmith.api import merge
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.manifest import manifest_of
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.curves.plane import plane_through
from weightsmith.curves.positions import Position, along_edges, check_grid, evenly_along_edges
from weightsmith.errors import CheckpointError, MethodError
from weightsmith.plan.merged import LazyCheckpoint

if TYPE_CHECKING:
    from weightsmith.curves.results import Results
    from weightsmith.curves.study import Evaluation

Shape = Literal["line", "polygon", "plane"]
SHAPES: tuple[Shape, ...] = ("line", "polygon", "plane")
# Points that are asked for where nothing else is said.
POINTS = 11
MARGIN = 0.2
# What a written curve says of its points.
POINTS_FILE = "points.json"


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a curve.

    Attributes:
        label: how it is called in tables and as a folder.
        coordinates: ``(lambda,)``, or ``(x, y)`` on a plane, in units of Euclidean distance between weights.
        coefficients: how much of every model it has; they sum to 1.
    """

    label: str
    coordinates: tuple[float, ...]
    coefficients: tuple[float, ...]
    _make: Callable[[], LazyCheckpoint] = field(repr=False)

    @cached_property
    def checkpoint(self) -> LazyCheckpoint:
        """The model at this point: nothing of it is computed until its tensors are read, or it is saved."""
        return self._make()


class Merges:
    """Makes the merge at each point of a shape.

    Attributes:
        planned: the merge in the middle of every edge, or of the plane. Planned at once, so that models which cannot
            be merged are refused before anything is computed.
    """

    def __init__(self, models: Sequence[Checkpoint], shape: Shape, settings: Mapping[str, Any]) -> None:
        self._models = tuple(models)
        self._settings = dict(settings)
        self.planned = (
            [self._mixed([1.0 / len(models)] * len(models))]
            if shape == "plane"
            else [self._between(start, 0.5) for start in range(len(models) - 1)]
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The recipes and files that all points rest on, as JSON values."""
        files = dict.fromkeys(identity for one in self.planned for identity in one.identities)
        return {
            "recipes": [one.to_yaml() for one in self.planned],
            "files": [[one.path, one.size, one.modified, one.header] for one in files],
        }

    def at(self, position: Position) -> LazyCheckpoint:
        """Return the merge at a position."""
        return self._mixed(position.coefficients) if position.edge is None else self._between(*position.edge)

    def _between(self, start: int, share: float) -> LazyCheckpoint:
        base, model = self._models[start : start + 2]
        return merge("interpolate", [model], base, lambda_=share, **self._settings)

    def _mixed(self, coefficients: Sequence[float]) -> LazyCheckpoint:
        return merge("linear", self._models, weight=list(coefficients), normalize=False, **self._settings)


class Curve(Sequence[Point]):
    """The points of a line, a polygon or a plane, in order. Made by :func:`curve`.

    A point is made anew each time that it is asked for, so that a long curve holds no plans of merges.

    Attributes:
        shape: what the points lie on.
        models: the short names of the models, no two the same.
        corners: the coordinates of the models.
        axes: the names of the coordinates: ``("lambda",)``, or ``("x", "y")``.
        warnings: what a person should know before the points are computed.
        identity: recipes and files that all points rest on; where it is the same, so are points of equal coefficients.
    """

    def __init__(
        self,
        shape: Shape,
        models: Sequence[str],
        corners: Sequence[tuple[float, ...]],
        positions: Sequence[Position],
        merges: Merges,
    ) -> None:
        self.shape = shape
        self.models = tuple(models)
        self.corners = tuple(corners)
        self.axes: tuple[str, ...] = ("x", "y") if shape == "plane" else ("lambda",)
        self.warnings = tuple(dict.fromkeys(warning for one in merges.planned for warning in one.warnings))
        self.identity = {"shape": shape, **merges.identity}
        self._positions = tuple(positions)
        self._merges = merges

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> list[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | list[Point]:
        if isinstance(index, slice):
            return [self._point(position) for position in self._positions[index]]
        return self._point(self._positions[index])

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return f"Curve({self.shape} through {', '.join(self.models)}: {len(self)} points)"

    def write(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[Point, bool], None] | None = None,
        **saving: Any,
    ) -> list[Path]:
        """Write every point as a model: ``folder/0.30``, and so on; and ``points.json``, which tells what they are.

        A point that is there already, of the same recipe and the same files, is left as it is.

        Args:
            folder: where to write them.
            overwrite: whether all points are written anew.
            progress: told of every point, and whether it was written just now.
            **saving: see :meth:`weightsmith.plan.output.Output.save`.

        Returns:
            The points' folders, in order.

        Raises:
            OutputError: if there is something else in a point's place, or it cannot be written.
        """
        root, found = Path(folder), []
        for point in self:
            target = root / point.label
            written = overwrite or not is_written(point, target)
            if written:
                point.checkpoint.save(target, overwrite=overwrite, **saving)
            found.append(target)
            if progress is not None:
                progress(point, written)
        (root / POINTS_FILE).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        return found

    def evaluate(self, evaluation: Evaluation, target: str | os.PathLike[str], **options: Any) -> Results:
        """Measure every point; see :func:`weightsmith.curves.study.evaluate`."""
        from weightsmith.curves.study import evaluate

        return evaluate(self, evaluation, target, **options)

    def to_json(self) -> dict[str, Any]:
        """Return shape, models and points as JSON values."""
        return {
            "shape": self.shape,
            "models": [
                {"name": name, "coordinates": dict(zip(self.axes, corner, strict=True))}
                for name, corner in zip(self.models, self.corners, strict=True)
            ],
            "points": [
                {
                    "point": one.label,
                    **dict(zip(self.axes, one.coordinates, strict=True)),
                    "coefficients": list(one.coefficients),
                }
                for one in self._positions
            ],
        }

    def _point(self, position: Position) -> Point:
        def make() -> LazyCheckpoint:
            return self._merges.at(position)

        return Point(position.label, position.coordinates, position.coefficients, make)


def curve(
    models: Sequence[Source],
    points: int | None = None,
    shape: Shape = "line",
    *,
    lambdas: Sequence[float] | None = None,
    margin: float | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Curve:
    """Return the points of a line, a polygon or a plane through models, as checkpoints that are not computed yet.

    - ``line``: ``(1 - lambda) A + lambda B`` (WiSE-FT, arXiv:2109.01903; MI, arXiv:2510.10977; BCWI, arXiv:2301.10546,
      whose alpha is ``1 - lambda``). At 0 and 1 it is exactly A and B; beyond them it extrapolates.
    - ``polygon``: lines from each model to the next. Lambda goes on: 0 is the first model, 1 the second, 2 the third.
      The first model given again at the end closes it.
    - ``plane``: a grid on the plane through three models, in the coordinates of Garipov et al., 2018
      (arXiv:1802.10026); see :class:`weightsmith.curves.positions.Plane`. The models are read once to measure it.

    Tensors that are not of floats, and what travels beside the weights, come from the first model; on a polygon from
    the model that the point's edge begins at.

    Args:
        models: two models for a line, two or more for a polygon, three for a plane: references or checkpoints.
        points: number of points of a line, of each edge of a polygon, along each axis of a plane's grid; 11 by default.
        shape: what the points lie on.
        lambdas: in place of points, where on a line or polygon they lie.
        margin: of a plane, how far the grid goes beyond the triangle, as a share of its width and of its height; 0.2 by
            default.
        threads: how many threads measure a plane; by default one per core.
        **settings: ``dtype``, ``out_dtype``, ``on_missing``, ``on_shape_mismatch``, ``rules``, ``tokenizer_source`` and
            ``chat_template``, as :func:`weightsmith.merge` takes them.

    Raises:
        MethodError: if there are too few or too many models for the shape, or points and lambdas make no grid.
        PlanError: if the models cannot be merged, or span no plane.
        CheckpointError: if a model cannot be read.
    """
    _check_shape(shape, len(models), lambdas, points, margin)
    count = POINTS if points is None else points
    chain = None
    if shape != "plane":
        chain = evenly_along_edges(len(models), count) if lambdas is None else along_edges(len(models), lambdas)
    opened = _open(models)
    _check_different(opened, shape)
    names = _names(opened)
    merges = Merges(opened, shape, settings)
    if chain is not None:
        return Curve(shape, names, [(float(i),) for i in range(len(models))], chain, merges)
    wide = MARGIN if margin is None else margin
    check_grid(count, wide)
    plane = plane_through(merges.planned[0], names, threads=threads)
    return Curve(shape, names, plane.corners, plane.grid(count, wide), merges)


def is_written(point: Point, target: Path) -> bool:
    """Whether a folder holds a point already: its manifest names the same recipe and the same files."""
    try:
        manifest = manifest_of(target)
    except (OSError, CheckpointError):
        return False
    return manifest.recipe == point.checkpoint.to_yaml() and manifest.inputs == point.checkpoint.identities


def _check_shape(
    shape: str, models: int, lambdas: Sequence[float] | None, points: int | None, margin: float | None
) -> None:
    if shape not in SHAPES:
        raise MethodError(f"shape is {shape!r}; it is one of {', '.join(SHAPES)}")
    if models < 2:
        raise MethodError(f"{models} model{'' if models == 1 else 's'} given; a curve runs between two or more")
    if shape == "line" and models > 2:
        raise MethodError(
            f"a line runs between two models, and {models} are given; take --shape polygon to go on from each to the "
            "next" + (", or --shape plane" if models == 3 else "")
        )
    if shape == "plane" and models != 3:
        raise MethodError(f"three models span a plane, and {models} are given")
    if margin is not None and shape != "plane":
        raise MethodError(f"margin is for the grid of a plane; a {shape} goes on where lambdas say so")
    if lambdas is not None and (points is not None or shape == "plane"):
        raise MethodError(
            "a plane's grid is set by points and margin; lambdas are for lines and polygons"
            if shape == "plane"
            else "give either points or lambdas"
        )


def _check_different(models: Sequence[Checkpoint], shape: Shape) -> None:
    if shape == "plane" and len(set(models)) < len(models):
        raise MethodError("one of the models is given twice; three different models span a plane")
    for one, other in pairwise(models):
        if one is other:
            raise MethodError(f"{one.name} is given twice, one after the other: there is no line between them")


def _open(models: Sequence[Source]) -> list[Checkpoint]:
    """Open models; one that is named twice is opened once."""
    known: dict[str | Checkpoint, Checkpoint] = {}
    found = []
    for model in models:
        key = model if isinstance(model, Checkpoint) else os.fspath(model)
        if key not in known:
            known[key] = as_checkpoint(model)
        found.append(known[key])
    return found


def _names(models: Sequence[Checkpoint]) -> list[str]:
    """Return the models' short names, numbered where two different ones have the same."""
    taken: dict[str, Checkpoint] = {}
    names = []
    for model in models:
        short = parse_reference(model.name).short_name
        name, number = short, 1
        while taken.setdefault(name, model) is not model:
            number += 1
            name = f"{short}#{number}"
        names.append(name)
    return names
