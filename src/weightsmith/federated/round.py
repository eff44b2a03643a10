"""Rules that remember: a round is a lazy model, and what the server remembers after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.api import save
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.checkpoint.staging import check_target, resolve_target
from weightsmith.engine.executor import Summary
from weightsmith.errors import MethodError, RecipeError, did_you_mean
from weightsmith.federated.clients import Clients, Known, Updates, change_of, clients_of, known_of, moved
from weightsmith.federated.coefficients import fedavg_shares, fedstale_factors, rated, sampling_weights
from weightsmith.federated.state import Client, State, open_state, replacing, token_of
from weightsmith.plan.merged import LazyCheckpoint

# How a server waits: rounds of absence after which FedAU records an interval (the paper's, from memory).
CUTOFF = 50


class Round:
    """The server's step of one round, not taken yet.

    Attributes:
        model: the next global model, lazily; a checkpoint like any other.
        factors: name of a participant -> the factor on its update.
        stored: name of a client -> the factor on its stored update, where there is one.
        number: which round it is, from 1.
    """

    def __init__(
        self,
        model: LazyCheckpoint,
        factors: Mapping[str, float],
        stored: Mapping[str, float],
        state: State,
        successor: State,
        changes: Mapping[str, Source],
    ) -> None:
        self.model = model
        self.factors = dict(factors)
        self.stored = dict(stored)
        self.number = successor.round
        self._state = state
        self._successor = successor
        self._changes = dict(changes)

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """Write the model, then let the server's state step on.

        New updates are written first, beside the old ones; then the model; with its publication the round has happened,
        and the state follows. Killed anywhere, state and model belong together: before that moment the same call goes
        on from where it was, after it the state has stepped on when it is next opened.

        Args:
            target: see :meth:`weightsmith.plan.output.Output.save`.
            **options: as there.

        Raises:
            OutputError: if the state has moved on since the round was prepared, another process is at it, or something
                cannot be written.
        """
        check_target(resolve_target(Path(target)), overwrite=bool(options.get("overwrite")))
        token = token_of(self.model.to_yaml(), self.model.identities)
        with replacing(self._state, self._successor, resolve_target(Path(target)), token):
            for name, change in self._changes.items():
                path = self._state.path_of(str(self._successor.clients[name].update))
                # What a run that was killed left complete is written again: it may be of other clients.
                save(as_checkpoint(change), path, threads=options.get("threads"), overwrite=True)
            return self.model.save(target, **options)

    def __repr__(self) -> str:
        return f"Round({self.number} of {self._state.rule}, {len(self.factors)} of {len(self._state.clients)} clients)"


def fedau(
    clients: Clients,
    base: Source,
    *,
    state: str | os.PathLike[str],
    population: Sequence[str] | None = None,
    cutoff: int | None = CUTOFF,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> Round:
    """Weigh each participant by the mean interval between its past participations: FedAU.

    ``theta + eta / N sum_participants w_n (theta_n - theta)``, N the number of all clients and ``w_n`` the mean of the
    lengths, in rounds, of client n's recorded intervals; 1 before there is any. The interval that ends in this round
    counts from the next one on. If all clients always take part it is FedAvg with equal shares. What is remembered is
    two numbers and a counter per client.

    Args:
        clients: those that take part, by name (a folder or a mapping); none is allowed, and leaves the model as it is.
        base: the global model that they started from.
        state: the folder in which the server remembers; made by the first round.
        population: the names of all clients; needed for the first round.
        cutoff: K: an absence of so many rounds is recorded as an interval of that length; None for never, which is
            unbiased but noisy. The default is the paper's, from memory.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        CheckpointError: if a client or the state cannot be read.
        MethodError: if a number is out of range.
        RecipeError: if a client is not of the population, or the state is another rule's.
        PlanError: if tensors are missing or differ in shape.

    Source: Wang and Ji, A lightweight method for tackling unknown participation statistics in federated averaging, ICLR
    2024, arXiv:2306.03401; checked against its code.
    """
    if cutoff is not None and (isinstance(cutoff, bool) or cutoff < 1):
        raise MethodError(f"cutoff is {cutoff}; it must be at least 1 round, or None")
    known = open_state(state, "fedau", population)
    named = _participants(clients, known)
    count = len(known.clients)
    weights = [known.clients[name].participation.weight / count for name in named]
    factors = dict(zip(named, rated(weights, server_rate), strict=True))
    model = moved(base, list(named.values()), list(factors.values()), updates=updates, **settings)
    successor = known.after(
        {
            name: Client(client.participation.after(present=name in named, cutoff=cutoff))
            for name, client in known.clients.items()
        }
    )
    return Round(model, factors, {}, known, successor, {})


def fedstale(
    clients: Clients,
    base: Source,
    *,
    state: str | os.PathLike[str],
    beta: float,
    population: Sequence[str] | None = None,
    examples: Mapping[str, float] | None = None,
    probability: Known[float] | float | None = None,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> Round:
    """Correct the participants' updates by every client's last one, as far as beta says: FedStale.

    ``theta + eta (sum_active w_i (D_i - beta h_i) + beta sum_all p_i h_i)`` with ``D_i`` the new updates, ``h_i`` the
    stored ones (0 before the first), ``p_i`` shares of the data among all clients and ``w_i = p_i / q_i``. beta 0 uses
    the new updates alone (with all clients present, FedAvg); beta 1 is FedVARP. A lower beta is for participation that
    is very unequal, or data nearly alike. One update per client that ever took part is kept, in float32.

    Args:
        clients: those that take part, by name (a folder or a mapping); none is allowed.
        base: the global model that they started from.
        state: the folder in which the server remembers; made by the first round.
        beta: between 0 and 1.
        population: the names of all clients; needed for the first round, unless examples gives them.
        examples: how many examples each client of the population has; equally many by default.
        probability: probability ``q_i`` of each participant to take part; by default the share of the population that
            does take part in this round.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        CheckpointError: if a client or the state cannot be read.
        MethodError: if a number is missing or out of range.
        RecipeError: if a client is not of the population, or the state is another rule's.
        PlanError: if tensors are missing or differ in shape.

    Source: Rodio and Neglia, FedStale, 2024, arXiv:2405.04171; the history term and the weights checked against its
    code, the place of beta from the paper.
    """
    if population is None and examples is not None:
        population = list(examples)
    known = open_state(state, "fedstale", population)
    return _with_history(known, clients, base, beta, examples, probability, updates, server_rate, settings)


def fedvarp(
    clients: Clients,
    base: Source,
    *,
    state: str | os.PathLike[str],
    population: Sequence[str] | None = None,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> Round:
    """Reduce the variance of who takes part by every client's last update: FedVARP.

    ``theta + eta (mean_active (D_i - h_i) + mean_all h_i)``: FedStale with beta 1 and equal shares.

    Args:
        clients: see :func:`fedau`, as for all arguments.
        base: the global model that they started from.
        state: the folder in which the server remembers.
        population: the names of all clients.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        WeightsmithError: as :func:`fedstale`.

    Source: Jhunjhunwala et al., FedVARP, UAI 2022, arXiv:2207.14130; checked against the code of FedAU.
    """
    known = open_state(state, "fedvarp", population)
    return _with_history(known, clients, base, 1.0, None, None, updates, server_rate, settings)


def mifa(
    clients: Clients,
    base: Source,
    *,
    state: str | os.PathLike[str],
    population: Sequence[str] | None = None,
    updates: Updates = "models",
    server_rate: float = 1.0,
    **settings: Any,
) -> Round:
    """Use every client's latest update, however old: MIFA.

    ``theta + eta mean_all h_i``, with ``h_i`` the new update of those that take part and the stored one of the others,
    0 before the first. The paper's first round has all clients.

    Args:
        clients: see :func:`fedau`, as for all arguments.
        base: the global model that they started from.
        state: the folder in which the server remembers.
        population: the names of all clients.
        updates: whether clients are ``models`` or ``deltas``.
        server_rate: eta.
        **settings: further arguments of :func:`weightsmith.merge`.

    Raises:
        WeightsmithError: as :func:`fedstale`.

    Source: Gu et al., Fast federated learning in the presence of arbitrary device unavailability, NeurIPS 2021,
    arXiv:2106.04159; checked against the code of FedAU.
    """
    known = open_state(state, "mifa", population)
    # A probability of 1: the new update takes the place of the stored one, which leaves with the same share.
    return _with_history(known, clients, base, 1.0, None, 1.0, updates, server_rate, settings)


def _with_history(
    known: State,
    clients: Clients,
    base: Source,
    beta: float,
    examples: Mapping[str, float] | None,
    probability: Known[float] | float | None,
    updates: Updates,
    server_rate: float,
    settings: Mapping[str, Any],
) -> Round:
    """Return a round of a rule that keeps every client's last update; see :func:`fedstale`."""
    named = _participants(clients, known)
    everyone = list(known.clients)
    share = dict(zip(everyone, fedavg_shares(known_of(examples, everyone, "examples")), strict=True))
    chances = known_of(probability, list(named), "probability", default=len(named) / len(everyone))
    new = sampling_weights([share[name] for name in named], chances) if named else []
    weight = dict(zip(named, new, strict=True))
    on_stored = rated(
        fedstale_factors(list(share.values()), [weight.get(name) for name in everyone], beta), server_rate
    )
    stored = {
        name: factor
        for name, factor in zip(everyone, on_stored, strict=True)
        if factor and known.clients[name].update is not None
    }
    factors = dict(zip(named, rated(new, server_rate), strict=True))
    start = as_checkpoint(base)
    history = {known.path_of(str(known.clients[name].update)): factor for name, factor in stored.items()}
    model = moved(start, list(named.values()), list(factors.values()), updates=updates, stored=history, **settings)
    kept = "float64" if any(str(tensor.dtype) == "float64" for tensor in start.values()) else "float32"
    successor = known.after(
        {
            name: Client(client.participation, known.file_of(place) if name in named else client.update)
            for place, (name, client) in enumerate(known.clients.items())
        }
    )
    changes = {name: change_of(start, source, updates, kept) for name, source in named.items()}
    return Round(model, factors, stored, known, successor, changes)


def _participants(clients: Clients, known: State) -> dict[str, Source]:
    """Return those that take part, all of whom must be of the population."""
    if not isinstance(clients, Mapping | str | os.PathLike):
        raise RecipeError("the server remembers clients by name: give a folder of clients, or a mapping by name")
    named = clients_of(clients)
    for name in named:
        if name not in known.clients:
            raise RecipeError(
                f"client {name!r} is not of the population{did_you_mean(name, known.clients)}; it was given when the "
                f"state in {known.folder} was begun"
            )
    return named
