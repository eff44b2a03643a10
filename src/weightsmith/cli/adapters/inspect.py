"""``weightsmith adapter inspect``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.adapters.inspection import Inspection

# Layers that are listed without --all.
_LISTED = 24


@click.command("inspect")
@click.argument("adapter")
@click.option("--base", metavar="MODEL", help="The base: for norms as shares of its weights, and for DoRA.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core.")
@click.option("--all", "list_all", is_flag=True, help="List every layer, however many.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(adapter: str, base: str | None, threads: int | None, list_all: bool, as_json: bool) -> None:
    """Show what ADAPTER is, and how much it changes each layer.

    Rank and scale, the Frobenius norm of the change, its largest singular value, and its effective rank: the
    exponential of the entropy of its singular values. All through the factors, so no base is needed for a LoRA.
    """
    from weightsmith.adapters.inspection import inspect

    found = inspect(adapter, base, threads=threads)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(found, list_all=list_all)


def _show(found: Inspection, *, list_all: bool) -> None:
    click.echo(f"kind        {found.kind}")
    if found.base is not None:
        click.echo(f"base        {printable(found.base)}")
    settings = ", ".join(f"{key} {_value(value)}" for key, value in found.settings.items())
    click.echo(f"settings    {printable(settings) or 'none'}")
    click.echo(f"targets     {printable(', '.join(f'{name} ({count})' for name, count in found.targets.items()))}")
    types = ", ".join(found.dtypes)
    click.echo(f"tensors     {found.tensors:,}, {found.parameters:,} parameters, {size(found.nbytes)}, {types}")
    if found.saved:
        names = ", ".join(found.saved[:3]) + (" …" if len(found.saved) > 3 else "")
        click.echo(f"whole       {len(found.saved)} tensors take the base's place: {printable(names)}")
    if found.norm is not None:
        click.echo(f"norm        {found.norm:.4g} of all changes together")
    click.echo()
    layers = found.layers if list_all else found.layers[:_LISTED]
    heads = ("rank", "scale", "norm", "largest", "effective", "of weight")
    click.echo(" ".join(f"{head:>9}" for head in heads) + "  layer")
    for layer in layers:
        relative = "" if layer.relative is None else f"{100 * layer.relative:.3g} %"
        rank = "" if layer.rank is None else str(layer.rank)
        cells = (
            rank,
            _number(layer.scale),
            _number(layer.norm),
            _number(layer.spectral),
            _number(layer.effective),
            relative,
        )
        shape = "x".join(map(str, layer.shape or ()))
        click.echo(" ".join(f"{cell:>9}" for cell in cells) + f"  {printable(layer.module)} {shape}")
    if len(layers) < len(found.layers):
        click.echo(f"… and {len(found.layers) - len(layers)} more (--all lists them)")
    if found.reason is not None:
        click.echo(found.reason)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
