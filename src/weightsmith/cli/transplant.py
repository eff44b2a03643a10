"""``weightsmith transplant``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import save, saving_options
from weightsmith.cli.plan import planned
from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.transplantation.held_out import HeldOut
    from weightsmith.transplantation.report import Report, TableReport

_METHODS = (
    *("omp", "interpolation", "nearest", "wechsel", "focus", "landmark_pca"),
    *("subword", "mean", "zero", "random", "gaussian"),
)
_WHERE = click.Choice(["none", "embeddings", "head", "both"])
# How many of the tokens that were rebuilt worst are shown.
_WORST = 5


@click.command("transplant")
@click.argument("model")
@click.argument("donor")
@click.argument("target", metavar="OUT", required=False)
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default="omp",
    show_default=True,
    help="How the rows of new tokens are made; see above.",
)
@click.option("--head-method", type=click.Choice(_METHODS), help="How those of the head are, if another way.")
@click.option("-k", "--atoms", type=click.IntRange(min=1), help="omp: anchors that make up a token; 64 by default.")
@click.option(
    "--centred", is_flag=True, help="omp: make sums of what rows differ from their mean by, and add the mean."
)
@click.option(
    "--neighbours",
    type=click.IntRange(min=1),
    help="omp: pick among so many of the nearest anchors, by default all; interpolation, wechsel: take so many, by "
    "default 64 and 10.",
)
@click.option("--temperature", type=float, help="wechsel: that of the softmax; 0.1 by default.")
@click.option(
    "--weights",
    type=click.Choice(["distance", "barycentric", "least_squares"]),
    help="interpolation: how neighbours are weighed; distance by default.",
)
@click.option(
    "--metric",
    type=click.Choice(["euclidean", "cosine"]),
    help="interpolation: which are near; euclidean by default.",
)
@click.option(
    "--pieces",
    type=click.Choice(["mean", "sum", "weighted_mean", "first_last"]),
    help="subword: what is made of the pieces; mean by default.",
)
@click.option(
    "--scale",
    type=float,
    help="random, gaussian: factor of deviations; by default 1, 0.00316.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="random, gaussian: the seed.")
@click.option(
    "--byte-match", type=_WHERE, default="none", show_default=True, help="Where the token <0x41> is taken for A."
)
@click.option(
    "--prefix-match",
    type=_WHERE,
    default="none",
    show_default=True,
    help="Where a new token takes the row of the longest token that it begins with.",
)
@click.option("--trained-only", is_flag=True, help="Make no token of tokens that look untrained.")
@click.option(
    "--auxiliary",
    metavar="FILE",
    help="Compare DONOR's tokens by these vectors, not its embeddings: word2vec's text, or a matrix in safetensors.",
)
@click.option("--pad-to-multiple-of", type=click.IntRange(1, 1 << 20), help="Add rows of zeros up to a multiple of it.")
@click.option("--keep-size", is_flag=True, help="Add rows of zeros up to as many as MODEL has.")
@click.option(
    "--chat-template",
    type=click.Choice(["donor", "keep", "none"]),
    default="donor",
    show_default=True,
    help="DONOR's, MODEL's or none.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Write nothing: make shared tokens as if they were new, by each method, and say how near to their own rows "
    "they come.",
)
@saving_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print what became of the tokens as JSON; with --dry-run the plan too."
)
def command(
    model: str,
    donor: str,
    target: str | None,
    dry_run: bool,
    quiet: bool,
    json_log: bool,
    as_json: bool,
    compare: bool,
    shard_size: int,
    threads: int | None,
    memory: int | None,
    device: str | None,
    backend: str | None,
    overwrite: bool,
    restart: bool,
    verify: bool,
    on_nonfinite: Any,
    **settings: Any,
) -> None:
    """Give MODEL the tokenizer of DONOR: OUT is MODEL with rows for DONOR's tokens.

    \b
    weightsmith transplant base/ donor/ --compare
    weightsmith transplant base/ donor/ out/
    weightsmith transplant base/ donor/ out/ -k 32 --head-method subword
    weightsmith transplant base/ donor/tokenizer.json out/ --method subword

    Tokens that both have keep MODEL's rows. Those of new tokens are made, in embeddings and head:

    \b
    omp            of k shared tokens, as DONOR's embeddings are
    interpolation  of the nearest shared tokens in DONOR's embeddings
    nearest        the row of the nearest one
    wechsel        of the nearest ones, by a softmax of similarities
    focus          of all similar ones, by a sparsemax of similarities
    landmark_pca   by one linear map from DONOR's space to MODEL's
    subword        of the pieces that MODEL's own tokenizer cuts a token into
    mean, zero     one row for all
    random         drawn around the mean, each element by itself
    gaussian       drawn around the mean, by the rows' covariance

    The first six compare DONOR's embeddings, and do well where these are like MODEL's, which --compare tells; for the
    others DONOR may be a tokenizer alone. How well tokens were rebuilt is printed, and kept in OUT. More:
    docs/guide/vocabularies.md
    """
    from weightsmith.transplantation.create import transplant

    if target is None and not compare:
        raise click.UsageError("Missing argument 'OUT'.")
    if target is not None and compare:
        raise click.UsageError("--compare writes nothing: leave OUT out, or --compare.")
    made = transplant(model, donor, **settings)
    if compare:
        tried = made.compare(threads=threads)
        if as_json:
            click.echo(json.dumps({n: {m: asdict(one) for m, one in by.items()} for n, by in tried.items()}, indent=2))
        else:
            _show_comparison(tried)
        return
    assert target is not None
    if dry_run and as_json:
        # One document: a plan as text before it could be read by no program.
        plan, _ = planned(made.plan(shard_size=shard_size), threads=threads, memory=memory, tensors=True)
        click.echo(json.dumps({**made.report(search=False).to_json(), "plan": plan}, indent=2))
        return
    save(
        made,
        target,
        dry_run=dry_run,
        quiet=quiet,
        json_log=json_log,
        shard_size=shard_size,
        threads=threads,
        memory=memory,
        device=device,
        backend=backend,
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        on_nonfinite=on_nonfinite,
    )
    found = made.report(search=not dry_run)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif not quiet and not json_log:
        _show(found)


def _show(found: Report) -> None:
    for table in found.tables:
        _show_table(table)
    if found.rate is not None:
        click.echo(f"{found.searched:,} tokens searched in {found.seconds:.1f} s: {found.rate:,.0f} a second")


def _show_comparison(tried: Mapping[str, Mapping[str, HeldOut]]) -> None:
    for name, methods in tried.items():
        first = next(iter(methods.values()))
        click.echo(f"{printable(name)}: {first.tokens:,} shared tokens, made of {first.anchors:,} others")
        click.echo(f"  {'method':16}{'error':>7}{'cosine':>9}")
        for method, one in methods.items():
            click.echo(f"  {method:16}{one.error:7.3f}{one.cosine:9.3f}")
        click.echo(f"  {'mean of all':16}{first.mean_error:7.3f}")


def _show_table(table: TableReport) -> None:
    kinds = {"surface": "by text", "role": "by role", "byte": "as bytes", "prefix": "by prefix"}
    shared = ", ".join(f"{count:,} {kinds[name]}" for name, count in table.shared.items() if count) or "none"
    click.echo(f"{printable(table.name)}: {table.rows_before:,} rows become {table.rows:,}")
    click.echo(f"  shared     {shared}")
    averaged = f", {table.averaged:,} of them the mean of all" if table.averaged else ""
    of = f" of {table.anchors:,} anchors" if table.anchors is not None else ""
    click.echo(f"  new        {table.made:,} by {table.method}{of}{averaged}")
    if table.untrained:
        click.echo(f"  untrained  {table.untrained:,}, zeros now")
    if table.unused:
        click.echo(f"  unused     {table.unused:,} rows")
    if table.residual is not None:
        names = {"0.5": "median", "1": "largest"}
        told = ", ".join(
            f"{names.get(share) or f'{100 * float(share):g} % within'} {value:.3g}"
            for share, value in table.residual.items()
        )
        click.echo(f"  residual   {told}")
        worst = ", ".join(f"{printable(token)} ({residual:.3g})" for token, residual in table.worst[:_WORST])
        click.echo(f"  worst      {worst}")
    if table.held_out is not None:
        one = table.held_out
        click.echo(
            f"  check      {one.tokens:,} shared tokens made of {one.anchors:,} others: error {one.error:.3g}, cosine "
            f"{one.cosine:.3g} (the mean of all: {one.mean_error:.3g})"
        )
