"""What merge and plan share: a recipe from a file, or from flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from weightsmith.errors import RecipeError

if TYPE_CHECKING:
    from weightsmith.recipe.schema import Recipe

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options by which a merge is described without a file, and those that change a file's recipe."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option("--method", metavar="NAME", help="Merge by this method, without a recipe file."),
        click.option("--base", metavar="MODEL", help="The base."),
        click.option("--model", "models", metavar="MODEL", multiple=True, help="A model; may be repeated."),
        click.option(
            "--onto",
            metavar="MERGED",
            help="Go on with a merge: its result is the first model, and method, base and parameters are its own where "
            "they are not given.",
        ),
        parameter_option("A parameter of the method; for one value per model, a list: weight=[0.3,0.7]."),
        click.option(
            "--rule",
            "rules",
            metavar="NAMES=METHOD",
            multiple=True,
            help="Another method for tensors whose names fit a pattern with * and ?, with parameters of its own and "
            "some of the models: '*norm*=linear,weight=1', 'lm_head*=passthrough,model=A', '*mlp*=density=0.5'. The "
            "first that fits decides; may be repeated.",
        ),
        click.option(
            "--fisher",
            "fishers",
            metavar="MODEL=CHECKPOINT",
            multiple=True,
            help="The importances of a model's weights, for methods that take them; may be repeated.",
        ),
        click.option("--base-fisher", metavar="CHECKPOINT", help="The importances of the base's weights."),
        click.option("--set", "variables", metavar="NAME=VALUE", multiple=True, help="A variable of the recipe."),
        click.option("--dtype", help="The output's dtype."),
        click.option("--out-dtype", help="The output's dtype, where the recipe's dtype is to stay."),
        click.option("--seed", type=int, help="The seed of random methods."),
        click.option("--compat", type=click.Choice(["mergekit"]), help="Restore that tool's numbers."),
        click.option(
            "--tokenizer-source",
            metavar="MODEL",
            help="Whose tokenizer the output takes: base, a model, or union; all models are brought to its tokens.",
        ),
        click.option(
            "--plugin",
            "plugins",
            metavar="FILE.py",
            multiple=True,
            help="Run a Python file that defines methods. Only files you trust.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def parameter_option(about: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option by which a method or kind gets its parameters."""
    return click.option("-p", "--param", "parameters", metavar="NAME=VALUE", multiple=True, help=about)


def parameters_of(texts: Sequence[str]) -> dict[str, Any]:
    """Read parameters: NAME=VALUE each, the value as in YAML."""
    return dict(_pair(text, "-p") for text in texts)


class Bytes(click.ParamType[int]):
    """A number of bytes: ``5GB``, ``500MB``, ``1073741824``."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a size."""
        if isinstance(value, int):
            return value
        text = value.strip().upper().removesuffix("B")
        unit = text[-1:] if text[-1:] in _UNITS else ""
        try:
            size = int(float(text.removesuffix(unit)) * _UNITS[unit])
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no size; write 5GB or 500MB", param, ctx)
        if size <= 0:
            self.fail("it must be at least one byte", param, ctx)
        return size


def dtype_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option of the output's dtype."""
    return click.option("--dtype", help="The dtype of the weights that are written; by default that of the base.")(
        function
    )


def shard_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option of the shards' size."""
    return click.option(
        "--shard-size", type=Bytes(), default="5GB", show_default=True, help="Most bytes of tensors in a file."
    )(function)


def writing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all commands that write a model or bundle: shards, threads, an existing target, progress."""
    return shard_option(running_options(function))


def running_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all commands that write anything: threads, an existing target, progress."""
    options = [
        click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core."),
        click.option("--overwrite", is_flag=True, help="Replace OUT if it exists, once the new one is whole."),
        click.option("--restart", is_flag=True, help="Discard what an unfinished run left, and begin anew."),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json-log", is_flag=True, help="Report progress as one JSON object per line on stderr."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def memory_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option of the memory's bound."""
    return click.option(
        "--memory", type=Bytes(), help="Most memory to use, such as 2GB; fewer threads run where that takes it."
    )(function)


def read_recipe(
    path: str | None,
    *,
    method: str | None,
    base: str | None,
    models: Sequence[str],
    onto: str | None,
    parameters: Sequence[str],
    rules: Sequence[str],
    fishers: Sequence[str],
    base_fisher: str | None,
    variables: Sequence[str],
    dtype: str | None,
    out_dtype: str | None,
    seed: int | None,
    compat: str | None,
    tokenizer_source: str | None,
    plugins: Sequence[str],
) -> Recipe:
    """Return the recipe of a file, or the one that flags describe."""
    from weightsmith.methods.registry import load_plugin

    for plugin in plugins:
        load_plugin(plugin)
    given_settings = {
        "dtype": dtype,
        "out_dtype": out_dtype,
        "seed": seed,
        "compat": compat,
        "tokenizer_source": tokenizer_source,
    }
    changes = {key: value for key, value in given_settings.items() if value is not None}
    if path is not None:
        if any((method, base, models, onto, parameters, rules, fishers, base_fisher)):
            raise click.UsageError(
                "give either a recipe file, or --method with --model, --base, --onto, -p, --rule, --fisher and "
                "--base-fisher"
            )
        from weightsmith.recipe.load import load_recipe, validate

        recipe = load_recipe(path, dict(_pair(text, "--set") for text in variables))
        return validate({**recipe.model_dump(exclude_unset=True), **changes}, path) if changes else recipe
    if not method and not onto:
        raise click.UsageError("give a recipe file, or --method with --model (and --base)")
    if not models:
        raise click.UsageError(f"{'--onto' if onto else '--method'} needs at least one --model")
    from weightsmith.api import build_recipe

    given = parameters_of(parameters)
    if base_fisher is not None:
        changes["base_fisher"] = base_fisher
    importances = _fishers(fishers, models)
    own_rules = [_rule(text) for text in rules]
    return build_recipe(method, list(models), base, given, own_rules, importances, onto, **changes)


def _fishers(texts: Sequence[str], models: Sequence[str]) -> list[str | None]:
    """Read ``MODEL=CHECKPOINT`` for some of the models; the model is one that is given, and may hold ``=``."""
    found: list[str | None] = [None] * len(models)
    for text in texts:
        owners = [i for i, model in enumerate(models) if text.startswith(f"{model}=") and len(text) > len(model) + 1]
        if not owners:
            raise click.UsageError(f"--fisher {text!r}: write MODEL=CHECKPOINT, MODEL as one --model has it")
        for i in owners:
            found[i] = text.removeprefix(f"{models[i]}=")
    return found


def _rule(text: str) -> dict[str, Any]:
    """Read ``NAMES=METHOD,NAME=VALUE,…``: parameters, and ``model`` for the models that take part."""
    names, separator, rest = text.partition("=")
    first, *others = _divide(rest)
    # Without a method the merge's own is meant, with other parameters or models.
    own = "=" in first
    pairs = [entry.partition("=") for entry in ([first] if own else []) + others]
    if not names or not separator or not first or not all(name and value for name, _, value in pairs):
        raise click.UsageError(f"--rule {text!r}: write NAMES=METHOD, or NAMES=METHOD,NAME=VALUE,…")
    models = [value for name, _, value in pairs if name == "model"]
    given = dict(_pair("=".join((name, value)), "--rule") for name, _, value in pairs if name != "model")
    return {
        "scope": {"names": names},
        **({} if own else {"merge_method": first}),
        **({"models": [{"model": model} for model in models]} if models else {}),
        **({"parameters": given} if given else {}),
    }


def _divide(text: str) -> list[str]:
    """Cut a text at the commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _pair(text: str, option: str) -> tuple[str, Any]:
    from weightsmith.recipe.yaml_text import parse_value

    name, separator, value = text.partition("=")
    if not separator or not name:
        raise click.UsageError(f"{option} {text!r}: write NAME=VALUE")
    try:
        return name, parse_value(value)
    except ValueError as error:
        raise RecipeError(f"{option} {text!r}: the value is not YAML") from error
