"""Every method once more: whole tensors, float64, sorts and loops, written from the papers and cards.

Slow and plain on purpose, and sharing nothing with the package but the random numbers. Each takes the models (in float64), the base (or
None; in the dtype that the package works in, for it ranks what it computes in that dtype) and the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from weightsmith.kernels import philox

Array = np.ndarray[Any, Any]


def each(value: Any, models: list[Array]) -> list[Any]:
    return value if isinstance(value, list) else [value] * len(models)


def _ranked_delta(model, base):
    return (model.astype(base.dtype) - base).astype(np.float64)


def linear(models, base, weight=1.0, normalize=True):
    weights = np.array(each(weight, models))
    total = np.tensordot(weights, np.stack(models), 1)
    return total / weights.sum() if normalize else total


def passthrough(models, base, scale=1.0):
    return each(scale, models)[0] * models[0]


def slerp(models, base, t):
    a, b = np.float64(base).ravel(), models[0].ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > 0.9995:
        out = (1 - t) * a + t * b
    else:
        angle = math.acos(cosine)
        out = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    return out.reshape(models[0].shape)


def _arc(a, b, t):
    cosine = np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-8:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(models, base, weight=1.0, nuslerp_flatten=True, nuslerp_row_wise=False):
    w = each(weight, models)
    t = w[1] / sum(w)
    origin = 0.0 if base is None else np.float64(base)
    a, b = models[0] - origin, models[1] - origin
    if nuslerp_flatten:
        return origin + _arc(a.ravel(), b.ravel(), t).reshape(a.shape)
    axis = 0 if nuslerp_row_wise else -1
    a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    rows = [_arc(x, y, t) for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)]
    return origin + np.moveaxis(np.array(rows).reshape(a.shape), -1, axis)


def _log(at, direction):
    cosine = np.clip(at @ direction, -1, 1)
    angle = math.acos(cosine)
    return np.zeros_like(at) if angle < 1e-12 else angle / math.sin(angle) * (direction - cosine * at)


def _exp(at, tangent):
    length = np.linalg.norm(tangent)
    return at if length == 0 else math.cos(length) * at + math.sin(length) * tangent / length


def multislerp(models, base, weight=1.0, tangent="log"):
    origin = 0.0 if base is None else np.float64(base)
    vectors = [(m - origin).ravel() for m in models]
    w = np.array(each(weight, models)) / sum(each(weight, models))
    lengths = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, lengths, strict=True)]
    mean = sum(x * u for x, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    if tangent == "log":
        mean = _exp(mean, sum(x * _log(mean, u) for x, u in zip(w, units, strict=True)))
    return origin + (mean * (w @ lengths)).reshape(models[0].shape)


def karcher(models, base, weight=1.0, filter_wise=False, max_iter=10, tol=1e-5):
    shares = np.array(each(weight, models)) / sum(each(weight, models))
    rows = [m.reshape(-1, m.shape[-1]) if filter_wise else m.reshape(1, -1) for m in models]
    means = [_karcher([row[i] for row in rows], shares, max_iter, tol) for i in range(len(rows[0]))]
    return np.array(means).reshape(models[0].shape)


def _karcher(vectors, shares, max_iter, tol):
    lengths = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, lengths, strict=True)]
    start = sum(s * u for s, u in zip(shares, units, strict=True))
    mean = start / np.linalg.norm(start)
    for _ in range(max_iter):
        step = sum(s * _log(mean, u) for s, u in zip(shares, units, strict=True))
        if np.linalg.norm(step) < tol:
            break
        mean = _exp(mean, step)
    return mean * (shares @ lengths)


def model_stock(models, base, filter_wise=False):
    base = np.float64(base)
    deltas = [m - base for m in models]
    flat = [d.reshape(-1, d.shape[-1]) if filter_wise else d.reshape(1, -1) for d in deltas]
    n = len(models)
    ratios = []
    for row in range(len(flat[0])):
        pairs = [
            flat[i][row] @ flat[j][row] / np.linalg.norm(flat[i][row]) / np.linalg.norm(flat[j][row])
            for i in range(n)
            for j in range(i)
        ]
        cosine = np.mean(pairs)
        ratios.append(np.clip(n * cosine / (1 + (n - 1) * cosine), 0, 1))
    t = np.array(ratios)[:, None]
    mean = sum(models).reshape(flat[0].shape) / n
    return (t * mean + (1 - t) * base.reshape(flat[0].shape)).reshape(base.shape)


def _add(base, deltas, weight, *, consensus, normalize, scale):
    weighted = [w * d for w, d in zip(weight, deltas, strict=True)]
    divisor: Any = sum(weight)
    if consensus:
        sign = np.where(sum(weighted) >= 0, 1, -1)
        masks = [np.sign(x) == sign for x in weighted]
        weighted = [x * m for x, m in zip(weighted, masks, strict=True)]
        divisor = sum(w * m for w, m in zip(weight, masks, strict=True))
        divisor = np.where(divisor == 0, 1, divisor)
    return np.float64(base) + scale * sum(weighted) / (divisor if normalize else 1)


def _ranked(delta):
    """Return every entry's rank by magnitude, 0 the largest; equal ones by position."""
    rank = np.empty(delta.size, int)
    rank[np.argsort(-np.abs(delta).ravel(), kind="stable")] = np.arange(delta.size)
    return rank.reshape(delta.shape)


def _rescaled(delta, kept, rescale):
    out = delta * kept
    return out * np.abs(delta).sum() / np.abs(out).sum() if rescale else out


def task_arithmetic(models, base, weight=1.0, normalize=False, **given):
    deltas = [m - base for m in models]
    scale = given.get("lambda", 1.0)
    return _add(base, deltas, each(weight, models), consensus=False, normalize=normalize, scale=scale)


def ties(models, base, weight=1.0, density=1.0, normalize=True, rescale=False, **given):
    deltas = []
    for model, share in zip(models, each(density, models), strict=True):
        delta = _ranked_delta(model, base)
        kept = _ranked(delta) < max(1, int(share * delta.size))
        deltas.append(_rescaled(delta, kept, rescale))
    scale = given.get("lambda", 1.0)
    return _add(base, deltas, each(weight, models), consensus=True, normalize=normalize, scale=scale)


def _breadcrumbs(models, base, weight, density, gamma, rescale, trim_scope, consensus):
    deltas = []
    for model in models:
        delta = _ranked_delta(model, base)
        kept = _kept_of_rows(delta, density, gamma) if trim_scope == "row" else _kept_below(delta, density, gamma)
        deltas.append(_rescaled(delta, kept, rescale))
    return _add(base, deltas, each(weight, models), consensus=consensus, normalize=False, scale=1.0)


def _kept_below(delta, density, gamma):
    n = delta.size
    kept, top = int(density * n), int(gamma * n)
    bottom = max(0, n - kept - top)
    rank = _ranked(delta)
    return (rank < n - bottom) & (rank >= n - bottom - kept)


def _kept_of_rows(delta, density, gamma):
    """As the authors do it: the largest of a row set to zero, then the largest of what is left kept."""
    n = delta.shape[-1]
    kept = np.zeros(delta.shape, bool)
    for place in np.ndindex(delta.shape[:-1]):
        left = sorted(range(n), key=lambda i: (abs(delta[place][i]), i), reverse=True)[int(gamma * n) :]
        kept[place][left[: int(density * n)]] = True
    return kept


def breadcrumbs(models, base, weight=1.0, density=1.0, gamma=0.01, rescale=False, trim_scope="tensor"):
    return _breadcrumbs(models, base, weight, density, gamma, rescale, trim_scope, consensus=False)


def breadcrumbs_ties(models, base, weight=1.0, density=1.0, gamma=0.01, rescale=False, trim_scope="tensor"):
    return _breadcrumbs(models, base, weight, density, gamma, rescale, trim_scope, consensus=True)


def _thinned(models, base, density, chances, rescale, rescale_by, dropped_of="delta"):
    """Drop entries where the generator, which has tests of its own, draws at least their chance."""
    deltas = []
    for i, (model, share) in enumerate(zip(models, each(density, models), strict=True)):
        delta = _ranked_delta(model, base) if dropped_of == "delta" else model
        draw = philox.uniform(philox.key_of(0, "tensor", i), 0, delta.size).reshape(delta.shape)
        chance = chances(delta, share) if 0 < share < 1 else np.full(delta.shape, share)
        out = np.where(draw < chance, delta, 0.0)
        if rescale and rescale_by == "l1" and np.abs(out).sum() > 0:
            out = out * np.abs(delta).sum() / np.abs(out).sum()
        elif rescale:
            out = out / np.where(chance > 0, chance, 1.0)
        deltas.append(out if dropped_of == "delta" else out - base)
    return deltas


def _dare(consensus):
    def reference(
        models, base, weight=1.0, density=1.0, normalize=False, rescale=True, rescale_by="expected", object="delta"
    ):
        deltas = _thinned(models, base, density, lambda _, share: share, rescale, rescale_by, object)
        return _add(base, deltas, each(weight, models), consensus=consensus, normalize=normalize, scale=1.0)

    return reference


def _della(consensus):
    def reference(
        models,
        base,
        weight=1.0,
        density=1.0,
        epsilon=0.15,
        normalize=consensus,
        rescale=True,
        rescale_by="expected",
        trim_scope="row",
    ):
        def in_rows(delta, share):
            rows = np.abs(delta).reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
            rank = np.stack([np.argsort(np.argsort(row, kind="stable")) for row in rows]) / (rows.shape[1] - 1)
            return (share - epsilon + 2 * epsilon * rank).reshape(delta.shape)

        def in_tensor(delta, share):
            # Patterns of 16 bits stand for the magnitudes; equal ones share the mean of their ranks.
            patterns = np.abs(delta).astype(base.dtype).view(f"u{base.dtype.itemsize}") >> (
                8 * base.dtype.itemsize - 16
            )
            ordered = np.sort(patterns.ravel())
            first = np.searchsorted(ordered, patterns.ravel(), "left")
            last = np.searchsorted(ordered, patterns.ravel(), "right") - 1
            rank = (first + last) / 2 / (delta.size - 1)
            return (share - epsilon + 2 * epsilon * rank).reshape(delta.shape)

        chances = in_rows if trim_scope == "row" else in_tensor
        deltas = _thinned(models, base, density, chances, rescale, rescale_by)
        return _add(base, deltas, each(weight, models), consensus=consensus, normalize=normalize, scale=1.0)

    return reference


def sce(models, base, select_topk=1.0):
    deltas = np.stack([_ranked_delta(m, base) for m in models])
    variance = deltas.var(axis=0)
    if select_topk < 1:
        count = int(np.count_nonzero(variance) * select_topk)
        deltas = deltas * (_ranked(variance) < count)
    share = (deltas**2).reshape(len(models), -1).mean(axis=1)
    share = share / share.sum()
    agreeing = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    weights = share.reshape(-1, *[1] * (deltas.ndim - 1)) * agreeing
    total = weights.sum(axis=0)
    return np.float64(base) + (weights * deltas).sum(axis=0) / np.where(total == 0, 1, total)


def nearswap(models, base, t):
    base = np.float64(base)
    distance = np.maximum(np.abs(base - models[0]), 1e-6)
    share = np.clip(t / distance, 0, 1)
    return share * models[0] + (1 - share) * base


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def arcee_fusion(models, base):
    base = np.float64(base)
    p, q = _softmax(models[0]) + 1e-8, _softmax(base) + 1e-8
    importance = np.abs(models[0] - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, middle, high = (ordered[int((importance.size - 1) * quantile)] for quantile in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), models[0], base)


def _ram(models, base, epsilon):
    deltas = np.stack([m - base for m in models])
    active = np.abs(deltas) > epsilon
    return deltas, active, active.sum(axis=0)


def ram(models, base, epsilon=1e-5):
    deltas, active, count = _ram(models, base, epsilon)
    return base + (deltas * active).sum(axis=0) / np.maximum(count, 1)


def ramplus_tl(models, base, r=0.1, alpha=0.2, epsilon=1e-5):
    deltas, active, count = _ram(models, base, epsilon)
    total = np.zeros_like(deltas[0])
    for delta, own in zip(deltas, active, strict=True):
        alone, shared = own & (count == 1), own & (count > 1)
        ratio = min(shared.sum() / alone.sum(), alpha) if alone.sum() else 0.0
        total += delta * own * np.where(alone, 1 + r * ratio, 1.0)
    return base + total / np.maximum(count, 1)


# method -> its reference, and the parameters to compare it with
REFERENCES: dict[str, tuple[Callable[..., Array], list[dict[str, Any]]]] = {
    "linear": (
        linear,
        [{"weight": 1.0}, {"weight": [0.2, -0.5, 1.1]}, {"weight": [1.0, 2.0, 0.5], "normalize": False}],
    ),
    "passthrough": (passthrough, [{}, {"scale": [-0.5]}]),
    "slerp": (slerp, [{"t": 0.0}, {"t": 0.3}, {"t": 1.0}]),
    "nuslerp": (
        nuslerp,
        [
            {"weight": [0.3, 0.6]},
            {"weight": [1.0, 1.0], "no_base": True},
            {"weight": [0.3, 0.6], "nuslerp_flatten": False},
            {"weight": [0.3, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        ],
    ),
    "multislerp": (
        multislerp,
        [
            {"weight": [0.5, 0.3, 0.9]},
            {"weight": 1.0, "no_base": True},
            {"weight": [1.0, 3.0, 2.0], "tangent": "projection"},
        ],
    ),
    "karcher": (
        karcher,
        [{}, {"max_iter": 1}, {"weight": [1.0, 3.0, 0.5]}, {"weight": [1.0, 3.0, 0.5], "filter_wise": True}],
    ),
    "model_stock": (model_stock, [{}, {"filter_wise": True}]),
    "task_arithmetic": (
        task_arithmetic,
        [{"weight": 0.5}, {"weight": [0.5, -1.0, 2.0], "lambda": 0.7}, {"weight": [0.5, 1.0, 2.0], "normalize": True}],
    ),
    "ties": (
        ties,
        [
            {"weight": 1.0, "density": 0.2},
            {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.5, 0.9], "lambda": 0.5},
            {"weight": 1.0, "density": 0.4, "normalize": False, "rescale": True},
        ],
    ),
    "dare_linear": (
        _dare(False),
        [
            {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.9, 1.0]},
            {"weight": [0.5, 1.0, 2.0], "density": 0.4, "rescale_by": "l1", "normalize": True},
            {"weight": 1.0, "density": 0.5, "rescale": False},
            {"weight": 1.0, "density": 0.0},
            {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.9, 1.0], "object": "weights"},
            {"weight": 1.0, "density": 0.4, "object": "weights", "rescale_by": "l1"},
        ],
    ),
    "dare_ties": (
        _dare(True),
        [
            {"weight": [0.5, 1.0, 2.0], "density": 0.4},
            {"weight": 1.0, "density": 0.4, "rescale_by": "l1"},
            {"weight": 1.0, "density": 0.4, "object": "weights", "rescale": False},
        ],
    ),
    "della": (
        _della(True),
        [
            {"weight": [0.5, 1.0, 2.0]},
            {"weight": [0.5, 1.0, 2.0], "density": [0.3, 0.5, 0.8]},
            {"weight": 1.0, "density": 0.4, "rescale_by": "l1", "normalize": False},
        ],
    ),
    "della_linear": (
        _della(False),
        [
            {"weight": [0.5, 1.0, 2.0], "density": [0.0, 0.5, 1.0]},
            {"weight": 1.0, "density": 0.5, "trim_scope": "tensor"},
            {"weight": 1.0, "density": 0.5, "rescale": False},
        ],
    ),
    "breadcrumbs": (
        breadcrumbs,
        [
            {"weight": 0.5, "density": 0.5, "gamma": 0.1},
            {"weight": 1.0, "density": 0.8, "gamma": 0.5, "rescale": True},
            {"weight": 0.5, "density": 0.5, "gamma": 0.1, "trim_scope": "row"},
            {"weight": 0.5, "density": 0.9, "gamma": 0.5, "rescale": True, "trim_scope": "row"},
        ],
    ),
    "breadcrumbs_ties": (
        breadcrumbs_ties,
        [
            {"weight": 0.5, "density": 0.5, "gamma": 0.1},
            {"weight": 0.5, "density": 0.5, "gamma": 0.1, "trim_scope": "row"},
        ],
    ),
    "sce": (sce, [{}, {"select_topk": 0.1}, {"select_topk": 0.5}]),
    "ram": (ram, [{}, {"epsilon": 0.08}]),
    "ramplus_tl": (ramplus_tl, [{}, {"epsilon": 0.08, "r": 0.5, "alpha": 0.6}]),
    "nearswap": (nearswap, [{"t": 0.0}, {"t": 0.05}]),
    "arcee_fusion": (arcee_fusion, [{}]),
}

# Method and parameters: ways of computing that a method's example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": 0.5, "normalize": False}),
    ("passthrough", {"scale": 0.5}),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": 0.5, "tangent": "projection"}),
    ("karcher", {"filter_wise": True}),
    ("model_stock", {"filter_wise": True}),
    ("ties", {"weight": 0.5, "density": 0.3, "rescale": True, "trim_scope": "model"}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.2, "rescale": True}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.2, "rescale": True, "trim_scope": "row"}),
    ("breadcrumbs_ties", {"weight": 0.5, "density": 0.5, "gamma": 0.05, "trim_scope": "row"}),
    ("dare_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("della", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("della_linear", {"weight": 0.5, "density": 0.3, "trim_scope": "tensor"}),
    ("sce", {"select_topk": 1.0}),
    ("ramplus_tl", {"count_scope": "tensor"}),
]

for family in ("averages", "robust", "transfer", "interference", "columns", "spectral", "continual"):
    found = import_module(f"references_{family}")
    REFERENCES |= found.REFERENCES
    VARIANTS += found.VARIANTS
