"""``weightsmith methods``."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weightsmith.methods.parameters import Parameter
    from weightsmith.methods.registry import Method


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plugin", "plugins", metavar="FILE.py", multiple=True, help="Run a file that defines methods.")
@click.option("--check", is_flag=True, help="Run the conformance battery on the method.")
def command(name: str | None, as_json: bool, plugins: tuple[str, ...], check: bool) -> None:
    """List the merge methods, or explain one: formula, parameters, defaults, ranges, needs, source."""
    from weightsmith.methods.registry import all_methods, get_method, load_plugin

    for plugin in plugins:
        load_plugin(plugin)
    if check:
        if name is None:
            raise click.UsageError("--check needs the method's NAME")
        _check(get_method(name))
        return
    chosen = [get_method(name)] if name is not None else list(all_methods().values())
    if as_json:
        content = [_json(method) for method in chosen]
        click.echo(json.dumps(content[0] if name is not None else content, indent=2))
    elif name is not None:
        _page(chosen[0])
    else:
        _list(chosen)


def _list(methods: list[Method]) -> None:
    """Print methods by family: name, needs and summary, other names below."""
    width = max(len(method.name) for method in methods)
    needs = max(len(method.needs) for method in methods if method.fisher == "unused")
    for family, group in itertools.groupby(methods, lambda method: method.family):
        click.echo(f"{family}:")
        for method in group:
            click.echo(f"  {method.name:{width}}  {method.needs:{needs}}  {method.summary}")
            if method.also:
                click.echo(f"  {'':{width}}  also: {', '.join(method.also)}")
        click.echo()
    click.echo("'weightsmith methods NAME' explains one; other names work too.")


def _page(method: Method) -> None:
    click.echo(f"{method.name}: {method.needs}\n")
    click.echo(method.description)
    if method.order:
        click.echo(f"\nRoles: {method.order}")
    if method.parameters:
        click.echo("\nParameters:")
    for line in parameter_lines(method.parameters.values()):
        click.echo(line)
    facts = [
        ("Also known as", ", ".join(method.also)),
        ("Source", method.source),
        ("Cost", method.cost),
        ("Random", "yes: the recipe's seed decides" if method.random else ""),
        ("Holds", ", ".join(sorted(method.properties))),
    ]
    facts += [
        (f"compat: {tool}", ", ".join(f"{name} {_yaml(value)}" for name, value in values.items()))
        for tool, values in method.compat.items()
    ]
    click.echo()
    for title, text in facts:
        if text:
            click.echo(f"{title}: {text}")
    click.echo("\nA recipe:\n")
    click.echo(_example(method))


def parameter_lines(parameters: Iterable[Parameter]) -> Iterator[str]:
    """Yield what parameters are, two lines each."""
    for parameter in parameters:
        default = "required" if parameter.required else f"default {_yaml(parameter.default)}"
        scope = ", per model" if parameter.per_model else ""
        yield f"  {parameter.name}  {parameter.range_text}{scope}; {default}"
        yield f"      {parameter.about.description}"


def _example(method: Method) -> str:
    count = max(method.minimum, 2 if method.maximum is None else method.maximum)
    own = {name: value for name, value in method.example.items() if method.parameters[name].per_model}
    shared = {name: value for name, value in method.example.items() if name not in own}
    lines = [f"  merge_method: {method.name}"]
    if method.base == "required":
        lines.append("  base_model: path/to/base")
    lines.append("  models:")
    roles = method.roles[method.base == "required" :]
    for i in range(count):
        role = f"  # {roles[min(i, len(roles) - 1)]}" if roles else ""
        lines.append(f"  - model: path/to/model-{i + 1}{role}")
        if own:
            lines.append("    parameters: {" + ", ".join(f"{k}: {_yaml(v)}" for k, v in own.items()) + "}")
    if shared:
        lines.append("  parameters: {" + ", ".join(f"{k}: {_yaml(v)}" for k, v in shared.items()) + "}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _json(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "description": method.description,
        "also": list(method.also),
        "source": method.source,
        "cost": method.cost,
        "fisher": method.fisher,
        "roles": list(method.roles),
        "base": method.base,
        "minimum_models": method.minimum,
        "maximum_models": method.maximum,
        "random": method.random,
        "properties": sorted(method.properties),
        "compat": {tool: dict(values) for tool, values in method.compat.items()},
        "parameters": [
            {
                "name": p.name,
                "type": p.kind.__name__,
                "choices": list(p.choices),
                "per_model": p.per_model,
                "required": p.required,
                "default": p.default,
                "minimum": p.about.minimum,
                "maximum": p.about.maximum,
                "description": p.about.description,
            }
            for p in method.parameters.values()
        ],
    }


def _check(method: Method) -> None:
    from weightsmith.conformance import run_battery

    failed = 0
    for check, problem in run_battery(method):
        failed += problem is not None
        click.echo(f"{'FAILED' if problem else 'ok':7} {check}" + (f": {problem}" if problem else ""))
    sys.exit(1 if failed else 0)
