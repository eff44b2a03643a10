"""A few singular triples per matrix and task: TSV-Compress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.bundle.description import Entry
from weightsmith.bundle.kind import Group, Kind, Made, Stored, Survey, task_name
from weightsmith.bundle.matrices import FactoredTensor, Piece, dense_change, for_each_task, is_matrix, wide
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.methods.matrices import Decomposition, leading

U, S, V = "u", "s", "v"


@dataclass(frozen=True)
class Tsv(Kind):
    """TSV-Compress: the leading singular triples of every matrix's task vector.

    ``theta_t = theta_0 + U_r diag(S_r) V_r`` with ``r = floor(min(out, in) / T)`` for T tasks, at least 1: together
    the tasks take about the room of one model, or of two where matrices are square. All two-dimensional tensors are
    decomposed, embeddings too; everything else is kept whole for each task, as in the authors' code. A matrix whose
    factors would take as much room as itself (there is such where T is 1 or 2) is kept whole as well: that is ours.

    Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025, arXiv:2412.00081.

    Attributes:
        rank: r for all matrices, instead of the paper's.
        decomposition: ``exact`` (LAPACK) or ``randomized``: random projections with two power passes, faster
            where few triples of many are kept.
    """

    name: ClassVar[str] = "tsv"
    summary: ClassVar[str] = "nothing shared; per task truncated factors of each matrix, all else whole"

    rank: int | None = None
    decomposition: Decomposition = "exact"

    def __post_init__(self) -> None:
        if self.rank is not None:
            self._check_count("rank")
        self._check_choice("decomposition", "exact", "randomized")

    @property
    def uses_matrices(self) -> bool:
        """See :attr:`Kind.uses_matrices`."""
        return True

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`."""
        taken = [group for group in groups if is_matrix(group) and self._pays(group, len(tasks))]
        parts = [
            _Triples(group, self._rank_of(group, len(tasks)), self.decomposition, survey.threads) for group in taken
        ]
        return Made(taken, [tensor for part in parts for tensor in part.tensors()])

    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """See :meth:`Kind.restore`."""
        rows, columns = _matrix(entry, stored)
        s = stored.own(S, (None,))
        u, v = stored.own(U, (rows, *s.shape)), stored.own(V, (*s.shape, columns))
        return FactoredTensor(stored.name, entry, base, lambda: (wide(u) * wide(s), wide(v)))

    def _rank_of(self, group: Group, tasks: int) -> int:
        least = min(group.shape)
        return max(least // tasks, 1) if self.rank is None else min(self.rank, least)

    def _pays(self, group: Group, tasks: int) -> bool:
        return self._rank_of(group, tasks) * (sum(group.shape) + 1) < group.size


class _Triples:
    """The singular triples of the task vectors of one matrix."""

    def __init__(self, group: Group, rank: int, how: Decomposition, threads: int) -> None:
        self._group = group
        self._rank = rank
        self._how: Decomposition = how
        self._threads = threads

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the bundle that hold them."""
        rows, columns = self._group.shape
        shapes = {U: (rows, self._rank), S: (self._rank,), V: (self._rank, columns)}
        pieces = [(task, field) for task in self._group.models for field in shapes]
        return [
            Piece(task_name(task, field, self._group.name), shapes[field], self._group.dtype, self, itemgetter(which))
            for which, (task, field) in enumerate(pieces)
        ]

    def make(self) -> tuple[Array, ...]:
        """Return U, S and V of every task, one after the other."""

        def apart(task: str) -> tuple[Array, ...]:
            found: tuple[Any, ...] = leading(xp, dense_change(self._group, task), self._rank, self._how)
            return found

        found = for_each_task(self._group, self._rank, self._how, self._threads, apart)
        return tuple(np.ascontiguousarray(array) for task in self._group.models for array in found[task])


def _matrix(entry: Entry, stored: Stored) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise stored.fail(f"it is {list(entry.shape)}, and factors are those of a matrix")
    return entry.shape[0], entry.shape[1]
