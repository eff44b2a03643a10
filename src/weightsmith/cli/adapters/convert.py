"""``weightsmith adapter convert``."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli.merge import listener_for, report, warn
from weightsmith.cli.recipes import running_options

# As weightsmith.adapters has them; importing it would make help slow.
_LAYOUTS = ("peft", "kohya", "diffusers", "mlx")
_DTYPES = ("fp32", "fp16", "bf16", "float32", "float16", "bfloat16")


@click.command("convert")
@click.argument("adapter")
@click.argument("target", metavar="OUT")
@click.option("--to", "layout", type=click.Choice(_LAYOUTS), required=True, help="The layout to write.")
@click.option("--base", metavar="MODEL", help="The model that ADAPTER is for, where names alone do not tell enough.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="The dtype of the factors; by default their own.")
@running_options
@click.option("--verify", is_flag=True, help="Hash all inputs first, and note the hashes in OUT.")
def command(
    adapter: str,
    target: str,
    layout: str,
    base: str | None,
    dtype: str | None,
    quiet: bool,
    json_log: bool,
    **options: Any,
) -> None:
    """Write ADAPTER to OUT with its tensors named as another trainer or loader names them.

    \b
    weightsmith adapter convert lora.safetensors out/ --to peft --base sdxl/
    weightsmith adapter convert peft-folder/ lora.safetensors --to kohya --dtype fp16

    \b
    peft       a folder with adapter_config.json; one for each model of a pipeline
    kohya      a .safetensors file, or a folder that holds one; also LyCORIS' LoHa and LoKr
    diffusers  pytorch_lora_weights.safetensors, or another .safetensors file
    mlx        a folder that MLX-LM loads

    ADAPTER may be in any of these, or under the names of a model's publisher (Flux, ComfyUI's prefixes). The factors
    stay as they are, and so does the scale of every module; what OUT's layout cannot say is an error. OUT appears when
    it is whole.
    """
    from weightsmith.adapters import convert

    converted = convert(adapter, layout, base=base, dtype=dtype)
    summary = converted.save(target, progress=listener_for(quiet=quiet, json_log=json_log), **options)
    if not quiet:
        warn(summary.warnings, json_log)
        report(summary, json_log)
