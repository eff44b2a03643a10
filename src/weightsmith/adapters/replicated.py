"""A base whose layers stand several times, as an adapter's ``layer_replication`` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsmith.architecture.config import with_layers
from weightsmith.architecture.stacks import analyse
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.errors import CheckpointError, PlanError, shown

_KEY = "layer_replication"
# More than any model has; an adapter names layers of its own for each.
_MOST_LAYERS = 10_000


def replicated(base: Checkpoint, adapters: Sequence[Checkpoint]) -> Checkpoint:
    """Return the base that adapters were trained on, where they say that its layers stand several times.

    PEFT stacks layers by ranges, ``[[0, 4], [2, 5]]``, that share their weights; each of the new layers has an adapter
    of its own, so that the result has weights of its own in each.

    Args:
        base: the model as it is stored.
        adapters: adapters on it.

    Raises:
        CheckpointError: if a config's ranges are none.
        PlanError: if adapters differ in it, or the base has no such layers.
    """
    given = [adapter.config.get(_KEY) or None for adapter in adapters]
    if not any(given):
        return base
    if any(one != given[0] for one in given):
        names = " and ".join(adapter.name for adapter in adapters)
        raise PlanError(f"{names} differ in {_KEY}: they have no base in common")
    architecture = analyse(base, base.config)
    if len(architecture.main) != 1:
        raise PlanError(f"{adapters[0].name} has {_KEY}, and {base.name} has {len(architecture.main)} stacks of layers")
    (stack,) = architecture.main
    picked = _picked(adapters[0], given[0], len(stack.indices))
    inside = {name for index in stack.indices for name in architecture.members(stack, index).values()}
    tensors = {name: tensor for name, tensor in base.items() if name not in inside}
    for number, rank in enumerate(picked):
        for suffix, name in architecture.members(stack, stack.indices[rank]).items():
            tensors[stack.name(number, suffix)] = base[name]
    config, _ = with_layers(base.config, stack, picked, architecture)
    return Checkpoint(base.name, tensors, Companions(config, base.companions.files), base.identities, base.components)


def _picked(adapter: Checkpoint, ranges: Any, count: int) -> list[int]:
    """Return which layer each of the new ones is."""
    picked: list[int] = []
    for pair in ranges if isinstance(ranges, list) else [None]:
        ends = pair if isinstance(pair, list) and all(type(end) is int for end in pair) else []
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= count or len(picked) > _MOST_LAYERS:
            raise CheckpointError(
                f"{adapter.name}: adapter_config.json gives {_KEY} as {shown(ranges)}; needed are pairs of a first "
                f"layer and one after the last, of {count} layers"
            )
        picked += range(ends[0], ends[1])
    return picked
