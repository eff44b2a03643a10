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


def roughly(seconds: float) -> str:
    """Write an estimate of time as coarsely as it is meant: ``about 20 minutes``, ``about 3 hours``."""
    if seconds < 45:
        return "less than a minute"
    minutes = seconds / 60
    if minutes < 90:
        rounded = round(minutes / 5) * 5 if minutes > 12 else max(round(minutes), 1)
        return f"about {rounded} minute{'s' if rounded > 1 else ''}"
    hours = minutes / 60
    return f"about {round(hours):,} hours" if hours < 72 else f"about {round(hours / 24):,} days"
