"""``weightsmith adapter revert``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import listener_for, report, warn
from weightsmith.cli.recipes import running_options

if TYPE_CHECKING:
    from weightsmith.engine.executor import Summary


def adapter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of commands that write adapters."""
    verify = click.option("--verify", is_flag=True, help="Hash all inputs first, and note the hashes in OUT.")
    return running_options(verify(function))


def write(summary: Summary, known: Sequence[str], *, quiet: bool, json_log: bool) -> None:
    """Tell what was written, with those warnings that were not told before."""
    if not quiet:
        warn([warning for warning in summary.warnings if warning not in known], json_log)
        report(summary, json_log)


@click.command("revert")
@click.argument("basis")
@click.argument("adapter")
@click.argument("target", metavar="OUT")
@click.option("--dtype", help="The dtype of OUT; by default that of the basis.")
@adapter_options
def command(
    basis: str, adapter: str, target: str, dtype: str | None, quiet: bool, json_log: bool, **options: Any
) -> None:
    """Restore one ADAPTER that BASIS was made of: OUT is a LoRA in PEFT's layout.

    \b
    weightsmith adapter merge a/ b/ c/ basis/ --method rmm -p basis=2
    weightsmith adapter revert basis/ b out/

    ADAPTER is its name, or its number from 1. With as many basis adapters as adapters each comes back as it was, but
    for rounding.
    """
    from weightsmith.adapters.combine.create import revert

    restored = revert(basis, adapter, dtype=dtype)
    progress = listener_for(quiet=quiet, json_log=json_log)
    write(restored.save(target, progress=progress, **options), (), quiet=quiet, json_log=json_log)
