"""References for ``weightsmith.methods.transfer``; see references.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def transfer(models, base, target_share=1.0, **given):
    tuned, source = models
    target = np.float64(base)
    return source + target_share * (target - source) + given.get("lambda", 1.0) * (tuned - source)


def interpolate(models, base, **given):
    share = given.get("lambda", 0.5)
    return (1 - share) * np.float64(base) + share * models[0]


def ama(models, base, ratio=0.2, mean_ratio=0.2, mixed="linear"):
    """The tensors of the comparison are named "tensor", which is no embedding, norm or head."""
    return ratio * np.float64(base) + (1 - ratio) * models[0]


def bcwi(models, base, alpha, fisher_scope="model"):
    return alpha * np.float64(base) + (1 - alpha) * sum(models) / len(models)


def _signature(pretrained, clean, corrupted):
    a, d = (clean - pretrained).ravel(), (corrupted - pretrained).ravel()
    projection = np.outer(a, a) / (a @ a) if a.size < 5000 else None
    along = projection @ d if projection is not None else a * (a @ d) / (a @ a)
    return (d - along).reshape(clean.shape)


def rws(models, base, alpha=1.0, weight=None, squared=False):
    pretrained, clean, *corrupted = models
    strengths = [alpha / len(corrupted)] * len(corrupted)
    if isinstance(weight, list):
        strengths = [s if w is None else w for s, w in zip(strengths, weight[2:], strict=True)]
    result = np.float64(base)
    for strength, one in zip(strengths, corrupted, strict=True):
        result = result + strength ** (2 if squared else 1) * _signature(pretrained, clean, one)
    return result


def rws_signature(models, base):
    return _signature(*models)


REFERENCES: dict[str, Any] = {
    "transfer": (transfer, [{}, {"lambda": 0.3}, {"lambda": 0.5, "target_share": 0.5}, {"lambda": -1.0}]),
    "interpolate": (interpolate, [{}, {"lambda": 0.0}, {"lambda": 1.0}, {"lambda": 1.7}]),
    "ama": (ama, [{}, {"ratio": 0.7}, {"ratio": 1.4, "mixed": "all"}]),
    "bcwi": (bcwi, [{"alpha": 0.0}, {"alpha": 0.3}, {"alpha": 1.0}]),
    "rws": (rws, [{}, {"alpha": -0.7}, {"weight": [None, None, 0.4]}, {"alpha": 0.5, "squared": True}]),
    "rws_signature": (rws_signature, [{}]),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("transfer", {"lambda": 0.5, "target_share": 0.5}),
    ("interpolate", {"lambda": 1.0}),
    ("ama", {"ratio": 0.7, "mixed": "all"}),
    ("bcwi", {"alpha": 1.0}),
    ("rws", {"alpha": -0.5, "squared": True}),
]
