"""The command ``weightsmith``: finds the verb, runs it, and turns errors to text in one place.

A verb's module is imported when the verb is run, so that ``weightsmith --help`` costs what Python costs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from weightsmith import __version__
from weightsmith.cli.lazy import LazyGroup
from weightsmith.cli.terminal import printable
from weightsmith.errors import Interrupted, WeightsmithError

# Verb -> what it does, in one line.
_VERBS = {
    "merge": "Merge models by a recipe, or by a method and models.",
    "average": "Average the checkpoints of a training run.",
    "plan": "Show what a merge would read, compute and write.",
    "fuse": "Fold adapters into a base, or a model's own structure, to plain weights.",
    "inspect": "Show what is in a model: tensors, layers, sizes.",
    "diff": "Compare two models, tensor by tensor.",
    "tokens": "Compare two tokenizers, and say how their models can be merged.",
    "report": "See models before a merge, or what a merge has done: a page, JSON or text.",
    "extract": "Take what a fine-tune changed as an adapter.",
    "transplant": "Give a model the tokenizer of another.",
    "adapter": "Look at adapters, combine and convert them.",
    "bundle": "Keep several fine-tunes of one base in one small folder.",
    "curve": "Make the models between models, and measure each.",
    "verify": "Check that a merged model is still what was written.",
    "reproduce": "Run the recipe of a merged model again, and compare.",
    "methods": "List the merge methods, or explain one.",
    "schema": "Print the JSON schema of recipes, for editors.",
    "quickstart": "Merge small trained models and see what they can do.",
}


cli = LazyGroup(
    "weightsmith",
    verbs=_VERBS,
    package="weightsmith.cli",
    help="Work on the weights of trained neural networks: weights in, weights out.",
)
cli = click.version_option(__version__, prog_name="weightsmith")(cli)
cli = click.option("--debug", is_flag=True, help="Show where in the program an error arose.", expose_value=False)(cli)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    chosen = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in chosen
    try:
        code: Any = cli.main(args=chosen, prog_name="weightsmith", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; a second error on exit would only be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except WeightsmithError as error:
        if debug:
            raise
        told = printable(str(error))
        print(told if isinstance(error, Interrupted) else f"error: {told}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1)
    except (OSError, MemoryError) as error:
        # What nobody had words for: too many open files, a folder that may not be listed, no memory.
        if debug:
            raise
        about = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {printable(about) or 'out of memory'}", file=sys.stderr)
        sys.exit(1)
