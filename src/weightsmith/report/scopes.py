"""Adds what was found of tensors up to layers, components and everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from weightsmith.architecture.components import COMPONENTS
from weightsmith.checkpoint.tensor import Array
from weightsmith.report.distribution import Entries
from weightsmith.report.findings import Layer, Scope, Scoped

Row = TypeVar("Row")


@dataclass(frozen=True)
class OfTensor:
    """What was found of a tensor: its sums and largest magnitudes, and how its entries are distributed.

    Attributes:
        scope: the tensor.
        numbers: see :class:`weightsmith.report.quantities.Quantities`.
        peaks: ``[models]``, the largest magnitude of each task vector.
        entries: of the models that are to be merged; None where none of them holds the tensor.
    """

    scope: Scope
    numbers: Array
    peaks: Array
    entries: Entries | None


class Scopes:
    """Sums over every scope of a report."""

    def __init__(self, tensors: Sequence[OfTensor], layers: Sequence[Layer], voters: int) -> None:
        """Add up.

        Args:
            tensors: what was found, in order.
            layers: all layers, in order.
            voters: how many models are to be merged.
        """
        self._tensors = tensors
        self._voters = voters
        order = {layer.key: place for place, layer in enumerate(layers)}
        kinds = {name: place for place, name in enumerate(COMPONENTS)}

        def rank(scope: Scope) -> tuple[int, int]:
            return order.get(scope.layer or "", -1), kinds.get(scope.component or "", -1)

        def grouped(key: Callable[[Scope], Scope]) -> dict[Scope, list[OfTensor]]:
            found: dict[Scope, list[OfTensor]] = {}
            for one in tensors:
                found.setdefault(key(one.scope), []).append(one)
            return {scope: found[scope] for scope in sorted(found, key=rank)}

        self._groups: Mapping[str, dict[Scope, list[OfTensor]]] = {
            "total": grouped(lambda scope: Scope()),
            "components": grouped(lambda scope: Scope(component=scope.component)),
            "layers": grouped(lambda scope: Scope(layer=scope.layer)),
            "cells": grouped(lambda scope: Scope(scope.layer, scope.component)),
            "tensors": {one.scope: [one] for one in tensors},
        }
        self._sums = {
            name: [(scope, *_summed(members)) for scope, members in groups.items()]
            for name, groups in self._groups.items()
        }

    def rows(self, make: Callable[[Scope, Array, Array], Iterable[Row]]) -> Scoped[Row]:
        """Return the rows of a table: ``make`` is given each scope, its sums and its largest magnitudes."""
        return Scoped(**{name: tuple(row for one in sums for row in make(*one)) for name, sums in self._sums.items()})

    def rows_of_entries(self, make: Callable[[Scope, Entries], Iterable[Row]], tables: Sequence[str]) -> Scoped[Row]:
        """Return the rows of a table on the distribution of entries, at some scopes alone.

        Args:
            make: is given each scope, and what is known of its entries.
            tables: the scopes: ``total``, ``components``, ``layers``.
        """

        def of_table(name: str) -> Iterator[Row]:
            for scope, members in self._groups[name].items():
                yield from make(scope, self._all(members))

        return Scoped(**{name: tuple(of_table(name)) for name in tables})

    def _all(self, members: Iterable[OfTensor]) -> Entries:
        found = Entries.none(self._voters)
        for one in members:
            if one.entries is not None:
                found.add(one.entries, slice(None), slice(None))
        return found


def _summed(members: Sequence[OfTensor]) -> tuple[Array, Array]:
    """Add up, in the order of the tensors."""
    if len(members) == 1:
        return members[0].numbers, members[0].peaks
    numbers, peaks = np.zeros_like(members[0].numbers), np.zeros_like(members[0].peaks)
    for one in members:
        numbers += one.numbers
        np.maximum(peaks, one.peaks, out=peaks)
    return numbers, peaks
