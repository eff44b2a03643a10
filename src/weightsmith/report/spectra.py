"""Singular values of task matrices, and whether those of two models span the same space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.architecture.components import TOKEN_TABLES, component
from weightsmith.architecture.stacks import Architecture
from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.evaluate import Evaluator, blocks
from weightsmith.engine.plan import MATRIX_MEMORY
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import ReportError, did_you_mean
from weightsmith.methods.matrices import Decomposition, effective_rank, leading_of, leading_work, sides, spectrum
from weightsmith.methods.matrices import Spectrum as Decomposed
from weightsmith.report.facts import layer_of
from weightsmith.report.findings import ENERGIES, Spectrum, Subspace
from weightsmith.report.measure import BLOCK, Subject

# Matrices whose shorter side is longer are decomposed by a randomised range finder, for so many singular values.
_EXACT_SIDE = 1024
_COMPUTED = 128
# Leading singular vectors that are compared.
_DIRECTIONS = 16
# Singular values that are listed.
_LISTED = 48
_CHOSEN = ("attention_q", "attention_v", "attention_qkv", "attention_o", "mlp_down")
_CHOICE = "queries, values, outputs of attention and the way down of MLPs, in the first, middle and last layer"
# Where a model has none of these, its largest matrices are taken; tables of tokens, and what is larger than this, cost
# more than they tell.
_FALLBACK = "the largest matrix of the first, middle and last layer, or the three largest where there are no layers"
_LARGEST = 1 << 26
METHOD_RULE = (
    f"all singular values where the shorter side is at most {_EXACT_SIDE:,}, else the {_COMPUTED} leading ones by a "
    "randomised range finder with two power passes (Halko, Martinsson and Tropp, 2011)"
)


@dataclass(frozen=True)
class Spectra:
    """What was found of the chosen matrices."""

    spectra: tuple[Spectrum, ...]
    subspaces: tuple[Subspace, ...]


@dataclass(frozen=True)
class Choice:
    """The matrices to be decomposed, and by which rule they were chosen."""

    matrices: tuple[Subject, ...]
    rule: str


def choose(subjects: Sequence[Subject], architecture: Architecture, patterns: Sequence[str]) -> Choice:
    """Return the matrices to be decomposed.

    Args:
        subjects: the tensors that were measured.
        architecture: the base's layers.
        patterns: of names, with ``*`` and ``?``; none for some projections of three layers, or the largest matrices of
            a model that has no such projections.

    Raises:
        ReportError: if no matrix fits a pattern.
    """
    matrices = [one for one in subjects if one.voters and _is_matrix(one)]
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(one.name, pattern) for one in matrices):
                guess = did_you_mean(pattern, (one.name for one in matrices))
                raise ReportError(f"no matrix that base and models share fits {pattern!r}{guess}; '*' fits all")
        fitting = (one for one in matrices if any(fnmatchcase(one.name, pattern) for pattern in patterns))
        return Choice(tuple(fitting), "those whose names fit the patterns that were given")
    layers: dict[tuple[str, int], list[Subject]] = {
        (stack.prefix, stack.indices[place]): []
        for stack in architecture.main
        for place in (0, len(stack.indices) // 2, len(stack.indices) - 1)
    }
    for one in matrices:
        place = architecture.locate(one.name)
        if place is not None and (place.stack.prefix, place.index) in layers:
            layers[place.stack.prefix, place.index].append(one)
    found = tuple(one for layer in layers.values() for one in layer if component(one.name) in _CHOSEN)
    return Choice(found, _CHOICE) if found else Choice(tuple(_largest(layers.values(), matrices)), _FALLBACK)


def _largest(layers: Iterable[Sequence[Subject]], matrices: Sequence[Subject]) -> Iterator[Subject]:
    def some(subjects: Sequence[Subject], count: int) -> list[Subject]:
        small = [one for one in subjects if one.size <= _LARGEST and component(one.name) not in TOKEN_TABLES]
        return sorted(small, key=lambda one: -one.size)[:count]

    found = [one for layer in layers for one in some(layer, 1)]
    yield from found or some(matrices, 3)


def decompose(
    chosen: Sequence[Subject],
    labels: Sequence[str],
    architecture: Architecture,
    mapper: ThreadMapper,
    listener: ProgressListener,
    *,
    exact: bool,
) -> Spectra:
    """Decompose the task matrices of models.

    Args:
        chosen: the matrices; each thread holds one of them at a time, of one model, and fewer threads work where
            several would take more memory than merges allow themselves.
        labels: of the models.
        architecture: the base's layers.
        mapper: what works on matrices, with linear algebra kept to one thread each.
        listener: told of progress, in bytes of the matrices.
        exact: whether all singular values are wanted of all of them.

    Raises:
        CheckpointError: if a tensor cannot be read.
    """

    def one(subject: Subject) -> Spectra:
        found = _of_subject(subject, labels, layer_of(architecture, subject.name), exact)
        listener.advance(subject.nbytes)
        return found

    largest = max((_memory(subject, exact) for subject in chosen), default=1)
    found = list(mapper.limited(min(2 * mapper.threads, max(MATRIX_MEMORY // largest, 1)))(one, chosen))
    return Spectra(
        tuple(row for part in found for row in part.spectra), tuple(row for part in found for row in part.subspaces)
    )


def _is_matrix(subject: Subject) -> bool:
    shape = subject.tensors[0].shape
    return len(shape) >= 2 and min(sides(shape)) > 1


def _is_complete(shape: tuple[int, int], exact: bool) -> bool:
    """Whether all singular values of a matrix are computed."""
    return exact or min(shape) <= max(_EXACT_SIDE, _COMPUTED)


def _memory(subject: Subject, exact: bool) -> int:
    """Return about how many bytes it takes to decompose a matrix: itself, and what the decomposition holds."""
    shape = sides(subject.tensors[0].shape)
    how: Decomposition = "exact" if _is_complete(shape, exact) else "randomized"
    rank = min(shape) if how == "exact" else _COMPUTED
    return (subject.size + leading_work(*shape, rank, how).elements) * 4


def _of_subject(subject: Subject, labels: Sequence[str], layer: str, exact: bool) -> Spectra:
    rows, columns = sides(subject.tensors[0].shape)
    count = min(_DIRECTIONS, rows, columns)
    spectra, spaces = [], {}
    for slot, model in enumerate(subject.members[: subject.voters]):
        matrix = _task_matrix(subject, slot + 1).reshape(rows, columns)
        if not np.isfinite(matrix).all():
            # Its NaN are told of; it has no singular values.
            continue
        complete = _is_complete((rows, columns), exact)
        found = spectrum(xp, matrix) if complete else spectrum(xp, matrix, _COMPUTED, "randomized")
        spectra.append(_row(subject.name, layer, labels[model], matrix, found, complete))
        if found.rank(xp) >= count:
            left, _, right = leading_of(xp, matrix, found, count)
            spaces[model] = (left.astype(np.float64), right.astype(np.float64))
    subspaces = [
        Subspace(
            tensor=subject.name,
            first=labels[a],
            second=labels[b],
            rank=count,
            left=_shared(spaces[a][0].T @ spaces[b][0], count),
            right=_shared(spaces[a][1] @ spaces[b][1].T, count),
            chance_left=count / rows,
            chance_right=count / columns,
        )
        for a, b in itertools.combinations(spaces, 2)
    ]
    return Spectra(tuple(spectra), tuple(subspaces))


def _task_matrix(subject: Subject, slot: int) -> Array:
    """Return the task vector of one of a subject's models: ``[size]`` float32."""
    base, model = subject.tensors[0], subject.tensors[slot]
    evaluator = Evaluator()
    evaluator.prepare(base)
    evaluator.prepare(model)
    found = np.empty(subject.size, np.float32)
    working = np.dtype(np.float64 if np.dtype(np.float64) in (base.dtype, model.dtype) else np.float32)
    with np.errstate(all="ignore"):
        for start, stop in blocks(subject.size, 1, BLOCK):
            values = evaluator.values(model, start, stop, working)
            found[start:stop] = values - evaluator.values(base, start, stop, working)
    return found


def _shared(product: Array, count: int) -> float:
    return min(float(np.sum(product * product)) / count, 1.0)


def _row(name: str, layer: str, label: str, matrix: Array, found: Decomposed, complete: bool) -> Spectrum:
    values = np.asarray(found.values, np.float64)
    flat = matrix.reshape(-1)
    parts = (flat[start:stop].astype(np.float64) for start, stop in blocks(flat.size, 1, BLOCK))
    energy = math.fsum(float(part @ part) for part in parts)
    kept = values[: found.rank(xp)] if energy else values[:0]
    sums = np.cumsum(np.square(values))
    indices = sorted({round(math.exp(math.log(len(values)) * i / (_LISTED - 1))) for i in range(_LISTED)})
    return Spectrum(
        tensor=name,
        layer=layer,
        component=component(name),
        model=label,
        shape=(matrix.shape[0], matrix.shape[1]),
        norm=math.sqrt(energy),
        indices=tuple(indices),
        values=tuple(float(values[i - 1]) for i in indices),
        effective_rank=effective_rank(xp, kept) if complete and len(kept) else None,
        stable_rank=energy / float(values[0]) ** 2 if len(kept) else None,
        ranks=tuple(_reaching(sums, energy, share) for share in ENERGIES),
        energies=ENERGIES,
        computed=len(values),
        exact=complete,
    )


def _reaching(sums: Array, energy: float, share: float) -> int | None:
    """Return how many leading values hold a share of the energy, None where those that are known do not."""
    # What is left of a whole sum after rounding, of singular values found in float32, is no reason to take more.
    below = int(np.count_nonzero(sums < share * energy * (1 - 1e-6)))
    return below + 1 if below < len(sums) and energy > 0 else None
