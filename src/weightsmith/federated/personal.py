"""Partial personalisation: some tensors are averaged, the others stay each client's own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.api import merge
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.errors import MethodError
from weightsmith.federated.clients import Clients, Known, clients_of, known_of
from weightsmith.federated.coefficients import fedavg_shares
from weightsmith.plan.merged import LazyCheckpoint


def partial(
    clients: Clients,
    personal: str | Sequence[str],
    *,
    examples: Known[float] | None = None,
    mix: float = 0.0,
    shared: Source | None = None,
    **settings: Any,
) -> dict[str, LazyCheckpoint]:
    """Average what clients share, and leave each what is personal: N models in, N models out.

    ``u = sum_i p_i u_i`` for the shared tensors, the same in every output; ``v_i`` for the personal ones. This is the
    server's step of FedAlt and FedSim, which differ in the clients' training alone, and of FedPerfix, whose mask is
    self-attention and the head (its plugin is not built: inferred from the abstract). Integer tensors go with their
    side of the mask; the shared ones are the first client's. Personal tensors may differ in shape between clients.

    Saving all N outputs reads the shared tensors of all clients N times. For many clients save the average once, with
    :func:`weightsmith.federated.fedavg` of what they share, and give it as ``shared``: then each output reads two
    models.

    Args:
        clients: see :func:`weightsmith.federated.clients.clients_of`.
        personal: patterns of whole names of personal tensors, with ``*`` and ``?``: ``lm_head.*``, ``*.self_attn.*``.
        examples: how many examples each client has; equally many by default.
        mix: share of the average in personal tensors too, between 0 and 1; they must then have one shape (inferred).
        shared: the average of the shared tensors, where it is computed already.
        **settings: further arguments of :func:`weightsmith.merge`.

    Returns:
        Name of a client -> its next model, lazily, with the client's own config and tokenizer.

    Raises:
        CheckpointError: if a client cannot be read.
        MethodError: if a pattern is no tensor's, or a number is missing or out of range.
        PlanError: if shared tensors are missing or differ in shape.

    Sources: Pillutla et al., Federated learning with partial model personalization (FedAlt, FedSim), ICML 2022,
    arXiv:2204.03809; Sun et al., FedPerfix, ICCV 2023, arXiv:2308.09160.
    """
    if not 0 <= mix <= 1:
        raise MethodError(f"mix is {mix:g}; it must be between 0 and 1")
    patterns = [personal] if isinstance(personal, str) else list(personal)
    if not patterns:
        raise MethodError("personal has no pattern; give one of the names of tensors that stay with their clients")
    names = list(named := clients_of(clients))
    shares = fedavg_shares(known_of(examples, names, "examples"))
    models = {name: as_checkpoint(one) for name, one in named.items()}
    for name, model in models.items():
        _check(patterns, name, model)
    if shared is not None:
        if mix:
            raise MethodError("mix needs the personal tensors of all clients; leave out shared, or mix")
        average = as_checkpoint(shared)
        return {name: _assembled(average, model, patterns, settings) for name, model in models.items()}
    found = {}
    for own, model in models.items():
        rule: dict[str, Any] = {"scope": {"names": patterns}}
        if mix:
            mixed = [mix * p + (1.0 - mix) * (name == own) for name, p in zip(names, shares, strict=True)]
            rule |= {"models": list(models.values()), "parameters": {"weight": mixed}}
        else:
            rule |= {"merge_method": "passthrough", "models": [model]}
        rules = [rule, *settings.get("rules", ())]
        # The base has no part in a mean: it gives its config and tokenizer.
        found[own] = merge("linear", list(models.values()), base=model, weight=shares, **{**settings, "rules": rules})
    return found


def _assembled(
    average: Checkpoint, client: Checkpoint, patterns: Sequence[str], settings: dict[str, Any]
) -> LazyCheckpoint:
    """Return a client's next model from an average that is there already."""
    rules = [
        {"scope": {"names": list(patterns)}, "merge_method": "passthrough", "models": [client]},
        {"scope": {"names": "*"}, "merge_method": "passthrough", "models": [average]},
    ]
    return merge("linear", [average, client], base=client, weight=1.0, **{**settings, "rules": rules})


def _check(patterns: Sequence[str], name: str, model: Checkpoint) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(tensor, pattern) for tensor in model):
            example = next(iter(model), "none")
            raise MethodError(
                f"client {name} has no tensor {pattern!r}; its tensors are named like {example!r}: a pattern is of the "
                "whole name, with * and ?"
            )
