"""What a merge must leave behind so that it can be gone on with when further models arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weightsmith.engine.evaluate import Evaluator, Mapper
from weightsmith.engine.expression import Computed
from weightsmith.engine.plan import Task


def continuing(tasks: Sequence[Task]) -> list[Computed]:
    """Return the tensors of a merge whose method can be gone on with; none where several methods are at work."""
    computed = [task.tensor for task in tasks if isinstance(task.tensor, Computed)]
    names = {tensor.method.name for tensor in computed}
    return [] if len(names) != 1 or computed[0].method.continues is None else computed


def names(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the parameters by which a merge's result takes part in the next."""
    found = continuing(tasks)
    return found[0].method.continues.parameters if found and found[0].method.continues else ()


def find(tasks: Sequence[Task], evaluator: Evaluator, mapper: Mapper) -> Mapping[str, float] | None:
    """Return the values of those parameters, or None where tensors differ in them: one merge, one state.

    Args:
        tasks: the tensors of the merge.
        evaluator: knows the statistics that were taken; one that is missing is taken.
        mapper: works on blocks.
    """
    first: Mapping[str, float] | None = None
    for state in _states(continuing(tasks), evaluator, mapper):
        if state is None or (first is not None and state != first):
            return None
        first = state
    return first


def _states(tensors: Sequence[Computed], evaluator: Evaluator, mapper: Mapper) -> Iterator[Mapping[str, float] | None]:
    known: set[tuple[int, int]] = set()
    for tensor in tensors:
        key = id(tensor.group), id(tensor.parameters)
        if key in known:
            continue
        known.add(key)
        continues = tensor.method.continues
        statistic: Any = None
        if tensor.method.statistic is not None:
            if len(tensor.group.members) < len(tensors):
                # One of several scopes: their states differ.
                yield None
                return
            statistic = evaluator.statistic(tensor, mapper)
        yield continues.state(statistic, tensor.parameters, len(tensor.models)) if continues else None
