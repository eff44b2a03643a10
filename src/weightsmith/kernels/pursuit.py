"""Orthogonal matching pursuit of a batch of targets: in C, or on NumPy with the same bits.

Both take a target on until it is done or waits for something that is made for many targets at once: a row of the Gram
matrix, or better estimates of the inner products.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.kernels.native import Library

Array = npt.NDArray[Any]

# What a target waits for, as in pursuit.c.
RUNNING, DONE, WANTS_ROW, WANTS_BASE = range(4)
# A cosine of 1 in the Gram matrix.
COSINE = 32767
# Of the rounding of float32.
UNIT = 2.0**-24
# Sums that reach a result run in so many interleaved partial sums.
_LANES = 16
# Norm of a residual as a share of the target's, inner product as a share of both norms, and squared sine of the angle
# between an atom and the span of those picked: up to these they are what rounding leaves of zero. The first is the
# rounding of float32 itself, in which a multiple of an anchor's row was written; the others allow for float64's.
_DONE, _LEAST, _DEPENDENT = 2.0**-22, 1e-10, 1e-10
# Candidates beyond which it costs less to make estimates anew, at full precision of what is left.
_CROWD = 256

_POINTER, _NUMBER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Job(ctypes.Structure):
    _fields_ = (
        ("atoms", _POINTER),
        ("norms", _POINTER),
        ("gram", _POINTER),
        ("slots", _POINTER),
        ("count", _NUMBER),
        ("width", _NUMBER),
        ("most", _NUMBER),
        ("crowd", _NUMBER),
        ("product_error", _DOUBLE),
        ("cosine_error", _DOUBLE),
        ("done", _DOUBLE),
        ("least", _DOUBLE),
        ("dependent", _DOUBLE),
        ("targets", _POINTER),
        ("base", _POINTER),
        ("base_norm", _POINTER),
        ("base_weights", _POINTER),
        ("picked", _POINTER),
        ("weights", _POINTER),
        ("lower", _POINTER),
        ("solved", _POINTER),
        ("steps", _POINTER),
        ("waiting", _POINTER),
        ("residual", _POINTER),
        ("left", _POINTER),
    )


@dataclass(frozen=True)
class Atoms:
    """What targets are made of.

    Attributes:
        rows: ``[S, d]`` float32.
        norms: ``[S]`` float32, theirs.
        gram: ``[R, S]`` int16, cosines times ``COSINE``.
        slots: ``[S]`` int32: an atom's row of ``gram``, or -1.
        product_error: bound of the error of inner products that are given, as a share of both norms.
    """

    rows: Array
    norms: Array
    gram: Array
    slots: Array
    product_error: float

    @property
    def cosine_error(self) -> float:
        """Bound of the error of a cosine in ``gram``."""
        return self.product_error + 8 * UNIT + 0.5001 / COSINE


class Batch:
    """Targets on their way.

    Attributes:
        base: ``[B, S]`` float32: inner products of the atoms with what was left of each target when they were made,
            off by ``product_error`` at most; NaN for atoms that it is not to take.
        steps: ``[B]`` int32: how many atoms each has picked.
        waiting: ``[B]`` int32: for what.
        picked: ``[B, k]`` int32.
        weights: ``[B, k]`` float64.
        residual: ``[B, d]`` float64: what is left, of targets that want a base or are done.
        left: ``[B]`` float64: its norm as a share of the target's, of those that are done.
    """

    def __init__(self, atoms: Atoms, targets: Array, base: Array, most: int, library: Library | None) -> None:
        """Begin.

        Args:
            atoms: the atoms.
            targets: ``[B, d]`` float32.
            base: see above; it is written to.
            most: how many atoms each target takes.
            library: the compiled kernels, or None.
        """
        count = len(targets)
        self.base = base
        self.steps, self.waiting = np.zeros(count, np.int32), np.full(count, RUNNING, np.int32)
        self.picked, self.weights = np.full((count, most), -1, np.int32), np.zeros((count, most))
        self.residual, self.left = np.zeros(targets.shape), np.zeros(count)
        self._atoms, self._targets, self._most, self._library = atoms, targets, most, library
        self._base_norm = np.sqrt((targets.astype(np.float64) ** 2).sum(1))
        self._base_weights = np.zeros((count, most))
        self._lower, self._solved = np.zeros((count, most, most)), np.zeros((count, most))
        places = (targets, base, self._base_norm, self._base_weights, self.picked, self.weights, self._lower)
        rest = (self._solved, self.steps, self.waiting, self.residual, self.left)
        self._job = _Job(
            *(array.ctypes.data for array in (atoms.rows, atoms.norms, atoms.gram, atoms.slots)),
            *(*atoms.rows.shape, most, _CROWD, atoms.product_error, atoms.cosine_error, _DONE, _LEAST, _DEPENDENT),
            *(array.ctypes.data for array in (*places, *rest)),
        )

    def run(self, first: int, last: int) -> None:
        """Take targets ``first`` to ``last`` on as far as they go; for several threads, each with targets of its own.

        Raises:
            MemoryError: if there is no memory for the estimates of one target.
        """
        if self._library is None:
            for target in range(first, last):
                if self.waiting[target] != DONE:
                    self.waiting[target] = self._pursue(target)
        elif self._library.pursue(ctypes.addressof(self._job), first, last):
            raise MemoryError("no memory for the estimates of a matching pursuit")

    def rebase(self, targets: Array, products: Array) -> None:
        """Give targets that want a base their new one.

        Args:
            targets: ``[n]``, which.
            products: ``[n, S]`` float32: inner products of the atoms with their residuals.
        """
        for place, target in enumerate(targets):
            np.copyto(self.base[target], products[place], where=~np.isnan(self.base[target]))
            self._base_norm[target] = math.sqrt(_dot(self.residual[target], self.residual[target]))
            self._base_weights[target] = self.weights[target]

    # -- on NumPy: what pursuit.c does, in the same order where it reaches a result ----------------------------------

    def _pursue(self, t: int) -> int:
        atoms, target, most = self._atoms, self._targets[t], self._most
        square = _dot(target, target)
        size = math.sqrt(square)
        if size > 0 and self.steps[t] == 0 and self._alone(t, size):
            return self._finish(t, size)
        while True:
            steps = int(self.steps[t])
            rest = square
            for value in self._solved[t, :steps].tolist():
                rest -= value * value
            if steps and rest < 1e-6 * square:
                self._make_residual(t)
                if math.sqrt(_dot(self.residual[t], self.residual[t])) <= _DONE * size:
                    return self._finish(t, size)
            if steps == most or size == 0:
                return self._finish(t, size)
            moved = np.flatnonzero(self.weights[t, :steps] != self._base_weights[t, :steps])
            if (atoms.slots[self.picked[t, moved]] < 0).any():
                return WANTS_ROW
            upper, bound = self._estimate(t, moved)
            found = np.flatnonzero(upper >= bound)
            if len(found) > _CROWD and len(moved):
                self._make_residual(t)
                return WANTS_BASE
            if not len(found):
                return self._finish(t, size)
            self._make_residual(t)
            products = [abs(_dot(self.residual[t], atoms.rows[atom])) for atom in found]
            place = int(np.argmax(products))
            best = int(found[place])
            if not products[place] > _LEAST * size * float(atoms.norms[best]):
                return self._finish(t, size)
            self.base[t, best] = np.nan
            self._add(t, best)

    def _alone(self, t: int, size: float) -> bool:
        """Whether a target is a multiple of an atom, which then is all it takes: the first such atom."""
        atoms = self._atoms
        least = np.float32(size * (1 - 2 * atoms.product_error - 1e-6))
        for atom in np.flatnonzero((np.abs(self.base[t]) >= least * atoms.norms) & (atoms.norms > 0)):
            row = atoms.rows[atom]
            self.picked[t, 0], self.weights[t, 0] = atom, _dot(self._targets[t], row) / _dot(row, row)
            self.steps[t] = 1
            self._make_residual(t)
            if math.sqrt(_dot(self.residual[t], self.residual[t])) <= _DONE * size:
                return True
            self.picked[t, 0], self.weights[t, 0], self.steps[t] = -1, 0, 0
        return False

    def _estimate(self, t: int, moved: Array) -> tuple[Array, Any]:
        """Return what each |<residual, atom>| is at most, and what the greatest is at least; NaN for atoms to leave."""
        atoms = self._atoms
        picked = self.picked[t, moved]
        changes = (self.weights[t, moved] - self._base_weights[t, moved]) * atoms.norms[picked]
        sums = (changes / COSINE).astype(np.float32) @ atoms.gram[atoms.slots[picked]].astype(np.float32)
        error = self._base_norm[t] * (atoms.product_error + 8 * UNIT)
        error += np.abs(changes).sum() * (atoms.cosine_error + (len(moved) + 12) * UNIT)
        values = np.abs(self.base[t] - atoms.norms * sums)
        off = np.float32(1.001 * error) * atoms.norms
        return values + off, np.fmax.reduce(values - off)

    def _make_residual(self, t: int) -> None:
        residual = self._targets[t].astype(np.float64)
        for atom, weight in zip(self.picked[t, : self.steps[t]], self.weights[t], strict=False):
            residual -= weight * self._atoms.rows[atom].astype(np.float64)
        self.residual[t] = residual

    def _finish(self, t: int, size: float) -> int:
        self._make_residual(t)
        self.left[t] = math.sqrt(_dot(self.residual[t], self.residual[t])) / size if size > 0 else 0.0
        return DONE

    def _add(self, t: int, atom: int) -> None:
        """Add an atom to those that are picked and fit all weights anew, unless it adds nothing to their span."""
        steps = int(self.steps[t])
        lower, solved = self._lower[t, :steps, :steps].tolist(), self._solved[t, :steps].tolist()
        new = self._atoms.rows[atom]
        square = pivot = _dot(new, new)
        rest = _dot(self._targets[t], new)
        row: list[float] = []
        for i in range(steps):
            value = _dot(new, self._atoms.rows[self.picked[t, i]])
            for j in range(i):
                value -= row[j] * lower[i][j]
            row.append(value / lower[i][i])
            pivot -= row[i] * row[i]
            rest -= row[i] * solved[i]
        if not pivot > _DEPENDENT * square:
            return
        row.append(math.sqrt(pivot))
        lower.append(row)
        solved.append(rest / row[steps])
        weights = [0.0] * (steps + 1)
        for i in range(steps, -1, -1):
            value = solved[i]
            for j in range(i + 1, steps + 1):
                value -= lower[j][i] * weights[j]
            weights[i] = value / lower[i][i]
        self._lower[t, steps, : steps + 1] = row
        self._solved[t, steps] = solved[steps]
        self.picked[t, steps] = atom
        self.weights[t, : steps + 1] = weights
        self.steps[t] = steps + 1


def _dot(a: Array, b: Array) -> float:
    """Return an inner product as pursuit.c sums it: ``_LANES`` partial sums, joined by halves."""
    products = np.zeros(-(-len(a) // _LANES) * _LANES)
    np.multiply(a, b, out=products[: len(a)], dtype=np.float64)
    # Along the first axis rows are added one after the other.
    part = np.add.reduce(products.reshape(-1, _LANES), axis=0)
    width = _LANES // 2
    while width:
        part = part[:width] + part[width : 2 * width]
        width //= 2
    return float(part[0])
