"""References for ``weightsmith.methods.averages``; see references.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def each(value, models):
    return value if isinstance(value, list) else [value] * len(models)


def mean_of(models, weights):
    return sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)


def metric_weighted(models, base, metric, kind="loss", p=1.0):
    power = {"loss": lambda x: (1 / x) ** p, "exp_loss": lambda x: math.exp(-p * x), "score": lambda x: x**p}[kind]
    return mean_of(models, [power(value) for value in each(metric, models)])


def variance_corrected(models, base, weight=1.0, self_share=0.0, eps=1e-4, max_gain=None, vectors=False):
    weights = each(weight, models)
    mean = mean_of(models, weights)
    if mean.size == 1 or (mean.ndim == 1 and not vectors):
        return mean
    others = mean_of([model.var(ddof=1) for model in models], weights)
    target = self_share * models[0].var(ddof=1) + (1 - self_share) * others
    gain = math.sqrt((target + eps) / (mean.var(ddof=1) + eps))
    gain = gain if max_gain is None else min(gain, max_gain)
    return mean.mean() + (mean - mean.mean()) * gain


def sparse_soup(models, base, weight=1.0, mask="intersection", min_zeros=0.05):
    weights = each(weight, models)
    kept = [(m != 0) | (m.ndim < 2 or (m == 0).mean() < min_zeros) for m, w in zip(models, weights, strict=True) if w]
    chosen = {"intersection": np.all(kept, 0), "union": np.any(kept, 0), "first": kept[0]}[mask]
    return np.where(chosen, mean_of(models, weights), 0.0)


def _by_entry(models, weights, mixed, of_magnitudes):
    """Entry by entry, with Python's own numbers."""
    out = np.empty(models[0].size)
    for i, values in enumerate(zip(*[model.ravel().tolist() for model in models], strict=True)):
        pairs = [(w, v) for w, v in zip(weights, values, strict=True) if w]
        signs = {math.copysign(1, v) for _, v in pairs if v}
        mean = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
        size = of_magnitudes([(w, abs(v)) for w, v in pairs])
        if len(signs) < 2:
            out[i] = size * (signs or {1}).pop()
        else:
            out[i] = {"mean": mean, "zero": 0.0, "sign": math.copysign(size, mean) if mean else 0.0}[mixed]
    return out.reshape(models[0].shape)


def geometric(models, base, weight=1.0, mixed="mean"):
    def of_magnitudes(pairs):
        total = sum(w for w, _ in pairs)
        return math.prod(v ** (w / total) for w, v in pairs)

    return _by_entry(models, each(weight, models), mixed, of_magnitudes)


def harmonic(models, base, weight=1.0, mixed="mean"):
    def of_magnitudes(pairs):
        return 0.0 if any(v == 0 for _, v in pairs) else sum(w for w, _ in pairs) / sum(w / v for w, v in pairs)

    return _by_entry(models, each(weight, models), mixed, of_magnitudes)


REFERENCES: dict[str, Any] = {
    "metric_weighted": (
        metric_weighted,
        [
            {"metric": [0.9, 1.3, 2.0]},
            {"metric": [0.9, 1.3, 2.0], "p": 0.0},
            {"metric": [0.9, -1.3, 0.0], "kind": "exp_loss", "p": 2.5},
            {"metric": [100, 200, 0], "kind": "score", "p": 1.5},
        ],
    ),
    "variance_corrected": (
        variance_corrected,
        [
            {},
            {"eps": 0.0, "vectors": True, "weight": [1.0, 2.0, 0.5]},
            {"self_share": 1.0, "weight": [0.2, 1.0, 1.0]},
            {"self_share": 0.3, "vectors": True},
            {"max_gain": 1.001},
        ],
    ),
    "sparse_soup": (
        sparse_soup,
        [{}, {"weight": [1.0, 2.0, 0.0]}, {"mask": "union"}, {"mask": "first", "min_zeros": 0.0}],
    ),
    "geometric": (
        geometric,
        [{}, {"weight": [1.0, 3.0, 0.0]}, {"mixed": "zero"}, {"weight": [1.0, 2.0, 3.0], "mixed": "sign"}],
    ),
    "harmonic": (
        harmonic,
        [{}, {"weight": [1.0, 3.0, 0.0]}, {"mixed": "zero"}, {"weight": [1.0, 2.0, 3.0], "mixed": "sign"}],
    ),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("metric_weighted", {"metric": 0.5, "kind": "exp_loss"}),
    ("metric_weighted", {"metric": 7.0, "kind": "score", "p": 3.0}),
    ("variance_corrected", {"eps": 0.0, "vectors": True}),
    ("variance_corrected", {"max_gain": 1.0}),
    ("sparse_soup", {"mask": "union", "min_zeros": 0.0}),
    ("sparse_soup", {"mask": "first", "min_zeros": 0.0}),
    ("geometric", {"mixed": "zero"}),
    ("harmonic", {"mixed": "sign"}),
]
