"""The recipe's JSON schema, by which editors complete and check recipes."""

from __future__ import annotations

from typing import Any

from weightsmith.methods.registry import all_methods
from weightsmith.recipe.schema import Recipe


def json_schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12), with the names of all methods that are installed."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "weightsmith recipe"
    own = schema["properties"]
    own["include"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe files beneath this one: what they say holds where this file says nothing.",
    }
    own["variables"] = {"type": "object", "description": "Values for ${name} in any text of the recipe."}
    for holder in (own, schema["$defs"]["Merge"]["properties"], schema["$defs"]["ScopeRule"]["properties"]):
        method = holder["merge_method"]
        others = method.pop("anyOf", [{"type": method.pop("type", None)}])
        # Any text is allowed beside the known names: a plugin may bring a method that is not known here.
        method["anyOf"] = [{"enum": list(all_methods())}, *others]
    return schema
