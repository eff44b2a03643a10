"""References for ``weightsmith.methods.columns``; see references.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def _scores(significance, ratio, score):
    """Softmax over the models (axis 0), ``score`` where above ``ratio`` times the model's mean."""
    powers = np.exp(significance)
    scores = powers / powers.sum(0)
    scores[significance > ratio * significance.mean(1, keepdims=True)] = score
    return scores


def _ranks(values):
    ranks = np.empty(len(values))
    for place, column in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        ranks[column] = place / len(values)
    return ranks


def _cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def widen(models, base, ratio=1.0, score=1.0, transposed=False):
    base = np.float64(base)
    deltas = np.array([model - base for model in models])
    if base.ndim < 2:
        scores = _scores(np.abs(deltas), ratio, score)
        return base + (scores * deltas).sum(0)
    matrix = base.reshape(len(base), -1)
    flat = [model.reshape(len(base), -1) for model in models]
    if transposed:
        matrix, flat = matrix.T, [one.T for one in flat]
    width = matrix.shape[1]
    moved, turned = [], []
    for one in flat:
        pairs = [(one[:, j], matrix[:, j]) for j in range(width)]
        moved.append(_ranks([abs(np.linalg.norm(a) - np.linalg.norm(b)) for a, b in pairs]))
        turned.append(_ranks([1 - _cosine(a, b) for a, b in pairs]))
    scores = (_scores(np.array(moved), ratio, score) + _scores(np.array(turned), ratio, score)) / 2
    merged = matrix + sum(s * (one - matrix) for s, one in zip(scores, flat, strict=True))
    return (merged.T if transposed else merged).reshape(base.shape)


REFERENCES: dict[str, Any] = {"widen": (widen, [{}, {"ratio": 0.6, "score": 0.8}, {"ratio": 5.0}, {"ratio": 0.0}])}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [("widen", {"ratio": 5.0})]
