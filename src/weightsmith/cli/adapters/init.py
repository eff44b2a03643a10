"""``weightsmith adapter init``."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli.merge import listener_for, report, warn
from weightsmith.cli.recipes import memory_option, running_options

_TAKES_PART = ("pissa", "milora", "olora", "corda")


@click.command("init")
@click.argument("base")
@click.argument("target", metavar="OUT")
@click.option(
    "--method",
    type=click.Choice(["kaiming", "pissa", "milora", "olora", "eva", "corda"]),
    required=True,
    help="How the training begins.",
)
@click.option("--rank", type=click.IntRange(min=1), required=True, help="The rank.")
@click.option("--alpha", type=float, help="lora_alpha; by default the rank, which makes the scale 1.")
@click.option(
    "--target",
    "targets",
    metavar="NAMES",
    multiple=True,
    help="Modules, by the last part of their names or a pattern: q_proj, '*mlp*'; by default all linear layers within "
    "layers. May be repeated.",
)
@click.option("--activations", metavar="FILE", help="eva, corda: inputs of the layers, or their Gram matrices.")
@click.option("--residual", metavar="OUT_BASE", help="Write the base that OUT must be trained on.")
@click.option("--residual-dtype", help="Its dtype; by default that of BASE.")
@click.option("--rho", type=float, default=1.0, show_default=True, help="eva: how far ranks may be shared out.")
@click.option("--smallest", is_flag=True, help="corda: take the smallest singular values (kpm).")
@click.option(
    "--decomposition",
    type=click.Choice(["exact", "randomized"]),
    default="exact",
    show_default=True,
    help="pissa, eva: by LAPACK, or by random projections.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random numbers.")
@click.option("--dtype", default="float32", show_default=True, help="The dtype of A and B.")
@memory_option
@running_options
def command(
    base: str,
    target: str,
    residual: str | None,
    threads: int | None,
    memory: int | None,
    overwrite: bool,
    restart: bool,
    quiet: bool,
    json_log: bool,
    **settings: Any,
) -> None:
    """Make a LoRA on BASE to begin a training with: OUT.

    \b
    weightsmith adapter init base/ lora/ --method pissa --rank 16 --residual rest/
    weightsmith adapter init base/ lora/ --method eva --rank 16 --activations inputs.safetensors

    \b
    kaiming  random A, B zero: as LoRA begins
    pissa    the leading singular triples of each weight
    milora   the trailing ones
    olora    the first rows of its QR decomposition
    eva      the directions in which inputs vary most as A, B zero; without activations the weight's own
    corda    singular triples as the inputs weigh them; without activations PiSSA's

    Where an adapter begins with a part of the weights, it must be trained on the rest: --residual writes that base.
    """
    method = settings["method"]
    if method in _TAKES_PART and residual is None:
        raise click.UsageError(
            f"{method} begins with a part of BASE's weights, and must be trained on the rest: give --residual OUT_BASE"
        )
    if method not in _TAKES_PART and residual is not None:
        raise click.UsageError(f"{method} leaves BASE as it is: leave --residual out")
    from weightsmith.initialization.create import initialize_adapter

    adapter = initialize_adapter(base, threads=threads, trained_on=residual, **settings)
    outputs = [(adapter, target)] if residual is None else [(adapter.residual(), residual), (adapter, target)]
    for output, path in outputs:
        summary = output.save(
            path,
            threads=threads,
            memory=memory,
            overwrite=overwrite,
            restart=restart,
            progress=listener_for(quiet=quiet, json_log=json_log),
        )
        if not quiet:
            warn(summary.warnings, json_log)
            report(summary, json_log)
