"""What a combination of adapters came to: ranks and errors, by layer and in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer of a result.

    Attributes:
        module: its name.
        shape: the weight's shape.
        ranks: each adapter's rank: 0 where it does not change the layer, None where its change has no low rank.
        rank: the rank that was kept.
        norm: Frobenius norm of what the method gives.
        error: Frobenius norm of what is lost of it, by a smaller rank and by rounding.
        sum_norm: norm of the true weighted sum of the deltas, where the method gives another thing.
        from_sum: norm of the difference from it.
        cosine: of adapters whose fixed factors should be orthogonal: the largest cosine between two of them.
    """

    module: str
    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    rank: int
    norm: float
    error: float
    sum_norm: float | None = None
    from_sum: float | None = None
    cosine: float | None = None

    @property
    def relative(self) -> float:
        """The error as a share of the norm; 0 of nothing."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def relative_to_sum(self) -> float | None:
        """How far from the true weighted sum, as a share of that."""
        return _share([self.from_sum], [self.sum_norm])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"relative_error": self.relative, "relative_to_sum": self.relative_to_sum}


@dataclass(frozen=True)
class Report:
    """What a combination came to.

    Attributes:
        method: the method's name.
        parameters: its parameters.
        adapters: the adapters' names.
        weights: what each was weighted with.
        layers: every layer.
        notes: what a person should know.
    """

    method: str
    parameters: Mapping[str, Any]
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """What is lost in all layers together, as a share of what the method gives."""
        return _share([layer.error for layer in self.layers], [layer.norm for layer in self.layers]) or 0.0

    @property
    def from_sum(self) -> float | None:
        """How far all layers together are from the true weighted sum of the deltas, as a share of that."""
        return _share([layer.from_sum for layer in self.layers], [layer.sum_norm for layer in self.layers])

    @property
    def cosine(self) -> float | None:
        """The largest cosine between fixed factors, of all layers."""
        return max((layer.cosine for layer in self.layers if layer.cosine is not None), default=None)

    @property
    def ranks(self) -> tuple[int, int]:
        """The least and the greatest rank that was kept."""
        found = [layer.rank for layer in self.layers]
        return (min(found), max(found)) if found else (0, 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "method": self.method,
            "parameters": {name: list(v) if isinstance(v, tuple) else v for name, v in self.parameters.items()},
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "ranks": list(self.ranks),
            "relative_error": self.error,
            "relative_to_sum": self.from_sum,
            "cosine": self.cosine,
            "layers": [layer.to_json() for layer in self.layers],
            "notes": list(self.notes),
        }


def _share(parts: Sequence[float | None], wholes: Sequence[float | None]) -> float | None:
    known = [(part, whole) for part, whole in zip(parts, wholes, strict=True) if part is not None and whole is not None]
    whole = math.hypot(*(one for _, one in known))
    return math.hypot(*(part for part, _ in known)) / whole if known and whole else None


Reporter = Callable[[], Sequence[LayerReport]]
