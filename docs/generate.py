"""Writes the reference pages from what the code declares: the recipe's schema, the methods, the commands.

python docs/generate.py           # write docs/reference/*.md
python docs/generate.py --check   # exit 1 if a page is not what the code says
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from weightsmith.adapters.combine.registry import all_combiners
from weightsmith.adapters.registry import NOT_IN_FILE, NOT_WEIGHTS, Parameterization, all_parameterizations
from weightsmith.bundle.kind import kinds
from weightsmith.cli.main import cli
from weightsmith.methods.parameters import Parameter
from weightsmith.methods.registry import all_methods
from weightsmith.recipe.json_schema import json_schema
from weightsmith.reparameterized.fold import KINDS
from weightsmith.reparameterized.instructions import SETTINGS

PAGES = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; do not edit. -->\n\n"


def recipe_page() -> str:
    """Return the recipe reference, from the JSON schema."""
    schema = json_schema()
    lines = [
        "# The recipe",
        "",
        "Every key of a recipe, from its schema. `weightsmith schema` prints the schema itself, for editors "
        "that complete YAML by one. Unknown keys are errors.",
        "",
    ]
    lines += _object("Recipe", schema)
    for name, definition in schema.get("$defs", {}).items():
        if "properties" in definition:
            lines += _object(name, definition)
    return "\n".join(lines) + "\n"


def _object(name: str, definition: Mapping[str, Any]) -> list[str]:
    required = set(definition.get("required", ()))
    lines = [f"## {name}", "", str(definition.get("description", "")), "", "| key | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    for key, entry in definition.get("properties", {}).items():
        default = "**required**" if key in required else _cell(entry.get("default"))
        meaning = " ".join(str(entry.get("description", "")).split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(entry)} | {default} | {meaning} |")
    return [*lines, ""]


def _cell(value: Any) -> str:
    return "" if value in (None, {}, []) else f"`{value}`"


def _type(entry: Mapping[str, Any]) -> str:
    if "$ref" in entry:
        name = str(entry["$ref"]).rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    for joined in ("anyOf", "oneOf", "allOf"):
        if joined in entry:
            kinds = [_type(option) for option in entry[joined] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if entry.get("type") == "array":
        return f"list of {_type(entry['items'])}" if "items" in entry else "list"
    if isinstance(entry.get("additionalProperties"), dict):
        return f"map to {_type(entry['additionalProperties'])}"
    return str(entry.get("type", "any"))


def methods_page() -> str:
    """Return the method reference, from the registry."""
    methods = [m for m in all_methods().values() if m.function.__module__.startswith("weightsmith.")]
    lines = [
        "# Methods",
        "",
        "What each method declares about itself; `weightsmith methods NAME` prints the same. *Per model* "
        "parameters have one value for each model and may be given under it; all others have one value.",
        "",
    ]
    for family, group in itertools.groupby(methods, lambda method: method.family):
        lines += [f"**{family}**", "", "| method | needs | |", "|---|---|---|"]
        for m in group:
            also = f" Also known as {', '.join(f'`{name}`' for name in m.also)}." if m.also else ""
            lines.append(f"| [{m.name}](#{m.name}) | {m.needs} | {m.summary}{also} |")
        lines.append("")
    lines.pop()
    for method in methods:
        lines += ["", f"## {method.name}", "", method.description, ""]
        if method.also:
            lines += [f"**Also known as:** {', '.join(f'`{name}`' for name in method.also)}", ""]
        lines += [f"**Needs:** {method.needs}", ""]
        if method.order:
            lines += [f"**Roles:** {method.order}", ""]
        if method.source:
            lines += [f"**Source:** {method.source}", ""]
        lines += [f"**Cost:** {method.cost}", ""]
        if method.properties:
            lines += [f"**Properties:** {', '.join(sorted(method.properties))}", ""]
        lines += _parameters(method.parameters.values())
        for tool, values in method.compat.items():
            given = ", ".join(f"`{name}: {_yaml(value)}`" for name, value in values.items())
            lines += ["", f"With `compat: {tool}`: {given}."]
    return "\n".join(lines) + "\n"


def _parameters(parameters: Collection[Parameter]) -> list[str]:
    """Return the table of parameters; nothing if there are none."""
    lines = ["| parameter | | default | values | meaning |", "|---|---|---|---|---|"] if parameters else []
    for p in parameters:
        default = "**required**" if p.required else f"`{_yaml(p.default)}`"
        scope = "per model" if p.per_model else ""
        about = p.about.description.replace("|", "\\|")
        lines.append(f"| `{p.name}` | {scope} | {default} | {p.range_text} | {about} |")
    return lines


def combining_page() -> str:
    """Return the reference of methods that combine adapters, from their registry."""
    combiners = all_combiners().values()
    lines = [
        "# Methods for adapters",
        "",
        "The methods of `weightsmith adapter merge` that are made for adapters; `--explain` prints the same. Those of "
        "[Methods](methods.md) that work on task vectors work on the deltas of adapters too. How they are used: "
        "[Adapters](../guide/adapters.md#combine-adapters).",
        "",
        "| method | |",
        "|---|---|",
    ]
    lines += [f"| [{one.name}](#{one.name}) | {one.summary.replace('``', '`')} |" for one in combiners]
    for one in combiners:
        lines += ["", f"## {one.name}", "", one.about.replace("``", "`"), "", f"**Source:** {one.source}"]
        if one.parameters:
            lines += ["", *_parameters(one.parameters.values())]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def bundles_page() -> str:
    """Return the reference of kinds of bundles, from their own documentation."""
    lines = [
        "# Kinds of bundles",
        "",
        "What each kind says of itself. Parameters are given as `-p NAME=VALUE`, or in Python by name. How bundles are "
        "made and used: [Bundles](../guide/bundles.md).",
        "",
        "| kind | |",
        "|---|---|",
    ]
    lines += [f"| [{name}](#{name}) | {kind.summary} |" for name, kind in kinds().items()]
    for name, kind in kinds().items():
        text = inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
        about, _, described = text.partition("\nAttributes:\n")
        lines += ["", f"## {name}", "", about.strip()]
        if described:
            lines += ["", "| parameter | default | meaning |", "|---|---|---|"]
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        for parameter, meaning in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", described, re.MULTILINE):
            default = "none" if defaults[parameter] is None else str(defaults[parameter]).lower()
            lines.append(f"| `{parameter.rstrip('_')}` | `{default}` | {' '.join(meaning.split())} |")
    return "\n".join(lines) + "\n"


def adapters_page() -> str:
    """Return the reference of kinds of adapters, from the registry."""
    known = all_parameterizations()
    lines = [
        "# Kinds of adapters",
        "",
        "What each kind declares about itself: what it makes of a weight W, how its tensors are laid out, the keys of "
        "`adapter_config.json` that bear on weights, and what is refused. How adapters are folded: "
        "[Adapters](../guide/adapters.md).",
        "",
        "Shapes are those of a layer's weight and of the adapter's tensors beside it; equal names are equal lengths, "
        "and `...` stands for all axes that are left. Tensors are named `base_model.model.<module>.<part>`, with or "
        "without `.weight` behind. What is not listed for a kind makes no difference to weights.",
        "",
    ]
    for family, group in itertools.groupby(known.values(), lambda kind: kind.function.__module__):
        about = (inspect.getdoc(sys.modules[family]) or "").partition("\n")[0]
        lines += [f"**{about}**", "", "| `peft_type` | kind | |", "|---|---|---|"]
        for kind in group:
            summary = kind.about.partition("\n")[0].partition(": ")[2].replace("``", "`").replace("|", "\\|")
            lines.append(f"| [{kind.peft_type}](#{kind.peft_type.lower()}) | {kind.title} | {summary} |")
        lines.append("")
    lines.pop()
    for kind in known.values():
        lines += _adapter(kind)
    lines += ["", "## What no plain weights equal", "", "| `peft_type` | why it is refused |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in NOT_WEIGHTS.items()]
    lines += ["", "## What files do not tell", "", "| `peft_type` | why it is refused |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in NOT_IN_FILE.items()]
    return "\n".join(lines) + "\n"


def _adapter(kind: Parameterization) -> list[str]:
    lines = ["", f"## {kind.peft_type}", "", kind.about.replace("``", "`"), "", f"**Source:** {kind.source}", ""]
    lines += ["| weight | tensors | there may be | when |", "|---|---|---|---|"]
    for form in kind.forms:
        parts, optional = (
            ", ".join(f"`{part} [{', '.join(shape.split())}]`" for part, shape in shapes.items())
            for shapes in (form.parts, form.optional)
        )
        parts += "".join(f", shared `{part} [{', '.join(text.split())}]`" for part, text in form.shared.items())
        when = "" if form.when is None else f"`{form.when}`"
        lines.append(f"| `[{', '.join(form.weight.split())}]` | {parts} | {optional} | {when} |")
    if kind.shared:
        lines += ["", f"**Shared by all layers:** {', '.join(f'`{part}`' for part in kind.shared)}."]
    if kind.aliases:
        lines += ["", f"**Also known as:** {', '.join(f'`{old}` for `{new}`' for old, new in kind.aliases.items())}."]
    if kind.variant is not None:
        lines += ["", f"**In configs:** `peft_type: {kind.variant[0]}` with `{kind.variant[1]}` set."]
    if kind.settings:
        lines += ["", "| key | default | meaning |", "|---|---|---|"]
    for setting in kind.settings:
        meaning = setting.about + (f"; by module in `{setting.patterns}`" if setting.patterns else "")
        lines.append(f"| `{setting.name}` | `{_yaml(setting.default)}` | {meaning} |")
    if kind.refuses:
        lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| `{key}` | {reason} |" for key, reason in kind.refuses.items()]
    if kind.lacking:
        lines += ["", f"**Where parts are not in the file:** {kind.lacking}."]
    return lines


def reparameterized_page() -> str:
    """Return the reference of training forms and of rules, from their tables."""
    lines = [
        "# Training forms",
        "",
        "What `weightsmith fuse MODEL OUT` recognises, and the rules by which a person says what names do not show: "
        "`--rule KIND:NAMES,SETTING=VALUE`. How both are used: [Training forms](../guide/reparameterized.md).",
        "",
        "| kind | what it is |",
        "|---|---|",
        *(f"| `{kind}` | {about} |" for kind, about in KINDS.items()),
        "",
        "## Rules",
        "",
        "| kind | setting | default | meaning |",
        "|---|---|---|---|",
    ]
    for kind, settings in SETTINGS.items():
        if not settings:
            lines.append(f"| `{kind}` | | | |")
        for name, setting in settings.items():
            default = "**required**" if setting.required else _cell(setting.default)
            lines.append(f"| `{kind}` | `{name}` | {default} | {setting.about} |")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Return the command reference, from the commands' own help."""
    context = click.Context(cli, info_name="weightsmith", terminal_width=90, max_content_width=90)
    lines = ["# Command line", "", "```text", cli.get_help(context), "```"]
    for name, inner in _commands(cli, context):
        lines += ["", f"## {name}", "", "```text", inner.command.get_help(inner), "```"]
    return "\n".join(lines) + "\n"


def _commands(group: click.Group, context: click.Context, before: str = "") -> Iterator[tuple[str, click.Context]]:
    """Yield the name and context of every command, those within commands included."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None:
            inner = click.Context(command, info_name=name, parent=context, max_content_width=90, terminal_width=90)
            yield f"{before}{name}", inner
            if isinstance(command, click.Group):
                yield from _commands(command, inner, f"{before}{name} ")


PAGE_MAKERS = (
    ("recipe", recipe_page),
    ("methods", methods_page),
    ("adapters", adapters_page),
    ("bundles", bundles_page),
    ("reparameterized", reparameterized_page),
    ("combining", combining_page),
    ("cli", cli_page),
)


def main() -> None:
    """Write the pages, or check them."""
    check = "--check" in sys.argv[1:]
    PAGES.mkdir(exist_ok=True)
    stale = []
    for name, page in PAGE_MAKERS:
        path = PAGES / f"{name}.md"
        text = NOTE + page()
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, "utf-8")
    if check and stale:
        sys.exit(f"docs/reference is not what the code says: {', '.join(stale)}; run python docs/generate.py")


if __name__ == "__main__":
    main()
