"""``weightsmith extract``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import listener_for, report, warn
from weightsmith.cli.recipes import Bytes, memory_option, running_options
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.extraction.report import Report

# Matrices that are listed without --all.
_LISTED = 20


@click.command("extract")
@click.argument("finetuned")
@click.argument("base")
@click.argument("target", metavar="OUT")
@click.option("--rank", type=click.IntRange(min=1), help="The rank of every matrix.")
@click.option("--energy", type=float, help="Keep this share of the squares of each change, with the least rank.")
@click.option("--effective-rank", is_flag=True, help="Give each change its effective rank.")
@click.option("--budget", type=Bytes(), help="Most bytes of all tensors of OUT; triples go where they keep the most.")
@click.option("--max-rank", type=click.IntRange(min=1), help="The largest rank of any matrix.")
@click.option("--dora", is_flag=True, help="A magnitude for every row (DoRA).")
@click.option(
    "--decomposition",
    type=click.Choice(["exact", "randomized"]),
    default="exact",
    show_default=True,
    help="By LAPACK, or by random projections: faster where few triples of many are kept.",
)
@click.option(
    "--kind",
    type=click.Choice(["lora", "sparse", "sign", "quantized"]),
    default="lora",
    show_default=True,
    help="What is kept of each change.",
)
@click.option("--density", type=float, help="sparse: the share of entries that is kept.")
@click.option(
    "--scope",
    type=click.Choice(["tensor", "model"]),
    default="tensor",
    show_default=True,
    help="sparse: of each tensor, or of all together.",
)
@click.option("--bits", type=click.IntRange(1, 8), help="quantized: bits of an entry.")
@click.option("--quantizer", type=click.Choice(["linear", "log2", "tanh"]), help="quantized: how levels lie.")
@click.option("--dtype", help="The dtype of factors and values; by default that of FINETUNED.")
@click.option("--only-matrices", is_flag=True, help="Leave changed tensors out that are not taken apart.")
@click.option("--whole", metavar="NAMES", multiple=True, help="Keep these tensors whole: '*embed*'; may be repeated.")
@click.option("--exclude", metavar="NAMES", multiple=True, help="Leave these tensors out; may be repeated.")
@click.option(
    "--rename",
    metavar="PATTERN=REPLACEMENT",
    multiple=True,
    help="Name modules otherwise in OUT, by a regular expression; may be repeated.",
)
@memory_option
@running_options
@click.option("--verify", is_flag=True, help="Hash all inputs first, and note the hashes in OUT.")
@click.option("--all", "list_all", is_flag=True, help="List every matrix, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print what is lost as JSON.")
def command(
    finetuned: str,
    base: str,
    target: str,
    threads: int | None,
    memory: int | None,
    overwrite: bool,
    restart: bool,
    verify: bool,
    quiet: bool,
    json_log: bool,
    list_all: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Take what FINETUNED changed in BASE as an adapter: OUT.

    \b
    weightsmith extract tuned/ base/ lora/ --rank 32
    weightsmith extract tuned/ base/ lora/ --energy 0.9
    weightsmith extract tuned/ base/ lora/ --budget 40MB
    weightsmith extract tuned/ base/ out/ --kind sparse --density 0.05

    Without --kind, OUT is a LoRA in PEFT's layout. What is lost is measured, and told for each matrix. The kinds:
    docs/guide/extract.md
    """
    from weightsmith.extraction.create import extract

    listener = listener_for(quiet=quiet, json_log=json_log)
    adapter = extract(finetuned, base, threads=threads, memory=memory, progress=listener, **settings)
    if not quiet:
        warn(adapter.warnings, json_log)
    summary = adapter.save(
        target,
        threads=threads,
        memory=memory,
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        progress=listener,
    )
    found = adapter.report()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif not quiet and not json_log:
        _show(found, list_all=list_all)
    if not quiet:
        warn([warning for warning in summary.warnings if warning not in adapter.warnings], json_log)
        report(summary, json_log)


def _show(found: Report, *, list_all: bool) -> None:
    listed = found.matrices if list_all else found.matrices[:_LISTED]
    click.echo(f"{'rank':>6} {'effective':>9} {'change lost':>11} {'of weight':>9} {'size':>8} {'time':>9}  matrix")
    for one in listed:
        rank = "" if one.rank is None else one.rank
        effective = "" if one.effective_rank is None else f"{one.effective_rank:.1f}"
        seconds = "" if one.seconds is None else f"{one.seconds:.2f} s"
        click.echo(
            f"{rank:>6} {effective:>9} {_percent(one.error):>11} {_percent(one.weight_error):>9} "
            f"{size(one.nbytes):>8} {seconds:>9}  {printable(one.name)} {'x'.join(map(str, one.shape))}"
        )
    if len(listed) < len(found.matrices):
        click.echo(f"… and {len(found.matrices) - len(listed)} more (--all lists them)")
    if found.whole:
        names = ", ".join(found.whole[:3]) + (" …" if len(found.whole) > 3 else "")
        click.echo(f"kept whole: {len(found.whole)} ({printable(names)})")
    for entry in found.left_out if list_all else found.left_out[:_LISTED]:
        click.echo(f"left out: {printable(entry.name)}: {entry.reason}")
    if not list_all and len(found.left_out) > _LISTED:
        click.echo(f"… and {len(found.left_out) - _LISTED} more left out (--all lists them)")
    click.echo(f"{size(found.nbytes)} for {size(found.changed_bytes)} that changed: {found.summary}")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
