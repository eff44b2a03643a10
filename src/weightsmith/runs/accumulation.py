"""The arithmetic of running averages: what one more checkpoint makes of what is kept.

What is kept is a mean in float32 or float64, and for SWAG the sum of squared deviations from it. One step is done in
float64 and rounded once, whatever the checkpoint's dtype: an average that is kept in bfloat16 stands still as soon as a
checkpoint's share of the difference is below half a unit in its last place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.errors import MethodError, did_you_mean, shown

Kind = Literal["uniform", "ema", "swag"]
KINDS = ("uniform", "ema", "swag")
ACCUMULATORS = ("float32", "float64")
# Above this decay a float32 accumulator would lose differences of more than 2^-14 of a weight.
_LARGEST_DECAY = 0.999


@dataclass(frozen=True)
class Averaging:
    """What kind of average is kept.

    Attributes:
        kind: ``uniform``: the mean of all checkpoints (SWA, Izmailov et al. 2018, arXiv:1803.05407). ``ema``: the
            exponential moving average ``m_t = d m_(t-1) + (1-d) x_t``, begun with ``m_1 = x_1``. ``swag``: the mean,
            and the variance of each weight (SWAG-diagonal, Maddox et al. 2019, arXiv:1902.02476).
        decay: of ``ema``, d: from 0 to below 1.
        bias_correction: of ``ema``, whether it begins with ``m_0 = 0`` and is divided by ``1 - d^t``, as Adam's moments
            are (Kingma and Ba 2015, arXiv:1412.6980, section 3): early checkpoints then have the shares that the decay
            gives them, and the first none beyond its own.
    """

    kind: Kind = "uniform"
    decay: float | None = None
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(self.kind, KINDS) if isinstance(self.kind, str) else ""
            raise MethodError(f"there is no running average {shown(self.kind)}{near}; there are {', '.join(KINDS)}")
        if self.kind != "ema":
            if self.decay is not None or self.bias_correction:
                raise MethodError(f"{self.kind} has no decay and no bias correction; ema has them: ema:0.999")
        elif not _is_number(self.decay) or not 0 <= self.decay < 1:  # type: ignore[operator]
            raise MethodError(
                f"the decay of ema is {shown(self.decay)}; a number from 0 to below 1 is needed, as in ema:0.999"
            )

    @classmethod
    def parse(cls, text: str, *, bias_correction: bool = False) -> Averaging:
        """Read ``uniform``, ``ema:DECAY`` or ``swag``.

        Raises:
            MethodError: if it is none of these.
        """
        kind, _, decay = text.partition(":")
        if not decay and ":" not in text:
            return cls(kind, None, bias_correction)  # type: ignore[arg-type]
        try:
            return cls(kind, float(decay), bias_correction)  # type: ignore[arg-type]
        except ValueError:
            raise MethodError(
                f"the decay of {text!r} is no number; write one from 0 to below 1, as in ema:0.999"
            ) from None

    def __str__(self) -> str:
        """The text that :meth:`parse` reads, and what it does not know."""
        text = self.kind if self.decay is None else f"{self.kind}:{self.decay:g}"
        return f"{text} with bias correction" if self.bias_correction else text

    @property
    def keeps_squares(self) -> bool:
        """Whether squared deviations are kept beside the mean."""
        return self.kind == "swag"

    @property
    def accumulator(self) -> str:
        """The dtype that an average of 16-bit or float32 checkpoints needs.

        float64 for decays above 0.999: in float32 a checkpoint whose share is ``1 - d`` changes nothing where it
        differs by less than ``2^-24 / (1 - d)`` of the weight.
        """
        return "float64" if self.decay is not None and self.decay > _LARGEST_DECAY else "float32"

    def share(self, count: int) -> float:
        """Return the share of the newest checkpoint in the average of ``count``, with it: from above 0 to 1."""
        if count == 1:
            return 1.0
        if self.decay is None:
            return 1.0 / count
        if not self.bias_correction:
            return 1.0 - self.decay
        # (1 - d) / (1 - d^t): the divided average, kept as such. expm1 and log1p keep digits where d is almost 1.
        return (1.0 - self.decay) / -math.expm1(count * math.log(self.decay)) if self.decay else 1.0


def begun(values: Array) -> Array | None:
    """Return the mean of the first checkpoint: its values; None if one of them is NaN."""
    return None if np.isnan(values).any() else values


def moved(mean: Array, values: Array, share: float) -> Array | None:
    """Return the mean with one more checkpoint: ``mean + share (x - mean)``.

    Args:
        mean: ``[n]`` float64.
        values: x, ``[n]`` float64.
        share: the checkpoint's share.

    Returns:
        ``[n]`` float64; None if it would not be finite. An infinity that both have, as in a mask, stays.
    """
    with np.errstate(invalid="ignore"):
        difference = values - mean
    if not np.isfinite(difference).all():
        difference[values == mean] = 0.0
        if not np.isfinite(difference).all():
            return None
    return mean + share * difference


def spread(squares: Array, mean: Array, after: Array, values: Array) -> Array:
    """Return the sum of squared deviations with one more checkpoint.

    ``M2 + (x - mean) (x - mean')`` (Welford 1962): a sum of what is never below 0, where the paper's difference of
    ``mean(x^2)`` and ``mean(x)^2`` loses all digits that the two have in common.

    Args:
        squares: M2, ``[n]`` float64.
        mean: the mean before, ``[n]`` float64.
        after: the mean with the checkpoint, ``[n]`` float64.
        values: x, ``[n]`` float64.
    """
    with np.errstate(invalid="ignore"):
        product = (values - mean) * (values - after)
    if not np.isfinite(product).all():
        # Infinities that all checkpoints have, as in a mask, do not differ.
        product[values == mean] = 0.0
    return squares + np.maximum(product, 0.0)  # type: ignore[no-any-return]


def variance(squares: Array, count: int) -> Array:
    """Return the variance of each weight: ``M2 / (n - 1)``, not below 0; the paper divides by n.

    Args:
        squares: M2, ``[n]`` float64.
        count: how many checkpoints there are, at least 2.
    """
    return np.maximum(squares, 0.0) / (count - 1)


def accumulator_of(averaging: Averaging, name: str | None, dtypes: list[DType]) -> DType:
    """Return the dtype in which an average is kept.

    Args:
        averaging: what kind it is.
        name: ``float32`` or ``float64``; None for what it needs.
        dtypes: the floating dtypes of the checkpoint.

    Raises:
        MethodError: if it is another dtype.
    """
    if name is not None and name not in ACCUMULATORS:
        raise MethodError(f"an average is kept in float32 or float64, not in {shown(name)}")
    if name is None:
        name = "float64" if np.dtype(np.float64) in dtypes else averaging.accumulator
    return np.dtype(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
