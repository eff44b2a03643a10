"""Numbers with their units, for people."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Write a number of bytes with three digits and a decimal unit: ``412 kB``, ``13.5 GB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
