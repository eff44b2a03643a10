"""Recipes as advice shows them: YAML that a person can copy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

# What YAML reads as the text that it is, whatever the letters mean: no number, no sign of its own.
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", ".", ".inf", ".nan"})


def yaml_text(text: str) -> str:
    """Return a text as a YAML scalar, quoted where it has to be."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text)


def recipe_text(method: str, base: str, models: Mapping[str, float], rules: Sequence[str] = ()) -> str:
    """Return a recipe as YAML.

    Args:
        method: the merge method.
        base: reference of the base; a mean (``linear``) has none.
        models: references of the models -> their weights.
        rules: lines of one rule; none where there is no rule.
    """
    lines = [f"merge_method: {method}"]
    if method != "linear":
        lines.append(f"base_model: {yaml_text(base)}")
    lines.append("models:")
    lines += [f"- {{model: {yaml_text(name)}, parameters: {{weight: {weight:g}}}}}" for name, weight in models.items()]
    if rules:
        lines += ["rules:", *(f"{'  ' if number else '- '}{line}" for number, line in enumerate(rules))]
    return "\n".join(lines)
