"""Adapters: small sets of weights that change a model's weights.

>>> import weightsmith as ws
>>> ws.adapters.convert("lora.safetensors", "peft", base="sdxl").save("out")   # doctest: +SKIP
>>> ws.adapters.merge(["code", "maths"], weight=[0.7, 0.3]).save("both")       # doctest: +SKIP
>>> ws.adapters.inspect("both").norm                                           # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.adapters.combine.combination import Combination
    from weightsmith.adapters.combine.create import merge, revert
    from weightsmith.adapters.combine.report import LayerReport, Report
    from weightsmith.adapters.inspection import Inspection, inspect
    from weightsmith.adapters.layouts.converted import ConvertedAdapter, convert
    from weightsmith.adapters.layouts.normal import normalize
    from weightsmith.adapters.layouts.places import recognize

# Public name -> the module that defines it. Loaded on first use: folding needs little of all this.
_HOMES = {
    "Combination": "weightsmith.adapters.combine.combination",
    "ConvertedAdapter": "weightsmith.adapters.layouts.converted",
    "Inspection": "weightsmith.adapters.inspection",
    "LayerReport": "weightsmith.adapters.combine.report",
    "Report": "weightsmith.adapters.combine.report",
    "convert": "weightsmith.adapters.layouts.converted",
    "inspect": "weightsmith.adapters.inspection",
    "merge": "weightsmith.adapters.combine.create",
    "normalize": "weightsmith.adapters.layouts.normal",
    "recognize": "weightsmith.adapters.layouts.places",
    "revert": "weightsmith.adapters.combine.create",
}

__all__ = [
    "Combination",
    "ConvertedAdapter",
    "Inspection",
    "LayerReport",
    "Report",
    "convert",
    "inspect",
    "merge",
    "normalize",
    "recognize",
    "revert",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightsmith.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
