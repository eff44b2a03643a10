"""What PEFT's ``adapter_config.json`` says, written: ranks by module, and the file's text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from weightsmith.adapters.patterns import Patterns

# What PEFT puts before the names of a model's tensors.
PREFIX = "base_model.model."


def patterns(values: Mapping[str, int], default: int) -> dict[str, int]:
    """Return a ``rank_pattern`` by which PEFT finds every module's rank.

    PEFT takes the first pattern that fits a name or what follows one of its dots, and a dot in it fits any letter. So
    longer names come first, and of those as long the ones with fewer dots: then no other name's pattern is met before a
    module's own. A module of the default rank that another's pattern fits is listed too.
    """
    others = {module: value for module, value in values.items() if value != default}
    if not others:
        return {}
    known = Patterns(dict(_ordered(others)))
    others |= {
        module: rank for module, rank in values.items() if rank == default and known.value(module, default) != default
    }
    return {module: int(rank) for module, rank in _ordered(others)}


def most_common(values: Iterable[int]) -> int:
    """Return the value that occurs most often; of several the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value)) if counts else 1


def config_text(config: Mapping[str, Any]) -> str:
    """Return a config as the text of its file."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _ordered(values: Mapping[str, int]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: (-len(item[0]), item[0].count("."), item[0]))
