"""From an expression to numbers: the block of a computed tensor, and the statistics it rests on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, Protocol, TypeVar

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.expression import Computed, Group, columns, computed_within
from weightsmith.kernels import philox
from weightsmith.kernels.convert import narrow, widen
from weightsmith.methods.block import Block, Scope, Sweep

# Elements in the blocks of a sweep. Sums of floats depend on it, so it is part of what a result is.
SWEEP = 1 << 17

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Applies a function to items, in order, perhaps on several threads."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """Yield the function's results in the order of the items."""
        ...


def in_turn(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """Apply a function to items one after the other, in the calling thread."""
    return map(function, items)


def blocks(size: int, vector: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` elements into stretches of about ``length`` that never cut a vector.

    Args:
        size: number of elements.
        vector: length of the vectors that stay whole; 1 for none.
        length: elements wanted in a stretch; a longer vector makes a longer stretch.

    Yields:
        Start and stop of each stretch.
    """
    step = max(length // vector, 1) * vector
    for start in range(0, size, step):
        yield start, min(start + step, size)


class Evaluator:
    """Computes blocks of expressions, and remembers the statistics and whole tensors they rest on.

    One evaluator serves one output tensor; statistics that range over more than a tensor are handed from one
    evaluator to the next by ``shared``. Safe to use from several threads.
    """

    def __init__(
        self,
        shared: dict[int, Any] | None = None,
        on_nonfinite: Callable[[str, int], None] | None = None,
    ) -> None:
        """Start with nothing computed.

        Args:
            shared: id of a group -> its statistic.
            on_nonfinite: called with the label of an input and a count where a block of it has values that
                are NaN or infinite.
        """
        self._shared = shared if shared is not None else {}
        self._on_nonfinite = on_nonfinite
        self._statistics: dict[int, Any] = {}
        self._whole: dict[int, Array] = {}
        self._lock = threading.RLock()

    def values(self, tensor: Tensor, start: int, stop: int, working: DType | None = None) -> Array:
        """Return elements ``start`` to ``stop`` of a tensor, stored or computed: ``[n]``, unrounded.

        Args:
            tensor: a floating tensor.
            start: flat index of the first element.
            stop: flat index after the last.
            working: float32 or float64; by default the dtype of the tensor's own arithmetic.
        """
        if isinstance(tensor, Computed):
            found = self._computed(tensor, start, stop)
            if working is None:
                return found
            if tensor.rounds:
                found = widen(narrow(found, tensor.dtype), working)
            return found.astype(working, copy=False)
        if working is None:
            working = np.dtype(np.float64 if tensor.dtype == np.float64 else np.float32)
        wide = getattr(tensor, "read_wide", None)
        if wide is not None:
            found = wide(start, stop)
            return np.asarray(found).astype(working, copy=False)
        return widen(tensor.read(start, stop), working)

    def prepare(self, tensor: Tensor, mapper: Mapper = in_turn) -> None:
        """Compute the statistics of every method within an expression, sweeping the data with ``mapper``."""
        if tensor.size:
            for part in computed_within(tensor):
                self.statistic(part, mapper)

    def statistic(self, tensor: Computed, mapper: Mapper = in_turn) -> Any:
        """Return the statistic of a computed tensor's method over the tensor's group, or None."""
        if tensor.method.statistic is None:
            return None
        alone = len(tensor.group.members) == 1
        known, key = (self._statistics if alone else self._shared), id(tensor.group)
        if key not in known:
            with self._lock:
                if key not in known:
                    known[key] = run_statistic(self, tensor.group, mapper)
        return known[key]

    def _computed(self, tensor: Computed, start: int, stop: int) -> Array:
        vector = columns(tensor.shape, tensor.reads)
        if tensor.reads == "tensor":
            return self._whole_of(tensor)[start:stop]
        first = start // vector * vector
        last = min(-(-stop // vector) * vector, tensor.size)
        statistic = self.statistic(tensor)
        found = self._call(tensor, statistic, self.block(tensor, first, last))
        return found[start - first : stop - first]

    def _whole_of(self, tensor: Computed) -> Array:
        with self._lock:
            if id(tensor) not in self._whole:
                statistic = self.statistic(tensor)
                block = self.block(tensor, 0, tensor.size)
                self._whole[id(tensor)] = self._call(tensor, statistic, block)
            return self._whole[id(tensor)]

    def _call(self, tensor: Computed, statistic: Any, block: Block) -> Array:
        if self._on_nonfinite is not None:
            for part, label, values in zip(tensor.models, tensor.labels, block.models, strict=True):
                self._report(part, label, values)
            if tensor.base is not None:
                self._report(tensor.base, "base", block.base)
        with np.errstate(all="ignore"):
            result = tensor.method.call(block, statistic, tensor.parameters)
        return np.asarray(result).reshape(-1).astype(tensor.working, copy=False)

    def _report(self, part: Tensor, label: str, values: Any) -> None:
        # A sum is the cheapest test: it is finite only if no value is NaN or infinite (or it overflowed).
        with np.errstate(all="ignore"):
            if isinstance(part, Computed) or np.isfinite(values.sum()):
                return
        count = values.size - int(np.count_nonzero(np.isfinite(values)))
        if count and self._on_nonfinite is not None:
            self._on_nonfinite(label, count)

    def block(self, tensor: Computed, start: int, stop: int, offset: int | None = None) -> Block:
        """Read the inputs of a computed tensor: what its method sees of elements ``start`` to ``stop``.

        Args:
            tensor: the computed tensor.
            start: flat index of the first element; at the start of a vector that may not be cut.
            stop: flat index after the last element.
            offset: index of the tensor's first element in the statistic's scope, where it is known.
        """
        shape = _block_shape(tensor, start, stop)
        if offset is None:
            offset = tensor.group.offset_of(tensor)

        def stretch(part: Tensor) -> Array:
            values = self.values(part, start, stop, tensor.working)
            if tensor.casts is not None:
                values = widen(narrow(values, tensor.casts), tensor.working)
            return values.reshape(shape)

        def draw(model: int) -> Array:
            key = philox.key_of(tensor.seed, tensor.name, tensor.labels[model])
            return philox.uniform(key, start, stop).reshape(shape)

        return Block(
            base=None if tensor.base is None else stretch(tensor.base),
            models=tuple(stretch(model) for model in tensor.models),
            start=offset + start,
            draw=draw,
        )


def run_statistic(evaluator: Evaluator, group: Group, mapper: Mapper = in_turn) -> Any:
    """Drive a statistic's generator over all blocks of a scope, and return what it returns."""
    first = group.members[0]
    stretches = []
    offset = 0
    for member in group.members:
        vector = columns(member.shape, member.reads)
        stretches += [(member, start, stop, offset) for start, stop in blocks(member.size, vector, SWEEP)]
        offset += member.size
    scope = Scope(size=offset, models=len(first.models))
    generator = first.method.start_statistic(scope, first.parameters)
    try:
        sweep: Sweep = next(generator)
        while True:
            chosen = stretches if sweep.only is None else [stretches[sweep.only]]
            function = sweep.function

            def visit(stretch: tuple[Computed, int, int, int], function: Callable[[Block], Any] = function) -> Any:
                member, start, stop, before = stretch
                with np.errstate(all="ignore"):
                    return function(evaluator.block(member, start, stop, before))

            results = mapper(visit, chosen)
            if sweep.combine is None:
                sweep = generator.send(list(results))
            else:
                head = next(results, None)
                found = [] if head is None else [reduce(sweep.combine, results, head)]
                sweep = generator.send(found)
    except StopIteration as end:
        return end.value


def _block_shape(tensor: Computed, start: int, stop: int) -> tuple[int, ...]:
    if tensor.reads == "elements":
        return (stop - start,)
    if tensor.reads == "tensor":
        return tensor.shape
    vector = columns(tensor.shape, tensor.reads)
    return ((stop - start) // vector, vector)
