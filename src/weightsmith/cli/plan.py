"""``weightsmith plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.recipes import memory_option, read_recipe, recipe_options, shard_option
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import roughly, size

if TYPE_CHECKING:
    from weightsmith.engine.plan import Plan


@click.command("plan")
@click.argument("recipe_path", metavar="[RECIPE]", required=False)
@recipe_options
@shard_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads to plan the memory for.")
@memory_option
@click.option("--tensors", is_flag=True, help="List every tensor, with its sources and parameters.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def command(
    recipe_path: str | None,
    shard_size: int,
    threads: int | None,
    memory: int | None,
    tensors: bool,
    as_json: bool,
    **described: Any,
) -> None:
    """Show what a merge would do: tensors, methods, bytes, memory, shards. Nothing is written."""
    recipe = read_recipe(recipe_path, **described)
    from weightsmith.api import merge_recipe
    from weightsmith.engine.memory import uncollected

    with uncollected():
        plan = merge_recipe(recipe).plan(shard_size=shard_size)
        show_plan(plan, threads=threads, memory=memory, as_json=as_json, tensors=tensors)


def planned(plan: Plan, *, threads: int | None, memory: int | None, tensors: bool) -> tuple[dict[str, Any], int]:
    """Return a plan as JSON values, and the number of threads that its memory is estimated for."""
    from weightsmith.engine.threads import default_threads

    count = threads or default_threads()
    if memory is not None:
        count = plan.threads_within(memory, count)
    return plan.to_json(count, memory=memory, tensors=tensors), count


def show_plan(plan: Plan, *, threads: int | None, memory: int | None, as_json: bool, tensors: bool) -> None:
    """Print a plan."""
    content, count = planned(plan, threads=threads, memory=memory, tensors=as_json or tensors)
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    if tensors:
        for entry in content["tensors"]:
            _show_tensor(entry)
        click.echo()
    click.echo(f"output      {len(plan.tasks):,} tensors, {content['parameters']:,} parameters")
    click.echo(f"methods     {', '.join(f'{name} on {count:,}' for name, count in content['methods'].items())}")
    if content["decompositions"]:
        _show_matrices(content)
    click.echo(f"read        {size(content['bytes_read'])}, once per pass")
    click.echo(f"write       {size(content['bytes_written'])}")
    workers = f"{count} thread{'s' if count > 1 else ''}"
    click.echo(f"memory      about {size(content['peak_memory'])} at most, with {workers}")
    for shard in content["shards"]:
        click.echo(f"shard       {printable(shard['file'])}: {shard['tensors']:,} tensors, {size(shard['nbytes'])}")
    for warning in content["warnings"]:
        click.echo(f"warning     {printable(warning)}")


def _show_matrices(content: dict[str, Any]) -> None:
    operations, at_a_time = content["matrix_operations"], content["matrices_at_a_time"]
    seconds = operations / _operations_a_second() / min(at_a_time, content["matrices"])
    click.echo(
        f"matrices    {content['matrices']:,} tensors, {content['decompositions']:,} decompositions, "
        f"{operations:.2g} operations: {roughly(seconds)} on this machine"
    )
    largest = content["largest_matrix"]
    shape = "x".join(map(str, largest["shape"]))
    click.echo(
        f"            the largest, {printable(largest['name'])} ({shape}), takes {size(largest['memory'])}; "
        f"{at_a_time} at a time"
    )


def _operations_a_second() -> float:
    """Time a small decomposition, as the plan counts one; larger ones do up to half as much again in a second."""
    from time import perf_counter

    import numpy as np
    from threadpoolctl import threadpool_limits

    side = 512
    matrix = np.random.default_rng(0).standard_normal((side, side))
    matrix = matrix @ matrix.T
    with threadpool_limits(1, user_api="blas"):
        np.linalg.eigh(matrix[:64, :64])
        started = perf_counter()
        np.linalg.eigh(matrix)
        return 9.0 * side**3 / (perf_counter() - started)


def _show_tensor(entry: dict[str, Any]) -> None:
    shape = "x".join(map(str, entry["shape"])) or "scalar"
    click.echo(f"{printable(entry['name'])}  {shape} {entry['dtype']}  {entry['method'] or 'carried'}")
    for source in entry["inputs"]:
        click.echo(f"    from {printable(source['model'])}: {printable(source['tensor'])}")
    given = {name: value for name, value in entry["parameters"].items() if value is not None}
    if given:
        click.echo("    " + ", ".join(f"{name} {json.dumps(value)}" for name, value in given.items()))
