"""``weightsmith average``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import save, saving_options
from weightsmith.cli.running import refuse_running_options, running_average_options, write_average, write_update
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.methods.sparse import Mask
    from weightsmith.runs import RunAverage


class StepRange(click.ParamType[tuple[int | None, int | None]]):
    """First and last step, both included: ``1000..5000``, ``1000..``, ``..5000``."""

    name = "a..b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int | None]:
        """Read a range of steps."""
        first, separator, last = str(value).partition("..")
        if not separator or not all(not part or part.isdigit() for part in (first, last)) or not (first or last):
            self.fail(f"{value!r} is no range of steps; write 1000..5000, 1000.. or ..5000", param, ctx)
        bounds = (int(first) if first else None, int(last) if last else None)
        if None not in bounds and int(first) > int(last):
            self.fail(f"{value!r} ends before it begins", param, ctx)
        return bounds


class _Command(click.Command):
    """Takes ``--weights by-metric loss:2`` as it takes ``--weights by-metric:loss:2``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined = list(args)
        for place, argument in enumerate(joined[:-1]):
            if argument == "by-metric" and place and joined[place - 1] == "--weights":
                joined[place : place + 2] = [f"by-metric:{joined[place + 1]}"]
                break
        return super().parse_args(ctx, joined)


@click.command("average", cls=_Command)
@click.argument("run_dir", metavar="RUN_DIR")
@click.argument("target", metavar="OUT", required=False)
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="The newest N of them.")
@click.option("--every", type=click.IntRange(min=1), default=1, metavar="K", help="Every K-th, back from the newest.")
@click.option("--steps", type=StepRange(), help="Those of steps a to b, both included; one of the two may be left out.")
@click.option("--pattern", metavar="NAMES", help="Look at these names in RUN_DIR alone: 'ema-*'.")
@click.option(
    "--weights", default="uniform", show_default=True, metavar="SCHEME", help="How they are weighted; see above."
)
@click.option("--base", metavar="MODEL", help="The model that the checkpoints are adapters of.")
@click.option("--dtype", help="The dtype of the weights that are written; by default that of the checkpoints.")
@click.option(
    "--mask",
    type=click.Choice(["intersection", "union", "first"]),
    help="Of pruned checkpoints, the entries that stay: those that all keep, any keeps, or the newest keeps.",
)
@click.option(
    "--variance-corrected", is_flag=True, help="Bring the variance of each matrix back to the checkpoints' mean."
)
@running_average_options
@saving_options
@click.option("--list", "list_only", is_flag=True, help="Show the checkpoints with their weights, and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --list, print it as JSON.")
def command(
    run_dir: str,
    target: str | None,
    base: str | None,
    dtype: str | None,
    mask: Mask | None,
    variance_corrected: bool,
    list_only: bool,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
    json_log: bool,
    update: str | None,
    source: str | None,
    **options: Any,
) -> None:
    """Average the checkpoints of the training run in RUN_DIR into the folder OUT.

    \b
    weightsmith average run/ --list
    weightsmith average run/ out/ --last 10
    weightsmith average run/ out/ --steps 8000.. --weights wsm:1-sqrt
    weightsmith average run/ out/ --weights by-metric eval_loss:2

    \b
    uniform                 the mean (also: sma, lawa)
    wma                     growing with the place
    ema:DECAY               exponential moving average from the oldest on
    linear-decay, 1-sqrt, cosine
                            as if the learning rate had decayed so: wsm:…
    wsm:DECAY[:STEPS]       linear, 1-sqrt, cosine, square, exponential, or
                            factors 0.8,0.5,0.1; over the last STEPS steps
    by-metric NAME:P        NAME^-P of a loss, NAME^P of a score
    endpoints:SHARE         the oldest and SHARE of the newest
    FILE.json               {"weights": [0.2, 0.8]}, the oldest first

    Checkpoints of transformers, Lightning, torch.distributed.checkpoint and Megatron are found by themselves, and any
    numbered files or folders. Optimiser states are not read; config, tokenizer and integer buffers are the newest's.
    More: docs/guide/runs.md

    While a run goes on, each checkpoint can be taken into a running average and then be deleted:

    \b
    weightsmith average --update state/ run/checkpoint-1000
    weightsmith average --update state/ run/checkpoint-1100
    weightsmith average --from state/ out/

    --weights is then uniform, ema:DECAY or swag, once for a state. With swag the variance of each weight is kept as
    well, and --sample SEED draws a model from the normal distribution that mean and variance make.
    """
    if update is not None:
        write_update(update, run_dir, target)
        return
    if source is not None:
        write_average(source, run_dir, target)
        return
    refuse_running_options(options)
    if target is None and not (list_only or dry_run):
        raise click.UsageError("give RUN_DIR and OUT, or --list")
    if as_json and not list_only:
        raise click.UsageError("--json goes with --list")
    from weightsmith.runs import choose

    chosen = choose(run_dir, **{name: options.pop(name) for name in ("weights", "last", "every", "steps", "pattern")})
    if as_json:
        click.echo(json.dumps(chosen.to_json(), indent=2))
        return
    if list_only or not (quiet or json_log):
        _show(chosen)
    if list_only:
        return
    averaged = chosen.result(base=base, dtype=dtype, mask=mask, variance_corrected=variance_corrected)
    save(averaged, target, dry_run=dry_run, quiet=quiet, json_log=json_log, **options)


def _show(chosen: RunAverage) -> None:
    click.echo(f"{printable(chosen.run.path)}: {len(chosen.run.checkpoints)} {chosen.run.kind}")
    metric = chosen.metric
    width = max(10, len(metric or ""))
    head = "" if metric is None else f"{printable(metric):>{width}} "
    click.echo(f"{'step':>10} {head}{'weight':>11} {'size':>8}  checkpoint")
    for one in chosen.checkpoints:
        value = one.saved.metrics.get(metric or "", float(one.saved.step) if metric == "step" else None)
        shown = "" if metric is None else f"{'' if value is None else f'{value:.5g}':>{width}} "
        click.echo(
            f"{one.saved.step:>10} {shown}{one.weight:>11.6f} {size(one.checkpoint.nbytes):>8}  "
            f"{printable(one.saved.label)}"
        )
    if chosen.run.left_out:
        click.echo(f"left out, without a step in the name: {printable(', '.join(chosen.run.left_out))}")
