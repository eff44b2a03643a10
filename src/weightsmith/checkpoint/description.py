"""What every description of a tensor must satisfy, in whatever format a stranger wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsmith.dtypes import DType
from weightsmith.errors import shown

# Real names have up to 150 characters. Beyond this one could fill a terminal, or outlast a regular expression.
_LONGEST_NAME = 1_000
# What NumPy's arrays can have.
_MOST_AXES = 64
_LARGEST_SIZE = 2**63


def problem_with_name(name: Any) -> str | None:
    """Return what is wrong with a tensor's name, or None: it must be a text that a file can hold again."""
    if not isinstance(name, str):
        return f"its name is {shown(name)}, which is no text"
    if len(name) > _LONGEST_NAME:
        return f"its name has {len(name):,} characters; at most {_LONGEST_NAME:,} are read"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name holds half a character (a surrogate), which UTF-8 cannot write"
    return None


def problem_with_shape(shape: Sequence[Any], dtype: DType) -> str | None:
    """Return what is wrong with a tensor's shape, or None.

    Lengths must be whole numbers from 0, for at most 64 axes; and their product, those of 0 left out, must be a number
    of bytes that a file can have: NumPy refuses an empty array whose other axes multiply beyond that.
    """
    if not all(map(is_count, shape)):
        return f"its shape is {shown(list(shape))}; lengths are whole numbers from 0"
    if len(shape) > _MOST_AXES:
        return f"its shape has {len(shape):,} axes; at most {_MOST_AXES} are read"
    size = dtype.itemsize
    for length in shape:
        size *= max(length, 1)
        if size >= _LARGEST_SIZE:
            return f"its shape is {shown(list(shape))}, larger than any file"
    return None


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 that a file's offset can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_SIZE
