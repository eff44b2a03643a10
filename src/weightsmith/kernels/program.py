"""From a record of operations to a program for the compiled machine, and its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from weightsmith.dtypes import DType
from weightsmith.kernels.native import Library
from weightsmith.kernels.select import BINS
from weightsmith.kernels.trace import FREE, Kind, Lazy, Recorder, Total, Untraceable

Array = npt.NDArray[Any]

# Elements in a tile: registers of float32 take 4 KB each, and a dozen of them share a core's first cache.
TILE = 1024
# A row is a tile of its own; shorter rows cost more to start than to compute, longer ones do not fit the cache.
SHORTEST_ROW, LONGEST_ROW = 64, 1 << 18

_SHORT = {
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "f16",
    np.dtype(np.float32): "f32",
    np.dtype(np.float64): "f64",
}
_SINGLE_RESULT = 8


@dataclass(frozen=True)
class Store:
    """Write an array to an output, rounded to a dtype."""

    value: Lazy
    dtype: DType


@dataclass(frozen=True)
class Collect:
    """Put down those of an array's non-negative values whose bit patterns lie in a range, and count those above."""

    value: Lazy
    low: int
    high: int


@dataclass(frozen=True)
class Histogram:
    """Count non-negative values by their bit patterns: from ``low`` on, ``2**shift`` in each of 65,536 bins."""

    value: Lazy
    low: int
    shift: int


Terminal = Store | Collect | Histogram | Total


def storable(dtype: DType) -> bool:
    """Whether programs can round to this dtype."""
    return dtype in _SHORT


def load(recorder: Recorder, slot: int, dtype: DType, working: DType, counted: int = -1) -> Lazy:
    """Record the reading of an input.

    Args:
        recorder: the record.
        slot: number of the input.
        dtype: of the input's elements.
        working: float32 or float64.
        counted: number of the count to which values that are NaN or infinite are added; -1 for none.

    Raises:
        Untraceable: if programs cannot read this dtype.
    """
    kind: Kind = "f64" if working == np.float64 else "f32"
    # The slot is part of what tells two loads apart.
    numbers = (slot, counted)
    if dtype in _SHORT:
        return recorder.record(f"load_{_SHORT[dtype]}", (), kind=kind, single=False, numbers=numbers)
    if dtype.itemsize == 1 and dtype.kind not in "biu":
        name = f"load_table:{dtype.name}"
        found = recorder.record(name, (), kind="f32", single=False, numbers=numbers)
        return found if kind == "f32" else recorder.astype(found, recorder.float64)
    raise Untraceable(f"no loads of {dtype}")


def rounded(recorder: Recorder, value: Lazy, dtype: DType) -> Lazy:
    """Record the rounding of values to a narrower dtype, in the dtype they have."""
    if dtype not in _SHORT:
        raise Untraceable(f"no rounding to {dtype}")
    name = _SHORT[dtype]
    if name == value.kind or (name, value.kind) == ("f64", "f32"):
        return value
    if name == "f32":
        return recorder.astype(recorder.astype(value, recorder.float32), recorder.float64)
    return recorder.record(f"round_{name}", (value,))


class Program:
    """A fused loop: reads its inputs a tile at a time, and writes or sums up what its terminals ask for.

    Programs hold no state between runs and may run in several threads at once.

    Attributes:
        inputs: the inputs that are read, by slot, in order.
        columns: elements that a stretch must be a multiple of.
        outputs: dtype of each array that is written.
        width: bits of the values that are selected among; 0 where none are.
    """

    def __init__(self, library: Library, recorder: Recorder, terminals: Sequence[Terminal], *, counts: int = 0) -> None:
        """Compile a record.

        Args:
            library: the compiled kernels.
            recorder: the record.
            terminals: what is wanted of it.
            counts: how many counts the loads of the record were given.

        Raises:
            Untraceable: if the machine lacks an operation.
        """
        self._run = library.run
        self._form = form = _form_of(library, recorder, terminals, counts)
        self._code = form.code_with(recorder, terminals)
        self.columns = recorder.columns or 1
        self.inputs, self.outputs, self.width = form.inputs, form.outputs, form.width

    def run(
        self, inputs: Sequence[Array], outputs: Sequence[Array], count: int, index: int = 0, position: int = 0
    ) -> Results:
        """Run over a stretch.

        Args:
            inputs: one contiguous array ``[count]`` for each of :attr:`inputs`, in the dtypes of the loads.
            outputs: one contiguous array ``[count]`` for each store, in its dtype.
            count: number of elements.
            index: index of the first element in its tensor; random numbers depend on it.
            position: index of the first element in the scope of the statistic.

        Raises:
            MemoryError: if there is no memory for the registers.
        """
        # The machine goes by addresses: what does not fit must not reach it.
        if count % self.columns or any(len(array) != count for array in (*inputs, *outputs)):
            raise ValueError(f"a stretch of {count} elements in rows of {self.columns}, with arrays of other lengths")
        form = self._form
        sums = np.empty(form.sums)
        counts = np.empty(form.counts, np.int64)
        found: list[Array] = []
        for patterns in form.found:
            found.append(np.zeros(BINS, np.int64) if patterns is None else np.empty(count, patterns))
        # Named, so that they live until the call returns.
        reads, writes, finds = _pointers(inputs), _pointers(outputs), _pointers(found)
        failed = self._run(
            _address(self._code),
            form.once,
            len(self._code),
            form.registers,
            form.item,
            form.tile,
            count,
            _address(reads),
            _address(writes),
            _address(sums),
            form.sums,
            _address(counts),
            form.counts,
            _address(finds),
            index,
            position,
        )
        if failed:
            raise MemoryError(f"no memory for {form.registers} registers of {form.tile} elements")
        return Results(form.results, sums, counts, found)


class _Form:
    """What programs have in common whose records differ in numbers alone: all but those numbers.

    Attributes:
        inputs: see :class:`Program`.
        outputs: see :class:`Program`.
        width: see :class:`Program`.
        found: for every selection the dtype of its patterns, None for a histogram.
        results: kind and slots of what each terminal finds.
        sums: number of sums.
        counts: number of counts, those of loads first.
        once: lines at the start of the code that are run once, not for every tile.
        registers: number of registers.
        item: bytes of an element of a register.
        tile: elements of a register.
        code: the code of the record it was made from.
    """

    def __init__(self, library: Library, recorder: Recorder, terminals: Sequence[Terminal], counts: int) -> None:
        self._operations = library.operations
        self.tile = recorder.columns or TILE
        if recorder.columns is not None and not SHORTEST_ROW <= recorder.columns <= LONGEST_ROW:
            raise Untraceable("rows too short or too long to fuse")
        self._tables: list[Array] = []
        self.outputs: list[DType] = []
        self.width = 0
        self.sums = 0
        self.counts = counts
        self.found: list[DType | None] = []
        self.results: list[tuple[str, int, int]] = []
        schedule = _scheduled([self._terminal(terminal) for terminal in terminals])
        loads = {step.numbers[0] for step in schedule if isinstance(step, Lazy) and step.operation.startswith("load_")}
        self.inputs = sorted(loads)
        self._place = {slot: place for place, slot in enumerate(self.inputs)}
        self._assemble(schedule)
        written = [step for step in schedule if not _is_constant(step)]
        ends = [step for step in schedule if isinstance(step, _End)]
        # Lines of the code that hold numbers of their own, and whose: a step's, or after all steps a terminal's.
        self._lines: list[int] = []
        self._places: list[int] = []
        for line, step in enumerate([*filter(_is_constant, schedule), *written]):
            if isinstance(step, Lazy) and step.operation in FREE:
                self._lines.append(line)
                self._places.append(step.place)
            elif isinstance(step, _End) and isinstance(terminals[ends.index(step)], Collect | Histogram):
                self._lines.append(line)
                self._places.append(len(recorder.steps) + ends.index(step))

    def code_with(self, recorder: Recorder, terminals: Sequence[Terminal]) -> Array:
        """Return the code with the numbers of another record of this form, and of its terminals."""
        steps, own = recorder.steps, len(recorder.steps)
        numbers = [steps[place].numbers if place < own else _bounds(terminals[place - own]) for place in self._places]
        if not numbers:
            return self.code
        code = self.code.copy()
        code[self._lines, 6:] = numbers
        return code

    def _terminal(self, terminal: Terminal) -> _End:
        """Give a terminal its slots."""
        if isinstance(terminal, Store):
            self.outputs.append(terminal.dtype)
            name = f"store_{terminal.value.kind}_{_SHORT[terminal.dtype]}"
            return _End(name, (terminal.value,), (len(self.outputs) - 1, 0, 0, 0, self._count()))
        if isinstance(terminal, Total):
            kinds = {operand.kind for operand in terminal.operands}
            if len(kinds) > 1:
                raise Untraceable("a product of float32 and float64")
            name = f"{terminal.operation}_{kinds.pop()}"
            if terminal.operation == "count":
                return _End(name, terminal.operands, (self._count(), 0, 0, 0, 0))
            self.results.append(("sum", self.sums, 0))
            self.sums += 1
            return _End(name, terminal.operands, (self.sums - 1, 0, 0, 0, 0))
        value = terminal.value
        if value.kind == "m32" or value.single:
            raise Untraceable("selection is among numbers of elements")
        slot = len(self.found)
        self.width = 8 * value.dtype.itemsize
        if isinstance(terminal, Histogram):
            self.found.append(None)
            self.results.append(("histogram", slot, 0))
            return _End(f"histogram_{value.kind}", (value,), (0, 0, slot, *_bounds(terminal)))
        self.found.append(np.dtype(f"u{value.dtype.itemsize}"))
        self.results.append(("collect", slot, self.counts))
        self.counts += 2
        at = self.counts - 2
        return _End(f"collect_{value.kind}", (value,), (at, at + 1, slot, *_bounds(terminal)))

    def _count(self) -> int:
        self.results.append(("count", self.counts, 0))
        self.counts += 1
        return self.counts - 1

    def _assemble(self, schedule: Sequence[Lazy | _End]) -> None:
        """Give every array a register, free for others after its last use, and write the program down."""
        last = {id(operand): at for at, step in enumerate(schedule) for operand in step.operands}
        constants = [step for step in schedule if _is_constant(step)]
        place = {id(node): register for register, node in enumerate(constants)}
        lines = [self._line(node, place) for node in constants]
        self.once = len(lines)
        self.registers = len(constants)
        free: list[int] = []
        for at, step in enumerate(schedule):
            if isinstance(step, Lazy):
                if _is_constant(step):
                    continue
                # Taken before those of the operands come free: operations do not work in place.
                if free:
                    place[id(step)] = free.pop()
                else:
                    place[id(step)] = self.registers
                    self.registers += 1
            lines.append(self._line(step, place))
            for key, operand in {id(operand): operand for operand in step.operands}.items():
                if last[key] == at and operand.operation != "constant":
                    free.append(place[key])
        wide = any(isinstance(step, Lazy) and step.kind == "f64" for step in schedule)
        self.item = 8 if wide else 4
        self.code = np.array(lines, np.int64).reshape(-1, 8)

    def _line(self, step: Lazy | _End, place: dict[int, int]) -> list[int]:
        """Write one operation in the layout of ``code`` in machine.c."""
        registers = [place[id(operand)] for operand in step.operands]
        form = sum(1 << bit for bit, operand in enumerate(step.operands) if operand.single)
        if isinstance(step, _End):
            name, (out, b, c, x, y) = step.name, step.slots
            a = registers[0]
            b = registers[1] if len(registers) > 1 else b
            return [self._number(name), out, a, b, c, form, x, y]
        if step.single and not step.operation.startswith("row_"):
            form |= _SINGLE_RESULT
        x, y = step.numbers
        a, b, c = (*registers, 0, 0, 0)[:3]
        name = f"{step.operation}_{_type_of(step)}"
        if step.operation.startswith("load_"):
            a, (operation, _, dtype) = self._place[x], step.operation.partition(":")
            name = f"{operation}_{step.kind}"
            if dtype:
                self._tables.append(_table(dtype))
                x = self._tables[-1].ctypes.data
        return [self._number(name), place[id(step)], a, b, c, form, x, y]

    def _number(self, name: str) -> int:
        try:
            return self._operations[name]
        except KeyError:
            raise Untraceable(f"the machine has no operation {name}") from None


_FORMS: dict[Any, _Form] = {}
_MOST_FORMS = 512


def _form_of(library: Library, recorder: Recorder, terminals: Sequence[Terminal], counts: int) -> _Form:
    """Return the form of a record; most records of a run differ from another in numbers alone."""
    ends = [end for terminal in terminals for end in _operands(terminal)]
    if any(end.recorder is not recorder for end in ends):
        # A method that keeps an array from one call for the next; places mean nothing in another record.
        raise Untraceable("an array of another block")
    wanted = tuple([_kind_of(terminal) for terminal in terminals])
    key = (library.level, recorder.columns, counts, tuple(recorder.form), wanted)
    found = _FORMS.get(key)
    if found is None:
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        found = _FORMS[key] = _Form(library, recorder, terminals, counts)
    return found


def _operands(terminal: Terminal) -> tuple[Lazy, ...]:
    return terminal.operands if isinstance(terminal, Total) else (terminal.value,)


def _kind_of(terminal: Terminal) -> tuple[Any, ...]:
    """Return what tells a terminal from others, but for its numbers."""
    if isinstance(terminal, Total):
        return (terminal.operation, *[operand.place for operand in terminal.operands])
    return (type(terminal), terminal.value.place, terminal.dtype if isinstance(terminal, Store) else None)


def _bounds(terminal: Terminal) -> tuple[int, int]:
    """Return the numbers of a selection."""
    if isinstance(terminal, Collect):
        return _signed(terminal.low), _signed(terminal.high)
    if isinstance(terminal, Histogram):
        return _signed(terminal.low), terminal.shift
    raise TypeError(f"{type(terminal).__name__} has no bounds")


class Results:
    """What a run of a program found, in the order of its terminals.

    Attributes:
        values: for a store the number of results that are NaN or infinite; for a sum or count the number; for a
            selection how many values lie above the range, and the patterns within it in order, unsigned; for a
            histogram its counts.
        counts: the counts that loads were given.
    """

    def __init__(self, kinds: list[tuple[str, int, int]], sums: Array, counts: Array, found: list[Array]) -> None:
        self.counts = counts
        self.values: list[Any] = []
        for kind, slot, count in kinds:
            if kind == "sum":
                self.values.append(float(sums[slot]))
            elif kind == "count":
                self.values.append(int(counts[slot]))
            elif kind == "histogram":
                self.values.append(found[slot])
            else:
                above, within = int(counts[count]), int(counts[count + 1])
                self.values.append((above, found[slot][:within].copy()))


@dataclass(frozen=True, eq=False)
class _End:
    """A terminal with its slots: what its code holds for out, b, c, x and y."""

    name: str
    operands: tuple[Lazy, ...]
    slots: tuple[int, int, int, int, int]


def _is_constant(step: Lazy | _End) -> bool:
    return isinstance(step, Lazy) and step.operation == "constant"


def _scheduled(ends: Sequence[_End]) -> list[Lazy | _End]:
    """Order operations such that each stands shortly before its first use."""
    schedule: list[Lazy | _End] = []
    done: set[int] = set()
    for end in ends:
        stack: list[tuple[Lazy, bool]] = [(operand, False) for operand in reversed(end.operands)]
        while stack:
            node, entered = stack.pop()
            if id(node) in done:
                continue
            if entered:
                done.add(id(node))
                schedule.append(node)
            else:
                stack.append((node, True))
                stack += [(operand, False) for operand in reversed(node.operands)]
        schedule.append(end)
    return schedule


def _type_of(node: Lazy) -> str:
    """Return the type that an operation's name carries: that of its operands, but for conversions from masks."""
    if not node.operands or node.operation == "float":
        return node.kind
    return node.operands[-1].kind if node.operation != "gate" else node.kind


@cache
def _table(dtype: str) -> Array:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _signed(pattern: int) -> int:
    return pattern - (1 << 64) if pattern >= 1 << 63 else pattern


def _pointers(arrays: Sequence[Array]) -> Array:
    return np.array([_address(array) for array in arrays], np.uint64)


def _address(array: Array) -> int:
    # A tenth of the time that array.ctypes.data takes.
    return array.__array_interface__["data"][0]  # type: ignore[no-any-return]
