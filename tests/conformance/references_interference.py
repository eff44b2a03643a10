"""References for ``weightsmith.methods.interference``; see references.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from weightsmith.kernels import philox


def _each(value: Any, models: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] * len(models)


def _vectors(models: Any, base: Any, weight: Any = 1.0) -> Any:
    """Task vectors in the dtype that the package compares them in, flat: ``[n][d]``."""
    factors = [np.asarray(w, base.dtype) for w in _each(weight, models)]
    deltas = [(w * (m.astype(base.dtype) - base)).astype(np.float64) for w, m in zip(factors, models, strict=True)]
    return np.stack(deltas).reshape(len(models), -1)


def _onto(base: Any, vector: Any, given: dict[str, Any]) -> Any:
    return np.float64(base) + given.get("lambda", 1.0) * np.asarray(vector).reshape(base.shape)


def emr(models, base, weight=1.0, **given):
    out = []
    for entry in _vectors(models, base, weight).T.tolist():
        sign = 1 if sum(entry) > 0 else -1
        out.append(sign * max([abs(x) for x in entry if x * sign > 0], default=0.0))
    return _onto(base, out, given)


def magmax(models, base, weight=1.0, **given):
    out = [max(entry, key=lambda x: (abs(x), x)) for entry in _vectors(models, base, weight).T.tolist()]
    return _onto(base, out, given)


def _top(vector, share):
    """Return where a vector has its largest magnitudes, a share of them, the earlier of equal ones."""
    count = max(1, int(share * vector.size)) if share > 0 else 0
    kept = np.zeros(vector.size, bool)
    kept[np.argsort(-np.abs(vector), kind="stable")[:count]] = True
    return kept


def consensus(models, base, weight=1.0, k=2, mask_lambda=0.4, multi_task="sum", density=None, **given):
    vectors, weights = _vectors(models, base), _each(weight, models)
    shares = [{"sum": 1.0, "ties": 0.2}[multi_task] if s is None else s for s in _each(density, models)]
    parts = np.stack([w * v * _top(v, s) for w, v, s in zip(weights, vectors, shares, strict=True)])
    if multi_task == "ties":
        parts = np.where(np.sign(parts) == np.where(parts.sum(axis=0) >= 0, 1, -1), parts, 0)
    total = parts.sum(axis=0)
    out = []
    for entry, joined in zip(vectors.T, total, strict=True):
        used = [
            abs(d) > limit * abs(joined - d)
            for d, w, limit in zip(entry, weights, _each(mask_lambda, models), strict=True)
            if w != 0
        ]
        out.append(joined if sum(used) >= k else 0.0)
    return _onto(base, out, given)


def localize_and_stitch(models, base, weight=1.0, density=0.05, **given):
    vectors, weights = _vectors(models, base), _each(weight, models)
    masks = [_top(v, share) & (v != 0) for v, share in zip(vectors, _each(density, models), strict=True)]
    out = []
    for i in range(base.size):
        held = [(w, v[i]) for w, v, mask in zip(weights, vectors, masks, strict=True) if mask[i] and w != 0]
        out.append(sum(w * x for w, x in held) / sum(w for w, _ in held) if held else 0.0)
    return _onto(base, out, given)


def _clamped(values, low, high):
    """Clamp to the values at two places of the sorted order, which the shares give."""
    ordered = np.sort(values)
    return np.clip(values, ordered[int(values.size * low)], ordered[int(values.size * (1 - high) - 1)])


def _minmax(values):
    return (values - values.min()) / (values.max() - values.min())


def pcb(models, base, weight=1.0, density=0.1, clip=1e-4, inter="sum", **given):
    vectors, n = _vectors(models, base), len(models)
    clipped = [_clamped(np.abs(v), clip, clip) for v in vectors]
    shares = [_minmax(c) for c in clipped]
    if inter == "sum":
        across = [np.tanh(v * vectors.sum(axis=0)) for v in vectors]
    else:
        signed = [np.sign(v) * a for v, a in zip(vectors, shares, strict=True)]
        across = [sum(np.tanh(one * other) for other in signed) for one in signed]
    scores = [np.exp(n * a**2) * t for a, t in zip(shares, across, strict=True)]
    scales = [_minmax(_clamped(s, 1 - share, 0)) for s, share in zip(scores, _each(density, models), strict=True)]
    total = sum(
        w * np.sign(v) * c * s for w, v, c, s in zip(_each(weight, models), vectors, clipped, scales, strict=True)
    )
    return _onto(base, total / np.maximum(sum(scales), 1e-12), given)


def sign_only(models, base, weight=1.0, **given):
    vectors, weights = _vectors(models, base), np.array(_each(weight, models))
    mean = np.abs(weights) @ np.abs(vectors).mean(axis=1) / np.abs(weights).sum()
    return _onto(base, mean * np.sign((weights[:, None] * vectors).sum(axis=0)), given)


def random_select(models, base, weight=1.0):
    size = models[0].size
    draws = [philox.uniform(philox.key_of(0, "tensor", i), 0, size).astype(np.float64) for i in range(len(models))]
    out = []
    for entry, drawn in zip(np.stack(models).reshape(len(models), -1).T, np.stack(draws).T, strict=True):
        times = [np.log1p(-u) / -w if w else np.inf for u, w in zip(drawn, _each(weight, models), strict=True)]
        out.append(entry[int(np.argmin(times))])
    return np.array(out).reshape(models[0].shape)


_FEW, _MANY = 0.2, [0.3, 0.9, 1.0]
REFERENCES: dict[str, Any] = {
    "emr": (emr, [{}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}]),
    "magmax": (magmax, [{}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}]),
    "consensus": (
        consensus,
        [
            {},
            *({"k": k, "mask_lambda": [0.2, 0.4, 0.6], "lambda": 0.3} for k in (0, 1, 3, 4)),
            {"weight": [0.5, 0.0, 2.0], "k": 1},
            {"multi_task": "ties"},
            {"multi_task": "ties", "density": _MANY, "k": 1, "weight": [0.5, 1.0, 2.0]},
            {"density": _MANY},
        ],
    ),
    "localize_and_stitch": (
        localize_and_stitch,
        [{}, {"density": _MANY}, {"density": _FEW, "weight": [0.5, 0.0, 2.0], "lambda": 0.5}],
    ),
    "pcb": (
        pcb,
        [
            {},
            # From half of the entries on, the lowest kept score is negative.
            {"density": [0.3, 0.95, 1.0], "clip": 0.01, "weight": [0.5, 0.0, 2.0], "lambda": 0.5},
            {"density": [0.05, 0.5, 0.8], "inter": "pairs", "clip": 0.1},
        ],
    ),
    "sign_only": (sign_only, [{}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}]),
    "random_select": (random_select, [{}, {"weight": [0.5, 0.0, 2.0]}]),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("consensus", {"k": 0}),
    ("consensus", {"k": 1, "multi_task": "ties", "trim_scope": "tensor"}),
    ("localize_and_stitch", {"density": 1.0}),
    ("pcb", {"density": 1.0, "clip": 0.0}),
    ("pcb", {"density": 0.05, "clip": 0.1, "inter": "pairs", "trim_scope": "tensor"}),
    ("sign_only", {"mean_scope": "model"}),
]
