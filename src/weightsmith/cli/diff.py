"""``weightsmith diff``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.comparison import Comparison, Measures


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--by", type=click.Choice(["layer", "tensor"]), default="layer", show_default=True, help="What a row is.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the models differ in anything.")
def command(a: str, b: str, by: str, as_json: bool, threads: int | None, exit_code: bool) -> None:
    """Compare models A and B.

    Per row: the norm of B - A, the same relative to the norm of A, the cosine between them, the share of
    entries that are equal, and the largest change of an entry.
    """
    from weightsmith.api import open as open_model
    from weightsmith.comparison import compare

    found = compare(open_model(a), open_model(b), threads=threads)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(found, by)
    if exit_code and not found.identical:
        sys.exit(1)


def _show(found: Comparison, by: str) -> None:
    rows = [(printable(name), row) for name, row in (found.layers if by == "layer" else found.tensors).items()]
    width = max([len(name) for name, _ in rows] + [5])
    click.echo(f"{by:{width}}  {'|B-A|':>10}  {'relative':>9}  {'cosine':>9}  {'equal':>7}  {'largest':>9}")
    for name, row in rows:
        click.echo(f"{name:{width}}  {_row(row)}")
    click.echo(f"{'all':{width}}  {_row(found.total)}")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        for name in names:
            click.echo(f"only in {side}: {printable(name)}")
    for name, (left, right) in found.shapes.items():
        click.echo(f"shape differs: {printable(name)} is {list(left)} in A and {list(right)} in B")
    for name, kinds in found.dtypes.items():
        click.echo(f"dtype differs: {printable(name)} is {kinds[0]} in A and {kinds[1]} in B")


def _row(row: Measures) -> str:
    relative = "-" if row.relative is None else f"{row.relative:.3%}"
    cosine = "-" if row.cosine is None else f"{row.cosine:.6f}"
    flag = f"  {row.nonfinite} not finite" if row.nonfinite else ""
    return f"{row.norm:10.4g}  {relative:>9}  {cosine:>9}  {row.equal:7.2%}  {row.largest:9.3g}{flag}"
