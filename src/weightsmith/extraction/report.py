"""What an extraction lost, matrix by matrix and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """What is kept of one matrix.

    Attributes:
        name: its name.
        shape: its shape.
        rank: the rank of what is kept, or None where it is no product of factors.
        nbytes: bytes that it takes in the adapter.
        energy: the share of the sum of squares of the change that is kept: ``1 - error^2``.
        error: the Frobenius norm of what is left of the change, in units of that of the change.
        weight_error: the same in units of that of the fine-tune's weight.
        effective_rank: of the change: the exponential of the entropy of its singular values divided by their sum; None
            where not all of them were computed.
        seconds: how long it took to read and make it, where this run did.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    nbytes: int
    energy: float
    error: float
    weight_error: float
    effective_rank: float | None
    seconds: float | None


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the fine-tune changed and the adapter does not hold.

    Attributes:
        name: its name.
        shape: its shape in the fine-tune.
        reason: why it was left out.
        norm: the Frobenius norm of its change; of its values where the base has no such tensor.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    norm: float


@dataclass(frozen=True)
class Report:
    """What an extraction lost.

    Attributes:
        matrices: what is kept of each matrix, in the order of the fine-tune's tensors.
        whole: the tensors that are kept as they are: these lose nothing.
        left_out: those that are left out; the error counts them.
        error: the norm of all that is lost, in units of that of all changes.
        weight_error: the same in units of the norm of all tensors that changed.
        nbytes: bytes of the adapter's tensors.
        changed_bytes: bytes that the changed tensors take in the fine-tune.
        unchanged: how many tensors the fine-tune has as the base has them.
    """

    matrices: tuple[Matrix, ...]
    whole: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    error: float
    weight_error: float
    nbytes: int
    changed_bytes: int
    unchanged: int

    @property
    def energy(self) -> float:
        """The share of the sum of squares of all changes that is kept."""
        return 1 - self.error**2

    def to_json(self, *, seconds: bool = True) -> dict[str, Any]:
        """Return it as JSON values.

        Args:
            seconds: whether to tell times, which differ from run to run.
        """
        return {
            "error": self.error,
            "weight_error": self.weight_error,
            "energy": self.energy,
            "bytes": self.nbytes,
            "changed_bytes": self.changed_bytes,
            "unchanged_tensors": self.unchanged,
            "matrices": [
                {
                    "name": one.name,
                    "shape": list(one.shape),
                    "rank": one.rank,
                    "bytes": one.nbytes,
                    "energy": one.energy,
                    "error": one.error,
                    "weight_error": one.weight_error,
                    "effective_rank": one.effective_rank,
                    **({"seconds": one.seconds} if seconds else {}),
                }
                for one in self.matrices
            ],
            "whole": list(self.whole),
            "left_out": [
                {"name": one.name, "shape": list(one.shape), "reason": one.reason, "norm": one.norm}
                for one in self.left_out
            ],
        }

    @property
    def summary(self) -> str:
        """What it comes to, in one line."""
        count = len(self.matrices)
        lost = f"{100 * self.error:.3g} % of the change is lost ({100 * self.weight_error:.3g} % of the weights)"
        out = f", {len(self.left_out)} left out" if self.left_out else ""
        apart = f"{count} matri{'x' if count == 1 else 'ces'} taken apart"
        return f"{apart}, {len(self.whole)} tensors kept whole{out}: {lost}"


def share(part: float, whole: float) -> float:
    """Return the root of a quotient of two sums of squares; 0 of nothing."""
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else 0.0
