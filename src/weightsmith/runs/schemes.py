"""Weight schemes: how much of each checkpoint of a run goes into its average.

A scheme is a function from the steps at which N checkpoints were saved, the oldest first, to N float64 weights that
sum to one. Nothing else decides an average, so a scheme can be tried on paper, tested on numbers and replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from weightsmith.errors import MethodError, did_you_mean
from weightsmith.methods.linear import shares_of

Scheme = Callable[[Sequence[int]], list[float]]
# A learning rate over time: from the share of the decay that is behind, 0 to 1, to the share of the rate that is left.
Decay = Callable[[float], float]

# By how much weights that a person writes down may miss a sum of one: what decimals of seven digits lose.
_ROUNDED = 1e-6
# What is left at the end of an exponential decay, which never reaches zero.
_EXPONENTIAL_END = 0.01

DECAYS: Mapping[str, Decay] = {
    "linear": lambda t: 1.0 - t,
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "square": lambda t: 1.0 - t * t,
    "exponential": lambda t: _EXPONENTIAL_END**t,
}


def uniform(steps: Sequence[int]) -> list[float]:
    """Return equal weights: LAWA (arXiv:2209.14981), SWA (arXiv:1803.05407) and PMA's SMA (arXiv:2505.12082)."""
    return [1.0 / len(steps)] * len(steps)


def linearly_growing(steps: Sequence[int]) -> list[float]:
    """Return weights that grow with the place, ``w_i ~ i`` from 1: PMA's WMA (arXiv:2505.12082)."""
    return shares_of([float(place) for place in range(1, len(steps) + 1)])


def exponential_average(steps: Sequence[int], decay: float, interval: int = 1) -> list[float]:
    """Return the weights of an exponential moving average from the oldest checkpoint on.

    ``A <- tau A + (1 - tau) W_i`` with ``tau = decay ** interval`` and ``A = W_1``: the method ``ema`` written out. It
    is PMA's EMA (arXiv:2505.12082) with ``alpha = 1 - tau``, and momentum interpolation (arXiv:2211.03186) over
    checkpoints in place of steps.

    Args:
        steps: the steps of the checkpoints.
        decay: share of the average so far that stays at each update, 0 to 1.
        interval: updates that lie between two checkpoints.

    Raises:
        MethodError: if decay or interval is out of range.
    """
    if not 0 <= decay <= 1 or interval < 1:
        raise MethodError(f"ema takes a decay from 0 to 1 and an interval from 1; found {decay:g} and {interval}")
    stays = decay**interval
    last = len(steps) - 1
    return [stays**last] + [(1.0 - stays) * stays ** (last - place) for place in range(1, last + 1)]


def endpoints(steps: Sequence[int], share: float) -> list[float]:
    """Return weights of the oldest and the newest alone, ``(1 - share) W_1 + share W_N``.

    It is Goedel-Prover-V2's averaging of a stage's start and end (arXiv:2508.03613, from paper knowledge; its share is
    not known), and WiSE-FT (arXiv:2109.01903).

    Raises:
        MethodError: if the share is no finite number, or there is one checkpoint alone.
    """
    if not math.isfinite(share):
        raise MethodError(f"endpoints takes a finite share of the newest; found {share}")
    if len(steps) < 2:
        raise MethodError("endpoints takes a start and an end; only one checkpoint is chosen")
    return [1.0 - share, *[0.0] * (len(steps) - 2), share]


def decayed(steps: Sequence[int], schedule: Decay | Sequence[float]) -> list[float]:
    """Return the weights by which checkpoints of a constant learning rate give the run with a decayed one (WSM).

    With ``theta_0 … theta_k`` the checkpoints and ``w_i`` the factor of the decayed rate on the way from
    ``theta_{i-1}`` to ``theta_i``: ``c_0 = 1 - w_1``, ``c_j = w_j - w_{j+1}``, ``c_k = w_k``. Then
    ``sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_{i-1})``: the decayed run, if its gradients are those of
    the constant one, as they are to first order. (Tian et al., WSM, 2025, arXiv:2507.17634, theorem 3.1.)

    The run is said to decay to its end one interval after the newest checkpoint: ``w_i = schedule(t_i)`` with
    ``t_i = (s_i - s_0) / (s_k - s_0 + (s_k - s_0) / k)``, s the steps. At even intervals that is ``i / (k + 1)``, so
    that a linear decay is the uniform mean, as in the paper, and the newest checkpoint always has a weight.

    Args:
        steps: the steps of the checkpoints, ascending.
        schedule: the factor on the learning rate as a function of the share of the decay that is behind, or the
            factors ``w_1 … w_k`` themselves.

    Raises:
        MethodError: if the factors are not as many as there are ways between checkpoints, not within 0 and 1, or grow.
    """
    count = len(steps) - 1
    if callable(schedule):
        span = steps[-1] - steps[0]
        whole = span + span / count if count else 1.0
        factors = [float(schedule((step - steps[0]) / whole)) for step in steps[1:]]
    else:
        factors = [float(factor) for factor in schedule]
        if len(factors) != count:
            raise MethodError(
                f"the decay has {len(factors)} factors for {len(steps)} checkpoints; give {count}: one for each way "
                "from a checkpoint to the next"
            )
    bounded = [1.0, *factors, 0.0]
    if not all(math.isfinite(factor) and before >= factor for before, factor in pairwise(bounded)):
        raise MethodError(
            f"a decay's factors go down from 1 to 0 and never up; found {', '.join(f'{one:g}' for one in factors)}"
        )
    return [before - after for before, after in pairwise(bounded)]


def given(steps: Sequence[int], coefficients: Sequence[float] | Mapping[int, float]) -> list[float]:
    """Return weights that were found elsewhere, such as LCSC's (arXiv:2404.02241) by evolutionary search.

    Args:
        steps: the steps of the checkpoints.
        coefficients: one weight for each checkpoint, the oldest first, of any sign; or one less, for all but the
            oldest: LCSC's ``W = W_1 + sum_{i>1} a_i (W_i - W_1)``; or step -> weight, 0 where a step is not named.

    Raises:
        MethodError: if there are not as many, they do not sum to one, or a step is none of the run's.
    """
    if isinstance(coefficients, Mapping):
        unknown = [step for step in coefficients if step not in steps]
        if unknown:
            raise MethodError(
                f"there are weights for steps {_listed(unknown)}, of which no checkpoint is chosen; chosen are those "
                f"of steps {_listed(steps)}"
            )
        weights = [float(coefficients.get(step, 0.0)) for step in steps]
    else:
        weights = [float(weight) for weight in coefficients]
        if len(weights) == len(steps) - 1:
            weights = [1.0 - math.fsum(weights), *weights]
    if len(weights) != len(steps):
        raise MethodError(
            f"there are {len(weights)} weights for {len(steps)} checkpoints; give {len(steps)}, the oldest first, or "
            f"{len(steps) - 1} for all but the oldest"
        )
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or abs(total - 1.0) > _ROUNDED * max(1.0, *map(abs, weights)):
        raise MethodError(f"the weights must be finite and sum to 1; their sum is {total:g}: divide them by it")
    return shares_of(weights)


def decay_named(name: str) -> Decay:
    """Return a decay schedule by its name.

    Raises:
        MethodError: if there is none of this name.
    """
    found = DECAYS.get(name)
    if found is None:
        raise MethodError(
            f"there is no decay schedule {name!r}{did_you_mean(name, DECAYS)}; there are: {', '.join(DECAYS)}, or a "
            "list of factors such as 0.8,0.5,0.1"
        )
    return found


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (" …" if len(steps) > 8 else "")
