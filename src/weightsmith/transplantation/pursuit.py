"""Orthogonal matching pursuit: each new row is rebuilt from a few anchors in the donor's space.

Goddard and Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit" (2025),
arXiv:2506.06607, after Pati, Rezaiifar and Krishnaprasad (1993). For a donor's row t and anchors ``d_s``, from
``r = t``:

    pick the s that is not picked yet with the largest ``|<r, d_s>|``, where the ``d_s`` are not normalised;
    ``w = argmin ||t - sum_{s picked} w_s d_s||``;  ``r = t - sum_s w_s d_s``

until k are picked. A target that is rebuilt before that, to the rounding of float32, is left with fewer; so is one of
which no anchor has anything left. An anchor that lies in the span of those picked is passed over. A target that is a
multiple of an anchor, to the rounding of float32, takes that anchor alone: as they are not normalised, longer anchors
would be picked before it, for nothing. These ends are ours; the authors' tool goes on to k.

Plainly each pick takes the inner products of r with all S anchors anew, 2 S d operations. Here they follow from those
with t and from rows of the Gram matrix of the anchors, ``<r, d_s> = <t, d_s> - sum_i w_i <d_i, d_s>`` (Batch-OMP:
Rubinstein, Zibulevsky and Elad, Technion CS-2008-08), 2 S operations for each picked anchor. Rows are kept as 16-bit
cosines, half of what float32 takes, as far as there is room, and made anew where there is none. What that loses is
bounded for every anchor, and the few that may be the best one are compared in float64: the picks are those of float64,
whatever made the estimates. Where too little is left of a target to be told from their error, they are made anew.
"""

from __future__ import annotations

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError
from weightsmith.kernels import native
from weightsmith.kernels.pursuit import COSINE, DONE, WANTS_BASE, WANTS_ROW, Atoms, Batch
from weightsmith.transplantation.combination import Combinations, Progress
from weightsmith.transplantation.dictionary import Dictionary, batches, multiply
from weightsmith.transplantation.nearest import nearest_of
from weightsmith.transplantation.rows import Rows

# Of the tool that the paper's authors publish (mergekit-tokensurgeon, -k).
ANCHORS = 64
# Bytes that may be held, by default.
MEMORY = 7_000_000_000
# Bytes that a batch of targets takes at most, how many they are at most, and rows of the Gram matrix made at once.
_BATCH_BYTES, _BATCH, _PANEL = 400_000_000, 1024, 256
# Columns of it that a thread makes at a time.
_COLUMNS = 1024
# Targets that a thread takes on at a time.
_STRETCH = 4


def matching_pursuit(
    donor: Rows,
    anchors: Array,
    targets: Array,
    *,
    count: int = ANCHORS,
    nearest: int | None = None,
    memory: int = MEMORY,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Combinations:
    """Rebuild targets from ``count`` anchors each, by orthogonal matching pursuit.

    Args:
        donor: the donor's rows, ``[V, d]``.
        anchors: ``[S]``: rows of the donor that can be picked.
        targets: ``[T]``: rows of the donor to rebuild.
        count: how many anchors each target is rebuilt from.
        nearest: pick among so many anchors only, those nearest to the target by cosine (a variant of ours that keeps
            far anchors out); all by default.
        memory: bytes to hold at most; the result does not depend on it.
        threads: how many threads to use; one per core by default. The result does not depend on it.
        progress: told of targets that are finished.

    Returns:
        Combinations with ``k = count``; anchors in the order in which they were picked.

    Raises:
        MethodError: if there are fewer anchors than are to be picked, or too little memory.
        CheckpointError: if a row holds what is not finite.
    """
    pool = len(anchors) if nearest is None else min(nearest, len(anchors))
    if not 1 <= count <= pool:
        raise MethodError(
            f"matching pursuit is to pick {count:,} anchors for each token, and has {pool:,} to pick from: expected "
            f"1 to {pool:,}"
        )
    dictionary = Dictionary.of(donor, anchors)
    result = Combinations(
        np.full((len(targets), count), -1, np.int32), np.zeros((len(targets), count)), np.zeros(len(targets))
    )
    # Of rows that are independent there are no more than they have elements.
    most = min(count, donor.shape[1])
    library = native.library()
    with ThreadMapper(threads or default_threads(), matrices=True) as mapper:
        gram = _Gram(dictionary, mapper, memory, most, len(targets))
        for part, vectors in batches(donor, targets, dictionary, gram.batch, progress):
            base = dictionary.products(vectors, mapper)
            if nearest is not None and nearest < len(dictionary):
                _keep_nearest(dictionary, vectors, base, nearest, mapper)
            batch = Batch(gram.atoms, vectors, base, most, library)
            _run(batch, gram, dictionary, mapper)
            result.anchors[part, :most] = batch.picked
            result.weights[part, :most] = batch.weights
            result.residual[part] = batch.left
    return result


def _run(batch: Batch, gram: _Gram, dictionary: Dictionary, mapper: ThreadMapper) -> None:
    """Take all targets of a batch to their end."""
    count = len(batch.waiting)
    left = np.arange(count)

    def take_on(first: int) -> None:
        batch.run(first, min(first + _STRETCH, count))

    while len(left):
        for _ in mapper(take_on, (np.unique(left // _STRETCH) * _STRETCH).tolist()):
            pass
        left = np.flatnonzero(batch.waiting != DONE)
        wanted = batch.picked[left[batch.waiting[left] == WANTS_ROW]]
        if wanted.size:
            gram.make(np.unique(wanted[wanted >= 0]), np.unique(batch.picked[batch.picked >= 0]))
        anew = left[batch.waiting[left] == WANTS_BASE]
        for start in range(0, len(anew), _PANEL):
            which = anew[start : start + _PANEL]
            batch.rebase(which, dictionary.products(batch.residual[which].astype(np.float32), mapper))


def _keep_nearest(dictionary: Dictionary, vectors: Array, base: Array, count: int, mapper: ThreadMapper) -> None:
    """Mark all anchors but the nearest of every target as ones to leave."""

    def mark(target: int) -> None:
        kept, _ = nearest_of(dictionary, vectors[target], base[target], count, "cosine")
        products = base[target, kept]
        base[target] = np.nan
        base[target, kept] = products

    for _ in mapper(mark, range(len(vectors))):
        pass


class _Gram:
    """Rows of the anchors' Gram matrix as 16-bit cosines, as many as there is room for; those used last are kept.

    Attributes:
        atoms: the rows, and where they lie.
        batch: how many targets to work on at a time, so that there is room for the rows of all their anchors.
    """

    def __init__(self, dictionary: Dictionary, mapper: ThreadMapper, memory: int, most: int, targets: int) -> None:
        count, width = dictionary.rows.shape
        self._dictionary, self._mapper = dictionary, mapper
        each = 2 * 4 * count + 12 * width + 8 * most * (most + 4)
        size = max(min(_BATCH_BYTES // each, _BATCH, targets), 1)
        held = dictionary.rows.nbytes + mapper.threads * 8 * count + _PANEL * 4 * count
        room = (memory - held - size * each) // (2 * count)
        needed = min(count, targets * most)
        if room < needed:
            # Half the room for the anchors of one batch: the other half is for those that many batches share.
            size = max(min(size, room // (2 * most)), 1)
            if room < most:
                least = held + each + 2 * count * most
                raise MethodError(
                    f"matching pursuit among {count:,} anchors of {width:,} elements takes {least / 1e9:.1f} GB at the "
                    f"least, and may hold {memory / 1e9:.1f}: allow more memory, or use fewer anchors"
                )
        self.batch = size
        slots = min(count, max(room, 0), max(needed, 1))
        self.atoms = Atoms(
            dictionary.rows,
            dictionary.norms.astype(np.float32),
            np.empty((slots, count), np.int16),
            np.full(count, -1, np.int32),
            dictionary.product_error,
        )
        self._owner = np.full(slots, -1, np.int64)
        self._used = np.zeros(slots, np.int64)
        self._time = 0
        norms = self.atoms.norms.astype(np.float64)
        self._inverse = np.divide(1.0, norms, out=np.zeros(count), where=norms > 0)
        if slots == count:
            self._make_all()

    def make(self, wanted: Array, pinned: Array) -> None:
        """Make rows.

        Args:
            wanted: anchors whose rows are needed, each once.
            pinned: anchors whose rows are not to be dropped for them.
        """
        slots = self.atoms.slots
        self._time += 1
        present = slots[pinned]
        self._used[present[present >= 0]] = self._time
        missing = wanted[slots[wanted] < 0]
        places = np.argsort(self._used, kind="stable")[: len(missing)]
        dropped = self._owner[places]
        slots[dropped[dropped >= 0]] = -1
        self._owner[places], self._used[places] = missing, self._time
        for start in range(0, len(missing), _PANEL):
            self._fill(missing[start : start + _PANEL], places[start : start + _PANEL])
        slots[missing] = places

    def _make_all(self) -> None:
        """Make all rows, each pair of anchors once; on demand there would be few to make at a time, which is slower."""
        count = len(self.atoms.slots)
        self.atoms.slots[:] = self._owner[:] = np.arange(count)
        for start in range(0, count, _PANEL):
            rows = slice(start, min(start + _PANEL, count))

            def fill(columns: slice, rows: slice = rows) -> None:
                cosines = self._cosines(self.atoms.rows[rows], rows, columns)
                self.atoms.gram[rows, columns] = cosines
                self.atoms.gram[columns, rows] = cosines.T

            for _ in self._mapper(fill, _slices(start, count)):
                pass

    def _fill(self, numbers: Array, places: Array) -> None:
        panel = self.atoms.rows[numbers]

        def fill(columns: slice) -> None:
            self.atoms.gram[places, columns] = self._cosines(panel, numbers, columns)

        for _ in self._mapper(fill, _slices(0, len(self.atoms.slots))):
            pass

    def _cosines(self, panel: Array, numbers: slice | Array, columns: slice) -> Array:
        """Return cosines of some anchors, of these rows and numbers, with others, times ``COSINE``: int16."""
        inverse = self._inverse
        cosines = np.empty((len(panel), columns.stop - columns.start), np.float32)
        multiply(panel, self.atoms.rows[columns], cosines)
        cosines *= (COSINE * inverse[numbers, None]).astype(np.float32)
        cosines *= inverse[columns].astype(np.float32)
        np.rint(cosines, out=cosines)
        # Of two rows that are one, rounding may make a cosine above 1.
        np.clip(cosines, -COSINE, COSINE, out=cosines)
        return cosines.astype(np.int16)


def _slices(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + _COLUMNS, stop)) for first in range(start, stop, _COLUMNS)]
