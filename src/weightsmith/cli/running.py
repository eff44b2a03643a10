"""What ``weightsmith average`` does with a running average: --update and --from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from weightsmith.cli.merge import listener_for, report, save, warn
from weightsmith.cli.terminal import printable

# The options that go with --update alone, and with --from alone.
_OF_UPDATE = ("bias_correction", "accumulator", "step", "again")
_OF_FROM = ("sample",)
_COMMON = ("run_dir", "threads", "quiet", "json_log")
_SAVING = ("shard_size", "memory", "device", "backend", "overwrite", "restart", "verify", "on_nonfinite", "dry_run")


def running_average_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of running averages."""
    options = [
        click.option(
            "--update", metavar="STATE", help="Take a checkpoint into a running average: --update STATE CKPT."
        ),
        click.option("--from", "source", metavar="STATE", help="Write a running average as a model: --from STATE OUT."),
        click.option("--bias-correction", is_flag=True, help="--update: divide an EMA by 1 - DECAY^t, as Adam does."),
        click.option(
            "--accumulator",
            type=click.Choice(["float32", "float64"]),
            help="--update: the dtype that a new average is kept in.",
        ),
        click.option(
            "--step", type=click.IntRange(min=0), help="--update: the checkpoint's step, where its name has none."
        ),
        click.option("--again", is_flag=True, help="--update: take a checkpoint once more that is in the average."),
        click.option("--sample", type=int, metavar="SEED", help="--from: draw a sample of SWAG-diagonal instead."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def refuse_running_options(options: dict[str, Any]) -> None:
    """Take the options that say something of running averages alone out of those that were given, or refuse them."""
    context = click.get_current_context()
    names = [name for name in (*_OF_UPDATE, *_OF_FROM) if _given(context, name)]
    _refuse(context, names, "RUN_DIR OUT", "running averages, --update and --from")
    for name in (*_OF_UPDATE, *_OF_FROM):
        del options[name]


def write_update(state: str, checkpoint: str, target: str | None) -> None:
    """Take a checkpoint into a running average."""
    context = click.get_current_context()
    if target is not None or context.params["source"] is not None:
        raise click.UsageError("--update takes one checkpoint: --update STATE CHECKPOINT")
    _check_options(context, ("update", "weights", *_OF_UPDATE, *_COMMON), "--update")
    from weightsmith.runs.running import update_average

    options = context.params
    quiet, json_log = options["quiet"], options["json_log"]
    done = update_average(
        state,
        checkpoint,
        weights=options["weights"] if _given(context, "weights") else None,
        threads=options["threads"],
        progress=listener_for(quiet=quiet, json_log=json_log),
        **{name: options[name] for name in _OF_UPDATE},
    )
    if not quiet:
        warn(done.summary.warnings, json_log)
        report(done.summary, json_log)
        if not json_log:
            record = done.record
            step = "" if record.step is None else f", up to step {record.step:,}"
            of = "1 checkpoint" if record.count == 1 else f"{record.count:,} checkpoints"
            click.echo(f"{printable(state)}: {record.averaging} of {of}{step}", err=True)


def write_average(state: str, target: str, more: str | None) -> None:
    """Write a running average as a model."""
    if more is not None:
        raise click.UsageError("--from takes one target: --from STATE OUT")
    context = click.get_current_context()
    _check_options(context, ("source", "dtype", *_OF_FROM, *_COMMON, *_SAVING), "--from")
    from weightsmith.runs.running import running_average

    options = context.params
    averaged = running_average(state, dtype=options["dtype"], sample=options["sample"])
    save(averaged, target, **{name: options[name] for name in ("threads", "quiet", "json_log", *_SAVING)})


def _check_options(context: click.Context, known: tuple[str, ...], form: str) -> None:
    names = [name for name in context.params if name not in known and _given(context, name)]
    _refuse(context, names, form, "other forms of average")


def _refuse(context: click.Context, names: list[str], form: str, home: str) -> None:
    for parameter in context.command.params:
        if parameter.name in names:
            raise click.UsageError(f"{parameter.opts[0]} does not go with {form}: it is an option of {home}")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE
