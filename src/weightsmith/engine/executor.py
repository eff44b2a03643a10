"""Carries a plan out on a pool of threads: every block is written at its final place, in any order."""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.manifest import Digest, hash_part, join_parts
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.engine import state
from weightsmith.engine.ahead import ReadAhead, input_width, inputs_of
from weightsmith.engine.backend import NUMPY, Backend, block_of
from weightsmith.engine.evaluate import Evaluator, Mapper, blocks, in_turn, run_statistic
from weightsmith.engine.expression import Computed, carried, computed_within, stored_within
from weightsmith.engine.journal import Journal
from weightsmith.engine.plan import Plan, Task, matrix_memory, most_inputs
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.shards import Nowhere, Shards, Sink, complete
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import Interrupted, OutputError
from weightsmith.kernels.convert import largest_finite

# A tensor up to this size is the work of one thread; a larger one is shared by all.
_SMALL = 1 << 20
# One up to this size is not handed to another thread: that costs more than it takes, which is mostly the interpreter's
# work, and threads wait for each other there.
_TINY = 1 << 13
# Seconds between two syncs of finished tensors to disk and journal.
_JOURNAL_EVERY = 5.0


OnNonfinite = Literal["error", "warn", "ignore"]
# Where NaN and infinity were met, if not in an input.
RESULT = "result"


@dataclass(frozen=True)
class NonFinite:
    """Values that are NaN or infinite.

    Attributes:
        tensor: name of the tensor in the output.
        where: ``result``, or the model whose tensor holds them.
        count: how many there are.
    """

    tensor: str
    where: str
    count: int


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        target: the folder or file that was made.
        tensors: tensors in it.
        resumed: how many of them an earlier, unfinished run had made.
        nbytes: bytes of its weights.
        seconds: wall time.
        nonfinite: where NaN and infinity were met.
        warnings: what a person should know: what the plan said, and what came up as files were written.
    """

    target: Path
    tensors: int
    resumed: int
    nbytes: int
    seconds: float
    nonfinite: tuple[NonFinite, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """A tensor that is written.

    Attributes:
        digest: the hash of its bytes.
        nonfinite: where in it NaN and infinity were met -> how many.
    """

    digest: Digest
    nonfinite: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return what a journal holds of it."""
        return {"xxh3": str(self.digest), "nonfinite": dict(self.nonfinite)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Done:
        """Read what :meth:`to_json` gave."""
        return cls(Digest.parse(entry["xxh3"]), entry["nonfinite"])


@dataclass(frozen=True)
class Outcome:
    """What is known of an output that is written.

    Attributes:
        done: what is known of every tensor, by name.
        state: the parameters by which the output takes part in a merge that goes on with it, or None.
    """

    done: Mapping[str, Done]
    state: Mapping[str, float] | None


def execute(
    plan: Plan,
    folder: Path,
    journal: Journal,
    *,
    threads: int,
    listener: ProgressListener | None = None,
    backend: Backend = NUMPY,
    on_nonfinite: OnNonfinite = "error",
    memory: int | None = None,
) -> Outcome:
    """Write the weights of a plan into a folder.

    Args:
        plan: the plan.
        folder: the staging folder; files that an earlier run began are continued.
        journal: the run's journal; tensors it holds are not computed again.
        threads: how many threads to use.
        listener: told of progress.
        backend: whose arrays are computed on.
        on_nonfinite: what to do about results that are NaN or infinite where the inputs are not: ``error`` to
            stop, ``warn`` and ``ignore`` to go on.
        memory: most bytes to hold; fewer matrices are worked on at a time where that takes it.

    Returns:
        What is known of the output.

    Raises:
        Interrupted: on Ctrl-C; finished tensors are in the journal.
        OutputError: if the disk is full or a file cannot be written, or a result is not finite.
        CheckpointError: if an input cannot be read.
    """

    def record(done: Mapping[str, Done]) -> None:
        journal.record({name: entry.to_json() for name, entry in done.items()})

    sink = Shards(plan.layout, folder)
    run = _Run(plan, sink, record, listener or Silent(), backend, on_nonfinite, memory=memory)
    try:
        # A file that is not as it was left (a crash can lose it) holds nothing, whatever the journal says.
        whole = complete(plan.layout, folder)
        journal.forget(task.name for task in plan.tasks if not whole[plan.place(task).shard])
        finished = {
            task.name: Done.from_json(journal.finished[task.name])
            for task in plan.tasks
            if task.name in journal.finished
        }
        run.check_finite(finished)
        return Outcome(finished | run.run(finished, threads), run.state)
    except OSError as error:
        raise OutputError(_os_error_text(error, folder)) from error


def recompute(
    plan: Plan,
    steps: Mapping[str, int],
    *,
    threads: int,
    listener: ProgressListener | None = None,
    backend: Backend = NUMPY,
) -> dict[str, Done]:
    """Compute the weights of a plan and write nothing.

    Args:
        plan: the plan.
        steps: name -> bytes to hash at a time.
        threads: how many threads to use.
        listener: told of progress.
        backend: whose arrays are computed on.

    Returns:
        What is known of every tensor, by name.

    Raises:
        Interrupted: on Ctrl-C.
        CheckpointError: if an input cannot be read.
    """
    run = _Run(plan, Nowhere(), lambda done: None, listener or Silent(), backend, "ignore", steps)
    return run.run({}, threads)


def nonfinite_of(done: Mapping[str, Done]) -> tuple[NonFinite, ...]:
    """Return where NaN and infinity were met, in the order of the tensors."""
    return tuple(
        NonFinite(name, where, count)
        for name, entry in done.items()
        for where, count in sorted(entry.nonfinite.items())
    )


def check_space(plan: Plan, folder: Path) -> None:
    """Check that the disk has room for what a plan has still to write.

    Raises:
        OutputError: if it has not; the message gives both numbers.
    """
    present = sum(_allocated(folder / shard.path) for shard in plan.layout.shards)
    needed = plan.bytes_written - present
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise OutputError(
            f"the disk of {folder.parent.parent} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are "
            "needed; free some space or choose another target"
        )


class _Run:
    """The state of one execution: finished tensors, and what failed."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        record: Callable[[Mapping[str, Done]], None],
        listener: ProgressListener,
        backend: Backend,
        on_nonfinite: OnNonfinite,
        steps: Mapping[str, int] | None = None,
        memory: int | None = None,
    ) -> None:
        self.plan = plan
        self.room = plan.room_for_matrices(memory)
        self.sink = sink
        self.record = record
        self.listener = listener
        self.backend = backend
        self.on_nonfinite = on_nonfinite
        self.steps = steps or {}
        self.stopping = threading.Event()
        self.shared: dict[int, Any] = {}
        self.state: Mapping[str, float] | None = None
        self._done: dict[str, Done] = {}
        self._unrecorded: list[Task] = []
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def check_finite(self, finished: Mapping[str, Done]) -> None:
        """Refuse finished tensors as they would be refused now: the run that made them may have been asked for less.

        Raises:
            OutputError: if there are results that are NaN or infinite where the inputs are not.
        """
        for task in self.plan.tasks:
            if task.name in finished:
                self._check_finite(task, finished[task.name].nonfinite)

    def run(self, finished: Mapping[str, Done], threads: int) -> dict[str, Done]:
        """Do all tasks that are not finished, and return what is known of them, in the order of the plan."""
        tasks = [task for task in self.plan.tasks if task.name not in finished]
        before = sum(task.nbytes for task in self.plan.tasks) - sum(task.nbytes for task in tasks)
        self.listener.start(before + sum(task.nbytes for task in tasks), len(self.plan.tasks), before)
        in_order = sorted(tasks, key=_place_in_input)
        try:
            mapper = ThreadMapper(threads, matrices=_takes_matrices(tasks))
            with self.sink, self._recording(), ReadAhead(inputs_of(in_order)) as self._ahead, mapper:
                try:
                    self._work(in_order, mapper)
                    if self._failure is None:
                        self.state = state.find(self.plan.tasks, self._evaluator(), mapper)
                except KeyboardInterrupt:
                    self.stopping.set()
                    raise Interrupted(
                        "stopped; what is finished is kept, and the same command goes on from there"
                    ) from None
                except BaseException:
                    self.stopping.set()
                    raise
        finally:
            self.listener.finish()
        return {task.name: self._done[task.name] for task in tasks}

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Sync finished tensors and record them, every few seconds and at the end."""
        thread = threading.Thread(target=self._record_regularly, name="weightsmith-journal", daemon=True)
        self._ended = threading.Event()
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._record()
        if self._failure is not None:
            raise self._failure

    def _work(self, tasks: Iterable[Task], mapper: ThreadMapper) -> None:
        """Do the tasks: tiny ones here, small ones and matrices whole, one a thread; large ones on all threads."""
        tasks = list(tasks)
        self._prepare_groups(tasks, mapper)
        pending: deque[Future[None]] = deque()
        matrices: deque[tuple[Future[None], int]] = deque()
        for task in tasks:
            held = matrix_memory(task)
            if held:
                while matrices and (
                    len(matrices) >= mapper.threads or held + sum(taken for _, taken in matrices) > self.room
                ):
                    matrices.popleft()[0].result()
                matrices.append((mapper.submit(self._do, task, in_turn), held))
            elif _TINY < task.size <= _SMALL:
                pending.append(mapper.submit(self._do, task, in_turn))
                if len(pending) >= 4 * mapper.threads:
                    pending.popleft().result()
            else:
                self._do(task, in_turn if task.size <= _TINY else mapper)
            if self._failure is not None:
                break
        for future in (*pending, *(one for one, _ in matrices)):
            future.result()

    def _prepare_groups(self, tasks: list[Task], mapper: ThreadMapper) -> None:
        """Compute the statistics that range over several tensors, before any of them is needed."""
        for task in tasks:
            for part in computed_within(task.tensor):
                group = part.group
                wanted = part.method.statistic is not None and len(group.members) > 1
                if wanted and id(group) not in self.shared:
                    held = max(matrix_memory(other) for other in tasks)
                    limited = mapper.limited(max(min(self.room // held, mapper.threads), 1)) if held else mapper
                    self.shared[id(group)] = run_statistic(self._evaluator(), group, limited)

    def _do(self, task: Task, mapper: Mapper) -> None:
        if self.stopping.is_set():
            return
        place = self.plan.place(task)
        tensor, item = task.tensor, task.dtype.itemsize
        met = _Met()
        evaluator = self._evaluator(met.add)
        source = carried(tensor, task.dtype)
        if source is None:
            evaluator.prepare(tensor, mapper)
        width = input_width(task)

        def one(stretch: tuple[int, int]) -> bytes:
            if self.stopping.is_set():
                return b""
            start, stop = stretch
            offset = place.offset + start * item
            room = self.backend.scratch.get("result", (stop - start) * item)
            if source is None:
                values, lost = evaluator.result(tensor, start, stop, task.dtype, room.view(task.dtype))
                met.add(RESULT, lost)
                self.sink.write(place.shard, values, offset)
            else:
                copied = self.sink.copy(place.shard, source, start, stop, offset)
                values = source.read_into(start, stop, room)
                if not copied:
                    self.sink.write(place.shard, values, offset)
            self._ahead.worked((stop - start) * width)
            self.listener.advance(values.nbytes)
            return hash_part(np.ascontiguousarray(values).view(np.uint8))

        # A whole matrix is computed once and held: what is written of it at a time may be cut anywhere.
        vector = tensor.columns if isinstance(tensor, Computed) and tensor.reads != "tensor" else 1
        length = self.steps.get(task.name, block_of(most_inputs(task), self.backend.block) * item) // item
        stretches = list(blocks(task.size, vector, length))
        parts = list(mapper(one, stretches))
        if self.stopping.is_set():
            return
        step = (stretches[0][1] - stretches[0][0]) * item if stretches else 0
        self._check_finite(task, met.counts)
        with self._lock:
            self._done[task.name] = Done(Digest(join_parts(parts), step), met.counts)
            self._unrecorded.append(task)
        self.listener.tensor_done(task.name)

    def _check_finite(self, task: Task, counts: Mapping[str, int]) -> None:
        """Refuse results that are NaN or infinite in more places than the inputs are."""
        lost = counts.get(RESULT, 0)
        given = sum(count for where, count in counts.items() if where != RESULT)
        if lost <= given or self.on_nonfinite != "error":
            return
        if given and matrix_memory(task):
            raise OutputError(
                f"{task.name}: {given:,} values of its inputs are NaN or infinite, and a method that takes the whole "
                f"matrix makes {lost:,} results so; mend the input, give this tensor to another method (rules), or go "
                "on with --on-nonfinite warn"
            )
        dtype = dtypes.name_of(task.dtype)
        raise OutputError(
            f"{task.name}: {lost:,} results are NaN or infinite in {dtype}, and "
            + (f"only {given:,} values of its inputs are" if given else "none of its inputs is")
            + f"; the largest {dtype} is {largest_finite(task.dtype):g}: write a wider dtype (--out-dtype float32), "
            "choose smaller weights, or go on with --on-nonfinite warn"
        )

    def _evaluator(self, on_nonfinite: Callable[[str, int], None] | None = None) -> Evaluator:
        return Evaluator(self.shared, on_nonfinite, self.backend)

    def _record_regularly(self) -> None:
        while not self._ended.wait(_JOURNAL_EVERY):
            try:
                self._record()
            except BaseException:
                self.stopping.set()
                return

    def _record(self) -> None:
        with self._lock:
            tasks, self._unrecorded = self._unrecorded, []
        # A sync that failed is told of once: the next would succeed, and prove nothing of what was written before it.
        if not tasks or self._failure is not None:
            return
        try:
            self.sink.sync(self.plan.place(task).shard for task in tasks)
            self.record({task.name: self._done[task.name] for task in tasks})
        except BaseException as error:
            self._failure = error
            raise


class _Met:
    """Counts of NaN and infinity in one tensor, from many threads."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, where: str, count: int) -> None:
        if count:
            with self._lock:
                self.counts[where] = self.counts.get(where, 0) + count


def _place_in_input(task: Task) -> tuple[str, int]:
    """Where the first input of a task lies: reading files from front to back is what disks and kernels expect."""
    first = next(stored_within(task.tensor), None)
    return (first.source.path, first.offset) if isinstance(first, StoredTensor) else ("", 0)


def _takes_matrices(tasks: Iterable[Task]) -> bool:
    return any(
        any(part.reads == "tensor" for part in computed_within(task.tensor))
        or any(part.held for part in stored_within(task.tensor))
        for task in tasks
    )


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _os_error_text(error: OSError, folder: Path) -> str:
    target = folder.parent.name.removeprefix(".").removesuffix(".weightsmith")
    if error.errno == errno.ENOSPC:
        return (
            f"the disk is full; what is finished is kept in {folder.parent}: free some space, and the same "
            "command goes on from there"
        )
    more = "; allow more open files (ulimit -n)" if error.errno == errno.EMFILE else ""
    return f"cannot write {target}: {error.strerror or error}{more}; what is finished is kept in {folder.parent}"
