"""``weightsmith fuse``."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli.merge import save, saving_options
from weightsmith.cli.recipes import dtype_option


@click.command("fuse")
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.argument("target", metavar="OUT")
@click.option(
    "--weight",
    "weights",
    metavar="NUMBER",
    type=float,
    multiple=True,
    help="How much of an adapter is taken, 1 by default: once for all of them, or once for each in their order.",
)
@dtype_option
@saving_options
def command(
    base: str, adapters: tuple[str, ...], target: str, weights: tuple[float, ...], dtype: str | None, **options: Any
) -> None:
    """Fold adapters into BASE: OUT is a model of plain weights.

    \b
    weightsmith fuse base/ lora/ out/
    weightsmith fuse base/ style/ subject/ out/ --weight 0.7 --weight 0.4

    Of several adapters, each one's change is formed on BASE alone, and their weighted sum is added to it. Wherever a
    model is named, base+lora and base+0.7*style+0.4*subject name the same without writing it. The kinds that fold:
    docs/reference/adapters.md
    """
    from weightsmith.api import fuse

    save(fuse(base, adapters, weights or None, out_dtype=dtype), target, **options)
