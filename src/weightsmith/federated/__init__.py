"""Federated aggregation: the server's step of a round, from folders of client checkpoints or updates.

>>> import weightsmith as ws
>>> ws.federated.fedavg("round-7", examples={"ward-a": 900, "ward-b": 120})            # doctest: +SKIP
>>> step = ws.federated.fedau("round-7", "global-6", state="server", population=wards)  # doctest: +SKIP
>>> step.save("global-7")                                                              # doctest: +SKIP

Every rule is a small function in :mod:`weightsmith.federated.coefficients`, from what is known of the clients to one
number for each; the aggregation is a lazy checkpoint like any other. Rules that remember something between rounds keep
it in a folder (:mod:`weightsmith.federated.state`), and give a :class:`Round`, whose ``save`` writes model and state.
"""

from __future__ import annotations

from weightsmith.federated.coefficients import (
    fedavg_shares,
    fedlaw_factors,
    fednova_factors,
    normalizing_steps,
    sampling_weights,
)
from weightsmith.federated.personal import partial
from weightsmith.federated.round import Round, fedau, fedstale, fedvarp, mifa
from weightsmith.federated.rules import fedavg, fedlaw, fednova, known_probability

__all__ = [
    "Round",
    "fedau",
    "fedavg",
    "fedavg_shares",
    "fedlaw",
    "fedlaw_factors",
    "fednova",
    "fednova_factors",
    "fedstale",
    "fedvarp",
    "known_probability",
    "mifa",
    "normalizing_steps",
    "partial",
    "sampling_weights",
]
