"""References for ``weightsmith.methods.continual``; see references.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from weightsmith.kernels import philox


def _projected(merged, delta, alpha):
    # All rows lie in the space that these span: a basis of it is square and as good as the full one.
    rows, _ = np.linalg.qr(np.concatenate([merged, delta]).T)
    u, s, vt = np.linalg.svd(merged @ rows, full_matrices=True)
    share = np.cumsum(s) / s.sum()
    above = [i for i in range(len(s)) if share[i] > alpha + 1e-12]
    rank = above[0] if above else 0
    projected = u.T @ (delta @ rows) @ vt.T
    for i in range(min(merged.shape)):
        projected[i, i] = 0
    projected[:rank, :rank] = 0
    return u @ projected @ vt @ rows.T


def opcm(models, base, alpha=0.5, previous_lambda=1.0, seen=1, mean_norm=None):
    """One model after the other, with full square bases, scaled after each, as the paper has it."""
    base = np.float64(base)
    merged = models[0] - base
    norms = [np.linalg.norm(merged) if mean_norm is None else mean_norm] * seen
    undo = previous_lambda
    for model in models[1:]:
        delta = model - base
        norms.append(np.linalg.norm(delta))
        if merged.ndim == 2 and min(merged.shape) > 1:
            delta = _projected(merged, delta, alpha)
        update = undo * merged + delta
        mean = np.mean(norms)
        undo = np.linalg.norm(update) / mean
        merged = update / undo
    if len(models) == 1:
        merged = merged * np.mean(norms) / np.linalg.norm(merged)
    return base + merged


def ema(models, base, momentum, interval=1):
    average = models[0]
    for model in models[1:]:
        stays = 1.0
        for _ in range(interval):
            stays *= momentum
        average = average * stays + model * (1 - stays)
    return average


def imm(models, base, drop=0.2, share=0.5):
    base, delta = np.float64(base), models[0] - np.float64(base)
    kept = philox.uniform(philox.key_of(0, "tensor", "0"), 0, delta.size).reshape(delta.shape) >= drop
    return (1 - share) * base + share * (base + np.where(kept, delta / (1 - drop), 0))


REFERENCES: dict[str, Any] = {
    "opcm": (
        opcm,
        [{}, {"alpha": 0.0}, {"alpha": 0.9}, {"alpha": 1.0}, {"seen": 3, "mean_norm": 2.5, "previous_lambda": 1.7}],
    ),
    "ema": (ema, [{"momentum": 0.3}, {"momentum": 0.9, "interval": 5}]),
    "imm": (imm, [{}, {"drop": 0.7, "share": 0.9}]),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("opcm", {"alpha": 0.9, "norm_scope": "tensor"}),
    ("ema", {"momentum": 0.9, "interval": 5}),
    ("imm", {"drop": 0.7}),
]
