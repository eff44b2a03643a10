"""Functions of the C library that Python does not offer."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def libc_function(name: str, *arguments: Any) -> Any:
    """Return a function of the C library, or None where it has none of that name.

    Args:
        name: the function.
        arguments: the ctypes types of its arguments.

    Returns:
        The function; it returns an int, and ``ctypes.get_errno()`` tells why it failed.
    """
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = arguments
    return function
