"""References for ``weightsmith.methods.robust``; see references.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from references_averages import each, mean_of


def median(models, base, weight=1.0):
    """Of whole weights: the ordinary median of as many copies."""
    copies = [model for w, model in zip(each(weight, models), models, strict=True) for _ in range(int(w))]
    return np.median(np.stack(copies), axis=0)


def trimmed_mean(models, base, trim=1, beta=None):
    dropped = trim if beta is None else math.ceil(beta * len(models))
    return np.sort(np.stack(models), axis=0)[dropped : len(models) - dropped].mean(axis=0)


def krum(models, base, byzantine, select=1, distance_scope="model"):
    def score(i):
        apart = sorted(((models[i] - models[j]) ** 2).sum() for j in range(len(models)) if j != i)
        return sum(apart[: len(models) - byzantine - 2])

    best = sorted(range(len(models)), key=score)[:select]
    return sum(models[i] for i in best) / select


def geometric_median(models, base, weight=1.0, smoothing=1e-6, max_iter=1000, tol=1e-12, distance_scope="model"):
    """Weiszfeld's steps on the whole tensors."""
    weights = each(weight, models)
    point = mean_of(models, weights)
    for _ in range(max_iter):
        pulls = [w / max(smoothing, np.linalg.norm(point - m)) for w, m in zip(weights, models, strict=True)]
        following = mean_of(models, pulls)
        if np.linalg.norm(following - point) < 1e-14 * np.linalg.norm(point):
            break
        point = following
    return point


REFERENCES: dict[str, Any] = {
    "median": (
        median,
        [
            {},
            {"weight": [2.0, 0.0, 2.0]},
            {"weight": [1.0, 2.0, 2.0]},
            {"weight": [3.0, 1.0, 2.0]},
            {"weight": [1.0, 1.0, 5.0]},
        ],
    ),
    "trimmed_mean": (trimmed_mean, [{}, {"trim": 0}, {"beta": 0.2}, {"beta": 0.0}]),
    "krum": (krum, [{"byzantine": 0}, {"byzantine": 0, "select": 2, "distance_scope": "tensor"}]),
    "geometric_median": (
        geometric_median,
        [{}, {"weight": [1.0, 1.5, 0.7]}, {"weight": [1.0, 1.0, 0.0]}, {"smoothing": 2.0, "max_iter": 3, "tol": 0.0}],
    ),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("trimmed_mean", {"beta": 0.4}),
    ("krum", {"byzantine": 0, "select": 2, "distance_scope": "layer"}),
    ("geometric_median", {"distance_scope": "tensor", "max_iter": 4}),
]
