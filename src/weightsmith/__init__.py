"""weightsmith works on the weights of trained neural networks: weights in, weights out.

>>> import weightsmith as ws
>>> base, code, maths = ws.open("base"), ws.open("code"), ws.open("maths")      # doctest: +SKIP
>>> merged = ws.merge("ties", [code, maths], base=base, weight=[0.5, 0.5], density=0.4)  # doctest: +SKIP
>>> print(merged.to_yaml())                                                     # doctest: +SKIP
>>> merged.save("out")                                                          # doctest: +SKIP

Nothing is read but headers until a checkpoint is saved, or a tensor's elements are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weightsmith import adapters, bundle, callbacks, federated, runs
    from weightsmith.api import average, diff, fuse, merge, merge_recipe, open, plan, save
    from weightsmith.checkpoint.checkpoint import Checkpoint
    from weightsmith.curves.curve import curve
    from weightsmith.engine.arrays import merge_arrays
    from weightsmith.errors import WeightsmithError
    from weightsmith.extraction.create import extract
    from weightsmith.initialization.create import initialize_adapter
    from weightsmith.methods.block import Block, Scope, Sweep
    from weightsmith.methods.registry import Param, PerModel, method
    from weightsmith.recipe.load import load_recipe
    from weightsmith.recipe.schema import Recipe
    from weightsmith.reparameterized.fold import fold_model
    from weightsmith.reparameterized.unfold import unfold_compander, unfold_weight_norm
    from weightsmith.report.create import report
    from weightsmith.runs.average import average_run
    from weightsmith.runs.running import running_average, update_average
    from weightsmith.tokenizer.comparison import compare_tokenizers
    from weightsmith.transplantation.create import transplant
    from weightsmith.verification import reproduce, verify

# Public name -> the module that defines it. Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "Block": "weightsmith.methods.block",
    "Checkpoint": "weightsmith.checkpoint.checkpoint",
    "Param": "weightsmith.methods.registry",
    "PerModel": "weightsmith.methods.registry",
    "Recipe": "weightsmith.recipe.schema",
    "Scope": "weightsmith.methods.block",
    "Sweep": "weightsmith.methods.block",
    "WeightsmithError": "weightsmith.errors",
    "average": "weightsmith.api",
    "average_run": "weightsmith.runs.average",
    "compare_tokenizers": "weightsmith.tokenizer.comparison",
    "curve": "weightsmith.curves.curve",
    "diff": "weightsmith.api",
    "extract": "weightsmith.extraction.create",
    "fold_model": "weightsmith.reparameterized.fold",
    "fuse": "weightsmith.api",
    "initialize_adapter": "weightsmith.initialization.create",
    "load_recipe": "weightsmith.recipe.load",
    "merge": "weightsmith.api",
    "merge_arrays": "weightsmith.engine.arrays",
    "merge_recipe": "weightsmith.api",
    "method": "weightsmith.methods.registry",
    "open": "weightsmith.api",
    "plan": "weightsmith.api",
    "report": "weightsmith.report.create",
    "reproduce": "weightsmith.verification",
    "save": "weightsmith.api",
    "running_average": "weightsmith.runs.running",
    "transplant": "weightsmith.transplantation.create",
    "unfold_compander": "weightsmith.reparameterized.unfold",
    "unfold_weight_norm": "weightsmith.reparameterized.unfold",
    "update_average": "weightsmith.runs.running",
    "verify": "weightsmith.verification",
}

# Public names that are modules.
_ROOMS = ("adapters", "bundle", "callbacks", "federated", "runs")

__all__ = [
    "Block",
    "Checkpoint",
    "Param",
    "PerModel",
    "Recipe",
    "Scope",
    "Sweep",
    "WeightsmithError",
    "__version__",
    "adapters",
    "average",
    "average_run",
    "bundle",
    "callbacks",
    "compare_tokenizers",
    "curve",
    "diff",
    "extract",
    "federated",
    "fold_model",
    "fuse",
    "initialize_adapter",
    "load_recipe",
    "merge",
    "merge_arrays",
    "merge_recipe",
    "method",
    "open",
    "plan",
    "report",
    "reproduce",
    "running_average",
    "runs",
    "save",
    "transplant",
    "unfold_compander",
    "unfold_weight_norm",
    "update_average",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"weightsmith.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
    # Not kept in the module's globals: the packages plan and report take their names when they are imported, and can
    # be called themselves.
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
