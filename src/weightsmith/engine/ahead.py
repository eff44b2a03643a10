"""Reading ahead: the kernel is asked for the weights that are needed next, while others are worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.expression import stored_within
from weightsmith.engine.plan import Task
from weightsmith.engine.threads import Background

# Bytes of input asked for at a time, and how far ahead of the work.
_STEP = 8 << 20
_DISTANCE = 128 << 20
# Tensors of fewer bytes come with their neighbours: the kernel reads ahead by itself.
_SMALL = 1 << 20


# A tensor, its first element and the one after the last.
Stretch = tuple[Tensor, int, int]


class ReadAhead(Background):
    """Asks for stretches of tensors in order, a bounded distance ahead of what has been worked on.

    Where the files are in memory already it costs next to nothing; where they are not, disk and processor work at the
    same time. It never reads anything itself, and errors are left to those who do.
    """

    def __init__(self, wanted: Iterable[tuple[int, Sequence[Stretch]]]) -> None:
        """Ask for stretches.

        Args:
            wanted: in the order of the work, stretches that are needed together, and how many bytes of input they are.
        """
        super().__init__("weightsmith-ahead")
        self._wanted = wanted
        self._ahead = 0

    def worked(self, nbytes: int) -> None:
        """Note that so many bytes of input have been worked on."""
        with self._changed:
            self._ahead -= nbytes
            if self._ahead <= _DISTANCE:
                self._changed.notify()

    def _run(self) -> None:
        for nbytes, stretches in self._wanted:
            with self._changed:
                self._ahead += nbytes
                while self._ahead > _DISTANCE and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
            for tensor, start, stop in stretches:
                try:
                    tensor.prefetch(start, stop)
                except OSError:
                    return


def inputs_of(tasks: Sequence[Task]) -> Iterator[tuple[int, list[Stretch]]]:
    """Yield the inputs of stretches of the output, and how many bytes they are, in the order of the work."""
    for task in tasks:
        width = input_width(task)
        step = max(_STEP // max(width, 1), 1)
        inputs = list(stored_within(task.tensor))
        for start in range(0, task.size, step):
            stop = min(start + step, task.size)
            # An input of another size is a factor of an adapter, small beside the weights.
            whole = [tensor for tensor in inputs if tensor.size == task.size and tensor.nbytes >= _SMALL]
            yield (stop - start) * width, [(tensor, start, stop) for tensor in whole]


def input_width(task: Task) -> int:
    """Return how many bytes are read for one element of a task's output."""
    return sum(tensor.dtype.itemsize for tensor in stored_within(task.tensor))
