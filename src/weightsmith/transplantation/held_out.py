"""How near rows that are made come to rows that are known: shared tokens are taken for new ones, and made again.

The residual tells how well a token of the donor is made of others in the donor's space. Whether the same sum says
anything in the model's space it does not tell, and after the transplant nobody can: the model has no row for the token.
For shared tokens it has. No paper is followed here; the measure is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.transplantation.combination import combine
from weightsmith.transplantation.landmarks import LandmarkMap
from weightsmith.transplantation.recipe import Way
from weightsmith.transplantation.rows import Rows
from weightsmith.transplantation.search import Search, Shared
from weightsmith.transplantation.tables import Table

# Shared tokens that are taken for new ones, and the most others that they are made of: minutes become seconds.
TOKENS, ANCHORS = 256, 8192
# Fewer shared tokens tell nothing.
_FEWEST = 64


@dataclass(frozen=True)
class HeldOut:
    """How near the rows of shared tokens come that were made as if they were new.

    Attributes:
        tokens: how many shared tokens.
        anchors: of how many others they were made.
        error: median of ``||made - own|| / ||own||`` in the model's space: 0 is exact, 1 is as far off as zeros.
        cosine: median cosine between the row that was made and the token's own; zeros count as 0.
        mean_error: what ``error`` is where each is given the mean row of the others.
    """

    tokens: int
    anchors: int
    error: float
    cosine: float
    mean_error: float


def hold_out(way: Way, donor: Tensor, table: Table, shared: Shared, *, threads: int | None = None) -> HeldOut | None:
    """Make rows of shared tokens of other shared tokens, and compare them with the tokens' own.

    Both are spread evenly over the shared tokens, in the order of the donor's numbers.

    Args:
        way: how rows are made; one that searches the donor's space.
        donor: where the donor's tokens lie: ``[V, d]``.
        table: the model's table.
        shared: the shared tokens.
        threads: how many threads to use; by default one per core.

    Returns:
        The comparison; None where fewer than 64 tokens are shared, or none has a row of numbers that is not zero.

    Raises:
        CheckpointError: if a row cannot be read, or is not finite in the donor.
    """
    count = len(shared.donor)
    if count < _FEWEST:
        return None
    chosen = _spread(count, min(TOKENS, count // 4))
    others = np.setdiff1d(np.arange(count), chosen)
    others = others[_spread(len(others), min(ANCHORS, len(others)))]
    # The model's rows that are no numbers are kept as they are: they must not stop what does not need them.
    chosen, own = _finite(table, shared, chosen)
    others, rows = _finite(table, shared, others)
    if not len(chosen) or not len(others):
        return None
    known, own = Shared(shared.donor[others], shared.model[others]), own.astype(np.float64)
    mean = rows.mean(0, dtype=np.float64)
    if way.method == "landmark_pca":
        found = LandmarkMap.of(Rows(donor), known.donor, Rows(rows), np.arange(len(rows)))
        made = found.apply(Rows(donor).take(shared.donor[chosen]))
    else:
        within = None if way.neighbours is None else min(way.neighbours, len(others))
        fitting = replace(way, atoms=min(way.atoms, within or len(others)), neighbours=within)
        numbered = Shared(known.donor, np.arange(len(rows)))
        what = Search(fitting, donor, numbered, shared.donor[chosen]).find(threads=threads)
        made = combine(what.combinations, rows[what.model], centre=mean if way.centred else None)
    lengths = np.linalg.norm(own, axis=1)
    told = lengths > 0
    if not told.any():
        return None
    return HeldOut(
        int(told.sum()),
        len(others),
        _median(np.linalg.norm(made - own, axis=1)[told] / lengths[told]),
        _median(_cosines(made, own)[told]),
        _median(np.linalg.norm(mean - own, axis=1)[told] / lengths[told]),
    )


def memory_of(donor: Tensor, table: Table, shared: Shared) -> int:
    """Return about how many bytes :func:`hold_out` takes."""
    anchors = min(ANCHORS, len(shared.donor))
    return 4 * anchors * (donor.shape[1] + table.width) + 2 * anchors**2


def _finite(table: Table, shared: Shared, places: Array) -> tuple[Array, Array]:
    """Return those of some shared tokens whose rows in the model are numbers, and these rows."""
    rows = table.all_rows().take(shared.model[places], check=False)
    finite = np.isfinite(rows).all(1)
    return places[finite], rows[finite]


def _spread(count: int, wanted: int) -> Array:
    return np.arange(wanted, dtype=np.int64) * count // max(wanted, 1)


def _cosines(made: Array, own: Array) -> Array:
    scale = np.linalg.norm(made, axis=1) * np.linalg.norm(own, axis=1)
    cosines: Array = np.divide((made * own).sum(1), scale, out=np.zeros(len(own)), where=scale > 0)
    return cosines


def _median(values: Array) -> float:
    # Six digits: the last ones of a float64 would pretend to mean something.
    return float(f"{float(np.median(values)):.6g}")
