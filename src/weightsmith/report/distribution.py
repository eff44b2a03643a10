"""How the entries of task vectors are distributed, and whether models changed the same entries most.

Where not all entries are looked at, one is taken from each of :data:`SAMPLE` equally long stretches of a tensor, at a
place that SplitMix64 draws from the stretch's number: spread over the tensor, in no step with its rows, and the same
on every machine. A tensor of no more entries is looked at whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.report.findings import TOPS, Histogram, Overlap, Scope

# Entries that are looked at in each tensor.
SAMPLE = 1 << 16
SAMPLE_RULE = (
    f"of every tensor of more than {SAMPLE:,} entries one from each of {SAMPLE:,} equal stretches, at a place drawn by "
    "SplitMix64; smaller tensors whole"
)
# Two bins an octave. The odd bounds are powers of the root of 2 cut to nine bits: bins are read off bit patterns.
_HALF = 0x350000
_ROOT = 1 + _HALF / (1 << 23)
_BINS = 512
# Patterns of magnitudes, by their first sixteen bits and by the rest.
_COARSE, _FINE = 1 << 16, 1 << 15


def sample_places(size: int, start: int, stop: int) -> Array | slice:
    """Return which entries of a stretch of a tensor are in its sample.

    Args:
        size: entries of the tensor.
        start: the stretch's first entry.
        stop: the one after its last.

    Returns:
        Places within the stretch: int64 ``[k]``, rising, or a slice of all.
    """
    if size <= SAMPLE:
        return slice(None)
    first, last = start * SAMPLE // size, min(-(-stop * SAMPLE // size), SAMPLE)
    numbers = np.arange(first, last + 1, dtype=np.int64)
    bounds = numbers * (size // SAMPLE) + numbers * (size % SAMPLE) // SAMPLE
    drawn = _split_mix(numbers[:-1].astype(np.uint64)) % np.diff(bounds).astype(np.uint64)
    places = bounds[:-1] + drawn.astype(np.int64)
    return places[(places >= start) & (places < stop)] - start


def _split_mix(numbers: Array) -> Array:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): uint64 in, uint64 out."""
    with np.errstate(over="ignore"):
        mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: Array = mixed ^ (mixed >> np.uint64(31))
    return found


@dataclass(frozen=True)
class Entries:
    """What is known of the entries of task vectors. It adds up over tensors.

    Numbers of entries are scaled to the whole tensor where a sample was looked at.

    Attributes:
        looked_at: ``[models]``, entries that were looked at; not scaled.
        entries: ``[models]``, entries that there are.
        bins: ``[models, 2, 512]``, positive and negative values by magnitude.
        powers: ``[models, 4]``, sums of the first four powers.
        sets: ``[pairs, tops, 2]``, entries of the sets of the largest of either model.
        common: ``[pairs, tops]``, entries in both sets.
        chance: ``[pairs, tops]``, the same of sets drawn at random.
        compared: ``[pairs]``, entries of the tensors that both hold.
    """

    looked_at: Array
    entries: Array
    bins: Array
    powers: Array
    sets: Array
    common: Array
    chance: Array
    compared: Array

    @classmethod
    def none(cls, models: int) -> Entries:
        """Return what is known of no entries."""
        pairs, tops = models * (models - 1) // 2, len(TOPS)
        shapes = ((), (), (2, _BINS), (4,))
        own = [np.zeros((models, *shape)) for shape in shapes]
        return cls(*own, *(np.zeros((pairs, *shape)) for shape in ((tops, 2), (tops,), (tops,), ())))

    def add_values(self, other: Entries, models: Sequence[int]) -> None:
        """Add, in place, what histograms are made of; ``other`` is about some of the models."""
        for name in ("looked_at", "entries", "bins", "powers"):
            getattr(self, name)[models] += getattr(other, name)

    def add_sets(self, other: Entries, pairs: Sequence[int]) -> None:
        """Add, in place, what overlaps are made of; ``other`` is about some of the pairs."""
        for name in ("sets", "common", "chance", "compared"):
            getattr(self, name)[pairs] += getattr(other, name)


def sampled(values: Array, size: int) -> Entries:
    """Return what a sample tells of a tensor's entries.

    Args:
        values: ``[models, k]`` float32, entries of the task vectors that are finite in all models.
        size: entries of the tensor that the sample stands for.
    """
    found = Entries.none(len(values))
    if not values.shape[1]:
        return found
    _count(found, values)
    magnitudes = np.abs(values)
    thresholds = np.empty((len(values), len(TOPS)), np.float32)
    ranks = [values.shape[1] - _largest(values.shape[1], top) for top in TOPS]
    for own, one in zip(thresholds, magnitudes, strict=True):
        own[:] = np.partition(one, ranks)[ranks]
    _intersect(found, magnitudes, thresholds)
    return _scaled(found, values.shape[1], size)


def counted(blocks: Callable[[], Iterable[Array]], models: int) -> Entries:
    """Return the same of all entries, which are gone through three times.

    Args:
        blocks: gives ``[models, k]`` float32 at a time, entries that are finite in all models.
        models: how many there are.
    """
    found = Entries.none(models)
    coarse = np.zeros((models, _COARSE), np.int64)
    size = 0
    for values in blocks():
        size += values.shape[1]
        _count(found, values)
        for own, patterns in zip(coarse, _patterns(values), strict=True):
            own += np.bincount(patterns >> 15, minlength=_COARSE)
    if not size:
        return found
    # The bin that each threshold lies in, and its rank within the bin, counted from the top.
    above = np.cumsum(coarse[:, ::-1], axis=1)
    ranks = [_largest(size, top) for top in TOPS]
    bins = [[_COARSE - 1 - int(np.searchsorted(own, rank)) for rank in ranks] for own in above]
    fine = np.zeros((models, len(TOPS), _FINE), np.int64)
    for values in blocks():
        for k, patterns in enumerate(_patterns(values)):
            high = patterns >> 15
            for place, wanted in enumerate(bins[k]):
                fine[k, place] += np.bincount(patterns[high == wanted] & (_FINE - 1), minlength=_FINE)
    thresholds = np.empty((models, len(TOPS)), np.uint32)
    for k, place in np.ndindex(models, len(TOPS)):
        within = ranks[place] - (int(above[k, _COARSE - 2 - bins[k][place]]) if bins[k][place] < _COARSE - 1 else 0)
        low = _FINE - 1 - int(np.searchsorted(np.cumsum(fine[k, place, ::-1]), within))
        thresholds[k, place] = bins[k][place] << 15 | low
    for values in blocks():
        _intersect(found, np.abs(values), thresholds.view(np.float32))
    return _scaled(found, size, size)


def _largest(size: int, top: float) -> int:
    """Return how many entries a share is, at least one."""
    return max(math.ceil(size * top), 1)


def _patterns(values: Array) -> Array:
    """Return the bits of magnitudes, which order as they do."""
    found: Array = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return found


def _count(found: Entries, values: Array) -> None:
    """Add values to bins and powers."""
    found.looked_at[:] += values.shape[1]
    for k, (one, patterns) in enumerate(zip(values, _patterns(values), strict=True)):
        bins = (patterns >> 23) * 2 + ((patterns & 0x7FFFFF) >= _HALF)
        # Positive values, negative values, and zeros behind them.
        kinds = np.where(one > 0, bins, bins + _BINS)
        kinds[one == 0] = 2 * _BINS
        found.bins[k] += np.bincount(kinds, minlength=2 * _BINS + 1)[: 2 * _BINS].reshape(2, _BINS)
        wide = one.astype(np.float64)
        square = wide * wide
        found.powers[k] += (wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum())


def _intersect(found: Entries, magnitudes: Array, thresholds: Array) -> None:
    """Add the sizes of the sets of the largest, and of their intersections."""
    for place in range(len(TOPS)):
        sets = [(one >= threshold) & (one > 0) for one, threshold in zip(magnitudes, thresholds[:, place], strict=True)]
        sizes = [int(np.count_nonzero(one)) for one in sets]
        for number, (a, b) in enumerate(itertools.combinations(range(len(sets)), 2)):
            found.sets[number, place] += (sizes[a], sizes[b])
            found.common[number, place] += np.count_nonzero(sets[a] & sets[b])


def _scaled(found: Entries, looked_at: int, size: int) -> Entries:
    """Scale what was counted among some entries to all of a tensor's."""
    scale = size / looked_at
    return Entries(
        looked_at=found.looked_at,
        entries=np.full_like(found.entries, size),
        bins=found.bins * scale,
        powers=found.powers * scale,
        sets=found.sets * scale,
        common=found.common * scale,
        chance=found.sets[..., 0] * found.sets[..., 1] / looked_at * scale,
        compared=np.full_like(found.compared, size),
    )


def overlaps(scope: Scope, labels: Sequence[str], found: Entries) -> list[Overlap]:
    """Return a row for each two models and each share of the largest entries."""
    rows = []
    for number, (first, second) in enumerate(itertools.combinations(labels, 2)):
        entries = float(found.compared[number])
        if not entries:
            continue
        for place, top in enumerate(TOPS):
            one, other = found.sets[number, place].tolist()
            smaller = min(one, other)
            rows.append(
                Overlap(
                    scope=scope,
                    first=first,
                    second=second,
                    top=top,
                    overlap=float(found.common[number, place]) / smaller if smaller else None,
                    chance=float(found.chance[number, place]) / smaller if smaller else None,
                    sizes=(one / entries, other / entries),
                )
            )
    return rows


def histograms(scope: Scope, labels: Sequence[str], found: Entries) -> list[Histogram]:
    """Return a row for each model."""
    rows = []
    for k, label in enumerate(labels):
        entries = float(found.entries[k])
        if not entries:
            continue
        used = np.flatnonzero(found.bins[k].sum(axis=0))
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        bins = found.bins[k, :, first:last] / entries
        edges = [_edge(place) for place in range(first, last + 1)] if used.size else []
        mean, second, third, fourth = (found.powers[k] / entries).tolist()
        variance = max(second - mean * mean, 0.0)
        central = fourth - 4 * mean * third + 6 * mean * mean * second - 3 * mean**4
        rows.append(
            Histogram(
                scope=scope,
                model=label,
                entries=int(found.looked_at[k]),
                weight=entries / float(found.looked_at[k]),
                zero=max(1.0 - float(bins.sum()), 0.0),
                edges=tuple(edges),
                positive=tuple(bins[0].tolist()),
                negative=tuple(bins[1].tolist()),
                mean=mean,
                deviation=math.sqrt(variance),
                kurtosis=central / variance**2 - 3 if variance**2 > 0 else None,
                quantiles=tuple(_reached(bins.sum(axis=0), edges, top) for top in TOPS),
                tops=TOPS,
            )
        )
    return rows


def _edge(place: int) -> float:
    """Return the lower bound of a bin; values below the least normal float32 are in the first two."""
    return math.ldexp(_ROOT if place % 2 else 1.0, place // 2 - 127)


def _reached(shares: Array, edges: Sequence[float], top: float) -> float:
    """Return the magnitude that a share of all entries reach.

    Between the bounds of its bin, the logarithm of the share beyond is taken to fall evenly over that of the magnitude:
    within 3% for normal and Laplace distributions (inferred). In the highest bin entries are spread evenly instead.
    """
    beyond = 0.0
    for place in range(len(shares) - 1, -1, -1):
        reaching = beyond + shares[place]
        if reaching >= top:
            part = math.log(top / beyond) / math.log(reaching / beyond) if beyond > 0.0 else top / reaching
            return float(edges[place + 1] * (edges[place] / edges[place + 1]) ** part)
        beyond = reaching
    return 0.0
