"""Sums that add up from stretches to tensors, layers and models, and the rows that are made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.kernels.measure import Layout, Measured
from weightsmith.report.findings import Agreement, Change, Composition, Conflict, Scope

_OF_MODELS = ("entries", "base", "across", "square", "mass", "moved", "against")
_OF_PAIRS = ("compared", "product", "first", "second", "equal", "both", "one_way", "together", "apart")


@dataclass(frozen=True)
class Quantities:
    """Where each sum stands in a vector of all of them.

    Attributes:
        labels: of the models, in order; the merged result last, if there is one.
        voters: how many of them are models that were, or are to be, merged.
    """

    labels: tuple[str, ...]
    voters: int

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Each two models that are to be merged."""
        return list(itertools.combinations(range(self.voters), 2))

    def places_of_pairs(self, models: Sequence[int]) -> list[int]:
        """Return where the pairs of some models stand among the pairs of all."""
        return _places_of_pairs(self.voters, tuple(models))

    @cached_property
    def places(self) -> dict[str, slice]:
        """Name -> where its numbers stand.

        Of each model: ``entries``, ``base`` (its sum of squares), ``across`` (its product with the task vector),
        ``square`` (of the task vector), ``mass``, ``moved``, ``against`` (twice). Of each pair: ``compared`` entries,
        ``product``, ``first`` and ``second`` (their squares), ``equal``, ``both``, ``one_way``, ``together`` (the mass
        of their sum), ``apart`` (the two masses). Of tensors that all models hold: ``shared`` entries,
        ``shared_mass``, ``total``, ``several``, ``contested``; and ``gram``, the products of each two task vectors,
        the result's included.
        """
        n, p = len(self.labels), len(self.pairs)
        sizes = dict.fromkeys(_OF_MODELS, n)
        sizes |= dict.fromkeys(_OF_PAIRS, p)
        sizes |= dict.fromkeys(("shared", "shared_mass", "total", "several", "contested"), 1)
        sizes["gram"] = n * n
        stops = list(itertools.accumulate(sizes.values()))
        return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return int(self.places["gram"].stop)

    def of(self, numbers: Array, name: str) -> Array:
        """Return the numbers of a name: a view."""
        view: Array = numbers[self.places[name]]
        return view

    def spread(self, layout: Layout, members: Sequence[int], found: Measured) -> tuple[Array, Array]:
        """Put what was measured of a tensor into the place it has among all models.

        Args:
            layout: of the measurement.
            members: numbers of the models that hold the tensor, in the order of the measurement.
            found: what was measured.

        Returns:
            ``[size]`` float64, and ``[models]`` float64, the largest magnitudes.
        """
        numbers, peaks = np.zeros(self.size), np.zeros(len(self.labels))
        sums, counts = found.sums, found.counts
        own = list(members)
        peaks[own] = found.peaks
        squares = _square(layout, sums[layout.sums["products"]])
        finite = float(counts[layout.counts["finite"]][0])
        mass, voters = sums[layout.sums["mass"]], own[: layout.voters]
        values = {
            "entries": finite,
            "base": squares[0, 0],
            "across": squares[0, 1:],
            "square": np.diagonal(squares)[1:],
            "mass": mass,
            "moved": counts[layout.counts["moved"]],
        }
        for name, value in values.items():
            self.of(numbers, name)[own] = value
        if layout.elects:
            self.of(numbers, "against")[voters] = sums[layout.sums["against"]]
            places = self.places_of_pairs(voters)
            equal, both, one_way = counts[layout.counts["pairs"]].reshape(-1, 3).T
            for name, value in {
                "compared": finite,
                "product": [squares[a + 1, b + 1] for a, b in layout.pairs],
                "first": [squares[a + 1, a + 1] for a, _ in layout.pairs],
                "second": [squares[b + 1, b + 1] for _, b in layout.pairs],
                "equal": equal,
                "both": both,
                "one_way": one_way,
                "together": sums[layout.sums["together"]],
                "apart": [mass[a] + mass[b] for a, b in layout.pairs],
            }.items():
                self.of(numbers, name)[places] = value
        if len(own) == len(self.labels):
            self.of(numbers, "gram")[:] = squares[1:, 1:].reshape(-1)
            self.of(numbers, "shared")[:] = finite
            if layout.elects:
                self.of(numbers, "shared_mass")[:] = mass[: layout.voters].sum()
                for name in ("total", "several", "contested"):
                    part = layout.sums if name == "total" else layout.counts
                    self.of(numbers, name)[:] = (sums if name == "total" else counts)[part[name]]
        return numbers, peaks

    def changes(self, scope: Scope, numbers: Array, peaks: Array) -> list[Change]:
        """Return a row for each model that was measured in a scope."""
        rows = []
        columns = [self.of(numbers, name).tolist() for name in _OF_MODELS]
        for k, (entries, base, across, square, mass, moved, against) in enumerate(zip(*columns, strict=True)):
            if not entries:
                continue
            base_norm, delta_norm = math.sqrt(base), math.sqrt(square)
            norm = math.sqrt(max(base + 2 * across + square, 0.0))
            rows.append(
                Change(
                    scope=scope,
                    model=self.labels[k],
                    entries=int(entries),
                    base_norm=base_norm,
                    norm=norm,
                    delta_norm=delta_norm,
                    relative=_ratio(delta_norm, base_norm),
                    changed=moved / entries,
                    largest=float(peaks[k]),
                    mass=mass,
                    against=_ratio(against / 2, mass) if k < self.voters else None,
                    cosine_base=_cosine(base + across, base_norm, norm),
                    delta_cosine_base=_cosine(across, base_norm, delta_norm),
                )
            )
        return rows

    def agreements(self, scope: Scope, numbers: Array, _: Array) -> list[Agreement]:
        """Return a row for each two models that were compared in a scope."""
        rows = []
        columns = [self.of(numbers, name).tolist() for name in _OF_PAIRS]
        for (a, b), values in zip(self.pairs, zip(*columns, strict=True), strict=True):
            compared, product, first, second, equal, both, one_way, together, apart = values
            if not compared:
                continue
            rows.append(
                Agreement(
                    scope=scope,
                    first=self.labels[a],
                    second=self.labels[b],
                    entries=int(compared),
                    cosine=_cosine(product, math.sqrt(first), math.sqrt(second)),
                    distance=math.sqrt(max(first + second - 2 * product, 0.0)),
                    equal=equal / compared,
                    both_moved=both / compared,
                    same_sign=_ratio(one_way, both),
                    conflict=_ratio(max(apart - together, 0.0) / 2, apart),
                )
            )
        return rows

    def conflict(self, scope: Scope, numbers: Array, _: Array) -> list[Conflict]:
        """Return the row on all models together, none where a tensor of the scope is not in all of them."""
        names = ("shared", "shared_mass", "total", "several", "contested")
        entries, mass, total, several, contested = (float(self.of(numbers, name)[0]) for name in names)
        if self.voters < 2 or not entries:
            return []
        share = _ratio(max(mass - total, 0.0) / 2, mass)
        return [Conflict(scope, self.labels[: self.voters], int(entries), share, _ratio(contested, several))]

    def composition(self, scope: Scope, numbers: Array, _: Array) -> list[Composition]:
        """Return how much of each model is in the result, the last of all: least squares on the task vectors."""
        n = len(self.labels)
        if self.voters == n or not self.of(numbers, "shared")[0]:
            return []
        gram = self.of(numbers, "gram").reshape(n, n)
        inputs, across, square = gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1])
        norms = np.sqrt(np.diagonal(inputs))
        # Scaled to ones on the diagonal, so that what counts as dependent does not hang on how far a model moved.
        scale = np.where(norms > 0, norms, 1.0)
        solved = np.linalg.pinv(inputs / np.outer(scale, scale), rcond=_DEPENDENT, hermitian=True) @ (across / scale)
        coefficients = solved / scale
        explained = coefficients * across
        left = square - float(2 * explained.sum() - coefficients @ inputs @ coefficients)
        return [
            Composition(
                scope=scope,
                models=self.labels[:-1],
                coefficients=tuple(coefficients.tolist()),
                cosines=tuple(
                    _cosine(float(a), float(b), math.sqrt(square)) for a, b in zip(across, norms, strict=True)
                ),
                contributions=tuple(_ratio(float(one), square) for one in explained),
                r_squared=_ratio(max(square - max(left, 0.0), 0.0), square),
                delta_norm=math.sqrt(square),
                residual_norm=math.sqrt(max(left, 0.0)),
            )
        ]


# Task vectors whose angle to the space of the others has a sine below the root of this count as dependent: float32
# task vectors say no more.
_DEPENDENT = 1e-12


def _square(layout: Layout, products: Array) -> Array:
    """Return the products of all vectors with each other as a symmetric matrix."""
    found = np.zeros((layout.models + 1, layout.models + 1))
    rows, columns = zip(*layout.products, strict=True)
    found[rows, columns] = products
    found[columns, rows] = products
    return found


@cache
def _places_of_pairs(voters: int, members: tuple[int, ...]) -> list[int]:
    places = {pair: place for place, pair in enumerate(itertools.combinations(range(voters), 2))}
    return [places[pair] for pair in itertools.combinations(members, 2)]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _cosine(product: float, one: float, other: float) -> float | None:
    """Return a cosine, which rounding may not carry beyond 1."""
    return max(-1.0, min(1.0, product / one / other)) if one > 0 and other > 0 else None
