"""How far restored models are from the ones that a bundle was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith import dtypes
from weightsmith.bundle.description import Error
from weightsmith.bundle.tiles import TILE, tile_starts
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import OutputError
from weightsmith.kernels.convert import widen

_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class _Sums:
    """Sums over a stretch: squares of error, model and change; the largest error; and entries that are the same."""

    error: float = 0.0
    model: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    same: int = 0


def measure(
    restored: Checkpoint, model: Checkpoint, base: Checkpoint, mapper: ThreadMapper, listener: ProgressListener
) -> Error:
    """Compare a restored model with the one that it was made from, in float64.

    Args:
        restored: the restored one.
        model: the other, with the same tensors.
        base: the base of both.
        mapper: what works on tiles.
        listener: told of progress, in bytes of the model.

    Raises:
        OutputError: if a value of the restored one is not finite where the model's is.
        CheckpointError: if one of them cannot be read.
    """

    def sums(piece: tuple[str, int, int]) -> _Sums:
        name, start, stop = piece
        one, other = restored[name].read(start, stop), model[name].read(start, stop)
        listener.advance(other.nbytes)
        same = _same(one, other)
        if not dtypes.is_float(model[name].dtype):
            return _Sums(same=same)
        found, wanted = widen(one, _FLOAT64), widen(other, _FLOAT64)
        # What a model's own values that are not finite differ by is no number; to the bit they are the same or not.
        if not np.isfinite(found).all() or not np.isfinite(wanted).all():
            finite = np.isfinite(wanted)
            found, wanted = np.where(finite, found, 0), np.where(finite, wanted, 0)
            if not np.isfinite(found).all():
                raise OutputError(
                    f"{name} as restored has values that are NaN or infinite, and the model's are finite: keep the "
                    "changes in a wider dtype (--dtype float32), or use the kind lossless"
                )
        error = found - wanted
        change = np.zeros(0)
        if name in base and base[name].shape == model[name].shape and dtypes.is_float(base[name].dtype):
            change = wanted - widen(base[name].read(start, stop), _FLOAT64)
            change = change if np.isfinite(change).all() else change[np.isfinite(change)]
        return _Sums(
            error=float(error @ error),
            model=float(wanted @ wanted),
            change=float(change @ change),
            largest=float(np.abs(error, out=error).max(initial=0.0)),
            same=same,
        )

    def quietly(piece: tuple[str, int, int]) -> _Sums:
        with np.errstate(all="ignore"):
            return sums(piece)

    found = list(mapper(quietly, _pieces(model)))
    return _error(found, model.parameters)


def _sum(values: Sequence[float]) -> float:
    # Exact sums refuse infinity that comes from an overflow.
    return math.fsum(values) if all(map(math.isfinite, values)) else math.inf


def _share(error: float, whole: float) -> float | None:
    """Return a quotient, or None where there is none: of nothing, or beyond float64."""
    share = error / whole if whole else math.nan
    return share if math.isfinite(share) else None


def _pieces(model: Checkpoint) -> Iterator[tuple[str, int, int]]:
    for name, tensor in model.items():
        for start in tile_starts(tensor.size):
            yield name, start, min(start + TILE, tensor.size)


def _same(one: Array, other: Array) -> int:
    """Return how many entries are the same to the bit."""
    bits = f"u{one.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(one).view(bits) == np.ascontiguousarray(other).view(bits)))


def _error(sums: Sequence[_Sums], size: int) -> Error:
    error, model, change = (
        math.sqrt(_sum([getattr(one, part) for one in sums])) for part in ("error", "model", "change")
    )
    return Error(
        relative=_share(error, model),
        of_change=_share(error, change),
        largest=_share(max((one.largest for one in sums), default=0.0), 1),
        equal=sum(one.same for one in sums) / size if size else 1.0,
    )
