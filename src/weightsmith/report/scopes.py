"""Adds what was found of tensors up to layers, components and everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from weightsmith.architecture.components import COMPONENTS
from weightsmith.checkpoint.tensor import Array
from weightsmith.report.distribution import Entries
from weightsmith.report.findings import Layer, Scope, Scoped, TensorFacts

Row = TypeVar("Row")


@dataclass(frozen=True)
class OfTensor:
    """What was found of a tensor.

    Attributes:
        facts: the tensor.
        numbers: its sums, see :class:`weightsmith.report.quantities.Quantities`.
        peaks: ``[models]``, the largest magnitude of each task vector.
    """

    facts: TensorFacts
    numbers: Array
    peaks: Array

    @property
    def scope(self) -> Scope:
        """The tensor as a scope."""
        return Scope(self.facts.layer, self.facts.component, self.facts.name)


class Distributions:
    """How entries are distributed over everything, per component, and per layer as far as overlaps go.

    Of single tensors nothing is kept: there may be many.
    """

    def __init__(self, models: int) -> None:
        """Start with nothing, of so many models that are to be merged."""
        self._models = models
        self._found: dict[str, dict[Scope, Entries]] = {"total": {}, "components": {}, "layers": {}}

    def add(self, facts: TensorFacts, entries: Entries, models: Sequence[int], pairs: Sequence[int]) -> None:
        """Add a tensor.

        Args:
            facts: the tensor.
            entries: how its entries are distributed, of the models that hold it.
            models: the numbers of these models.
            pairs: the numbers of their pairs.
        """
        scopes = {
            "total": Scope(),
            "components": Scope(component=facts.component),
            "layers": Scope(layer=facts.layer),
        }
        for table, scope in scopes.items():
            known = self._found[table]
            if scope not in known:
                known[scope] = Entries.none(self._models)
            known[scope].add_sets(entries, list(pairs))
            if table != "layers":
                known[scope].add_values(entries, list(models))

    def rows(
        self, tables: Sequence[str], layers: Sequence[Layer], make: Callable[[Scope, Entries], Iterable[Row]]
    ) -> Scoped[Row]:
        """Return the rows of a table.

        Args:
            tables: which of the scopes it has.
            layers: all layers, in order.
            make: is given each scope, and what is known of its entries.
        """
        rank = _rank(layers)

        def of_table(name: str) -> Iterator[Row]:
            for scope in sorted(self._found[name], key=rank):
                yield from make(scope, self._found[name][scope])

        return Scoped(**{name: tuple(of_table(name)) for name in tables})


class Scopes:
    """Sums over every scope of a report.

    Attributes:
        tensors: the tensors in the order of layers and components.
    """

    def __init__(self, tensors: Sequence[OfTensor], layers: Sequence[Layer]) -> None:
        """Add up.

        Args:
            tensors: what was found.
            layers: all layers, in order.
        """
        rank = _rank(layers)
        self.tensors = sorted(tensors, key=lambda one: rank(one.scope))

        def grouped(key: Callable[[Scope], Scope]) -> dict[Scope, list[OfTensor]]:
            found: dict[Scope, list[OfTensor]] = {}
            for one in self.tensors:
                found.setdefault(key(one.scope), []).append(one)
            return {scope: found[scope] for scope in sorted(found, key=rank)}

        groups = {
            "total": grouped(lambda scope: Scope()),
            "components": grouped(lambda scope: Scope(component=scope.component)),
            "layers": grouped(lambda scope: Scope(layer=scope.layer)),
            "cells": grouped(lambda scope: Scope(scope.layer, scope.component)),
            "tensors": grouped(lambda scope: scope),
        }
        self._sums = {
            name: [(scope, *_summed(members)) for scope, members in found.items()] for name, found in groups.items()
        }

    def rows(self, make: Callable[[Scope, Array, Array], Iterable[Row]]) -> Scoped[Row]:
        """Return the rows of a table: ``make`` is given each scope, its sums and its largest magnitudes."""
        return Scoped(**{name: tuple(row for one in sums for row in make(*one)) for name, sums in self._sums.items()})


def _rank(layers: Sequence[Layer]) -> Callable[[Scope], tuple[int, int]]:
    """Return what scopes are sorted by: layer, then component."""
    order = {layer.key: place for place, layer in enumerate(layers)}
    kinds = {name: place for place, name in enumerate(COMPONENTS)}
    return lambda scope: (order.get(scope.layer or "", -1), kinds.get(scope.component or "", -1))


def _summed(members: Sequence[OfTensor]) -> tuple[Array, Array]:
    """Add up, in the order of the tensors."""
    if len(members) == 1:
        return members[0].numbers, members[0].peaks
    numbers, peaks = np.zeros_like(members[0].numbers), np.zeros_like(members[0].peaks)
    for one in members:
        numbers += one.numbers
        np.maximum(peaks, one.peaks, out=peaks)
    return numbers, peaks
