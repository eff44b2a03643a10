"""How two checkpoints differ, tensor by tensor and layer by layer, streaming."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.architecture.stacks import analyse
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.engine.backend import SWEEP
from weightsmith.engine.evaluate import Evaluator, blocks
from weightsmith.engine.threads import ThreadMapper, default_threads


@dataclass(frozen=True)
class Measures:
    """What two tensors, or two groups of tensors, differ by. All arithmetic is in float64.

    Attributes:
        size: number of entries on each side.
        norm: Euclidean norm of B - A.
        norm_a: Euclidean norm of A.
        norm_b: Euclidean norm of B.
        cosine: cosine of the angle between A and B; None where one of them is zero.
        equal: share of entries with the same value (two NaN count as the same); 1 where there are none.
        largest: largest magnitude of an entry of B - A.
        nonfinite: entries that are NaN or infinite in A or B; they take no part in the norms.
    """

    size: int
    norm: float
    norm_a: float
    norm_b: float
    cosine: float | None
    equal: float
    largest: float
    nonfinite: int

    @property
    def relative(self) -> float | None:
        """The norm of the difference over the norm of A; None where A is zero."""
        return self.norm / self.norm_a if self.norm_a > 0 else None


@dataclass(frozen=True)
class Comparison:
    """How checkpoint B differs from checkpoint A.

    Attributes:
        tensors: name -> measures, for tensors of the same shape on both sides.
        layers: layer, or name of a tensor outside layers -> measures.
        total: all of them together.
        only_a: names that B lacks.
        only_b: names that A lacks.
        shapes: name -> both shapes, where they differ.
        dtypes: name -> both dtypes, where they differ; values are compared all the same.
    """

    tensors: Mapping[str, Measures]
    layers: Mapping[str, Measures]
    total: Measures
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[str, tuple[str, str]]

    @property
    def identical(self) -> bool:
        """Whether names, shapes, dtypes and all values are the same."""
        differing = self.only_a or self.only_b or self.shapes or self.dtypes
        return not differing and self.total.equal == 1.0

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""

        def rows(table: Mapping[str, Measures]) -> dict[str, Any]:
            return {name: {**asdict(row), "relative": row.relative} for name, row in table.items()}

        return {
            "identical": self.identical,
            "total": rows({"total": self.total})["total"],
            "layers": rows(self.layers),
            "tensors": rows(self.tensors),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": {name: [list(a), list(b)] for name, (a, b) in self.shapes.items()},
            "dtypes": {name: list(pair) for name, pair in self.dtypes.items()},
        }


@dataclass(frozen=True)
class _Sums:
    """Sums over a stretch, which add up to those of a tensor, a layer, a model."""

    size: int = 0
    difference: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    equal: int = 0
    largest: float = 0.0
    nonfinite: int = 0


def compare(one: Checkpoint, other: Checkpoint, *, threads: int | None = None) -> Comparison:
    """Compare two checkpoints. Memory does not depend on the size of their tensors.

    Args:
        one: A.
        other: B.
        threads: how many threads to use; by default one per core.
    """
    common = [name for name in one if name in other]
    alike = [name for name in common if one[name].shape == other[name].shape]
    stretches = [(name, start, stop) for name in alike for start, stop in blocks(one[name].size, 1, 4 * SWEEP)]

    def visit(stretch: tuple[str, int, int]) -> tuple[str, _Sums]:
        name, start, stop = stretch
        return name, _sums(_values(one[name], start, stop), _values(other[name], start, stop))

    parts: dict[str, list[_Sums]] = {name: [] for name in alike}
    with ThreadMapper(threads or default_threads()) as mapper:
        for name, sums in mapper(visit, stretches):
            parts[name].append(sums)
    per_tensor = {name: _add(found) for name, found in parts.items()}
    architecture = analyse(one, one.config)
    groups: dict[str, list[_Sums]] = {}
    for name, sums in per_tensor.items():
        place = architecture.locate(name)
        key = name if place is None else place.stack.name(place.index, "")
        groups.setdefault(key, []).append(sums)
    return Comparison(
        tensors={name: _measures(sums) for name, sums in per_tensor.items()},
        layers={key: _measures(_add(sums)) for key, sums in groups.items()},
        total=_measures(_add(per_tensor.values())),
        only_a=tuple(name for name in one if name not in other),
        only_b=tuple(name for name in other if name not in one),
        shapes={name: (one[name].shape, other[name].shape) for name in common if name not in per_tensor},
        dtypes={
            name: (dtypes.name_of(one[name].dtype), dtypes.name_of(other[name].dtype))
            for name in common
            if one[name].dtype != other[name].dtype
        },
    )


def _values(tensor: Tensor, start: int, stop: int) -> Array:
    """Read a stretch as float64; integers beyond 2**53 lose their last digits."""
    if dtypes.is_float(tensor.dtype):
        return np.asarray(Evaluator().values(tensor, start, stop, np.dtype(np.float64)))
    values = tensor.read(start, stop)
    return np.abs(values).astype(np.float64) if values.dtype.kind == "c" else values.astype(np.float64)


def _sums(a: Array, b: Array) -> _Sums:
    finite = np.isfinite(a) & np.isfinite(b)
    nonfinite = a.size - int(np.count_nonzero(finite))
    equal = int(np.count_nonzero((a == b) | (np.isnan(a) & np.isnan(b))))
    if nonfinite:
        a, b = a[finite], b[finite]
    difference = b - a
    return _Sums(
        size=a.size + nonfinite,
        difference=float(difference @ difference),
        a=float(a @ a),
        b=float(b @ b),
        product=float(a @ b),
        equal=equal,
        largest=float(np.abs(difference).max(initial=0.0)),
        nonfinite=nonfinite,
    )


def _add(parts: Iterable[_Sums]) -> _Sums:
    found = list(parts)
    return _Sums(
        size=sum(part.size for part in found),
        difference=math.fsum(part.difference for part in found),
        a=math.fsum(part.a for part in found),
        b=math.fsum(part.b for part in found),
        product=math.fsum(part.product for part in found),
        equal=sum(part.equal for part in found),
        largest=max((part.largest for part in found), default=0.0),
        nonfinite=sum(part.nonfinite for part in found),
    )


def _measures(sums: _Sums) -> Measures:
    lengths = math.sqrt(sums.a) * math.sqrt(sums.b)
    return Measures(
        size=sums.size,
        norm=math.sqrt(sums.difference),
        norm_a=math.sqrt(sums.a),
        norm_b=math.sqrt(sums.b),
        cosine=max(-1.0, min(1.0, sums.product / lengths)) if lengths > 0 else None,
        equal=sums.equal / sums.size if sums.size else 1.0,
        largest=sums.largest,
        nonfinite=sums.nonfinite,
    )
