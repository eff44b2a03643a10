"""Low-rank factors of a change: LoRA, and DoRA with a magnitude for every row."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.adapters.peft_config import PREFIX
from weightsmith.bundle.tiles import TILE, rounded
from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.errors import OutputError
from weightsmith.extraction.difference import FLOAT64, Difference
from weightsmith.extraction.modules import Module
from weightsmith.extraction.parts import Field, Part, left_of
from weightsmith.extraction.ranks import Candidate
from weightsmith.extraction.room import Room
from weightsmith.kernels.convert import widen
from weightsmith.methods.matrices import Decomposition, Spectrum, effective_rank, leading_of, leading_work, spectrum

_FLOAT32 = np.dtype(np.float32)
# Gains of rows below this are no directions to speak of.
_LEAST_GAIN = 0.1


class Spectra:
    """Decompositions that were made to choose ranks, kept for the factors as far as there is room."""

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self._left = limit
        self._kept: dict[str, Spectrum] = {}
        self._lock = threading.Lock()

    def keep(self, name: str, found: Spectrum) -> None:
        """Keep one, if there is room for it."""
        nbytes = found.vectors.nbytes + found.values.nbytes
        with self._lock:
            if nbytes <= self._left:
                self._left -= nbytes
                self._kept[name] = found

    def take(self, name: str) -> Spectrum | None:
        """Return one, and keep it no longer."""
        with self._lock:
            found = self._kept.pop(name, None)
            if found is not None:
                self._left += found.vectors.nbytes + found.values.nbytes
            return found


@dataclass(frozen=True)
class Factoring:
    """How matrices are taken apart.

    Attributes:
        how: ``exact`` (LAPACK) or ``randomized``.
        dtype: the dtype of the factors.
        dora: whether there is a magnitude for every row.
        room: where matrices are worked on.
        spectra: decompositions that are known already.
    """

    how: Decomposition
    dtype: DType
    dora: bool
    room: Room
    spectra: Spectra


class LowRank(Part):
    """``D`` as ``B A``: the leading singular triples, the root of each singular value in either factor.

    No product of this rank is nearer to the change (Eckart and Young, 1936), in the exact decomposition. The randomised
    one is off it by a few per cent at most; what is told of the error is measured with the factors as they are written.

    With DoRA (Liu et al., ICML 2024, arXiv:2402.09353) the layer's weight is ``m_i v_i / ||v_i||`` in row i, ``v``
    being ``W_0 + B A``. For given gains ``g_i = m_i / ||v_i||`` the best ``B A`` follows from the leading triples of
    ``W_1 - diag(g) W_0``, divided by g; and for a given ``v`` the best gain is ``<w_i, v_i> / ||v_i||^2``, ``w`` being
    a row of ``W_1``. Both are done once: from the gains that are best without ``B A`` (the direction first), and from
    ones (the magnitude last), which is LoRA with better magnitudes and so never worse than it; the nearer of the two is
    kept. This scheme is ours: the paper trains m, A and B.
    """

    rank: int

    def __init__(
        self, difference: Difference, module: Module, rank: int, factoring: Factoring, *, tied: str | None = None
    ) -> None:
        """Stand for a matrix.

        Args:
            difference: the matrix.
            module: its module.
            rank: how many triples to keep, at most: a randomised decomposition looks for so many.
            factoring: how it is taken apart.
            tied: of an embedding, the module of the head that is tied to it: PEFT ties the factors of both when it
                loads them, and wants them under both names.
        """
        super().__init__(difference, factoring.room)
        self.layer = module
        self.rank = rank
        self._computed = rank
        self._tied = tied
        self._factoring = factoring

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have its factors."""
        return (self.layer.name,) if self._tied is None else (self.layer.name, self._tied)

    @property
    def triple_bytes(self) -> int:
        """Bytes that one triple takes."""
        return sum(self.layer.sides) * self._factoring.dtype.itemsize * (1 if self._tied is None else 2)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are taken whatever the rank."""
        return self.layer.sides[0] * _FLOAT32.itemsize if self._factoring.dora else 0

    @property
    def memory(self) -> int:
        """See :attr:`Part.memory`."""
        rows, columns = self.layer.sides
        item = self.difference.working.itemsize
        work = leading_work(rows, columns, self._computed, self._factoring.how, item).elements * item
        matrices = (5 if self._factoring.dora else 1) * self.difference.size * item
        return matrices + work + 3 * (rows + columns) * self.rank * FLOAT64.itemsize

    def fields(self) -> list[Field]:
        """See :meth:`Part.fields`: A and B in PEFT's layout, and the magnitude."""
        rows, columns = self.layer.sides
        fields = factor_fields(self.layer, self.rank, self._factoring.dtype)
        if self._tied is not None:
            head, dtype = f"{PREFIX}{self._tied}", self._factoring.dtype
            fields += [
                Field(f"{head}.lora_A.weight", (self.rank, rows), dtype),
                Field(f"{head}.lora_B.weight", (columns, self.rank), dtype),
            ]
        if self._factoring.dora:
            kernel = self.layer.shape[2:]
            shape = (1, rows, *(1 for _ in kernel)) if self.layer.form == "convolution" else (rows,)
            # Rounded to 16 bits it would be off by more than most fine-tunes change a weight.
            fields.append(Field(f"{PREFIX}{self.layer.name}.lora_magnitude_vector", shape, _FLOAT32))
        return fields

    def survey(self) -> tuple[Candidate, float]:
        """Return what the choice of its rank depends on, and the sum of squares of the fine-tune's weights."""
        with self._room.take(self.memory), self._timed():
            change, sums = self.difference.matrix()
            matrix = self.layer.oriented(change)
            found = self._spectrum(matrix)
            self._factoring.spectra.keep(self.name, found)
        complete = len(found.values) == min(self.layer.sides)
        values = found.values[: found.rank(xp)]
        one = Candidate(values, sums.change, self.triple_bytes, self.fixed_bytes, complete)
        return one, sums.tuned

    def compute(self, change: Array) -> tuple[tuple[Array, ...], float, float | None]:
        """See :meth:`Part.compute`."""
        arrays: tuple[Array, ...]
        matrix = self.layer.oriented(change)
        found = self._factoring.spectra.take(self.name) or self._spectrum(matrix)
        complete = len(found.values) == min(self.layer.sides)
        effective = effective_rank(xp, found.values[: found.rank(xp)]) if complete else None
        factors = self._factors(matrix, found)
        del found
        if self._factoring.dora:
            del change, matrix
            arrays, error = self._with_magnitude(factors)
        else:
            down, up = map(_widened, factors)
            error = left_of(matrix, lambda start, stop: up[start:stop] @ down)
            arrays = factors if self._tied is None else (*factors, factors[1].T, factors[0].T)
        return tuple(np.ascontiguousarray(array).reshape(-1) for array in arrays), error, effective

    def _spectrum(self, matrix: Array) -> Spectrum:
        found: Spectrum = spectrum(xp, matrix, self._computed, self._factoring.how)
        return found

    def _factors(self, matrix: Array, found: Spectrum, gains: Array | None = None) -> tuple[Array, Array]:
        """Return A and B, rounded: ``[rank, columns]`` and ``[rows, rank]``."""
        left, values, right = (array.astype(FLOAT64) for array in leading_of(xp, matrix, found, self.rank))
        roots = np.sqrt(values)
        up, down = left * roots, roots[:, None] * right
        if gains is not None:
            up /= gains[:, None]
        return self._rounded("A", down), self._rounded("B", up)

    def _rounded(self, side: str, factor: Array) -> Array:
        return rounded_factor(f"lora_{side} of {self.layer.name}", factor, self._factoring.dtype)

    def _with_magnitude(self, plain: tuple[Array, Array]) -> tuple[tuple[Array, ...], float]:
        """Return A, B and m, and the sum of squares of what they leave of the fine-tune's weights."""
        pair = np.empty((2, self.difference.size), self.difference.working)
        for start, base, tuned, _ in self.difference.tiles():
            pair[0, start : start + len(base)], pair[1, start : start + len(base)] = base, tuned
        old, new = self.layer.oriented(pair[0]), self.layer.oriented(pair[1])
        gains = _gains(old, new)
        rest = new - (gains[:, None] * old).astype(new.dtype)
        directed = self._factors(rest, self._spectrum(rest), gains)
        del rest
        tried = [self._magnitude(old, new, factors) for factors in (directed, plain)]
        best = min((0, 1), key=lambda which: tried[which][1])
        magnitude, error = tried[best]
        return (*(directed, plain)[best], magnitude), error

    def _magnitude(self, old: Array, new: Array, factors: tuple[Array, Array]) -> tuple[Array, float]:
        """Return the best m for given factors, and the sum of squares of what is left."""
        down, up = map(_widened, factors)
        rows, columns = self.layer.sides
        norms, inner = np.empty(rows), np.empty(rows)
        step = max(TILE // columns, 1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            direction = old[start:stop].astype(FLOAT64) + up[start:stop] @ down
            norms[start:stop] = np.sqrt((direction**2).sum(1))
            inner[start:stop] = (direction * new[start:stop]).sum(1)
        if not norms.all():
            raise OutputError(
                f"{self.name}: a row of the base with its change is zero, and DoRA divides by its norm; keep this "
                f"tensor whole (--whole '{self.name}'), or leave --dora out"
            )
        magnitude = rounded(f"lora_magnitude_vector of {self.layer.name}", inner / norms, _FLOAT32)
        gains = magnitude / norms

        def restored(start: int, stop: int) -> Array:
            found: Array = gains[start:stop, None] * (old[start:stop].astype(FLOAT64) + up[start:stop] @ down)
            return found

        return magnitude, left_of(new, restored)


def factor_fields(module: Module, rank: int, dtype: DType) -> list[Field]:
    """Return A and B of a module as PEFT lays them out."""
    rows, columns = module.sides
    stem = f"{PREFIX}{module.name}"
    if module.form == "embedding":
        return [
            Field(f"{stem}.lora_embedding_A", (rank, columns), dtype),
            Field(f"{stem}.lora_embedding_B", (rows, rank), dtype),
        ]
    # Of a convolution A has its kernel, and B is a pointwise one.
    kernel = module.shape[2:] if module.form == "convolution" else ()
    inner = module.shape[1:] if module.form == "convolution" else (columns,)
    return [
        Field(f"{stem}.lora_A.weight", (rank, *inner), dtype),
        Field(f"{stem}.lora_B.weight", (rows, rank, *(1 for _ in kernel)), dtype),
    ]


def rounded_factor(name: str, factor: Array, dtype: DType) -> Array:
    """Round a factor to the dtype that it is kept in, in its shape.

    Raises:
        OutputError: if a value is beyond its range.
    """
    return rounded(name, np.ascontiguousarray(factor).reshape(-1), dtype).reshape(factor.shape)


def _gains(old: Array, new: Array) -> Array:
    """Return by what each row of the base is best multiplied to be near the fine-tune's: ``[rows]``, float64."""
    gains = np.ones(len(old))
    step = max(TILE // old.shape[1], 1)
    for start in range(0, len(old), step):
        one, other = old[start : start + step].astype(FLOAT64), new[start : start + step]
        squares = (one**2).sum(1)
        found = np.divide((one * other).sum(1), squares, out=np.ones(len(one)), where=squares > 0)
        gains[start : start + step] = np.where(found > _LEAST_GAIN, found, 1.0)
    return gains


def has_zero_row(difference: Difference, module: Module) -> bool:
    """Whether a row of the base, as the layer uses it, is zero: DoRA divides by its norm."""
    if not module.stored_transposed:
        width = module.sides[1]
        step = max(TILE // width, 1) * width
        return any(
            not _wide(difference, start, min(start + step, difference.size)).reshape(-1, width).any(1).all()
            for start in range(0, difference.size, step)
        )
    rows, columns = module.sides
    seen = np.zeros(rows, bool)
    step = max(TILE // rows, 1) * rows
    for start in range(0, rows * columns, step):
        seen |= _wide(difference, start, min(start + step, difference.size)).reshape(-1, rows).any(0)
    return not seen.all()


def _wide(difference: Difference, start: int, stop: int) -> Array:
    return widen(difference.base.read(start, stop), FLOAT64)


def _widened(factor: Array) -> Array:
    return widen(factor.reshape(-1), FLOAT64).reshape(factor.shape)
