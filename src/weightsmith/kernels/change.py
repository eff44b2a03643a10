"""What is left where one array is taken from another, refused where it is no number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weightsmith.kernels.convert import Array


def finite_change(values: Array, base: Array, refuse: Callable[[bool, str], Exception]) -> Array:
    """Return ``values - base``.

    Args:
        values: ``[n]``, float32 or float64.
        base: ``[n]`` of the same dtype.
        refuse: makes the error: told whether the base is to blame, and what is wrong with it.

    Raises:
        Exception: the one that ``refuse`` makes, if the change is not finite.
    """
    with np.errstate(all="ignore"):
        change: Array = values - base
        # A sum is the cheapest test, and says nothing where it overflows.
        if np.isfinite(change.sum()) or np.isfinite(change).all():
            return change
        by_base = not bool(np.isfinite(base).all())
        count = np.count_nonzero(~np.isfinite(base if by_base else values))
    what = f"{count:,} values that are NaN or infinite" if count else "a change that is beyond float32"
    raise refuse(by_base, what)
