"""Averages that are kept while a model trains: callbacks for transformers' Trainer and for Lightning.

>>> from weightsmith.callbacks import RunningAverage                                      # doctest: +SKIP
>>> callback = RunningAverage("run/average", every=50, weights="ema:0.99", out="run/averaged")  # doctest: +SKIP
>>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()           # doctest: +SKIP

Nothing but Python is imported until a callback is named: ``RunningAverage`` imports transformers,
``LightningRunningAverage`` imports lightning, or pytorch_lightning where that is what is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.callbacks.lightning import LightningRunningAverage
    from weightsmith.callbacks.trainer import RunningAverage

_HOMES = {
    "LightningRunningAverage": "weightsmith.callbacks.lightning",
    "RunningAverage": "weightsmith.callbacks.trainer",
}

__all__ = ["LightningRunningAverage", "RunningAverage"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightsmith.callbacks' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
