"""What plots share: round numbers along an axis, a scale from values to lengths, and colours for values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Viridis (van der Walt and Smith, 2015, CC0), at even steps: of even lightness, also to eyes that see few colours.
PALETTE = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")


@dataclass(frozen=True)
class Scale:
    """Maps values from ``low`` to ``high`` to lengths from ``begin`` to ``end``; what lies beyond stands at the end."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the length of a value."""
        value = min(max(value, self.low), self.high)
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return a range with some room on either side; one of no width gets some."""
    # A double has 15 digits: a range below them would have no distinct ends.
    least = max(1e-12 * max(abs(low), abs(high)), 1e-290)
    width = max(high - low, least) if high > low else abs(high) or 1.0
    return low - share * width, high + share * width


def ticks(low: float, high: float, count: int = 9) -> list[float]:
    """Return about so many round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step + 0.0 for i in range(first, last + 1)]


def texts(values: Sequence[float]) -> list[str]:
    """Write the numbers of an axis with as many digits as tell them apart."""
    for digits in range(3, 16):
        found = [f"{value:.{digits}g}" for value in values]
        # Also as exact as the step between them, or 0.125 and 0.25 would stand at 0.12 and 0.25.
        step = min((abs(other - one) for one, other in pairwise(values)), default=1.0)
        exact = all(abs(float(text) - value) <= 1e-6 * step for text, value in zip(found, values, strict=True))
        if len(set(found)) == len(values) and exact:
            return found
    return [repr(value) for value in values]


def colour(share: float) -> str:
    """Return the palette's colour at a share from 0 to 1, as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(PALETTE) - 1)
    start = min(int(place), len(PALETTE) - 2)
    ends = [[int(PALETTE[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (start, start + 1)]
    mixed = (round(one + (place - start) * (other - one)) for one, other in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def borders(centres: Sequence[float]) -> list[float]:
    """Return where cells around increasing centres begin and end: one more than there are centres."""
    if len(centres) == 1:
        return [centres[0] - 0.5, centres[0] + 0.5]
    inner = [(one + other) / 2 for one, other in pairwise(centres)]
    return [2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]]
