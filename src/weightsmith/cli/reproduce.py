"""``weightsmith reproduce``."""

from __future__ import annotations

import click

from weightsmith.cli.merge import backend_options, listener_for
from weightsmith.cli.verify import report


@click.command("reproduce")
@click.argument("path", metavar="OUT")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core.")
@backend_options
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the result.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(
    path: str, threads: int | None, device: str | None, backend: str | None, quiet: bool, as_json: bool
) -> None:
    """Run the recipe of OUT again, from the same inputs, and compare. Nothing is written.

    Paths in the recipe are relative to the current folder, as they were when OUT was made. Exits with 1 if an
    input has changed, or a tensor comes out different.
    """
    from weightsmith.verification import reproduce

    progress = listener_for(quiet=quiet or as_json, json_log=False)
    found = reproduce(path, threads=threads, device=device, backend=backend, progress=progress)
    report(found, as_json=as_json, good="the recipe makes the same again")
