"""``weightsmith fuse``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import save, saving_options
from weightsmith.cli.recipes import dtype_option

if TYPE_CHECKING:
    from weightsmith.reparameterized.fold import FoldedModel


@click.command("fuse")
@click.argument("base")
@click.argument("adapters", metavar="[ADAPTER...]", nargs=-1)
@click.argument("target", metavar="OUT")
@click.option(
    "--weight",
    "weights",
    metavar="NUMBER",
    type=float,
    multiple=True,
    help="How much of an adapter is taken, 1 by default: once for all of them, or once for each in their order.",
)
@click.option(
    "--rule",
    "rules",
    metavar="KIND:NAMES,SETTING=VALUE",
    multiple=True,
    help="Without adapters: what names do not show, such as eps:*,value=0.001 or keep:head*; may be repeated.",
)
@click.option("--rules", "rules_file", metavar="FILE", help="Further rules, in YAML or JSON.")
@dtype_option
@saving_options
def command(
    base: str,
    adapters: tuple[str, ...],
    target: str,
    weights: tuple[float, ...],
    rules: tuple[str, ...],
    rules_file: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Fold adapters into BASE, or BASE's own structure: OUT is a model of plain weights.

    \b
    weightsmith fuse base/ lora/ out/
    weightsmith fuse base/ style/ subject/ out/ --weight 0.7 --weight 0.4

    Of several adapters, each one's change is formed on BASE alone, and their weighted sum is added to it. Wherever a
    model is named, base+lora and base+0.7*style+0.4*subject name the same without writing it. The kinds that fold:
    docs/reference/adapters.md

    Without adapters the form that BASE was trained in is folded, which is recognised by its tensors' names: batch
    norms behind convolutions, branches side by side (RepVGG, MobileOne, FastViT, RepNeXt), weight normalisation and
    more: docs/guide/reparameterized.md

    \b
    weightsmith fuse repvgg-a0/ out/
    weightsmith fuse repavit/ out/ --rule repavit:*,idle=0.75
    """
    if not adapters:
        if weights:
            raise click.UsageError("--weight is of adapters, and none is given")
        if (Path(target) / "adapter_config.json").exists():
            raise click.UsageError(f"{target} is an adapter: give BASE ADAPTER OUT")
        from weightsmith.reparameterized.fold import fold_model

        folded = fold_model(base, rules, rules_file=rules_file, dtype=dtype)
        if not options["quiet"]:
            _show(folded, as_json=options["json_log"])
        save(folded, target, **options)
        return
    if rules or rules_file is not None:
        raise click.UsageError("--rule and --rules are of a model's own structure: fold that first, without adapters")
    from weightsmith.api import fuse

    save(fuse(base, adapters, weights or None, out_dtype=dtype), target, **options)


def _show(folded: FoldedModel, *, as_json: bool) -> None:
    """Print what was recognised, by kind."""
    counts = folded.counts()
    if as_json:
        for count in counts:
            entry = {"event": "recognised", "kind": count.kind, "folds": count.folds}
            click.echo(json.dumps({**entry, "tensors": count.sources, "results": count.results}), err=True)
        return
    click.echo(f"{'kind':16}{'folded':>8}{'tensors':>10}{'become':>8}", err=True)
    for count in counts:
        click.echo(f"{count.kind:16}{count.folds:>8,}{count.sources:>10,}{count.results:>8,}", err=True)
