"""The rules themselves: from what is known of the clients to one number for each.

Nothing here knows of weights. Every function takes and gives plain numbers, in float64, in the order of the clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from weightsmith.errors import MethodError
from weightsmith.methods.linear import shares_of


def fedavg_shares(examples: Sequence[float]) -> list[float]:
    """Return each client's share of the data: ``p_i = n_i / sum_j n_j``.

    Args:
        examples: how many examples each client has; 0 or above.

    Raises:
        MethodError: if there are no clients, a count is negative or not finite, or all are 0.

    Source: McMahan et al., Communication-efficient learning of deep networks, AISTATS 2017, arXiv:1602.05629.
    """
    _check(examples, "examples", "0 or above", lambda value: value >= 0)
    if not any(examples):
        raise MethodError("every client has 0 examples, so none has a share; give at least one above 0")
    # By a power of two, which rounds nothing: the sum of the counts could be beyond float64.
    _, exponent = math.frexp(max(examples))
    return shares_of([math.ldexp(count, -exponent) for count in examples])


def normalizing_steps(steps: int, *, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """Return how often a client's first gradients count in its update: the norm ``|a_i|_1`` of FedNova.

    Plain SGD: the steps themselves. With momentum rho: ``(t - rho (1 - rho^t) / (1 - rho)) / (1 - rho)``. With a
    proximal term (FedProx), ``e`` being its factor times the learning rate: ``(1 - (1 - e)^t) / e``.

    Args:
        steps: local steps t, at least 1.
        momentum: the local optimiser's momentum rho, ``0 <= rho < 1``.
        proximal: local learning rate times the factor of the proximal term, ``0 <= e < 1``.

    Raises:
        MethodError: if a number is outside its range, or both momentum and a proximal term are given.

    Source: Wang et al., Tackling the objective inconsistency problem (FedNova), NeurIPS 2020, arXiv:2007.07481; checked
    against the recursions of the authors' code.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise MethodError(f"a client took {steps} local steps; give a whole number, 1 or above")
    for name, value in (("momentum", momentum), ("proximal", proximal)):
        if not 0 <= value < 1:
            raise MethodError(f"{name} is {value:g}; it must be 0 or above and below 1")
    if momentum and proximal:
        raise MethodError("the paper has no norm for momentum with a proximal term; compute it and give it as norms")
    if momentum:
        # The sum of 1 + rho + ... over all steps: what the closed form subtracts would be lost near rho = 1.
        return math.fsum(-math.expm1(k * math.log(momentum)) for k in range(1, int(steps) + 1)) / (1.0 - momentum)
    if proximal:
        return -math.expm1(steps * math.log1p(-proximal)) / proximal
    return float(steps)


def fednova_factors(
    shares: Sequence[float], norms: Sequence[float], *, effective_steps: float | None = None
) -> list[float]:
    """Return the factor of each client's update: ``tau p_i / |a_i|_1``, with ``tau = sum_j p_j |a_j|_1``.

    Clients of equal norms have the factors of FedAvg: their shares.

    Args:
        shares: share ``p_i`` of each client; they sum to one.
        norms: what :func:`normalizing_steps` gives for each client; above 0.
        effective_steps: another ``tau``. The authors' code takes ``sum_j p_j t_j`` where there is a proximal term.

    Raises:
        MethodError: if a norm or ``tau`` is not above 0 and finite.

    Source: as :func:`normalizing_steps`.
    """
    _check(norms, "norms", "above 0", lambda value: value > 0)
    if effective_steps is None:
        # Relative to the largest, so that equal norms give the shares themselves.
        largest = max(norms)
        tau = largest * math.fsum(share * (norm / largest) for share, norm in zip(shares, norms, strict=True))
    else:
        _check([effective_steps], "effective_steps", "above 0", lambda value: value > 0)
        tau = effective_steps
    return [share * (tau / norm) for share, norm in zip(shares, norms, strict=True)]


def fedlaw_factors(
    logits: Sequence[float], gamma: float = 0.0, *, form: Literal["exp", "quad"] = "exp"
) -> tuple[list[float], float]:
    """Return what FedLAW's free numbers stand for: ``lambda``, which sums to one, and the shrinking factor ``gamma``.

    ``exp``: ``softmax(l)`` and ``exp(g)``; where the search starts, l is the logarithm of the data shares and g is 0.
    ``quad``: ``l_i^2 / sum_j l_j^2`` and ``g^2``, starting from equal l and g = 1.

    Args:
        logits: l, one number per client.
        gamma: g.
        form: which of the two.

    Raises:
        MethodError: if a number is not finite, or all of quad's are 0.

    Source: Li et al., Revisiting weighted aggregation in federated learning with neural networks (FedLAW), ICML 2023,
    arXiv:2302.10911, and its code.
    """
    _check([*logits, gamma], "FedLAW's numbers", "finite", lambda _: True)
    if form == "exp":
        return shares_of([math.exp(one - max(logits)) for one in logits]), math.exp(gamma)
    if form != "quad":
        raise MethodError(f"form is {form!r}; it must be 'exp' or 'quad'")
    largest = max(map(abs, logits))
    if not largest:
        raise MethodError("all numbers of form quad are 0, so no client has a weight; give at least one other")
    return shares_of([(one / largest) ** 2 for one in logits]), gamma**2


def sampling_weights(shares: Sequence[float], probabilities: Sequence[float]) -> list[float]:
    """Return ``p_i / q_i``: with these the sum over those who take part is, on average, the sum over all.

    Args:
        shares: share ``p_i`` of each client.
        probabilities: probability ``q_i`` that the client takes part, above 0, at most 1.

    Raises:
        MethodError: if a probability is not one.

    Source: the "known probability" weighting of the code of FedAU (arXiv:2306.03401), and FedStale's sampler.
    """
    _check(probabilities, "probability", "above 0 and at most 1", lambda value: 0 < value <= 1)
    return [share / chance for share, chance in zip(shares, probabilities, strict=True)]


@dataclass(frozen=True)
class Participation:
    """What FedAU remembers of a client.

    Attributes:
        intervals: how many intervals between rounds in which it took part were recorded.
        total: the sum of their lengths in rounds.
        absent: rounds since the last record.
    """

    intervals: int = 0
    total: int = 0
    absent: int = 0

    @property
    def weight(self) -> float:
        """FedAU's weight: the mean of the recorded intervals, 1 before there is any."""
        return self.total / self.intervals if self.intervals else 1.0

    def after(self, *, present: bool, cutoff: int | None) -> Participation:
        """Return what is remembered after one more round.

        Args:
            present: whether the client took part. The interval that ends so counts from the next round on.
            cutoff: after so many rounds of absence an interval of that length is recorded, and a new one begins; None
                for never.
        """
        length = self.absent + 1
        if present or (cutoff is not None and length >= cutoff):
            return Participation(self.intervals + 1, self.total + length, 0)
        return replace(self, absent=length)


def fedstale_factors(shares: Sequence[float], weights: Sequence[float | None], beta: float) -> list[float]:
    """Return the factor of each client's stored update: ``beta (p_i - w_i)`` if it takes part, else ``beta p_i``.

    With ``w_i`` on the new updates this is ``sum_active w_i (D_i - beta h_i) + beta sum_all p_i h_i``.

    Args:
        shares: share ``p_i`` of every client of the population.
        weights: weight ``w_i`` of every client that takes part, None for the others.
        beta: how much of the stored updates is used: 0 for FedAvg's update, 1 for FedVARP's.

    Raises:
        MethodError: if beta is not between 0 and 1.

    Source: Rodio and Neglia, FedStale: leveraging stale client updates in federated learning, 2024, arXiv:2405.04171;
    the history term checked against its code, the place of beta from the paper.
    """
    if not 0 <= beta <= 1:
        raise MethodError(f"beta is {beta:g}; it must be between 0 and 1")
    return [beta * (share - (0.0 if weight is None else weight)) for share, weight in zip(shares, weights, strict=True)]


def rated(factors: Sequence[float], server_rate: float) -> list[float]:
    """Return factors times the server's learning rate.

    Raises:
        MethodError: if the rate is not finite.
    """
    _check([server_rate], "server_rate", "a number", lambda _: True)
    return [server_rate * factor for factor in factors]


def _check(values: Sequence[float], what: str, wanted: str, fits: Callable[[float], bool]) -> None:
    if not values:
        raise MethodError("there are no clients; give at least one")
    for value in values:
        if isinstance(value, bool) or not math.isfinite(value) or not fits(value):
            raise MethodError(f"{what}: {value!r} is given; every number must be {wanted}, and finite")
