"""Carries a plan out on a pool of threads: every block is written at its final place, in any order."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoint.layout import Shard
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.ahead import ReadAhead, input_width
from weightsmith.engine.backend import NUMPY, Backend
from weightsmith.engine.evaluate import Evaluator, Mapper, blocks, in_turn, run_statistic
from weightsmith.engine.expression import Computed, carried, computed_within, stored_within
from weightsmith.engine.journal import Journal
from weightsmith.engine.plan import Plan, Task
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.threads import ThreadMapper
from weightsmith.engine.writeback import WriteBehind
from weightsmith.errors import Interrupted, OutputError

# A tensor up to this size is the work of one thread; a larger one is shared by all.
_SMALL = 1 << 20
# Seconds between two syncs of finished tensors to disk and journal.
_JOURNAL_EVERY = 5.0


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


def execute(
    plan: Plan,
    folder: Path,
    journal: Journal,
    *,
    threads: int,
    listener: ProgressListener | None = None,
    backend: Backend = NUMPY,
) -> tuple[NonFinite, ...]:
    """Write the weights of a plan into a folder.

    Args:
        plan: the plan.
        folder: the staging folder; files that an earlier run began are continued.
        journal: the run's journal; tensors it holds are not computed again.
        threads: how many threads to use.
        listener: told of progress.
        backend: whose arrays are computed on.

    Returns:
        Where NaN and infinity were met.

    Raises:
        Interrupted: on Ctrl-C; finished tensors are in the journal.
        OutputError: if the disk is full or a file cannot be written.
        CheckpointError: if an input cannot be read.
    """
    check_space(plan, folder)
    pending = sorted((task for task in plan.tasks if task.name not in journal.finished), key=_place_in_input)
    done = sum(task.nbytes for task in plan.tasks) - sum(task.nbytes for task in pending)
    run = _Run(plan, folder, journal, listener or Silent(), backend)
    run.listener.start(done + sum(task.nbytes for task in pending), len(plan.tasks), done)
    try:
        with run.open_files(pending), ThreadMapper(threads, matrices=_takes_matrices(pending)) as mapper:
            try:
                run.work(pending, mapper)
            except KeyboardInterrupt:
                run.stopping.set()
                raise Interrupted(
                    "stopped; what is finished is kept, and the same command goes on from there"
                ) from None
            except BaseException:
                run.stopping.set()
                raise
    except OSError as error:
        raise OutputError(_os_error_text(error, folder)) from error
    finally:
        run.listener.finish()
    return run.nonfinite()


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
    """The state of one execution: open files, finished tensors, counts of non-finite values."""

    def __init__(
        self, plan: Plan, folder: Path, journal: Journal, listener: ProgressListener, backend: Backend
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.journal = journal
        self.listener = listener
        self.backend = backend
        self.stopping = threading.Event()
        self.shared: dict[int, Any] = {}
        self._files: list[int] = []
        self._finished: list[Task] = []
        self._lock = threading.Lock()
        self._nonfinite: dict[tuple[str, str], int] = {}
        self._behind = WriteBehind()

    @contextlib.contextmanager
    def open_files(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Open every shard, and sync finished tensors to the journal every few seconds and at the end.

        Meanwhile the inputs of the tasks are read ahead, and what is written is sent to the disk.
        """
        flusher = threading.Thread(target=self._flush_regularly, name="weightsmith-journal", daemon=True)
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        try:
            for shard in self.plan.layout.shards:
                self._files.append(_open_shard(self.folder, shard))
            flusher.start()
            try:
                with self._behind, ReadAhead(tasks) as self._ahead:
                    yield
            finally:
                self._ended.set()
                flusher.join()
                self._flush()
            if self._failure is not None:
                raise self._failure
        finally:
            for handle in self._files:
                os.close(handle)
            self._files = []

    def work(self, tasks: Iterable[Task], mapper: ThreadMapper) -> None:
        """Do the tasks: small ones whole, one a thread; large ones one after the other, on all threads."""
        tasks = list(tasks)
        self._prepare_groups(tasks, mapper)
        pending: deque[Future[None]] = deque()
        for task in tasks:
            if _is_small(task):
                pending.append(mapper.submit(self._do, task, in_turn))
                if len(pending) >= 4 * mapper.threads:
                    pending.popleft().result()
            else:
                self._do(task, mapper)
            if self._failure is not None:
                break
        while pending:
            pending.popleft().result()

    def nonfinite(self) -> tuple[NonFinite, ...]:
        """Return where NaN and infinity were met, in the order of the output's tensors."""
        order = {task.name: place for place, task in enumerate(self.plan.tasks)}
        found = [NonFinite(tensor, where, n) for (tensor, where), n in self._nonfinite.items()]
        return tuple(sorted(found, key=lambda entry: (order[entry.tensor], entry.where)))

    def _prepare_groups(self, tasks: list[Task], mapper: ThreadMapper) -> None:
        """Compute the statistics that range over several tensors, before any of them is needed."""
        for task in tasks:
            for part in computed_within(task.tensor):
                group = part.group
                wanted = part.method.statistic is not None and len(group.members) > 1
                if wanted and id(group) not in self.shared:
                    self.shared[id(group)] = run_statistic(self._evaluator(), group, mapper)

    def _do(self, task: Task, mapper: Mapper) -> None:
        if self.stopping.is_set():
            return
        place = self.plan.place(task)
        handle = self._files[place.shard]
        tensor = task.tensor
        evaluator = self._evaluator(lambda where, n: self._note(task.name, where, n))
        source = carried(tensor, task.dtype)
        if source is None:
            evaluator.prepare(tensor, mapper)
        width = input_width(task)

        def one(stretch: tuple[int, int]) -> None:
            if self.stopping.is_set():
                return
            offset = place.offset + stretch[0] * task.dtype.itemsize
            nbytes = (stretch[1] - stretch[0]) * task.dtype.itemsize
            room = self.backend.scratch.get("result", nbytes)
            if source is not None:
                if not source.copy_to(*stretch, handle, offset):
                    _write_all(handle, source.read_into(*stretch, room), offset)
            else:
                values, lost = evaluator.result(tensor, *stretch, task.dtype, room.view(task.dtype))
                self._note(task.name, "result", lost)
                _write_all(handle, values, offset)
            self._ahead.worked((stretch[1] - stretch[0]) * width)
            self._behind.wrote(handle, nbytes)
            self.listener.advance(nbytes)

        vector = tensor.columns if isinstance(tensor, Computed) else 1
        for _ in mapper(one, blocks(task.size, vector, self.backend.block)):
            pass
        if self.stopping.is_set():
            return
        with self._lock:
            self._finished.append(task)
        self.listener.tensor_done(task.name)

    def _evaluator(self, on_nonfinite: Callable[[str, int], None] | None = None) -> Evaluator:
        return Evaluator(self.shared, on_nonfinite, self.backend)

    def _note(self, tensor: str, where: str, count: int) -> None:
        if count:
            with self._lock:
                key = (tensor, where)
                self._nonfinite[key] = self._nonfinite.get(key, 0) + count

    def _flush_regularly(self) -> None:
        while not self._ended.wait(_JOURNAL_EVERY):
            try:
                self._flush()
            except BaseException as error:
                self._failure = error
                self.stopping.set()
                return

    def _flush(self) -> None:
        with self._lock:
            finished, self._finished = self._finished, []
        if finished:
            for number in sorted({self.plan.place(task).shard for task in finished}):
                os.fsync(self._files[number])
            self.journal.record([task.name for task in finished])


def _place_in_input(task: Task) -> tuple[str, int]:
    """Where the first input of a task lies: reading files from front to back is what disks and kernels expect."""
    first = next(stored_within(task.tensor), None)
    return (first.source.path, first.offset) if isinstance(first, StoredTensor) else ("", 0)


def _takes_matrices(tasks: Iterable[Task]) -> bool:
    return any(part.reads == "tensor" for task in tasks for part in computed_within(task.tensor))


def _is_small(task: Task) -> bool:
    return task.size <= _SMALL


def _open_shard(folder: Path, shard: Shard) -> int:
    """Open a shard for writing, at its full length, with its header in place."""
    path = folder / shard.path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(handle).st_size != shard.nbytes:
            os.ftruncate(handle, shard.nbytes)
        _reserve(handle, shard.nbytes)
        _write_all(handle, np.frombuffer(shard.header, np.uint8), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _reserve(handle: int, nbytes: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        # Some filesystems cannot reserve; there a full disk shows itself at the write.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(handle: int, values: Array, offset: int) -> None:
    left = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    while left:
        written = os.pwrite(handle, left, offset)
        offset += written
        left = left[written:]


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
    return f"cannot write {target}: {error.strerror or error}"
