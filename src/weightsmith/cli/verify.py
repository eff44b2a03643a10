"""``weightsmith verify``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.verification import Verification

_SHOWN = 20


@click.command("verify")
@click.argument("path", metavar="OUT")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(path: str, threads: int | None, as_json: bool) -> None:
    """Check that OUT is still what a merge wrote: every header, every tensor, every file.

    A single flipped bit is found, by the hashes in OUT's manifest. Of other checkpoints the headers are
    checked. Exits with 1 if something is wrong.
    """
    from weightsmith.verification import verify

    report(verify(path, threads=threads), as_json=as_json, good="as it was written")


def report(found: Verification, *, as_json: bool, good: str) -> None:
    """Print what was found, and exit with 1 if something is wrong."""
    if as_json:
        click.echo(
            json.dumps(
                {
                    "ok": found.ok,
                    "path": str(found.path),
                    "tensors": found.tensors,
                    "bytes": found.nbytes,
                    "problems": [vars(problem) for problem in found.problems],
                    "notes": list(found.notes),
                },
                indent=2,
            )
        )
    else:
        for note in found.notes:
            click.echo(printable(f"note: {note}"), err=True)
        for problem in found.problems[:_SHOWN]:
            click.echo(printable(f"error: {problem}"), err=True)
        if len(found.problems) > _SHOWN:
            click.echo(f"error: and {len(found.problems) - _SHOWN} more; --json has them all", err=True)
        if found.ok:
            what = good if found.manifest is not None else "headers are sound"
            click.echo(f"{found.path}: {found.tensors:,} tensors, {size(found.nbytes)}: {what}")
    if not found.ok:
        raise click.exceptions.Exit(1)
