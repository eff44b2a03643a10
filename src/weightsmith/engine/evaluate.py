"""From an expression to numbers: the block of a computed tensor, and the statistics it rests on."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import reduce
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType, working_dtype
from weightsmith.engine import fuse
from weightsmith.engine.backend import NUMPY, Backend, Values
from weightsmith.engine.expression import Computed, Group, columns, computed_within, is_made
from weightsmith.kernels import philox
from weightsmith.methods.block import Block, Scope, Sweep, WholeBlock

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
        backend: Backend = NUMPY,
    ) -> None:
        """Start with nothing computed.

        Args:
            shared: id of a group -> its statistic.
            on_nonfinite: called with the label of an input and a count where a block of it has values that
                are NaN or infinite.
            backend: whose arrays methods are given.
        """
        self.backend = backend
        self._shared = shared if shared is not None else {}
        self._on_nonfinite = on_nonfinite
        self._counts_blocks = on_nonfinite is not None
        self._statistics: dict[int, Any] = {}
        self._whole: dict[int, Values] = {}
        self._programs: dict[tuple[int, DType], fuse.Fused | None] = {}
        self._lock = threading.RLock()

    def for_sweeps(self, backend: Backend) -> Evaluator:
        """Return an evaluator that knows what this one knows and reports nothing: what is not finite is counted once.

        Args:
            backend: whose arrays methods are given.
        """
        other = copy(self)
        other._counts_blocks = False
        if backend is not self.backend:
            other.backend, other._whole, other._programs, other._on_nonfinite = backend, {}, {}, None
        return other

    def values(self, tensor: Tensor, start: int, stop: int, working: DType | None = None) -> Values:
        """Return elements ``start`` to ``stop`` of a tensor, stored or computed: ``[n]``, unrounded.

        Args:
            tensor: a floating tensor.
            start: flat index of the first element.
            stop: flat index after the last.
            working: float32 or float64; by default the dtype of the tensor's own arithmetic.

        Returns:
            An array of the backend's kind.
        """
        with self.backend.computing():
            return self._values(tensor, start, stop, working)

    def result(
        self, tensor: Tensor, start: int, stop: int, dtype: DType, out: Array | None = None
    ) -> tuple[Array, int]:
        """Return elements of a tensor rounded to a dtype: ``[n]``, and how many of them are NaN or infinite.

        Args:
            tensor: a floating tensor.
            start: flat index of the first element.
            stop: flat index after the last.
            dtype: the floating dtype to round to.
            out: memory that may be used for the result: ``[n]`` of the dtype.
        """
        program = self._program(tensor, dtype) if isinstance(tensor, Computed) else None
        if program is None or not isinstance(tensor, Computed):
            with self.backend.computing():
                return self.backend.store(self._values(tensor, start, stop), dtype, out)
        if out is None:
            out = np.empty(stop - start, dtype)
        inputs = self.inputs(tensor, program, start, stop)
        lost, found = program.compute(inputs, out, start, tensor.group.offset_of(tensor) + start)
        if self._counts_blocks:
            self._report(tensor, found[: len(_weights(tensor))])
        return out, lost

    def inputs(self, tensor: Computed, program: fuse.Fused, start: int, stop: int) -> list[Array]:
        """Read what a program needs of elements ``start`` to ``stop``; valid until this thread reads again."""
        wanted = [(slot, tensor.inputs[slot]) for slot in program.program.inputs]
        # What is computed comes first: it reads into the same buffers.
        found = {
            slot: np.ascontiguousarray(self.values(part, start, stop, tensor.working))
            for slot, part in wanted
            if is_made(part)
        }
        for slot, part in wanted:
            if slot not in found:
                buffer = self.backend.scratch.get(slot, (stop - start) * part.dtype.itemsize)
                found[slot] = part.read_into(start, stop, buffer)
        return [found[slot] for slot, _ in wanted]

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

    def _values(self, tensor: Tensor, start: int, stop: int, working: DType | None = None) -> Values:
        if not isinstance(tensor, Computed):
            return self.backend.load(tensor, start, stop, working or working_dtype([tensor.dtype]))
        found = self._computed(tensor, start, stop)
        if working is None:
            return found
        if tensor.rounds:
            return self.backend.rounded(found, tensor.dtype, working)
        return self.backend.flat(found, working)

    def _computed(self, tensor: Computed, start: int, stop: int) -> Values:
        vector = columns(tensor.shape, tensor.reads)
        if tensor.reads == "tensor":
            return self._whole_of(tensor)[start:stop]
        first = start // vector * vector
        last = min(-(-stop // vector) * vector, tensor.size)
        if self._program(tensor, tensor.working) is not None:
            found, _ = self.result(tensor, first, last, tensor.working)
        else:
            block = self.block(tensor, first, last)
            if self._counts_blocks:
                self._count(tensor, block)
            found = self._call(tensor, self.statistic(tensor), block)
        return found[start - first : stop - first]

    def _program(self, tensor: Computed, dtype: DType) -> fuse.Fused | None:
        if not self.backend.fuses:
            return None
        key = (id(tensor), dtype)
        if key not in self._programs:
            # Made twice where two threads meet here, to the same effect.
            self._programs[key] = fuse.result_program(tensor, self.statistic(tensor), dtype)
        return self._programs[key]

    def _whole_of(self, tensor: Computed) -> Values:
        with self._lock:
            if id(tensor) not in self._whole:
                statistic = self.statistic(tensor)
                # Complete before another thread takes it: that is what leaving the context says.
                with self.backend.computing():
                    block = self.block(tensor, 0, tensor.size)
                    self._count(tensor, block)
                    self._whole[id(tensor)] = self._call(tensor, statistic, block)
            return self._whole[id(tensor)]

    def _call(self, tensor: Computed, statistic: Any, block: Block) -> Values:
        return self.backend.flat(tensor.method.call(block, statistic, tensor.parameters), tensor.working)

    def _count(self, tensor: Computed, block: Block) -> None:
        """Report what is not finite in stored inputs; what is computed was counted where it was."""
        if self._on_nonfinite is None:
            return
        if isinstance(block, WholeBlock):
            counts = [self._nonfinite_in(tensor, part) for part in _weights(tensor)]
        else:
            arrays = list(block.models) if tensor.base is None else [block.base, *block.models]
            stored = [not isinstance(part, Computed) for part in _weights(tensor)]
            found = iter(self.backend.nonfinite([array for array, one in zip(arrays, stored, strict=True) if one]))
            counts = [next(found) if one else 0 for one in stored]
        self._report(tensor, counts)

    def _nonfinite_in(self, tensor: Computed, part: Tensor) -> int:
        """Count what is not finite in a whole input; what is computed was counted where it was."""
        if isinstance(part, Computed):
            return 0
        found = 0
        for start, stop in blocks(part.size, 1, self.backend.block):
            with self.backend.computing():
                found += self.backend.nonfinite([self._stretch(tensor, part, start, stop)])[0]
        return found

    def _report(self, tensor: Computed, counts: Sequence[int]) -> None:
        labels = tensor.labels if tensor.base is None else ("base", *tensor.labels)
        for label, count in zip(labels, counts, strict=True):
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

        def drawn(model: int, start: int = start, stop: int = stop) -> Values:
            return self.backend.uniform(philox.key_of(tensor.seed, tensor.name, tensor.labels[model]), start, stop)

        fishers = [
            None if one is None else self._values(one, start, stop, tensor.working).reshape(shape)
            for one in tensor.fishers
        ]
        base_fisher = fishers.pop(0) if fishers and tensor.base is not None else None
        others: dict[str, Any] = {
            "start": offset + start,
            "role": tensor.form.role,
            "fishers": tuple(fishers),
            "base_fisher": base_fisher,
        }
        if tensor.reads == "tensor":
            return self._whole_block(tensor, drawn, others)

        def stretch(part: Tensor) -> Values:
            return self._stretch(tensor, part, start, stop).reshape(shape)

        base = None if tensor.base is None else stretch(tensor.base)
        models = tuple(stretch(model) for model in tensor.models)
        return Block(base=base, models=models, draw=lambda model: drawn(model).reshape(shape), **others)

    def _whole_block(
        self, tensor: Computed, drawn: Callable[[int, int, int], Values], others: dict[str, Any]
    ) -> WholeBlock:
        from array_api_compat import array_namespace

        def whole(stretch: Callable[[int, int], Values]) -> Values:
            """Join stretches of a tensor; no more of what they are made from is held than one of each."""
            found = self.backend.empty(tensor.size, tensor.working)
            for start, stop in blocks(tensor.size, 1, self.backend.block):
                # A context for each: what is read to is then used again.
                with self.backend.computing():
                    found[start:stop] = stretch(start, stop)
            return found.reshape(tensor.shape)

        def read(model: int) -> Values:
            part = tensor.models[model] if model >= 0 else tensor.base
            assert part is not None
            return whole(lambda start, stop: self._stretch(tensor, part, start, stop))

        def subtract(model: int) -> Values:
            part, base = tensor.models[model], tensor.base
            assert base is not None
            return whole(
                lambda start, stop: self._stretch(tensor, part, start, stop) - self._stretch(tensor, base, start, stop)
            )

        def draw(model: int) -> Values:
            return whole(lambda start, stop: drawn(model, start, stop))

        xp = array_namespace(self.backend.empty(0, tensor.working))
        count, has_base = len(tensor.models), tensor.base is not None
        return WholeBlock(tensor.shape, xp, read, subtract, count, has_base=has_base, draw=draw, **others)

    def _stretch(self, tensor: Computed, part: Tensor, start: int, stop: int) -> Values:
        """Read a stretch of an input as a tensor's method is given it: ``[n]``."""
        values = self._values(part, start, stop, tensor.working)
        return values if tensor.casts is None else self.backend.rounded(values, tensor.casts, tensor.working)


# A stretch of a member of a group: the tensor, start, stop, and the elements of the scope before the tensor.
_Stretch = tuple[Computed, int, int, int]


def run_statistic(evaluator: Evaluator, group: Group, mapper: Mapper = in_turn) -> Any:
    """Drive a statistic's generator over all blocks of a scope, and return what it returns."""
    first = group.members[0]
    backend = evaluator.backend
    evaluator = evaluator.for_sweeps(backend)
    stretches: list[_Stretch] = []
    offset = 0
    for member in group.members:
        vector = columns(member.shape, member.reads)
        stretches += [(member, start, stop, offset) for start, stop in blocks(member.size, vector, backend.sweep)]
        offset += member.size
    alone = first.form if len(group.members) == 1 else None
    weighed = any(one is not None for member in group.members for one in member.fishers)
    scope = Scope(offset, len(first.models), alone, weighed)
    generator = first.method.start_statistic(scope, first.parameters)

    def next_sweep(found: list[Any] | None) -> Sweep:
        with backend.computing():
            return generator.send(found)  # type: ignore[no-any-return]

    try:
        sweep = next_sweep(None)
        while True:
            if sweep.sampled:
                results = _visit_samples(evaluator, group, sweep, mapper)
            else:
                chosen = stretches if sweep.only is None else [stretches[sweep.only]]
                results = mapper(_Visit(evaluator, sweep), chosen)
            if sweep.combine is None:
                sweep = next_sweep(list(results))
            else:
                head = next(results, None)
                sweep = next_sweep([] if head is None else [reduce(sweep.combine, results, head)])
    except StopIteration as end:
        return end.value


class _Visit:
    """What a sweep does with a stretch: by a program where there is one, or as the method is written."""

    def __init__(self, evaluator: Evaluator, sweep: Sweep) -> None:
        self._evaluator = evaluator
        self._function = sweep.function
        self._programs: dict[Any, fuse.Fused | None] = {}

    def __call__(self, stretch: _Stretch) -> Any:
        member, start, stop, before = stretch
        program = self._program(member)
        if program is None:
            with self._evaluator.backend.computing():
                return self._function(self._evaluator.block(member, start, stop, before))
        inputs = self._evaluator.inputs(member, program, start, stop)
        return program.answer(inputs, stop - start, start, before + start)

    def _program(self, member: Computed) -> fuse.Fused | None:
        if not self._evaluator.backend.fuses:
            return None
        key = fuse.signature(member)
        if key not in self._programs:
            self._programs[key] = fuse.request_program(member, self._function)
        return self._programs[key]


# A sample: so many elements in a run, one run for so many elements of the scope, and bounds on the number of runs.
_RUN = 512
_SAMPLE_EVERY = 1 << 17
_LEAST_RUNS, _MOST_RUNS = 32, 4096
_RUNS_AT_A_TIME = 16


def _visit_samples(evaluator: Evaluator, group: Group, sweep: Sweep, mapper: Mapper) -> Iterator[Any]:
    """Visit short stretches from all over a scope, several in one piece of work.

    They are too short to be worth a way to another device; and a sample says only where to look.
    """
    visit = _Visit(evaluator.for_sweeps(NUMPY), sweep)

    def several(runs: list[_Stretch]) -> list[Any]:
        return [visit(run) for run in runs]

    runs = list(_runs(group))
    pieces = [runs[i : i + _RUNS_AT_A_TIME] for i in range(0, len(runs), _RUNS_AT_A_TIME)]
    for results in mapper(several, pieces):
        yield from results


def _runs(group: Group) -> Iterator[_Stretch]:
    """Spread runs over a scope: evenly, but never in step with the rows of a matrix."""
    ends = list(accumulate(member.size for member in group.members))
    size = ends[-1]
    count = min(max(size // _SAMPLE_EVERY, _LEAST_RUNS), _MOST_RUNS)
    for i in range(count):
        position = int((i + i * 0.6180339887498949 % 1.0) * size / count)
        place = bisect_right(ends, position)
        member = group.members[place]
        before = ends[place] - member.size
        vector = columns(member.shape, member.reads)
        start = (position - before) // vector * vector
        stop = min(start + max(_RUN // vector, 1) * vector, member.size)
        yield member, start, stop, before


def _weights(tensor: Computed) -> tuple[Tensor, ...]:
    """Return the tensors whose weights are merged, the base's first."""
    return tensor.models if tensor.base is None else (tensor.base, *tensor.models)


def _block_shape(tensor: Computed, start: int, stop: int) -> tuple[int, ...]:
    if tensor.reads == "elements":
        return (stop - start,)
    if tensor.reads == "tensor":
        return tensor.shape
    vector = columns(tensor.shape, tensor.reads)
    return ((stop - start) // vector, vector)
