"""``weightsmith quickstart``."""

from __future__ import annotations

import click


@click.command("quickstart")
@click.option("--keep", metavar="FOLDER", help="Keep the merged models in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(keep: str | None, as_json: bool) -> None:
    """Merge three small trained models, and show what each input and each merge can do."""
    from weightsmith.quickstart import run

    run(keep=keep, as_json=as_json)
