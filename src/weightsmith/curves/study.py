"""Measuring the points of a curve, one at a time, with a person's own command or function."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from weightsmith.curves.command import Command, named
from weightsmith.curves.curve import Curve, Point, is_written
from weightsmith.curves.journal import RESULTS_FILE, Journal
from weightsmith.curves.page import page
from weightsmith.curves.results import Failure, Result, Results
from weightsmith.errors import EvaluationError, OutputError
from weightsmith.plan.merged import LazyCheckpoint

# Where a point is written that is not kept, and what a command that failed printed.
_POINT, _FAILED = ".point", "failed"
PLOT_FILE, PAGE_FILE = "curve.png", "curve.html"

Answer = float | Mapping[str, Any]
Evaluation = str | Command | Callable[[LazyCheckpoint], Answer]
# Told of every point: its result or failure, its number from 1, how many there are, and whether it was known before.
Listener = Callable[[Result | Failure, int, int, bool], None]


def evaluate(
    curve: Curve,
    evaluation: Evaluation,
    target: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = (),
    minimize: bool = False,
    models: str | os.PathLike[str] | None = None,
    keep_going: bool = False,
    restart: bool = False,
    png: bool | None = None,
    progress: Listener | None = None,
    **saving: Any,
) -> Results:
    """Measure every point of a curve, and write a table and a plot of what was found.

    In target: ``results.jsonl``, a line for each point as soon as it is measured, by which a further call goes on and
    a finer grid uses what is known; ``results.json``, ``results.csv``, ``curve.html`` and, with matplotlib,
    ``curve.png``. Of a line or polygon they tell of every point in ``results.jsonl``; of a plane, of this grid's.

    A command is run on each point in turn, written to a hidden folder in target that is removed afterwards. It must
    end with 0 and print, as its last line, a number or a JSON object of which every number is a metric. What it printed
    is kept where it failed, in ``target/failed``.

    Args:
        curve: the points.
        evaluation: a command, with ``{model}`` where the model's folder belongs; or a function that takes the lazy
            checkpoint and returns a number or a mapping from metric to number. What a function raises is not caught.
        target: a folder for the results.
        metrics: the metrics to show, the one that decides which point is best first; by default all.
        minimize: whether less is better.
        models: a folder in which the models are kept, as :meth:`Curve.write` does.
        keep_going: whether to go on with the next point where a command fails.
        restart: whether to discard results that are there.
        png: whether to draw ``curve.png``; by default where matplotlib is installed.
        progress: told of every point.
        **saving: see :meth:`weightsmith.plan.output.Output.save`.

    Raises:
        EvaluationError: if a command fails, takes too long or gives no number; or the plot needs matplotlib.
        OutputError: if target holds the results of another curve or evaluation, or cannot be written.
    """
    command = Command(evaluation) if isinstance(evaluation, str) else evaluation
    if isinstance(command, Command):
        command.check()
    draws = _draws(png)
    root = Path(target)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {root}: {error.strerror}") from error
    failures: list[Failure] = []
    with Journal(root / RESULTS_FILE, {**curve.identity, "evaluation": _named(command)}, restart=restart) as journal:
        measure = _Measure(command, root, None if models is None else Path(models), saving)
        for number, point in enumerate(curve, 1):
            known = journal.find(point.coefficients)
            found: Result | Failure
            try:
                if known is not None:
                    measure.keep(point)
                found = known or measure(point)
            except EvaluationError as error:
                if not keep_going:
                    raise
                found = Failure(point.label, str(error))
            if isinstance(found, Failure):
                failures.append(found)
            elif known is None:
                journal.add(found)
            if progress is not None:
                progress(found, number, len(curve), known is not None)
        shown = _shown(curve, journal)
    results = Results(
        curve.shape, curve.axes, curve.models, curve.corners, shown, tuple(failures), tuple(metrics), minimize
    )
    _write(root, results, draws=draws)
    return results


def can_draw() -> bool:
    """Whether matplotlib is installed, which draws ``curve.png``."""
    return importlib.util.find_spec("matplotlib") is not None


def _draws(png: bool | None) -> bool:
    """Decide whether to draw, before anything is measured."""
    if png and not can_draw():
        raise EvaluationError("curve.png needs matplotlib: pip install 'weightsmith[plot]'; curve.html needs nothing")
    return can_draw() if png is None else png


def _named(evaluation: Command | Callable[..., Any]) -> dict[str, Any]:
    """Return what results depend on of an evaluation; how long it may take is not among it."""
    if isinstance(evaluation, Command):
        return {"command": evaluation.text, "shell": evaluation.shell}
    return {"function": f"{evaluation.__module__}.{getattr(evaluation, '__qualname__', type(evaluation).__qualname__)}"}


def _shown(curve: Curve, journal: Journal) -> tuple[Result, ...]:
    if curve.shape == "plane":
        # Points between those of another grid would tear holes into the map.
        return tuple(one for one in (journal.find(point.coefficients) for point in curve) if one is not None)
    return tuple(sorted(journal.results, key=lambda one: one.coordinates))


class _Measure:
    """Measures one point after the other."""

    def __init__(
        self, evaluation: Command | Callable[[LazyCheckpoint], Answer], root: Path, models: Path | None, saving: Any
    ) -> None:
        self._evaluation = evaluation
        self._root = root
        self._models = models
        self._saving = saving

    def __call__(self, point: Point) -> Result:
        started = time.monotonic()
        if isinstance(self._evaluation, Command):
            metrics = self._by_command(self._evaluation, point)
        else:
            self.keep(point)
            metrics = named(self._evaluation(point.checkpoint))
        seconds = round(time.monotonic() - started, 3)
        return Result(point.label, point.coordinates, point.coefficients, metrics, seconds)

    def keep(self, point: Point) -> Path | None:
        """Write a point where models are kept, unless it is there; return its folder, or None if none are kept."""
        if self._models is None:
            return None
        target = self._models / point.label
        if self._saving.get("overwrite") or not is_written(point, target):
            point.checkpoint.save(target, **self._saving)
        return target

    def _by_command(self, command: Command, point: Point) -> dict[str, float]:
        scratch = self._root / _POINT
        kept = self.keep(point)
        if kept is not None:
            return self._run(command, point, kept)
        try:
            # What a run that was killed has left.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            point.checkpoint.save(scratch / point.label, **self._saving)
            return self._run(command, point, scratch / point.label)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _run(self, command: Command, point: Point, model: Path) -> dict[str, float]:
        failed = self._root / _FAILED
        failed.mkdir(exist_ok=True)
        out, err = (failed / f"{point.label}.{name}" for name in ("stdout", "stderr"))
        try:
            metrics = command.run(model, out, err)
        except EvaluationError as error:
            raise EvaluationError(f"{point.label}: {error}; what it printed is in {out} and {err.name}") from error
        except BaseException:
            _discard(out, err)
            raise
        _discard(out, err)
        return metrics


def _discard(*files: Path) -> None:
    """Remove files of one folder, and the folder where nothing else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):
        files[0].parent.rmdir()


def _write(root: Path, results: Results, *, draws: bool) -> None:
    try:
        text = json.dumps(results.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (root / "results.json").write_text(text + "\n", "utf-8")
        (root / "results.csv").write_text(results.to_csv(), "utf-8")
        (root / PAGE_FILE).write_text(page(results), "utf-8")
        if draws and results.points:
            from weightsmith.curves.picture import draw

            draw(results, root / PLOT_FILE)
    except OSError as error:
        raise OutputError(f"cannot write in {root}: {error.strerror}") from error
