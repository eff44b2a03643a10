"""Weight schemes as people write them: ``uniform``, ``ema:0.9``, ``wsm:1-sqrt:20000``, ``by-metric:loss:2``, a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError, MethodError, RecipeError, did_you_mean
from weightsmith.methods.averages import Metric, metric_shares
from weightsmith.runs import schemes
from weightsmith.runs.discovery import Saved
from weightsmith.runs.schemes import Scheme

Weights = str | Sequence[float] | Mapping[int, float] | Scheme

_FORMS = (
    "uniform",
    "wma",
    "ema:DECAY",
    "ema:DECAY:INTERVAL",
    "linear-decay",
    "1-sqrt",
    "cosine",
    "wsm:DECAY",
    "wsm:DECAY:STEPS",
    "by-metric:NAME:P",
    "endpoints:SHARE",
    "FILE.json",
)
_SHORT = {"linear-decay": "linear", "1-sqrt": "1-sqrt", "cosine": "cosine"}
_PLAIN: Mapping[str, Scheme] = {
    "uniform": schemes.uniform,
    "sma": schemes.uniform,
    "lawa": schemes.uniform,
    "wma": schemes.linearly_growing,
}
# What a metric's name says of it; anything else is better where it is higher.
_LOWER = ("loss", "perplexity", "ppl", "error", "wer", "cer", "mse", "mae", "nll")
_LARGEST_FILE = 16_000_000


@dataclass(frozen=True)
class Weighting:
    """How the checkpoints of a run are weighted.

    Attributes:
        metric: the metric that decides, or None.
        of: gives the weights of checkpoints, the oldest first; they sum to one.
    """

    of: Callable[[Sequence[Saved]], list[float]]
    metric: str | None = None


def weighting(weights: Weights) -> Weighting:
    """Understand what a person gave as weights.

    Args:
        weights: a text (one of ``uniform``, ``wma``, ``ema:DECAY[:INTERVAL]``, ``linear-decay``, ``1-sqrt``,
            ``cosine``, ``wsm:DECAY[:STEPS]``, ``by-metric:NAME:P[:loss|exp_loss|score]``, ``endpoints:SHARE``, or the
            path of a JSON file); one number for each checkpoint, the oldest first, or one less (see
            :func:`weightsmith.runs.schemes.given`); step -> weight; or a scheme of one's own.

    Raises:
        RecipeError: if the text is none of these.
        MethodError: if a number in it is out of range.
        CheckpointError: if the file cannot be read.
    """
    if callable(weights):
        return _by_steps(weights)
    if not isinstance(weights, str):
        return _by_steps(partial(schemes.given, coefficients=weights))
    if weights.endswith(".json"):
        return _by_steps(partial(schemes.given, coefficients=_from_file(weights)))
    name, *arguments = [part.strip() for part in weights.replace("by-metric ", "by-metric:", 1).split(":")]
    if name in _PLAIN and not arguments:
        return _by_steps(_PLAIN[name])
    if name in _SHORT and not arguments:
        return _by_steps(partial(schemes.decayed, schedule=schemes.decay_named(_SHORT[name])))
    if name == "ema" and len(arguments) in (1, 2):
        interval = _number(arguments[1], weights) if len(arguments) == 2 else 1
        if interval != int(interval):
            raise RecipeError(f"--weights {weights}: the interval is a whole number of updates, not {arguments[1]}")
        return _by_steps(
            partial(schemes.exponential_average, decay=_number(arguments[0], weights), interval=int(interval))
        )
    if name == "endpoints" and len(arguments) == 1:
        return _by_steps(partial(schemes.endpoints, share=_number(arguments[0], weights)))
    if name == "wsm" and len(arguments) in (1, 2):
        return _wsm(weights, *arguments)
    if name == "by-metric" and len(arguments) in (2, 3):
        return by_metric(arguments[0], _number(arguments[1], weights), *arguments[2:])
    known = [form.partition(":")[0] for form in _FORMS]
    hint = "" if name in known else did_you_mean(name, known)
    raise RecipeError(f"--weights {weights!r} is none of the schemes{hint}: {', '.join(dict.fromkeys(_FORMS))}")


def by_metric(name: str, power: float, kind: str | None = None) -> Weighting:
    """Return weights by a metric that was logged: MWA (arXiv:2504.18580; the form of the weights is inferred).

    Args:
        name: the metric: a name in the log, or ``step``.
        power: how sharply weights follow it; 0 is the plain mean.
        kind: ``loss`` for ``m^-p``, ``exp_loss`` for ``exp(-p m)``, ``score`` for ``m^p``, as method
            ``metric_weighted`` has them; by default ``loss`` where the name says so, else ``score``.

    Raises:
        MethodError: if the power is negative, or there is no such kind.
    """
    chosen = kind or ("loss" if any(word in name.lower() for word in _LOWER) else "score")
    if chosen not in ("loss", "exp_loss", "score"):
        raise MethodError(f"by-metric:{name}: {chosen!r} is none of loss, exp_loss and score")
    if not math.isfinite(power) or power < 0:
        raise MethodError(f"by-metric:{name}: the power is a number from 0; found {power:g}")

    def of(checkpoints: Sequence[Saved]) -> list[float]:
        values = [_metric(one, name) for one in checkpoints]
        bad = [
            (one, value)
            for one, value in zip(checkpoints, values, strict=True)
            if not math.isfinite(value) or (chosen == "loss" and value <= 0) or (chosen == "score" and value < 0)
        ]
        if bad:
            wanted = {"loss": "above 0", "score": "0 or above", "exp_loss": "finite"}[chosen]
            raise MethodError(
                f"{name} of {bad[0][0].label} is {bad[0][1]:g}; as {chosen} it must be {wanted}: choose others by "
                "--steps, or by-metric:NAME:P:exp_loss for losses of any sign"
            )
        if chosen == "score" and power > 0 and not any(values):
            raise MethodError(f"{name} of every checkpoint is 0, so none has a weight")
        return metric_shares(values, cast(Metric, chosen), power)

    return Weighting(of, name)


def _metric(checkpoint: Saved, name: str) -> float:
    if name == "step":
        return float(checkpoint.step)
    if name not in checkpoint.metrics:
        known = ", ".join(checkpoint.metrics) or "nothing"
        raise CheckpointError(
            f"{checkpoint.path}: no {name!r} was logged up to step {checkpoint.step}"
            f"{did_you_mean(name, checkpoint.metrics)}; logged are: {known}"
        )
    return checkpoint.metrics[name]


def _by_steps(scheme: Scheme) -> Weighting:
    def of(checkpoints: Sequence[Saved]) -> list[float]:
        weights = [float(weight) for weight in scheme([one.step for one in checkpoints])]
        if len(weights) != len(checkpoints) or not math.isclose(math.fsum(weights), 1.0, rel_tol=0, abs_tol=1e-6):
            raise MethodError(
                f"the scheme gives {len(weights)} weights with the sum {math.fsum(weights):g} for {len(checkpoints)} "
                "checkpoints; it must give one for each, and they must sum to 1"
            )
        return weights

    return Weighting(of)


def _wsm(text: str, schedule: str, window: str | None = None) -> Weighting:
    """Return the weights of a decay, by name or factors, over a window of so many steps before the newest."""
    if "," in schedule or schedule.replace(".", "", 1).isdigit():
        decay: Any = [_number(part, text) for part in schedule.split(",")]
    else:
        decay = schemes.decay_named(schedule)
    width = math.inf if window is None else _number(window, text)
    if not width > 0:
        raise RecipeError(f"--weights {text}: the window is a number of steps above 0, not {window}")

    def scheme(steps: Sequence[int]) -> list[float]:
        within = [step for step in steps if step >= steps[-1] - width]
        return [0.0] * (len(steps) - len(within)) + schemes.decayed(within, decay)

    return _by_steps(scheme)


def _from_file(path: str) -> list[float] | dict[int, float]:
    """Read weights: ``{"weights": [0.2, 0.8]}``, or ``{"weights": {"500": 0.2, "1000": 0.8}}``."""
    found = parse_object(read_whole(path, _LARGEST_FILE), path).get("weights")
    values = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise CheckpointError(
            f"{path} holds no weights: it must be an object whose 'weights' are a list of numbers, or map steps to them"
        )
    if isinstance(found, dict):
        if not all(step.isdigit() for step in found):
            raise CheckpointError(f"{path}: the keys of 'weights' are steps: whole numbers")
        return {int(step): float(weight) for step, weight in found.items()}
    return [float(value) for value in values]


def _number(text: str, weights: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise RecipeError(f"--weights {weights}: {text!r} is no number") from None
    if not math.isfinite(value):
        raise RecipeError(f"--weights {weights}: {text} is not finite")
    return value
