"""The errors weightsmith raises.

Every error carries one sentence that names the thing at fault, what was expected and found, and what to
do. The command line prints that sentence and exits with 1; nothing else in the package prints errors.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

# Longer words are no typos of anything, and comparing two of them takes the square of their length.
_LONGEST_WORD = 200


class WeightsmithError(Exception):
    """Base class of all errors that a user can cause or cure."""


class CheckpointError(WeightsmithError):
    """A file or folder cannot be read as a checkpoint: missing, truncated, malformed."""


class UnsafeFileError(CheckpointError):
    """A file asks for something that a file of weights has no business asking for."""


class RecipeError(WeightsmithError):
    """A recipe cannot be understood: unknown key, wrong type, missing parameter."""


class PlanError(WeightsmithError):
    """A well-formed recipe cannot be carried out on these checkpoints."""


class MethodError(WeightsmithError):
    """A merge method is unknown, wrongly declared or given parameters out of range."""


class DeviceError(WeightsmithError):
    """A device to compute on is not there, lacks a package or memory, or cannot do what is asked of it."""


class EvaluationError(WeightsmithError):
    """What a person gave to measure models with failed, took too long, or gave no number."""


class ReportError(WeightsmithError):
    """A report cannot be made of what it was given, or read from what a file holds."""


class OutputError(WeightsmithError):
    """The result cannot be written: target exists, disk full, another run holds it."""


class Interrupted(WeightsmithError):
    """The run was stopped; what was finished is kept and the same command resumes it."""


class _Shown(reprlib.Repr):
    """Python's own form of a value, but of bounded length and depth whatever a file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 120

    def repr_int(self, value: int, level: int) -> str:
        """Write a number; one of thousands of digits cannot be, by default."""
        return repr(value) if value.bit_length() < 400 else f"a whole number of {value.bit_length():,} bits"

    def repr_instance(self, value: Any, level: int) -> str:
        """Write what has no form of its own here: an object's repr may go through all that it holds."""
        return repr(value) if isinstance(value, float | bool | None) else f"<{type(value).__name__}>"


_SHOWN = _Shown()


def shown(value: Any) -> str:
    """Return a value that a file holds as errors quote it: in Python's form, shortened where it is long or deep."""
    return _SHOWN.repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known word, or an empty string."""
    if len(word) > _LONGEST_WORD:
        return ""
    near = difflib.get_close_matches(word, [one for one in known if len(one) <= _LONGEST_WORD], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
