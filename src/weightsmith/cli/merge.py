"""``weightsmith merge``."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import click

from weightsmith.cli.plan import show_plan
from weightsmith.cli.recipes import memory_option, read_recipe, recipe_options, writing_options
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.engine.executor import Summary
    from weightsmith.engine.progress import ProgressListener
    from weightsmith.plan.output import Output


def backend_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device and --backend."""
    device = click.option("--device", help="What to compute on: cpu, the default, or a GPU: cuda, cuda:1.")
    backend = click.option(
        "--backend",
        type=click.Choice(["numpy", "torch"]),
        help="By default numpy on the cpu, torch on any other device.",
    )
    return device(backend(function))


def saving_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that write a model of computed weights, as :func:`save` takes them."""
    options = [
        writing_options,
        memory_option,
        backend_options,
        click.option("--verify", is_flag=True, help="Hash all inputs first, and note the hashes in OUT."),
        click.option(
            "--on-nonfinite",
            type=click.Choice(["error", "warn", "ignore"]),
            default="error",
            show_default=True,
            help="Results that are NaN or infinite where the inputs are not.",
        ),
        click.option("--dry-run", is_flag=True, help="Show the plan and stop, as 'weightsmith plan' does."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def save(
    output: Output,
    target: str | None,
    *,
    shard_size: int,
    threads: int | None,
    memory: int | None,
    device: str | None,
    backend: str | None,
    overwrite: bool,
    restart: bool,
    verify: bool,
    on_nonfinite: Literal["error", "warn", "ignore"],
    dry_run: bool,
    quiet: bool,
    json_log: bool,
) -> None:
    """Write what was computed, and tell of it; or show its plan."""
    if dry_run or target is None:
        show_plan(output.plan(shard_size=shard_size), threads=threads, memory=memory, as_json=False, tensors=False)
        return
    if not quiet:
        warn(output.warnings, json_log)
    summary = output.save(
        target,
        shard_size=shard_size,
        threads=threads,
        memory=memory,
        device=device,
        backend=backend,
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        on_nonfinite=on_nonfinite,
        progress=listener_for(quiet=quiet, json_log=json_log),
    )
    if not quiet:
        warn([warning for warning in summary.warnings if warning not in output.warnings], json_log)
        report(summary, json_log)


@click.command("merge")
@click.argument("paths", nargs=-1, metavar="[RECIPE] OUT")
@recipe_options
@saving_options
@click.option("--print-recipe", is_flag=True, help="Print the recipe as YAML and stop.")
def command(paths: tuple[str, ...], dry_run: bool, print_recipe: bool, **options: Any) -> None:
    """Merge models by RECIPE into the folder OUT.

    \b
    weightsmith merge recipe.yaml out/
    weightsmith merge --method slerp --base A --model B -p t=0.4 out/
    weightsmith merge --onto merged/ --model C further/

    OUT appears when it is whole. Stopped or killed, the same command goes on from there. A name that ends in
    .safetensors makes one file of weights alone.
    """
    needs_target = not (dry_run or print_recipe)
    described = {name: options.pop(name) for name in inspect.signature(read_recipe).parameters if name != "path"}
    by_flags = described["method"] is not None or described["onto"] is not None
    wanted = (0 if by_flags else 1) + (1 if needs_target else 0)
    if len(paths) != wanted and not (not needs_target and len(paths) == wanted + 1):
        form = "OUT" if by_flags else "RECIPE OUT"
        raise click.UsageError(
            f"give {form}{' with --method or --onto' if by_flags else ''}; {len(paths)} path(s) given"
        )
    recipe = read_recipe(None if by_flags else paths[0], **described)
    if print_recipe:
        from weightsmith.recipe.dump import to_yaml

        click.echo(to_yaml(recipe), nl=False)
        return
    from weightsmith.api import merge_recipe

    save(merge_recipe(recipe), None if dry_run else paths[-1], dry_run=dry_run, **options)


def listener_for(*, quiet: bool, json_log: bool) -> ProgressListener:
    """Return who shows progress: a bar on a terminal, lines elsewhere, JSON or nothing where asked for."""
    from weightsmith.engine import progress

    if json_log:
        return progress.JsonLines()
    if quiet:
        return progress.Silent()
    return progress.Live() if sys.stderr.isatty() else progress.Lines()


def warn(warnings: Iterable[str], json_log: bool) -> None:
    """Print warnings."""
    for warning in warnings:
        _say(json_log, event="warning", text=f"warning: {warning}")


def report(summary: Summary, json_log: bool) -> None:
    """Print what a run did."""
    for entry in summary.nonfinite:
        where = "in the result" if entry.where == "result" else f"in {entry.where}"
        text = f"warning: {entry.tensor}: {entry.count} values {where} are NaN or infinite"
        _say(json_log, event="nonfinite", tensor=entry.tensor, where=entry.where, count=entry.count, text=text)
    resumed = f" ({summary.resumed} of them by an earlier run)" if summary.resumed else ""
    _say(
        json_log,
        event="done",
        target=str(summary.target),
        tensors=summary.tensors,
        resumed=summary.resumed,
        bytes=summary.nbytes,
        seconds=round(summary.seconds, 3),
        text=f"{summary.target}: {summary.tensors} tensors{resumed}, {size(summary.nbytes)}, {summary.seconds:.1f} s",
    )


def _say(as_json: bool, text: str, **entry: Any) -> None:
    click.echo(json.dumps({**entry, "text": text}) if as_json else printable(text), err=True)
