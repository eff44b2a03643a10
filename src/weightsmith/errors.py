"""The errors weightsmith raises.

Every error carries one sentence that names the thing at fault, what was expected and found, and what to
do. The command line prints that sentence and exits with 1; nothing else in the package prints errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class OutputError(WeightsmithError):
    """The result cannot be written: target exists, disk full, another run holds it."""


class Interrupted(WeightsmithError):
    """The run was stopped; what was finished is kept and the same command resumes it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
