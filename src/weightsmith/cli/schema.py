"""``weightsmith schema``."""

from __future__ import annotations

import json

import click


@click.command("schema")
def command() -> None:
    """Print the JSON schema of recipes.

    \b
    weightsmith schema > recipe.schema.json
    # yaml-language-server: $schema=recipe.schema.json     (the recipe's first line)
    """
    from weightsmith.recipe.json_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
