"""What every kind of bundle is: a way to write the changes of several models, and to restore each of them.

A bundle's tensors lie in parts: ``base/`` (the base, under its own names), ``shared/`` (what all tasks share) and
``tasks/NAME/`` (what one task needs beside that). In a part, a tensor's name is a field and the name of the tensor of
the model that it helps to restore: ``shared/vector/model.norm.weight``. The field ``whole`` holds tensors that are
stored as they are.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from weightsmith import dtypes
from weightsmith.architecture.stacks import Place
from weightsmith.bundle.description import Entry
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import CheckpointError, MethodError, did_you_mean, shown
from weightsmith.kernels.change import finite_change
from weightsmith.kernels.convert import widen

BASE, SHARED, TASKS = "base", "shared", "tasks"
WHOLE = "whole"
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def shared_name(field: str, name: str) -> str:
    """Return the name in the bundle of a tensor that all tasks share."""
    return f"{SHARED}/{field}/{name}"


def task_name(task: str, field: str, name: str = "") -> str:
    """Return the name in the bundle of a tensor of one task; without ``name``, of one that is the whole model's."""
    return f"{TASKS}/{task}/{field}/{name}" if name else f"{TASKS}/{task}/{field}"


@dataclass(frozen=True, eq=False)
class Group:
    """One tensor of the base, and the same tensor of every model that changes it.

    Attributes:
        name: its name.
        base: the base's tensor.
        models: task -> its tensor, of the same shape.
        dtype: the dtype in which the bundle keeps what it keeps of the changes as floats.
        place: the layer it belongs to, or None.
    """

    name: str
    base: Tensor
    models: Mapping[str, Tensor]
    dtype: DType
    place: Place | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    @property
    def working(self) -> DType:
        """The dtype of the arithmetic: float64 where one of the tensors is, else float32."""
        return dtypes.working_dtype([self.base.dtype, *(tensor.dtype for tensor in self.models.values())])

    def without(self, tasks: Sequence[str]) -> Group:
        """Return the group without some of its models."""
        return dataclasses.replace(self, models={task: one for task, one in self.models.items() if task not in tasks})

    def change(self, task: str, start: int, stop: int, base: Array | None = None) -> Array:
        """Return elements ``start`` to ``stop`` of a task vector: ``[n]`` of the dtype of the arithmetic.

        Args:
            task: whose.
            start: flat index of the first element.
            stop: flat index after the last.
            base: the base's elements, where they are at hand.

        Raises:
            CheckpointError: if there are values that are NaN or infinite.
        """
        if base is None:
            base = self.base_values(start, stop)
        values = widen(self.models[task].read(start, stop), self.working)

        def refuse(by_base: bool, what: str) -> CheckpointError:
            whose = "the base" if by_base else f"task {task}"
            return CheckpointError(
                f"{self.name} of {whose} has {what}, and this kind of bundle keeps changes as numbers; "
                "the kind lossless keeps any"
            )

        return finite_change(values, base, refuse)

    def changes(self, start: int, stop: int) -> list[Array]:
        """Return elements ``start`` to ``stop`` of the task vectors of all models, in their order."""
        base = self.base_values(start, stop)
        return [self.change(task, start, stop, base) for task in self.models]

    def base_values(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop`` of the base's tensor, in the dtype of the arithmetic."""
        return widen(self.base.read(start, stop), self.working)


@dataclass(frozen=True)
class Made:
    """What a kind makes of models.

    Attributes:
        groups: those whose changes it describes, with those models whose it does; all others are stored whole.
        tensors: the tensors of the bundle's parts, under their names in the bundle, in the order to compute them in.
    """

    groups: Sequence[Group]
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Survey:
    """Reading models before anything can be written, for what must be known of all of a tensor first.

    Attributes:
        mapper: what works on the pieces.
        listener: told of progress, in bytes of the models.
    """

    mapper: ThreadMapper
    listener: ProgressListener

    @property
    def threads(self) -> int:
        """How many threads there are."""
        return self.mapper.threads

    def run(
        self, function: Callable[[Piece], Result], pieces: Sequence[Piece], nbytes: Callable[[Piece], int]
    ) -> list[Result]:
        """Return a function's results, in the order of the pieces.

        Args:
            function: reads a piece.
            pieces: what it is to be given.
            nbytes: how many bytes of models it reads of one.
        """

        def told(piece: Piece) -> Result:
            found = function(piece)
            self.listener.advance(nbytes(piece))
            return found

        self.listener.start(sum(map(nbytes, pieces)), 0, 0)
        try:
            return list(self.mapper(told, pieces))
        finally:
            self.listener.finish()


class Stored:
    """What a bundle holds for one tensor of one task, looked up by field and checked."""

    def __init__(self, where: str, name: str, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Look up in a bundle.

        Args:
            where: the bundle and the task, for errors.
            name: the tensor's name.
            shared: the tensors that all tasks share, by their names in that part.
            own: those of the task.
        """
        self.where = where
        self.name = name
        self._shared = shared
        self._own = own

    def shared(self, field: str, shape: Sequence[int | None], dtype: DType | None = None) -> Tensor:
        """Return a tensor that all tasks share.

        Args:
            field: the field.
            shape: what its shape must be; None stands for any length but 0.
            dtype: what its dtype must be; None stands for any floating dtype.

        Raises:
            CheckpointError: if there is none, or it is not that.
        """
        return self._find(self._shared, SHARED, f"{field}/{self.name}", shape, dtype)

    def own(self, field: str, shape: Sequence[int | None], dtype: DType | None = None) -> Tensor:
        """Return a tensor of the task; see :meth:`shared`."""
        return self._find(self._own, TASKS, f"{field}/{self.name}", shape, dtype)

    def of_model(self, field: str, shape: Sequence[int | None], dtype: DType | None = None) -> Tensor:
        """Return a tensor that the task has once for its whole model; see :meth:`shared`."""
        return self._find(self._own, TASKS, field, shape, dtype)

    def has(self, field: str) -> bool:
        """Whether the task has a tensor under this field."""
        return f"{field}/{self.name}" in self._own

    def fail(self, what: str) -> CheckpointError:
        """Return the error that something about this tensor is not as it must be."""
        return CheckpointError(f"{self.where}: {shown(self.name)}: {what}")

    def _find(
        self, part: Mapping[str, Tensor], kind: str, key: str, shape: Sequence[int | None], dtype: DType | None
    ) -> Tensor:
        found = part.get(key)
        place = "the shared part" if kind == SHARED else "the task's part"
        if found is None:
            raise self.fail(f"{place} lacks {shown(key)}: the bundle is not whole")
        fits = len(found.shape) == len(shape) and all(
            length > 0 if wanted is None else length == wanted
            for length, wanted in zip(found.shape, shape, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"
            raise self.fail(f"{place} holds {shown(key)} as {list(found.shape)}, and {wanted} is needed")
        if found.dtype != dtype if dtype is not None else not dtypes.is_float(found.dtype):
            wanted = "floats" if dtype is None else dtypes.name_of(dtype)
            raise self.fail(f"{place} holds {shown(key)} as {dtypes.name_of(found.dtype)}, and {wanted} is needed")
        return found


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of bundle; its fields are its parameters.

    Attributes:
        name: by which it is asked for.
        summary: what it stores, in one line.
        any_dtype: whether it describes changes of tensors that are not floats, too.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    any_dtype: ClassVar[bool] = False

    @abstractmethod
    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """Say what to store.

        Args:
            groups: every tensor that some models change.
            tasks: the names of all models.
            survey: for what must be known of the tensors before anything can be written.

        Raises:
            CheckpointError: if an input cannot be read.
            MethodError: if a parameter does not fit the models.
        """

    @abstractmethod
    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """Return a tensor of a model, lazily.

        Args:
            entry: its dtype and shape.
            base: the base's tensor, of the same shape.
            stored: what the bundle holds for it.

        Raises:
            CheckpointError: if what it holds does not fit.
        """

    @property
    def uses_matrices(self) -> bool:
        """Whether it decomposes whole matrices."""
        return False

    def to_json(self) -> dict[str, Any]:
        """Return the parameters as JSON values."""
        return {field.name.rstrip("_"): getattr(self, field.name) for field in dataclasses.fields(self)}

    # What parameters may be; ``parameter`` is the name that errors tell.

    def _check_choice(self, parameter: str, *choices: str) -> None:
        value = getattr(self, parameter)
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise self._wrong(parameter, f"one of {', '.join(choices)} is needed{near}")

    def _check_flag(self, parameter: str) -> None:
        if not isinstance(getattr(self, parameter), bool):
            raise self._wrong(parameter, "true or false is needed")

    def _check_count(self, parameter: str) -> None:
        value = getattr(self, parameter)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(parameter, "a whole number from 1 is needed")

    def _wrong(self, parameter: str, what: str) -> MethodError:
        name, value = parameter.rstrip("_"), shown(getattr(self, parameter))
        return MethodError(f"{name} of the kind {self.name!r} is {value}; {what}")


def make_kind(name: str, parameters: Mapping[str, Any]) -> Kind:
    """Return a kind with its parameters.

    Args:
        name: the kind's name.
        parameters: its parameters by name; those that are not given have their defaults.

    Raises:
        MethodError: if there is no such kind or parameter, or a value is not one that it can have.
    """
    known = kinds()
    if name not in known:
        raise MethodError(
            f"there is no kind of bundle {shown(name)}{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    fields = {field.name.rstrip("_"): field.name for field in dataclasses.fields(known[name])}
    given = {}
    for key, value in parameters.items():
        plain = key.rstrip("_")
        if plain not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes none"
            near = did_you_mean(plain, fields)
            raise MethodError(f"the kind {name!r} has no parameter {shown(plain)}{near}; {takes}")
        given[fields[plain]] = tuple(value) if isinstance(value, list) else value
    return known[name](**given)


def kinds() -> dict[str, type[Kind]]:
    """Return all kinds by name."""
    from weightsmith.bundle.lossless import Lossless
    from weightsmith.bundle.masks import Emr, Tall
    from weightsmith.bundle.reversible import Reversible
    from weightsmith.bundle.signs import BitDelta
    from weightsmith.bundle.tsv import Tsv

    return {kind.name: kind for kind in (Emr, Tall, Tsv, Reversible, BitDelta, Lossless)}
