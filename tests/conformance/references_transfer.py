"""References for ``weightsmith.methods.transfer``; see references.py."""

from __future__ import annotations

from typing import Any

REFERENCES: dict[str, Any] = {}
# Method and parameters: ways of computing that its example does not take.
VARIANTS: list[tuple[str, dict[str, Any]]] = []
