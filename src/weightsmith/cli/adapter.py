"""``weightsmith adapter``."""

from __future__ import annotations

from weightsmith.cli.lazy import LazyGroup

# Verb -> what it does, in one line.
_VERBS: dict[str, str] = {
    "inspect": "Show what an adapter is, and how much it changes each layer.",
    "merge": "Combine adapters into one.",
    "revert": "Restore an adapter that a basis was made of.",
    "convert": "Write an adapter in another layout: peft, kohya, diffusers, mlx.",
    "init": "Make an adapter to begin a training with.",
}

command = LazyGroup(
    "adapter",
    verbs=_VERBS,
    package="weightsmith.cli.adapters",
    help="Look at adapters, combine them, and convert them from one layout to another.",
)
