"""Numbers and lists, as sentences say them."""

from __future__ import annotations

from collections.abc import Sequence

# Names that a sentence lists before it only counts the rest.
LISTED = 4
# Numbers from here on have an exponent: nobody counts their digits.
_LONG = 1e6


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """Return names as a sentence lists them: ``a``, ``a and b``, ``a, b and 7 more``.

    Args:
        names: what is listed, at least one.
        most: how many are named.
    """
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def counted(number: int, one: str, more: str | None = None) -> str:
    """Return a number with its noun: ``1 row``, ``2,000 rows``; ``more`` is a plural that does not just end in s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def have(names: Sequence[str]) -> str:
    """Return the verb for names that a sentence lists: ``has`` or ``have``."""
    return verb(len(names), "has", "have")


def verb(number: int, one: str, more: str) -> str:
    """Return the form of a verb that goes with a number of things: ``holds`` or ``hold``."""
    return one if number == 1 else more


def percent(share: float) -> str:
    """Return a share as per cent: ``0.034%``, ``3.0%``, ``34%``, ``100%`` only if it is all; ``1.6e+30%``."""
    value = 100.0 * share
    if value >= _LONG:
        return f"{value:.1e}%"
    if 99.5 <= value < 100.0:
        return f"{min(value, 99.9):.1f}%"
    if 0.0 < value < 0.001:
        return "less than 0.001%"
    return f"{value:.0f}%" if value >= 9.95 or value == 0.0 else f"{value:#.2g}%"


def times(ratio: float) -> str:
    """Return a ratio: ``0.35 times``, ``2.4 times``, ``31 times``, ``7.2e+29 times``."""
    if ratio >= _LONG:
        return f"{ratio:.1e} times"
    return f"{ratio:.2f} times" if ratio < 1.0 else f"{ratio:.1f} times" if ratio < 10.0 else f"{ratio:,.0f} times"


def cosine_text(cosine: float, digits: int = 2) -> str:
    """Return a cosine with so many digits, without a sign where nothing is left of it: ``0.00``, never ``-0.00``."""
    text = f"{cosine:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0.0 else text
