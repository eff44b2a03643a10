"""One pass over a base and models: every weight is read once, and all sums are formed while it is in the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.engine.ahead import ReadAhead
from weightsmith.engine.backend import NUMPY
from weightsmith.engine.evaluate import Evaluator, blocks
from weightsmith.engine.expression import Computed, is_made, stored_within
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper
from weightsmith.kernels.convert import widen
from weightsmith.kernels.measure import Layout, Measured, finite, measure, readable, row_hashes
from weightsmith.report.distribution import Entries, counted, sample_places, sampled
from weightsmith.report.rows import LONGEST_ROW, MOST_ROWS, SHORTEST_ROW, DeadRows, RowHashes, find_rows

# Entries that are measured at a time. Sums depend on it in their last digits, so it is part of what a figure is.
BLOCK = 1 << 18
# Tensors of up to so many entries are the work of one thread, so many at a time.
_SMALL, _TOGETHER = 1 << 15, 32
# Bytes that are asked for ahead of the work at a time.
_STEP = 8 << 20
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Subject:
    """A tensor to be measured: of the base and of models, all of one shape.

    Attributes:
        name: its name.
        members: numbers of the models that hold it, in order; the result last. -1 stands for the base.
        tensors: the tensors of the base and of these models; of a tensor that is compared with none, that one alone.
        voters: how many of the models, the first ones, are to be merged.
    """

    name: str
    members: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    voters: int

    @property
    def size(self) -> int:
        """Entries of one of them."""
        return self.tensors[0].size

    @property
    def sides(self) -> tuple[int, ...]:
        """Numbers of the models that the tensors are of, with -1 for the base."""
        return self.members if len(self.tensors) == len(self.members) else (-1, *self.members)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def columns(self) -> int | None:
        """Length of the rows that are looked at, None for none."""
        shape = self.tensors[0].shape
        if len(shape) < 2 or not 0 < shape[0] <= MOST_ROWS:
            return None
        columns = self.size // shape[0]
        return columns if SHORTEST_ROW <= columns <= LONGEST_ROW else None


@dataclass(frozen=True)
class Found:
    """What was found of a tensor.

    Attributes:
        subject: the tensor.
        measured: sums and counts.
        layout: what they are.
        entries: how the entries of the voters' task vectors are distributed; None where there are none.
        rows: of every side that has some, its dead and duplicated rows.
    """

    subject: Subject
    measured: Measured
    layout: Layout
    entries: Entries | None
    rows: Mapping[int, DeadRows]


def subjects(base: Checkpoint, models: Sequence[Checkpoint], result: Checkpoint | None) -> list[Subject]:
    """Return the tensors to be measured: those of the base first, then what only models have.

    Args:
        base: the base.
        models: the models.
        result: the merged result, if there is one.
    """
    others = [*models, *([] if result is None else [result])]
    found = []
    for name, tensor in base.items():
        if not dtypes.is_float(tensor.dtype):
            continue
        own = [k for k, one in enumerate(others) if comparable(tensor, one.get(name))]
        voters = sum(k < len(models) for k in own)
        found.append(Subject(name, tuple(own), (tensor, *(others[k][name] for k in own)), voters))
    for k, one in enumerate(others):
        for name, tensor in one.items():
            if dtypes.is_float(tensor.dtype) and not comparable(tensor, base.get(name)):
                found.append(Subject(name, (k,), (tensor,), 0))
    return found


def comparable(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are of one shape, and both floats."""
    return other is not None and one.shape == other.shape and dtypes.is_float(other.dtype)


def measure_all(
    tensors: Sequence[Subject], mapper: ThreadMapper, listener: ProgressListener, *, exact: bool
) -> Iterator[Found]:
    """Measure tensors, and yield what was found in their order.

    Memory does not grow with models: a few blocks are held, and of each tensor a sample and the hashes of its rows.

    Args:
        tensors: the tensors.
        mapper: what works on blocks.
        listener: told of progress, in bytes read.
        exact: whether the entries are looked at without sampling, which takes three passes more.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """
    shared: dict[int, Any] = {}
    finishing: deque[Future[list[Found]]] = deque()

    def pieces() -> Iterator[_Piece]:
        small: list[_Work] = []
        for subject in tensors:
            work = _Work(subject, Evaluator(shared), exact)
            work.prepare(mapper)
            if subject.size <= _SMALL:
                small.append(work)
            if small and (subject.size > _SMALL or len(small) == _TOGETHER):
                yield _Piece(tuple(small))
                small = []
            if subject.size > _SMALL:
                for start, stop in work.stretches():
                    yield _Piece((work,), (start, stop))
        if small:
            yield _Piece(tuple(small))

    def finished(most: int) -> Iterator[Found]:
        while len(finishing) > most:
            for found in finishing.popleft().result():
                listener.tensor_done(found.subject.name)
                yield found

    with ReadAhead(_ahead(tensors)) as ahead:
        for piece, done in mapper(_visit, pieces()):
            ahead.worked(done.nbytes)
            listener.advance(done.nbytes)
            if isinstance(done, _Part):
                (work,) = piece.works
                work.parts.append(done)
                if len(work.parts) == work.number:
                    finishing.append(mapper.submit(lambda work=work: [work.finish()]))
            else:
                finishing.append(_known(done.findings))
            yield from finished(2 * mapper.threads)
        yield from finished(0)


@dataclass(frozen=True)
class _Part:
    """What was found of a stretch: sums, a sample of the task vectors ``[voters, k]``, and for each side its rows."""

    measured: Measured
    sample: Array | None
    rows: tuple[tuple[Array, Array], ...]
    nbytes: int


@dataclass(frozen=True)
class _Wholes:
    """What was found of small tensors, each at once: to hand one of them from thread to thread costs more than it."""

    findings: list[Found]
    nbytes: int


@dataclass
class _Work:
    """A tensor on its way through the pass."""

    subject: Subject
    evaluator: Evaluator
    exact: bool
    parts: list[_Part] = field(default_factory=list)
    layout: Layout = field(init=False)
    number: int = field(init=False)

    def __post_init__(self) -> None:
        compared = len(self.subject.tensors) - 1
        self.layout = Layout(compared, self.subject.voters)
        self.number = sum(1 for _ in self.stretches())

    def prepare(self, mapper: ThreadMapper) -> None:
        """Compute the statistics that computed tensors rest on."""
        for tensor in self.subject.tensors:
            self.evaluator.prepare(tensor, mapper)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks, which cut no row that is looked at."""
        return blocks(self.subject.size, self.subject.columns or 1, BLOCK)

    def visit(self, start: int, stop: int) -> _Part:
        """Read and measure a block."""
        tensors, columns = self.subject.tensors, self.subject.columns
        arrays = [self._read(slot, tensor, start, stop) for slot, tensor in enumerate(tensors)]
        sample = None
        if self.subject.voters and not self.exact:
            places = sample_places(self.subject.size, start, stop)
            sample = _task_vectors([array[places] for array in arrays[: self.subject.voters + 1]])
        return _Part(
            measure(self.layout, arrays),
            sample,
            () if columns is None else tuple(row_hashes(array, columns) for array in arrays),
            sum((stop - start) * tensor.dtype.itemsize for tensor in tensors),
        )

    def finish(self) -> Found:
        """Put the blocks together."""
        parts, self.parts = self.parts, []
        rows: dict[int, DeadRows] = {}
        if parts and parts[0].rows:
            of_sides = zip(*(part.rows for part in parts), strict=True)
            hashes = [RowHashes(*map(np.concatenate, zip(*own, strict=True))) for own in of_sides]
            rows = find_rows(self.subject.sides, hashes)
        entries = None
        if self.subject.voters and parts:
            if self.exact:
                entries = counted(self._task_vectors, self.subject.voters)
            else:
                samples = [part.sample for part in parts if part.sample is not None]
                entries = sampled(np.concatenate(samples, axis=1), self.subject.size)
        measured = _together(self.layout, [part.measured for part in parts])
        return Found(self.subject, measured, self.layout, entries, rows)

    def _task_vectors(self) -> Iterator[Array]:
        """Yield the task vectors of the voters, a block at a time: ``[voters, k]``."""
        tensors = self.subject.tensors[: self.subject.voters + 1]
        for start, stop in self.stretches():
            yield _task_vectors([self._read(slot, tensor, start, stop) for slot, tensor in enumerate(tensors)])

    def _read(self, slot: int, tensor: Tensor, start: int, stop: int) -> Array:
        """Read a block in its own dtype where the kernel takes that, widened where not; valid until the next read."""
        if not is_made(tensor) and readable(tensor.dtype):
            buffer = NUMPY.scratch.get(("report", slot), (stop - start) * tensor.dtype.itemsize)
            return tensor.read_into(start, stop, buffer)
        working = tensor.working if isinstance(tensor, Computed) else dtypes.working_dtype([tensor.dtype])
        return np.ascontiguousarray(self.evaluator.values(tensor, start, stop, working))


@dataclass(frozen=True)
class _Piece:
    """What one thread does at a time: a stretch of one tensor, or small tensors whole (no stretch)."""

    works: tuple[_Work, ...]
    stretch: tuple[int, int] | None = None


def _visit(piece: _Piece) -> tuple[_Piece, _Part | _Wholes]:
    """Read and measure a piece."""
    if piece.stretch is not None:
        (work,) = piece.works
        return piece, work.visit(*piece.stretch)
    findings, nbytes = [], 0
    for work in piece.works:
        # An empty tensor has no stretches.
        work.parts += [work.visit(*stretch) for stretch in work.stretches()]
        nbytes += work.subject.nbytes
        findings.append(work.finish())
    return piece, _Wholes(findings, nbytes)


def _known(findings: list[Found]) -> Future[list[Found]]:
    """Return what is known already, among what is waited for."""
    future: Future[list[Found]] = Future()
    future.set_result(findings)
    return future


def _task_vectors(arrays: Sequence[Array]) -> Array:
    """Return the task vectors ``[models, k]`` float32 in those entries that are finite in all arrays."""
    working = _FLOAT64 if any(array.dtype == _FLOAT64 for array in arrays) else _FLOAT32
    with np.errstate(all="ignore"):
        base, *models = (widen(array, working) for array in arrays)
        found = np.stack([model - base for model in models]).astype(np.float32, copy=False)
        kept = np.logical_and.reduce([finite(one) for one in (base, *models)])
    return found if kept.all() else found[:, kept]


def _together(layout: Layout, parts: Sequence[Measured]) -> Measured:
    """Add up stretches, in their order."""
    sums, counts = np.zeros(layout.size[0]), np.zeros(layout.size[1], np.int64)
    peaks = np.zeros(layout.models)
    for part in parts:
        sums += part.sums
        counts += part.counts
        np.maximum(peaks, part.peaks, out=peaks)
    return Measured(sums, counts, peaks)


def _ahead(tensors: Sequence[Subject]) -> Iterator[tuple[int, list[tuple[Tensor, int, int]]]]:
    """Yield what is to be read, and how many bytes it is, in the order of the work."""
    for subject in tensors:
        stored = [one for tensor in subject.tensors for one in stored_within(tensor) if one.size == subject.size]
        width = sum(tensor.dtype.itemsize for tensor in subject.tensors)
        for start, stop in blocks(subject.size, 1, max(_STEP // width, 1)):
            yield (stop - start) * width, [(one, start, stop) for one in stored]
