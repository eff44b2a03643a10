"""A plan: every tensor of an output, where its bytes go and what they are computed from. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.layout import Layout, Placement
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.backend import BLOCK, SWEEP, block_of
from weightsmith.engine.expression import Computed, computed_within, stored_within
from weightsmith.errors import PlanError
from weightsmith.methods.block import Work
from weightsmith.methods.statistics import MOST_GATHERED

# What the interpreter, the libraries and the plan hold, with what the allocator keeps: measured, with a margin.
RESIDENT = 90_000_000
# Working arrays of a block beside its inputs: delta, magnitude, mask, random numbers, sum and result.
_TEMPORARIES = 8
# Most bytes that whole matrices may take together, unless a person says another number or a single one needs more.
MATRIX_MEMORY = 3_800_000_000


@dataclass(frozen=True)
class Task:
    """One tensor of the output.

    Attributes:
        name: its name in the output.
        dtype: its dtype in the output.
        tensor: what it is: a stored tensor, which is carried, or a computed one.
    """

    name: str
    dtype: DType
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.size

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """All that a run will do.

    Attributes:
        tasks: the output's tensors, in order.
        layout: their places in the output's files.
        identities: the input files.
        sources: id of a stored tensor -> name of the checkpoint it belongs to.
        recipe: the recipe as YAML.
        warnings: what a person should know before running it.
        preparing: what is held before the first tensor is written, in bytes: at the least, and where there is room.
        held: what is held while tensors are written, however many threads there are, in bytes.
    """

    tasks: tuple[Task, ...]
    layout: Layout
    identities: tuple[Identity, ...] = ()
    sources: Mapping[int, str] = field(default_factory=dict)
    recipe: str = ""
    warnings: tuple[str, ...] = ()
    preparing: tuple[int, int] = (0, 0)
    held: int = 0

    def place(self, task: Task) -> Placement:
        """Return where a task's bytes go."""
        return self.layout.placements[task.name]

    @property
    def parameters(self) -> int:
        """Number of elements in the output."""
        return sum(task.size for task in self.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes of all output files of weights."""
        return self.layout.nbytes

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of all input tensors that the output rests on, each counted once."""
        return sum({id(t): t.nbytes for task in self.tasks for t in stored_within(task.tensor)}.values())

    @cached_property
    def methods(self) -> dict[str, int]:
        """Method name -> number of tensors it is applied to; ``carried`` counts those that are copied."""
        return dict(Counter(name for task in self.tasks for name in _methods(task.tensor)))

    def peak_memory(self, threads: int, memory: int | None = None) -> int:
        """Estimate the resident memory of a run with so many threads, in bytes.

        Args:
            threads: how many threads it uses.
            memory: most bytes that it is to hold, if a person says so: fewer matrices are then worked on at a time.
        """
        shared, of_a_thread, of_a_matrix = self._memory
        matrices = max(of_a_matrix, min(threads * of_a_matrix, self.room_for_matrices(memory)))
        least, most = self.preparing
        before = most if memory is None else max(least, min(most, memory - RESIDENT))
        return max(shared + max(threads * of_a_thread, matrices), RESIDENT + before)

    def room_for_matrices(self, memory: int | None = None) -> int:
        """Return how many bytes matrices may take that are worked on at the same time."""
        return MATRIX_MEMORY if memory is None else max(memory - self._memory[0], 0)

    @cached_property
    def work(self) -> Work:
        """What the linear algebra of the methods costs in all, and the most that is held for one matrix."""
        done = [part.work for task in self.tasks for part in computed_within(task.tensor) if part.work]
        return Work(
            sum(work.operations for work in done),
            max((work.elements for work in done), default=0),
            sum(work.decompositions for work in done),
        )

    @cached_property
    def matrices(self) -> tuple[Task, ...]:
        """The tensors that are taken apart whole, the one that takes the most memory first."""
        found = [task for task in self.tasks if any(part.work for part in computed_within(task.tensor))]
        return tuple(sorted(found, key=matrix_memory, reverse=True))

    def matrices_at_a_time(self, threads: int, memory: int | None = None) -> int:
        """Return how many matrices of the largest kind are worked on at a time.

        Args:
            threads: how many threads there are.
            memory: most bytes that the run is to hold, if a person says so.
        """
        largest = self._memory[2]
        return max(min(threads, self.room_for_matrices(memory) // largest), 1) if largest else threads

    @cached_property
    def _memory(self) -> tuple[int, int, int]:
        """Bytes held whatever the number of threads, by each of them, and by one that works on a matrix."""
        selected = max((_statistic_memory(task) for task in self.tasks), default=0)
        matrices = [matrix_memory(task) for task in self.tasks]
        others = (_task_memory(task) for task, matrix in zip(self.tasks, matrices, strict=True) if not matrix)
        return RESIDENT + selected + self.held, max(others, default=0), max(matrices, default=0)

    def threads_within(self, memory: int, threads: int) -> int:
        """Return how many threads, at most so many, a run may use to stay within a number of bytes.

        Raises:
            PlanError: if one thread needs more; the message names the largest tensor and both numbers.
        """
        for count in range(threads, 0, -1):
            if self.peak_memory(count, memory) <= memory:
                return count
        needed = max(self.held, self.preparing[0])
        if needed and needed + RESIDENT > memory:
            raise PlanError(
                f"rows of {(needed + RESIDENT) / 1e6:,.0f} MB are held together, and --memory allows "
                f"{memory / 1e6:,.0f} MB: allow more"
            )
        largest = max(self.tasks, key=lambda task: matrix_memory(task) or _task_memory(task))
        raise PlanError(
            f"{largest.name} needs about {self.peak_memory(1) / 1e6:,.0f} MB of memory in one thread, and "
            f"--memory allows {memory / 1e6:,.0f} MB: allow more, or leave the tensor out"
        )

    def to_json(self, threads: int, *, memory: int | None = None, tensors: bool = True) -> dict[str, Any]:
        """Return the plan as JSON values.

        Args:
            threads: threads to estimate the memory for.
            memory: most bytes that the run is to hold, if a person says so.
            tensors: whether to list the tensors, in the order of the output.
        """
        listed = {"tensors": [self._task_json(task) for task in self.tasks]} if tensors else {}
        return {
            **listed,
            "shards": [
                {"file": shard.path, "nbytes": shard.nbytes, "tensors": len(shard.tensors)}
                for shard in self.layout.shards
            ],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory(threads, memory),
            "parameters": self.parameters,
            "methods": self.methods,
            "matrix_operations": self.work.operations,
            "decompositions": self.work.decompositions,
            "matrices": len(self.matrices),
            "matrices_at_a_time": self.matrices_at_a_time(threads, memory) if self.matrices else 0,
            "largest_matrix": self._largest_json() if self.matrices else None,
            "warnings": list(self.warnings),
        }

    def _largest_json(self) -> dict[str, Any]:
        largest = self.matrices[0]
        return {"name": largest.name, "shape": list(largest.shape), "memory": matrix_memory(largest)}

    def _task_json(self, task: Task) -> dict[str, Any]:
        place = self.place(task)
        computed = task.tensor if isinstance(task.tensor, Computed) else None
        return {
            "name": task.name,
            "shape": list(task.shape),
            "dtype": dtypes.name_of(task.dtype),
            "shard": self.layout.shards[place.shard].path,
            "offset": place.offset,
            "nbytes": place.nbytes,
            "method": computed.method.name if computed else None,
            "inputs": [
                {"model": self.sources.get(id(tensor), ""), "tensor": tensor.name}
                for tensor in stored_within(task.tensor)
            ],
            "parameters": _json(computed.parameters) if computed else {},
        }


def _methods(tensor: Tensor) -> list[str]:
    return [part.method.name for part in computed_within(tensor)] or ["carried"]


def _statistic_memory(task: Task) -> int:
    """Estimate the bytes that a selection holds beside its blocks: what it gathers, and that in one piece."""
    sizes = [
        part.group.size * part.working.itemsize * len(part.models)
        for part in computed_within(task.tensor)
        if part.method.selects
    ]
    return 2 * min(max(sizes, default=0), MOST_GATHERED)


def _task_memory(task: Task) -> int:
    """Estimate the bytes that one thread holds while it works on a task."""
    held = sum(part.held for part in stored_within(task.tensor))
    block = block_of(most_inputs(task))
    for part in computed_within(task.tensor):
        # What is summed in a sweep must not depend on how much is read at a time: its blocks keep their length.
        wanted = max(BLOCK, SWEEP) if part.method.statistic is not None else block
        elements = max(min(part.size, wanted), part.columns)
        held += elements * part.working.itemsize * (len(part.inputs) + _TEMPORARIES)
    return held or min(task.nbytes, BLOCK * 8)


def most_inputs(task: Task) -> int:
    """Return the most tensors that are read for a block of any part of a task."""
    return max((len(part.inputs) for part in computed_within(task.tensor)), default=1)


def matrix_memory(task: Task) -> int:
    """Estimate the bytes that a task holds that works on whole matrices; 0 for any other."""
    held = sum(part.held for part in stored_within(task.tensor) if part.whole)
    for part in computed_within(task.tensor):
        if part.reads == "tensor":
            # In the end base, change and result; or of a method that says nothing, what others' blocks take.
            inputs = len(part.inputs) + _TEMPORARIES
            elements = max(part.work.elements, 3 * part.size) if part.work else inputs * part.size
            held += elements * part.working.itemsize
        elif held:
            held += min(part.size, BLOCK) * part.working.itemsize * (len(part.inputs) + _TEMPORARIES)
    return held


def _json(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
