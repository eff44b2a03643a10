"""Adapters: small sets of weights that change a model's weights.

>>> import weightsmith as ws
>>> ws.adapters.convert("lora.safetensors", "peft", base="sdxl").save("out")   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.adapters.layouts.converted import ConvertedAdapter, convert
    from weightsmith.adapters.layouts.normal import normalize
    from weightsmith.adapters.layouts.places import recognize

# Public name -> the module that defines it. Loaded on first use: folding needs little of all this.
_HOMES = {
    "ConvertedAdapter": "weightsmith.adapters.layouts.converted",
    "convert": "weightsmith.adapters.layouts.converted",
    "normalize": "weightsmith.adapters.layouts.normal",
    "recognize": "weightsmith.adapters.layouts.places",
}

__all__ = ["ConvertedAdapter", "convert", "normalize", "recognize"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightsmith.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
