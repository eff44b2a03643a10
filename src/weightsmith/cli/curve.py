"""``weightsmith curve``."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import backend_options, warn
from weightsmith.cli.recipes import memory_option, writing_options
from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.curves.curve import Curve, Point
    from weightsmith.curves.results import Failure, Result, Results

# Points that are listed without --all.
_LISTED = 50
# What goes to the models' merge rather than to writing its result.
_MERGING = ("dtype", "out_dtype", "on_missing", "on_shape_mismatch")


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them: ``0,0.25,1.2``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: write numbers with commas between them: 0,0.25,1.2", param, ctx)


@click.command("curve")
@click.argument("models", nargs=-1, required=True, metavar="A B [C…]")
@click.option(
    "--shape",
    type=click.Choice(["line", "polygon", "plane"]),
    help="What the points lie on: between two models, from each to the next, through three.  [default: line]",
)
@click.option("--points", type=int, help="Points of a line or edge, or along either axis of a plane.  [default: 11]")
@click.option("--lambdas", type=_Numbers(), help="In place of --points: 0,0.25,1.2; 0 is A, 1 is B, 2 is C.")
@click.option("--margin", type=float, help="How far a plane's grid goes beyond the triangle.  [default: 0.2]")
@click.option("--write", "written", metavar="DIR", help="Keep the models in this folder: DIR/0.30 and so on.")
@click.option("--evaluate", "evaluation", metavar="COMMAND", help="Run this on every point; {model} is its folder.")
@click.option("--out", metavar="OUT", help="The folder of results; with --write, by default DIR.")
@click.option("--shell", is_flag=True, help="Have a shell run the command.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End a command that takes longer.")
@click.option("--keep-going", is_flag=True, help="Go on with the next point where the command fails.")
@click.option("--metric", "metrics", multiple=True, help="Show this metric; the first decides. May be repeated.")
@click.option("--minimize", is_flag=True, help="Less is better: a loss.")
@click.option("--png/--no-png", default=None, help="Draw curve.png.  [default: where matplotlib is installed]")
@click.option("--dtype", help="The dtype of the models that are made.")
@click.option("--out-dtype", help="The same, where arithmetic is to see the inputs as they are.")
@click.option("--on-missing", type=click.Choice(["error", "base", "first", "skip"]), help="Tensors that some lack.")
@click.option(
    "--on-shape-mismatch",
    type=click.Choice(["error", "base", "first", "pad", "crop"]),
    help="Tensors of different shape.",
)
@writing_options
@memory_option
@backend_options
@click.option("--all", "list_all", is_flag=True, help="List every point, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print points, or results, as JSON.")
def command(
    models: tuple[str, ...],
    shape: str | None,
    points: int | None,
    lambdas: tuple[float, ...] | None,
    margin: float | None,
    written: str | None,
    evaluation: str | None,
    out: str | None,
    shell: bool,
    timeout: float | None,
    keep_going: bool,
    metrics: tuple[str, ...],
    minimize: bool,
    png: bool | None,
    restart: bool,
    quiet: bool,
    json_log: bool,
    list_all: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make the models on a line, a polygon or a plane between models, and measure each.

    \b
    weightsmith curve base/ tuned/ --write points/
    weightsmith curve base/ tuned/ --evaluate 'python score.py {model}' --out study/
    weightsmith curve A B C --shape plane --points 21 --evaluate '…' --out study/

    The command must end with 0 and print, last, a number or a JSON object of numbers. Points are made one at a
    time, and removed again without --write. Stopped, the same command goes on from there; a finer grid uses the
    results of a coarser one. OUT gets results.jsonl, .json and .csv, curve.html and curve.png. Alone, it lists the
    points: docs/guide/curves.md
    """
    results_in = _check_usage(
        written, evaluation, out, shell or keep_going or minimize or metrics or png is not None or timeout is not None
    )
    merging = {name: value for name in _MERGING if (value := settings.pop(name)) is not None}
    from weightsmith.curves.curve import curve

    found = curve(
        models,
        points,
        shape or "line",  # type: ignore[arg-type]
        lambdas=lambdas,
        margin=margin,
        threads=settings["threads"],
        **merging,
    )
    if not quiet:
        warn(found.warnings, json_log)
    if evaluation is None or results_in is None:
        if written is not None:
            found.write(
                written,
                restart=restart,
                progress=None if quiet else partial(_tell_written, json_log),
                **settings,
            )
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=2))
        elif not quiet:
            _list_points(found, list_all=list_all)
        return
    from weightsmith.curves.command import Command
    from weightsmith.curves.study import can_draw, evaluate

    results = evaluate(
        found,
        Command(evaluation, shell, timeout),
        results_in,
        metrics=metrics,
        minimize=minimize,
        models=written,
        keep_going=keep_going,
        restart=restart,
        png=png,
        progress=None if quiet else partial(_tell_measured, json_log),
        **settings,
    )
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=2, allow_nan=False))
    elif not quiet:
        _list_results(results, list_all=list_all)
        drawn = ", curve.png" if can_draw() and png is not False else ""
        click.echo(printable(f"{results_in}: results.jsonl, results.json, results.csv, curve.html{drawn}"))
        if png is None and not drawn:
            click.echo("for curve.png too: pip install 'weightsmith[plot]'", err=True)
    if results.failures:
        for failure in results.failures:
            click.echo(printable(f"error: {failure.reason}"), err=True)
        raise click.exceptions.Exit(1)


def _check_usage(written: str | None, evaluation: str | None, out: str | None, measuring: Any) -> str | None:
    """Return the folder of results, or None where nothing is measured."""
    if evaluation is None:
        if out is not None or measuring:
            raise click.UsageError("give --evaluate COMMAND, which these options are for")
        return None
    if out is None and written is None:
        raise click.UsageError("--evaluate needs --out OUT, the folder of its results")
    return out or written


def _tell_written(json_log: bool, point: Point, new: bool) -> None:
    if json_log:
        click.echo(json.dumps({"event": "point", "point": point.label, "written": new}), err=True)
    else:
        click.echo(f"{point.label}: {'written' if new else 'was there'}", err=True)


def _tell_measured(json_log: bool, found: Result | Failure, number: int, count: int, known: bool) -> None:
    from weightsmith.curves.results import Failure, number_to_json, write

    if isinstance(found, Failure):
        entry: dict[str, Any] = {"failed": found.reason}
        text = f"failed: {found.reason}"
    else:
        entry = {"metrics": {name: number_to_json(value) for name, value in found.metrics.items()}, "known": known}
        values = ", ".join(f"{name} {write(value)}" for name, value in found.metrics.items())
        text = f"{found.label}: {values} " + ("(known)" if known else f"({found.seconds:.1f} s)")
    if json_log:
        click.echo(json.dumps({"event": "point", "point": found.label, "number": number, **entry}), err=True)
    else:
        click.echo(printable(f"[{number}/{count}] {text}"), err=True)


def _list_points(found: Curve, *, list_all: bool) -> None:
    listed = found if list_all else found[:_LISTED]
    rows = [[one.label, *(f"{share:.4f}" for share in one.coefficients)] for one in listed]
    _show_table(["point", *(f"of {name}" for name in found.models)], rows, len(found))


def _list_results(results: Results, *, list_all: bool) -> None:
    from weightsmith.curves.results import write

    best = results.best()
    winners = () if best is None else best.points
    listed = results.points if list_all else results.points[:_LISTED]
    rows = [
        [
            f"{'* ' if one in winners else ''}{one.label}",
            *(f"{share:.4f}" for share in one.coefficients),
            *(write(one.metrics.get(name)) for name in results.shown),
            f"{one.seconds:.1f} s",
        ]
        for one in listed
    ]
    _show_table(["point", *results.shares, *results.shown, "time"], rows, len(results.points))
    click.echo(printable(f"* {best}" if best else "no point has a finite value"))


def _show_table(head: list[str], rows: list[list[str]], count: int) -> None:
    cells = [[printable(text) for text in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        click.echo("  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)))
    if len(rows) < count:
        click.echo(f"… and {count - len(rows)} more (--all lists them)")
