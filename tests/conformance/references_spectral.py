"""References for the spectral, subspaces and knots families; see references.py.

Thin decompositions by NumPy's gesdd in float64, whole concatenations, loops over directions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from weightsmith.kernels import philox


def _each(value, models):
    return value if isinstance(value, list) else [value] * len(models)


def _svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def _matrix(tensor, convolutions=False):
    """Return a tensor as a matrix, or None where it is none."""
    if tensor.ndim == 2 or (tensor.ndim > 2 and convolutions):
        return tensor.reshape(tensor.shape[0], -1)
    return None


def _add(base, scale, change):
    return np.float64(base) + scale * np.reshape(change, base.shape)


def _tasks(models, base, weight):
    """Return the weighted task vectors of the models whose weight is not 0."""
    return [w * (model - np.float64(base)) for w, model in zip(_each(weight, models), models, strict=True) if w != 0]


def _nearest_orthogonal(matrix):
    p, _, q = _svd(matrix)
    return p @ q


def tsv(models, base, weight=1.0, convolutions=False, **given):
    tasks = _tasks(models, base, weight)
    scale = given.get("lambda", 1.0)
    if _matrix(base, convolutions) is None:
        return _add(base, scale, sum(tasks) / len(tasks))
    tasks = [_matrix(task, convolutions) for task in tasks]
    kept = max(min(tasks[0].shape) // len(tasks), 1)
    parts = [_svd(task) for task in tasks]
    left = _nearest_orthogonal(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    right = _nearest_orthogonal(np.concatenate([vt[:kept] for _, _, vt in parts], axis=0))
    values = np.concatenate([s[:kept] for _, s, _ in parts])
    return _add(base, scale, left @ np.diag(values) @ right)


def iso_c(models, base, weight=1.0, convolutions=False, **given):
    tasks = _tasks(models, base, weight)
    scale = given.get("lambda", 1.0)
    total = _matrix(sum(tasks), convolutions)
    if total is None:
        return _add(base, scale, sum(tasks) / len(tasks))
    u, s, vt = _svd(total)
    return _add(base, scale, np.mean(s) * (u @ vt))


def iso_cts(models, base, weight=1.0, common_space_fraction=0.8, **given):
    tasks = _tasks(models, base, weight)
    scale = given.get("lambda", 1.0)
    if base.ndim != 2:
        return _add(base, scale, sum(tasks) / len(tasks))
    k = min(base.shape)
    own = round((k - int(k * common_space_fraction)) / len(tasks))
    common = k - own * len(tasks)
    u, s, vt = _svd(sum(tasks))
    outside = np.eye(base.shape[0]) - u[:, :common] @ u[:, :common].T
    lefts, values, rights = [], [], []
    for task in tasks:
        a, b, ct = _svd(outside @ task)
        lefts.append(a[:, :own])
        values.append(b[:own])
        rights.append(ct[:own])
    left = _nearest_orthogonal(np.concatenate([*lefts, u[:, :common]], axis=1))
    right = _nearest_orthogonal(np.concatenate([*rights, vt[:common]], axis=0))
    flat = np.concatenate([*values, s[:common]]).mean()
    return _add(base, scale, flat * (left @ right))


def _rebuilt(matrix, change):
    u, s, vt = _svd(matrix)
    result = np.zeros_like(matrix)
    for value, left, right in zip(change(s), u.T, vt, strict=True):
        result += value * np.outer(left, right)
    return result


def _reaching(values, share):
    total = 0.0
    for i, value in enumerate(values):
        total += value
        if total >= share * sum(values) * (1 - 1e-12):
            return i + 1
    return len(values)


def star(models, base, weight=1.0, eta=40.0, normalize=True, rank=None, svd="exact", **given):
    def change(s):
        s = s.copy()
        if rank is not None:
            s[rank:] = 0
        kept = _reaching(s, eta / 100) if eta else 0
        out = s.copy()
        out[kept:] = 0
        return out * (s.sum() / out.sum() if kept else 0)

    weights = _each(weight, models)
    total = 0
    for w, model in zip(weights, models, strict=True):
        task = model - np.float64(base)
        total = total + w * (task if _matrix(task) is None else _rebuilt(task, change))
    return _add(base, given.get("lambda", 1.0), total / (sum(weights) if normalize else 1))


def _effective_rank(s):
    shares = [value / sum(s) for value in s]
    return math.ceil(math.exp(-sum(p * math.log(p) for p in shares if p > 0)) - 1e-9)


def timber(models, base, gamma=0.2, convolutions=True, **given):
    def change(s):
        kept = _effective_rank(s)
        return np.concatenate([s[:kept], gamma * s[kept:]])

    task = models[0] - np.float64(base)
    matrix = _matrix(task, convolutions)
    return _add(base, given.get("lambda", 1.0), task if matrix is None else _rebuilt(matrix, change))


def low_rank(models, base, weight=1.0, keep="energy", energy=0.5, rank=None, **given):
    def change(s):
        if keep == "energy":
            kept = _reaching(s**2, energy) if energy else 0
        else:
            kept = rank if keep == "rank" else _effective_rank(s)
        return np.where(np.arange(len(s)) < kept, s, 0)

    tasks = _tasks(models, base, weight)
    return _add(base, given.get("lambda", 1.0), sum(t if t.ndim != 2 else _rebuilt(t, change) for t in tasks))


def subspace_boosting(models, base, weight=1.0, beta=0.01, **given):
    def change(s):
        return np.maximum(s, s[_reaching(s, beta) - 1])

    total = sum(_tasks(models, base, weight))
    return _add(base, given.get("lambda", 1.0), total if total.ndim != 2 else _rebuilt(total, change))


def _ties(parts, weight, elect, normalize):
    weighted = [w * part for w, part in zip(weight, parts, strict=True)]
    divisor: Any = sum(weight)
    if elect:
        sign = np.where(sum(weighted) >= 0, 1, -1)
        masks = [np.sign(part) == sign for part in weighted]
        weighted = [part * mask for part, mask in zip(weighted, masks, strict=True)]
        divisor = sum(w * mask for w, mask in zip(weight, masks, strict=True))
        divisor = np.where(divisor == 0, 1, divisor)
    return sum(weighted) / (divisor if normalize else 1)


def _knots(prepare):
    def reference(
        models,
        base,
        weight=1.0,
        density=0.2,
        concatenate="in",
        coordinates="scaled",
        elect=True,
        normalize=True,
        convolutions=True,
        rescale=True,
        **given,
    ):
        weights, shares = _each(weight, models), _each(density, models)
        tasks = [model - np.float64(base) for model in models]
        draws = [philox.uniform(philox.key_of(0, "tensor", i), 0, base.size) for i in range(len(models))]
        scale = given.get("lambda", 1.0)
        if _matrix(base, convolutions) is None:
            parts = [
                prepare(task, share, draw.reshape(task.shape), rescale)
                for task, share, draw in zip(tasks, shares, draws, strict=True)
            ]
            return _add(base, scale, _ties(parts, weights, elect, normalize))
        shape = _matrix(base, convolutions).shape
        tasks, draws = [task.reshape(shape) for task in tasks], [draw.reshape(shape) for draw in draws]
        if concatenate == "out":
            tasks, draws = [task.T for task in tasks], [draw.T for draw in draws]
        used = [i for i, w in enumerate(weights) if w != 0]
        u, s, vt = _svd(np.concatenate([tasks[i] for i in used], axis=1))
        rows = np.diag(s) @ vt if coordinates == "scaled" else vt
        parts = np.split(rows, len(used), axis=1)
        parts = [prepare(part, shares[i], draws[i][: len(part)], rescale) for i, part in zip(used, parts, strict=True)]
        merged = _ties(parts, [weights[i] for i in used], elect, normalize)
        change = u @ merged if coordinates == "scaled" else u @ np.diag(s) @ merged
        return _add(base, scale, change.T if concatenate == "out" else change)

    return reference


def _trimmed(part, share, draw, rescale):
    kept = max(1, int(share * part.size)) if share > 0 else 0
    order = np.argsort(-np.abs(part), axis=None, kind="stable")[:kept]
    out = np.zeros(part.size)
    out[order] = part.reshape(-1)[order]
    return out.reshape(part.shape)


def _thinned(part, share, draw, rescale):
    return np.where(draw < share, part, 0) / (share if rescale and share > 0 else 1)


WEIGHTS = [1.0, 0.5, 2.0]

REFERENCES: dict[str, Any] = {
    "tsv": (
        tsv,
        [{}, {"weight": WEIGHTS, "lambda": 0.7}, {"weight": [1.0, 0.0, -1.0], "convolutions": True}],
    ),
    "iso_c": (
        iso_c,
        [
            {},
            {"weight": WEIGHTS, "lambda": 1.5, "mean_over": "rank"},
            {"weight": [1.0, 0.0, -1.0], "convolutions": True},
        ],
    ),
    "iso_cts": (
        iso_cts,
        [{}, {"common_space_fraction": 0.3, "lambda": 1.5}, {"weight": WEIGHTS, "common_space_fraction": 1.0}],
    ),
    "star": (
        star,
        [
            {},
            {"eta": 80.0, "weight": WEIGHTS},
            {"eta": 0.0},
            {"eta": 100.0, "normalize": False, "lambda": 0.3},
            {"eta": 50.0, "rank": 2},
        ],
    ),
    "timber": (timber, [{}, {"gamma": 0.0, "lambda": 0.5}, {"gamma": 1.5, "convolutions": False}]),
    "low_rank": (
        low_rank,
        [
            {"weight": 1.0},
            {"weight": WEIGHTS, "energy": 0.9, "lambda": 0.5},
            {"weight": 1.0, "energy": 1.0},
            {"weight": 1.0, "energy": 0.0},
            {"weight": [1.0, 0.0, -1.0], "keep": "rank", "rank": 2},
            {"weight": 1.0, "keep": "effective_rank"},
        ],
    ),
    "subspace_boosting": (subspace_boosting, [{}, {"beta": 0.5, "weight": WEIGHTS}, {"beta": 1.0}, {"beta": 0.0}]),
    "knots": (
        _knots(_trimmed),
        [
            {},
            {"weight": WEIGHTS, "density": [0.2, 0.5, 1.0], "lambda": 0.6},
            {"concatenate": "out", "coordinates": "unscaled", "density": 0.4},
            {"weight": [1.0, 0.0, -1.0], "elect": False, "normalize": False, "density": 0.5, "convolutions": False},
            {"density": [0.0, 1.0, 0.3], "normalize": False},
        ],
    ),
    "knots_dare": (
        _knots(_thinned),
        [
            {},
            {"weight": WEIGHTS, "density": [0.2, 0.5, 1.0], "rescale": False},
            {"concatenate": "out", "coordinates": "unscaled", "density": 0.4, "elect": False, "normalize": False},
            {"weight": [1.0, 0.0, -1.0], "density": [0.0, 0.3, 0.7], "convolutions": False},
        ],
    ),
}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {"weight": 1.0, "convolutions": True, "svd": "randomized"}),
    ("iso_c", {"weight": 1.0, "convolutions": True, "mean_over": "rank", "tolerance": 0.01}),
    ("iso_cts", {"weight": 1.0, "common_space_fraction": 0.1, "convolutions": True, "svd": "randomized"}),
    ("star", {"weight": 1.0, "eta": 90.0, "rank": 3, "svd": "randomized"}),
    ("low_rank", {"weight": 0.5, "keep": "effective_rank", "convolutions": True}),
    ("low_rank", {"weight": 0.5, "keep": "rank", "rank": 3, "svd": "randomized"}),
    ("subspace_boosting", {"weight": 1.0, "beta": 0.5, "convolutions": True}),
    ("timber", {"gamma": 0.0, "convolutions": False}),
    ("knots", {"weight": 1.0, "density": 0.3, "concatenate": "out", "coordinates": "unscaled"}),
    ("knots", {"weight": 1.0, "density": 0.3, "trim_scope": "model"}),
    ("knots", {"weight": 0.3, "density": 1.0, "elect": False, "normalize": False}),
    ("knots_dare", {"weight": 1.0, "density": 0.3, "concatenate": "out", "convolutions": False}),
]
