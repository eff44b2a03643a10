"""``weightsmith adapter merge``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.adapters.revert import adapter_options, write
from weightsmith.cli.merge import listener_for, warn
from weightsmith.cli.recipes import memory_option, parameter_option, parameters_of
from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.adapters.combine.registry import Combiner
    from weightsmith.adapters.combine.report import LayerReport, Report

# Layers that are listed without --all.
_LISTED = 12


class _WithMethods(click.Command):
    """Lists the methods below the options; they are imported when somebody wants to read them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them."""
        from weightsmith.adapters.combine.registry import all_combiners

        with formatter.section("Methods made for adapters"):
            formatter.write_dl([(one.name, one.summary) for one in all_combiners().values()])
        formatter.write_paragraph()
        formatter.write_text(
            "A method of 'weightsmith methods' that works on task vectors (ties, dare_linear, della, …) works on the "
            "deltas here, entry by entry, and its result is cut to a rank. --explain tells of any."
        )


@click.command("merge", cls=_WithMethods)
@click.argument("paths", metavar="ADAPTER... OUT", nargs=-1)
@click.option("--method", metavar="NAME", default="linear", show_default=True, help="How they are combined; see below.")
@click.option(
    "--weight",
    "weights",
    metavar="NUMBER",
    type=float,
    multiple=True,
    help="How much of an adapter is taken, 1 by default: once for all of them, or once for each in their order.",
)
@parameter_option("A parameter of the method, such as density=0.3; --explain lists them.")
@click.option("--metrics", metavar="NAME[:NUMBERS]", help="mwa: loss, step, or with values: loss:1.9,1.7.")
@click.option("--rank", type=click.IntRange(min=1), help="The greatest rank of a layer; by default all that it takes.")
@click.option("--energy", type=float, help="Keep this share of the squares of each change, with the least rank.")
@click.option("--base", metavar="MODEL", help="The base: for DoRA and the like, and for sums of saved modules.")
@click.option("--dtype", help="The dtype of OUT; by default that of the adapters.")
@click.option("--compat", type=click.Choice(["peft"]), help="PEFT's own numbers, where they are others.")
@click.option(
    "--saved",
    type=click.Choice(["sum", "mean", "drop"]),
    help="What becomes of biases and saved modules: the sum of their changes, a mean, or nothing.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of random methods.")
@click.option(
    "--decomposition",
    type=click.Choice(["exact", "randomized"]),
    default="exact",
    show_default=True,
    help="Of dense results: by LAPACK, or by random projections, faster where few ranks of many are kept.",
)
@memory_option
@adapter_options
@click.option("--all", "list_all", is_flag=True, help="List every layer, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print ranks and errors as JSON.")
@click.option("--explain", is_flag=True, help="Explain the method and its parameters, and stop.")
def command(
    paths: tuple[str, ...],
    method: str,
    weights: tuple[float, ...],
    parameters: tuple[str, ...],
    metrics: str | None,
    threads: int | None,
    memory: int | None,
    quiet: bool,
    json_log: bool,
    list_all: bool,
    as_json: bool,
    explain: bool,
    rank: int | None,
    energy: float | None,
    base: str | None,
    dtype: str | None,
    compat: Any,
    saved: Any,
    seed: int,
    decomposition: Any,
    **options: Any,
) -> None:
    """Combine ADAPTERs into one: OUT is a LoRA in PEFT's layout.

    \b
    weightsmith adapter merge code/ maths/ both/ --weight 0.7 --weight 0.3
    weightsmith adapter merge a/ b/ c/ out/ --rank 32
    weightsmith adapter merge a/ b/ c/ out/ --method ties -p density=0.3
    weightsmith adapter merge a/ b/ c/ basis/ --method rmm -p basis=2

    By default OUT is the weighted sum of the adapters' deltas, in as few ranks as hold it, found through the factors.
    What a smaller rank loses is measured and printed. Adapters may differ in rank, kind and layers.
    """
    if explain:
        from weightsmith.adapters.combine.registry import get_combiner

        _explain(get_combiner(method))
        return
    if len(paths) < 2:
        raise click.UsageError(f"give ADAPTER... OUT; {len(paths)} path(s) given")
    from weightsmith.adapters.combine.create import merge

    given = parameters_of(parameters)
    combined = merge(
        paths[:-1],
        method,
        weight=weights or 1.0,
        rank=rank,
        energy=energy,
        base=base,
        dtype=dtype,
        compat=compat,
        saved=saved,
        seed=seed,
        decomposition=decomposition,
        threads=threads,
        memory=memory,
        **given | ({"metrics": metrics} if metrics is not None else {}),
    )
    if not quiet:
        warn(combined.warnings, json_log)
    summary = combined.save(
        paths[-1],
        threads=threads,
        memory=memory,
        progress=listener_for(quiet=quiet, json_log=json_log),
        **options,
    )
    found = combined.report()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif not quiet and not json_log:
        _show(found, list_all=list_all)
    write(summary, combined.warnings, quiet=quiet, json_log=json_log)


def _show(found: Report, *, list_all: bool) -> None:
    layers = found.layers if list_all else found.layers[:_LISTED]
    sums = any(layer.from_sum is not None for layer in layers)
    if layers:
        apart = f" {'from sum':>9}" if sums else ""
        click.echo(f"{'ranks':>12} {'kept':>5} {'error':>9}{apart}  layer")
    for layer in layers:
        apart = f" {_percent(layer.relative_to_sum):>9}" if sums else ""
        name = f"{printable(layer.module)} {'x'.join(map(str, layer.shape))}"
        click.echo(f"{_ranks(layer):>12} {layer.rank:>5} {_percent(layer.relative):>9}{apart}  {name}")
    if len(layers) < len(found.layers):
        click.echo(f"… and {len(found.layers) - len(layers)} more (--all lists them)")
    if found.layers:
        low, high = found.ranks
        told = f"rank {low}" if low == high else f"ranks {low} to {high}"
        click.echo(f"{len(found.layers)} layers, {told}: error {_percent(found.error)} of the change")
    if found.from_sum is not None:
        click.echo(f"{_percent(found.from_sum)} from the weighted sum of the deltas, which this method does not give")
    if found.cosine is not None:
        click.echo(
            f"the fixed factors are at most {found.cosine:.3g} from orthogonal (a cosine: 0 is orthogonal, 1 shared)"
        )
    for note in found.notes:
        click.echo(note)


def _ranks(layer: LayerReport) -> str:
    text = "+".join("full" if rank is None else str(rank) for rank in layer.ranks)
    return text if len(text) <= 12 else f"{len(layer.ranks)} of {sum(rank or 0 for rank in layer.ranks)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _explain(combiner: Combiner) -> None:
    from weightsmith.cli.methods import parameter_lines

    click.echo(f"{combiner.name}\n\n{combiner.about}")
    if combiner.parameters:
        click.echo("\nParameters:")
    for line in parameter_lines(combiner.parameters.values()):
        click.echo(line)
    click.echo(f"\nSource: {combiner.source}")
