"""``weightsmith bundle``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import listener_for, report, warn
from weightsmith.cli.recipes import parameter_option, parameters_of, writing_options
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size

if TYPE_CHECKING:
    from weightsmith.bundle import Bundle

_KINDS = ("emr", "tall", "tsv", "rmm", "bitdelta", "lossless")


@click.group("bundle")
def command() -> None:
    """Keep several fine-tunes of one base in one small folder, and restore each of them.

    \b
    weightsmith bundle create experts/ --kind emr --base B A1 A2 A3
    weightsmith bundle inspect experts/
    weightsmith bundle open experts/ --task A2 out/

    Wherever a model is named, experts#A2 names one of a bundle's.
    """


@command.command("create")
@click.argument("target", metavar="OUT")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--kind", type=click.Choice(_KINDS), required=True, help="What is kept of each model's changes.")
@click.option("--base", metavar="MODEL", required=True, help="The base that all models are fine-tunes of.")
@click.option(
    "--name", "names", metavar="TASK", multiple=True, help="A model's name, in the order of the models; one for each."
)
@parameter_option("A parameter of the kind, such as lambda=0.3 or basis=2.")
@click.option(
    "--base-by-reference", is_flag=True, help="Leave the base where it is, and know it again by hashes of its tensors."
)
@click.option("--dtype", help="The dtype in which changes are kept as floats; by default that of the models.")
@writing_options
@click.option("--verify", is_flag=True, help="Hash all inputs first, and note the hashes in OUT.")
def create(
    target: str,
    models: tuple[str, ...],
    kind: str,
    base: str,
    names: tuple[str, ...],
    parameters: tuple[str, ...],
    base_by_reference: bool,
    dtype: str | None,
    shard_size: int,
    threads: int | None,
    overwrite: bool,
    restart: bool,
    verify: bool,
    quiet: bool,
    json_log: bool,
) -> None:
    """Make the bundle OUT of several MODELs: fine-tunes of one base, or adapters on it.

    \b
    emr       a vector that all share, a bit per weight and a number for each
    tall      the sum of the changes, a bit per weight for each
    tsv       a few singular vectors of each matrix, for each
    rmm       a few basis models that all are combinations of
    bitdelta  a bit per weight and a number per matrix, for each
    lossless  the differences of bit patterns: every model to the bit

    OUT appears when it is whole. Stopped or killed, the same command goes on from there. Sizes and the error of
    each restored model are printed at the end. The kinds and their parameters: docs/guide/bundles.md
    """
    if names and len(names) != len(models):
        raise click.UsageError(f"{len(names)} names for {len(models)} models; give one --name for each, or none")
    if len(set(names)) < len(names):
        raise click.UsageError("two of the names are the same")
    from weightsmith.bundle import create as make
    from weightsmith.bundle.kind import make_kind

    created = make(
        target,
        dict(zip(names, models, strict=True)) if names else models,
        base=base,
        kind=make_kind(kind, parameters_of(parameters)),
        base_by_reference=base_by_reference,
        dtype=dtype,
        shard_size=shard_size,
        threads=threads,
        overwrite=overwrite,
        restart=restart,
        verify=verify,
        progress=listener_for(quiet=quiet, json_log=json_log),
    )
    if not quiet:
        warn(created.summary.warnings, json_log)
        report(created.summary, json_log)
        if not json_log:
            _show(created.bundle)


@command.command("inspect")
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(bundle: str, as_json: bool) -> None:
    """Show what is in BUNDLE: its kind, sizes, and each task with its error.

    Only headers are read. The content is checked by 'weightsmith verify BUNDLE'.
    """
    from weightsmith.bundle import open as open_bundle

    found = open_bundle(bundle)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(found)


@command.command("open")
@click.argument("bundle")
@click.argument("target", metavar="OUT")
@click.option("--task", required=True, help="Which model.")
@click.option("--base", metavar="MODEL", help="The base, where the bundle keeps it by reference.")
@writing_options
def open_(bundle: str, target: str, task: str, base: str | None, quiet: bool, json_log: bool, **options: Any) -> None:
    """Restore one model of BUNDLE: write it to the folder OUT, with its config and tokenizer."""
    from weightsmith.api import open as open_model
    from weightsmith.api import save

    restored = open_model(bundle, task=task, base=base)
    summary = save(restored, target, progress=listener_for(quiet=quiet, json_log=json_log), **options)
    if not quiet:
        warn(summary.warnings, json_log)
        report(summary, json_log)


def _show(found: Bundle) -> None:
    sizes = found.sizes()
    tasks = found.description.tasks
    parameters = ", ".join(f"{name} {_value(value)}" for name, value in found.kind.to_json().items())
    base = found.description.base
    where = "in the bundle" if base.tensors is None else "by reference"
    width = max(12, *(len(name) + 2 for name in tasks))
    count = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    click.echo(f"{'kind':{width}}{found.kind.name}, {count}{': ' if parameters else ''}{parameters}")
    click.echo(f"{'base':{width}}{size(sizes.base):>10}  {where}: {printable(base.reference)}")
    if sizes.shared:
        click.echo(f"{'shared':{width}}{size(sizes.shared):>10}")
    for name, task in tasks.items():
        told = ""
        if task.error is not None and task.error.equal == 1:
            told = "the model to the bit"
        elif task.error is not None:
            shares = {"of the model": task.error.relative, "of its change": task.error.of_change}
            parts = [f"{100 * share:.3g} % {what}" for what, share in shares.items() if share is not None]
            told = f"error {', '.join(parts) or 'beyond float64'}"
        click.echo(f"{name:{width}}{size(sizes.tasks[name]):>10}  {told}")
    click.echo(f"{'files':{width}}{size(sizes.beside):>10}  configs, tokenizers, description, manifest")
    share = f"{100 * sizes.ratio:.1f} % of the {size(sizes.models)} that the weights of the models take by themselves"
    click.echo(f"{'total':{width}}{size(sizes.total):>10}  {share}")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    return "none" if value is None else str(value)
