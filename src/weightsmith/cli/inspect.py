"""``weightsmith inspect``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.inspection import Inspection


@click.command("inspect")
@click.argument("model")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(model: str, tensors: bool, as_json: bool) -> None:
    """Show what is in MODEL: a folder, a file, a hub id or a URL. Only headers are read."""
    from weightsmith.api import open as open_model
    from weightsmith.inspection import inspect

    found = inspect(open_model(model))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(found, tensors=tensors)


def _show(found: Inspection, *, tensors: bool) -> None:
    kind = "adapter" if found.is_adapter else "model"
    about = ", ".join(found.architectures) or found.model_type or "of unknown architecture"
    click.echo(f"{kind:12}{printable(about)}")
    click.echo(f"tensors     {found.tensors:,}, {found.parameters:,} parameters, {size(found.nbytes)}")
    for dtype, (count, nbytes) in found.dtypes.items():
        click.echo(f"dtype       {dtype}: {count:,} tensors, {size(nbytes)}")
    for file, nbytes in found.files.items():
        click.echo(f"file        {printable(file)}: {size(nbytes)}")
    if found.companions:
        click.echo(f"beside      {printable(', '.join(found.companions))}")
    if found.tied:
        click.echo("tied        the head is the embedding (tie_word_embeddings)")
    for stack in found.stacks:
        click.echo()
        click.echo(f"{printable(stack.prefix) or '(numbered)'}: {stack.layers} layers, {stack.parameters:,} parameters")
        for group in stack.groups:
            click.echo(f"  layers {_ranges(group.layers)}, {group.parameters:,} parameters each:")
            for entry in group.tensors:
                click.echo(f"    {printable(entry.name)}  {_shape(entry.shape)} {entry.dtype}")
    if found.outside:
        click.echo()
        click.echo("outside layers:")
        for entry in found.outside:
            click.echo(f"  {printable(entry.name)}  {_shape(entry.shape)} {entry.dtype}")
    if tensors:
        click.echo()
        for entry in found.all_tensors:
            click.echo(f"{printable(entry.name)}  {_shape(entry.shape)} {entry.dtype}  {entry.nbytes:,} B")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
