"""What a bundle says of itself: the file ``weightsmith-bundle.json``, checked completely before anything else is read.

It names the kind and its parameters, the base, and for every task each of its tensors (shape, dtype, and in which form
the bundle holds it), the files that travel beside it, and the error that was measured when the bundle was made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn, TypeVar, get_args

from weightsmith import dtypes
from weightsmith.checkpoint.description import problem_with_name, problem_with_shape
from weightsmith.checkpoint.folder import is_companion
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import is_file_name
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

FORMAT = 1
LARGEST = 64_000_000
_MOST_TASKS = 10_000
# As they stand in "bundle#task", in file names, and in references with revisions and adapters.
_TASK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{32}")

# base: the base's tensor, to the bit; whole: stored as it is; change: the base's with a change that the kind describes.
Form = Literal["base", "whole", "change"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Entry:
    """A tensor that a bundle can restore: its dtype and shape, and the form in which the bundle holds it."""

    dtype: DType
    shape: tuple[int, ...]
    form: Form


@dataclass(frozen=True)
class Error:
    """How a restored model differs from the one it was made from.

    Attributes:
        relative: norm of the difference over the norm of the model, over all floating tensors; None where there is no
            such number.
        of_change: norm of the difference over the norm of the change from the base; None where nothing changed.
        largest: largest magnitude of a difference; None where it is beyond float64.
        equal: share of the entries of all tensors that are the same to the bit.
    """

    relative: float | None
    of_change: float | None
    largest: float | None
    equal: float


@dataclass(frozen=True)
class Task:
    """One model of a bundle.

    Attributes:
        reference: the model that it was made from.
        tensors: name -> what is restored under it.
        files: name of a file beside the model -> its path in the bundle, or below the base's.
        error: as measured when the bundle was made.
    """

    reference: str
    tensors: Mapping[str, Entry]
    files: Mapping[str, str]
    error: Error | None = None


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of a base that is not in the bundle, by which it is known again."""

    dtype: DType
    shape: tuple[int, ...]
    hash: str


@dataclass(frozen=True)
class Base:
    """The base.

    Attributes:
        reference: what it was made from.
        tensors: None where it is in the bundle; else every tensor that is needed of it.
    """

    reference: str
    tensors: Mapping[str, BaseTensor] | None = None


@dataclass(frozen=True)
class Description:
    """A bundle.

    Attributes:
        version: the version of weightsmith that made it.
        kind: the kind's name.
        parameters: the kind's parameters.
        base: its base.
        tasks: its models by name.
    """

    version: str
    kind: str
    parameters: Mapping[str, Any]
    base: Base
    tasks: Mapping[str, Task]

    def to_text(self) -> str:
        """Return it as JSON."""
        base: dict[str, Any] = {"reference": self.base.reference, "stored": self.base.tensors is None}
        if self.base.tensors is not None:
            base["tensors"] = {
                name: {"dtype": dtypes.code_of(one.dtype), "shape": list(one.shape), "xxh3": one.hash}
                for name, one in self.base.tensors.items()
            }
        content = {
            "format": FORMAT,
            "weightsmith": self.version,
            "kind": self.kind,
            "parameters": dict(self.parameters),
            "base": base,
            "tasks": {name: _task_to_json(task) for name, task in self.tasks.items()},
        }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n"


def _task_to_json(task: Task) -> dict[str, Any]:
    return {
        "reference": task.reference,
        "error": None if task.error is None else asdict(task.error),
        "files": dict(task.files),
        "tensors": {
            name: {"dtype": dtypes.code_of(entry.dtype), "shape": list(entry.shape), "form": entry.form}
            for name, entry in task.tensors.items()
        },
    }


def is_task_name(name: str) -> bool:
    """Whether a text can name a task."""
    return _TASK.fullmatch(name) is not None


def parse_description(content: bytes, where: str) -> Description:
    """Read a bundle's description.

    Args:
        content: the file's bytes.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if it is none.
        UnsafeFileError: if it names a file that is not in the bundle.
    """
    return _Reader(where).description(parse_object(content, where))


class _Reader:
    """Reads JSON values, each of which may be anything."""

    def __init__(self, where: str) -> None:
        self._where = where

    def description(self, content: dict[str, Any]) -> Description:
        if content.get("format") != FORMAT:
            found = shown(content.get("format"))
            self._fail(f"it is of format {found}, and this version reads {FORMAT}")
        count = len(self._object(content, "tasks"))
        if not 0 < count <= _MOST_TASKS:
            self._fail(f"it names {count:,} tasks; at least one, and at most {_MOST_TASKS:,} are read")
        tasks = self._map(content, "tasks", self._task)
        for name in tasks:
            if not is_task_name(name):
                self._fail(f"{shown(name)} cannot be the name of a task")
        return Description(
            version=self._text(content, "weightsmith"),
            kind=self._text(content, "kind"),
            parameters=self._map(content, "parameters", lambda _, value: value),
            base=self._base(self._object(content, "base")),
            tasks=tasks,
        )

    def _base(self, content: dict[str, Any]) -> Base:
        reference = self._text(content, "reference")
        if content.get("stored") is True:
            return Base(reference)
        if content.get("stored") is not False:
            self._fail(f"it says that the base is stored: {shown(content.get('stored'))}; true or false is needed")
        return Base(reference, self._map(content, "tensors", self._base_tensor))

    def _base_tensor(self, name: str, content: Any) -> BaseTensor:
        dtype, shape = self._tensor(name, content)
        digits = content.get("xxh3")
        if not isinstance(digits, str) or not _HASH.fullmatch(digits):
            self._fail(f"the base's tensor {shown(name)} has the hash {shown(digits)}")
        return BaseTensor(dtype, shape, digits)

    def _task(self, name: str, content: Any) -> Task:
        if not isinstance(content, dict):
            self._fail(f"the task {shown(name)} is {shown(content)}")
        return Task(
            reference=self._text(content, "reference"),
            tensors=self._map(content, "tensors", self._entry),
            files=self._map(content, "files", self._file),
            error=None if content.get("error") is None else self._error(self._object(content, "error")),
        )

    def _entry(self, name: str, content: Any) -> Entry:
        dtype, shape = self._tensor(name, content)
        form = content.get("form")
        if form not in get_args(Form):
            self._fail(f"tensor {shown(name)} has the form {shown(form)}; one of {', '.join(get_args(Form))} is needed")
        return Entry(dtype, shape, form)

    def _tensor(self, name: str, content: Any) -> tuple[DType, tuple[int, ...]]:
        problem = problem_with_name(name)
        if problem is None and not isinstance(content, dict):
            problem = f"it is described by {shown(content)}"
        if problem is not None:
            self._fail(f"tensor {shown(name)}: {problem}")
        code, shape = content.get("dtype"), content.get("shape")
        dtype = dtypes.from_code(code) if isinstance(code, str) else None
        if dtype is None:
            self._fail(f"tensor {shown(name)} has the unknown dtype {shown(code)}")
        problem = problem_with_shape(shape, dtype) if isinstance(shape, list) else f"its shape is {shown(shape)}"
        if problem is not None:
            self._fail(f"tensor {shown(name)}: {problem}")
        return dtype, tuple(shape)

    def _file(self, name: str, path: Any) -> str:
        if not isinstance(path, str) or not all(map(is_file_name, path.split("/"))):
            raise UnsafeFileError(f"{self._where}: it names the file {shown(path)}, which is not in the bundle")
        if name != "config.json" and not is_companion(name):
            raise UnsafeFileError(f"{self._where}: {shown(name)} is no file that travels beside a model")
        return path

    def _error(self, content: dict[str, Any]) -> Error:
        def number(key: str) -> float | None:
            value = content.get(key)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
                self._fail(f"it gives {key} of an error as {shown(value)}, which is no number")
            return float(value)

        return Error(number("relative"), number("of_change"), number("largest"), number("equal") or 0.0)

    def _text(self, content: dict[str, Any], key: str) -> str:
        value = content.get(key)
        if not isinstance(value, str):
            self._fail(f"it gives {key} as {shown(value)}, which is no text")
        return value

    def _object(self, content: dict[str, Any], key: str) -> dict[str, Any]:
        value = content.get(key)
        if not isinstance(value, dict):
            self._fail(f"it gives {key} as {shown(value)}, which is no object")
        return value

    def _map(self, content: dict[str, Any], key: str, read: Callable[[str, Any], Found]) -> dict[str, Found]:
        return {name: read(name, value) for name, value in self._object(content, key).items()}

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {what}")
