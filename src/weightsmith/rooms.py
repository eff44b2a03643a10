"""Packages that are functions as well: ``weightsmith.report`` is a package, and ``weightsmith.report(…)`` makes one.

Python puts an imported package into the package around it, where it takes the name from a function.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called as a function of one of its modules."""

    home: tuple[str, str]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        module, name = self.home
        return getattr(importlib.import_module(module), name)(*arguments, **named)


def make_callable(package: str, module: str, name: str) -> None:
    """Let a package be called.

    Args:
        package: its name.
        module: the module that holds the function; it is imported when the package is called.
        name: the function's name there.
    """
    room = sys.modules[package]
    room.__class__ = _Callable
    room.home = (module, name)  # type: ignore[attr-defined]
