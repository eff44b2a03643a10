"""Rules that remember nothing between rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.api import merge
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.errors import MethodError, RecipeError
from weightsmith.federated.clients import Clients, Known, Updates, clients_of, known_of, moved
from weightsmith.federated.coefficients import (
    fedavg_shares,
    fednova_factors,
    normalizing_steps,
    rated,
    sampling_weights,
)
from weightsmith.plan.merged import LazyCheckpoint

# What batch normalisation counts while it runs: no weights.
_RUNNING = ("*running_mean", "*running_var")


def fedavg(
    clients: Clients,
    base: Source | None = None,
    *,
    examples: Known[float] | None = None,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> LazyCheckpoint:
    """Average the clients by their shares of the data: FedAvg.

    ``sum_i p_i theta_i``; with a base ``theta + eta sum_i p_i (theta_i - theta)``, which is the same for ``eta = 1``.
    FedAMD's server takes the same mean of its miners' updates (inferred from its abstract). Integer tensors, counters
    included, are those of the base, or of the first client; the authors' code averages them too.

    Args:
        clients: see :func:`weightsmith.federated.clients.clients_of`.
        base: the global model that the clients started from; needed for updates that are deltas, and for a server rate.
        examples: how many examples each client has: by name, or in their order; equally many by default.
        updates: whether clients are ``models``, or ``deltas``: what training added to the base.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`: ``dtype``, ``on_missing``, ``tokenizer_source``.

    Raises:
        CheckpointError: if a client cannot be read.
        MethodError: if a count is missing or out of range.
        RecipeError: if a base is needed and not given.
        PlanError: if tensors are missing or differ in shape.

    Source: McMahan et al., Communication-efficient learning of deep networks, AISTATS 2017, arXiv:1602.05629.
    """
    named = clients_of(clients)
    shares = fedavg_shares(known_of(examples, list(named), "examples"))
    if base is None:
        if updates != "models" or server_rate != 1.0:
            raise RecipeError("give the base, the global model that the clients started from: updates are added to it")
        return merge("linear", list(named.values()), weight=shares, **settings)
    return moved(base, list(named.values()), rated(shares, server_rate), updates=updates, **settings)


def fednova(
    clients: Clients,
    base: Source,
    *,
    steps: Known[int] | int,
    examples: Known[float] | None = None,
    momentum: float = 0.0,
    proximal: float = 0.0,
    norms: Known[float] | None = None,
    effective_steps: float | None = None,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> LazyCheckpoint:
    """Average updates per local step, then go as many steps as the clients did on average: FedNova.

    ``theta + eta tau sum_i p_i (theta_i - theta) / |a_i|_1`` with ``tau = sum_i p_i |a_i|_1``: clients that took more
    local steps no longer pull further. With equal steps it is FedAvg.

    Args:
        clients: see :func:`weightsmith.federated.clients.clients_of`.
        base: the global model that the clients started from.
        steps: local steps of each client.
        examples: how many examples each has; equally many by default.
        momentum: momentum of the clients' optimiser.
        proximal: local learning rate times the factor of the proximal term. As in the authors' code, tau is then
            ``sum_i p_i t_i``, with t_i the steps.
        norms: ``|a_i|_1`` of each client, for another optimiser; then steps, momentum and proximal are not used for it.
        effective_steps: another tau.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        CheckpointError: if a client cannot be read.
        MethodError: if a number is missing or out of range.
        PlanError: if tensors are missing or differ in shape.

    Source: Wang et al., Tackling the objective inconsistency problem in heterogeneous federated optimization, NeurIPS
    2020, arXiv:2007.07481; checked against its code.
    """
    named = clients_of(clients)
    names = list(named)
    shares = fedavg_shares(known_of(examples, names, "examples"))
    taken = known_of(steps, names, "steps")
    lengths = [normalizing_steps(count, momentum=momentum, proximal=proximal) for count in taken]
    if norms is not None:
        lengths = known_of(norms, names, "norms")
    elif proximal and effective_steps is None:
        effective_steps = math.fsum(share * count for share, count in zip(shares, taken, strict=True))
    factors = fednova_factors(shares, lengths, effective_steps=effective_steps)
    return moved(base, list(named.values()), rated(factors, server_rate), updates=updates, **settings)


def known_probability(
    clients: Clients,
    base: Source,
    *,
    probability: Known[float] | float,
    population: int | Mapping[str, float],
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> LazyCheckpoint:
    """Weigh each participant by one over the probability that it takes part.

    ``theta + eta sum_participants (p_i / q_i) (theta_i - theta)``, with ``p_i`` the client's share among all clients:
    on average the step of all of them.

    Args:
        clients: those that take part; see :func:`weightsmith.federated.clients.clients_of`.
        base: the global model that they started from.
        probability: probability ``q_i`` of each to take part.
        population: how many clients there are, with equal shares; or the number of examples of every one of them.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        CheckpointError: if a client cannot be read.
        MethodError: if a number is missing or out of range.
        PlanError: if tensors are missing or differ in shape.

    Source: the weighting that the code of FedAU (arXiv:2306.03401) calls known probability.
    """
    named = clients_of(clients)
    names = list(named)
    if isinstance(population, Mapping):
        share = dict(zip(population, fedavg_shares(list(population.values())), strict=True))
        shares = known_of(share, names, "population")
    elif population < len(names):
        raise MethodError(f"{len(names)} clients take part, of a population of {population}")
    else:
        shares = [1.0 / population] * len(names)
    weights = sampling_weights(shares, known_of(probability, names, "probability"))
    return moved(base, list(named.values()), rated(weights, server_rate), updates=updates, **settings)


def fedlaw(
    clients: Clients,
    *,
    weights: Known[float],
    gamma: float = 1.0,
    **settings: Any,
) -> LazyCheckpoint:
    """Average with given weights and shrink the whole: FedLAW's form, without its search.

    ``gamma sum_i lambda_i theta_i``, with ``lambda`` the weights divided by their sum. The paper finds lambda and gamma
    on labelled data of the server; :func:`weightsmith.federated.fedlaw_factors` turns its free numbers into both. gamma
    multiplies biases and the weights of norms too. It does not multiply running statistics of batch norms, which the
    paper's search estimates anew: they are averaged with lambda, and want to be re-estimated (inferred).

    Args:
        clients: see :func:`weightsmith.federated.clients.clients_of`.
        weights: lambda: 0 or above.
        gamma: the factor on everything; mostly below 1.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        CheckpointError: if a client cannot be read.
        MethodError: if a number is missing or out of range.
        PlanError: if tensors are missing or differ in shape.

    Source: Li et al., Revisiting weighted aggregation in federated learning with neural networks, ICML 2023,
    arXiv:2302.10911; checked against its code.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise MethodError(f"gamma is {gamma:g}; it must be above 0, and finite")
    named = clients_of(clients)
    shares = fedavg_shares(known_of(weights, list(named), "weights"))
    models = [as_checkpoint(one) for one in named.values()]
    running = gamma != 1 and any(fnmatchcase(name, pattern) for name in models[0] for pattern in _RUNNING)
    if running:
        # The rule's own parameter: without it the merge's normalize decides, and its weights are gamma's.
        rule = {"scope": {"names": list(_RUNNING)}, "parameters": {"normalize": True}}
        settings = {**settings, "rules": [rule, *settings.get("rules", ())]}
    factors = [gamma * share for share in shares]
    return merge("linear", models, weight=factors, normalize=False, **settings)
