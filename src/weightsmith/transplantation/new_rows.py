"""The rows of new tokens, made as they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from threadpoolctl import threadpool_limits

from weightsmith import dtypes
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import read_wide, tile_rows, tiled
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import largest_finite, narrow
from weightsmith.tokenizer.matching import Numbers
from weightsmith.transplantation.combination import combine
from weightsmith.transplantation.gaussian import Gaussian, mean_of
from weightsmith.transplantation.landmarks import LandmarkMap
from weightsmith.transplantation.recipe import Way
from weightsmith.transplantation.rows import Rows
from weightsmith.transplantation.search import Found, Shared
from weightsmith.transplantation.tables import Table


class NewRows(Tensor):
    """Rows for new tokens in one of the model's tables: ``[T, width]``, of the table's dtype.

    Attributes:
        table: the model's table.
    """

    def __init__(self, table: Table, rows: int) -> None:
        """Say how many.

        Args:
            table: the model's table.
            rows: how many new rows.
        """
        self.name = table.tensor.name
        self.shape = (rows, table.width)
        self.dtype = table.tensor.dtype
        self.table = table

    @abstractmethod
    def make(self, first: int, last: int) -> Array:
        """Return rows ``first`` to ``last``: ``[last - first, width]``, float64; each depends on its number alone."""

    def values(self, start: int, stop: int) -> Array:
        """Return elements, at least one, before they are rounded: ``[stop - start]``, float64."""
        width = self.shape[1]
        first = start // width
        return self.make(first, -(-stop // width)).reshape(-1)[start - first * width : stop - first * width]

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`.

        Raises:
            CheckpointError: if what is made is no number, or too large for the table's dtype.
        """
        if start == stop:
            return np.empty(0, self.dtype)
        values = self.values(start, stop)
        made = narrow(values, self.dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.name}: rows of tokens hold values that are infinite or no numbers, and so would new ones, "
                "which are made of them: repair the checkpoint"
            )
        if not np.isfinite(made).all():
            dtype = dtypes.name_of(self.dtype)
            raise CheckpointError(
                f"{self.name}: the row of a new token comes to {np.abs(values).max():g}, and the largest {dtype} is "
                f"{largest_finite(self.dtype):g}: take another --method, or fewer --atoms"
            )
        return made


class Combined(NewRows):
    """Rows that are weighted sums of rows of the model."""

    def __init__(self, table: Table, rows: int, find: Callable[[], Found], centre: Numbers | None = None) -> None:
        """Say of what.

        Args:
            table: the model's table.
            rows: how many new rows.
            find: returns what each is made of.
            centre: the tokens whose mean row the sums are taken from, if any: ``[S]``.
        """
        super().__init__(table, rows)
        self._find, self._around = find, centre

    def make(self, first: int, last: int) -> Array:
        """See :meth:`NewRows.make`."""
        found = self._find()
        (rows,) = RECENT.get(self, lambda: (self.table.take(found.model),))
        return combine(found.combinations, rows, first, last, centre=self._centre)

    @cached_property
    def _centre(self) -> Array | None:
        return None if self._around is None else mean_of(self.table.all_rows(), self._around)


class Drawn(NewRows):
    """Rows that are drawn from a normal distribution around the model's, keyed by the seed and the token."""

    def __init__(self, table: Table, tokens: Sequence[str], known: Numbers, way: Way) -> None:
        """Say around what.

        Args:
            table: the model's table.
            tokens: the new tokens.
            known: the numbers of the model's tokens, whose rows the distribution is that of.
            way: ``random`` or ``gaussian``, with its seed.
        """
        super().__init__(table, len(tokens))
        self.held = 8 * table.width**2 if way.method == "gaussian" else 0
        self._tokens, self._known, self._way = tokens, known, way

    def values(self, start: int, stop: int) -> Array:
        """See :meth:`NewRows.values`; in tiles, for a product of matrices rounds by where a row stands in it."""
        return tiled(start, stop, self.shape[1], self.shape[0], self.make)

    def make(self, first: int, last: int) -> Array:
        """See :meth:`NewRows.make`."""
        gaussian = RECENT.get(self, self._measured)[0].gaussian
        return gaussian.draw(self._way.seed, self._tokens[first:last], self._way.scale)

    def _measured(self) -> tuple[_Measured]:
        # Sums that linear algebra divides among threads depend on their number.
        with threadpool_limits(1, user_api="blas"):
            found = Gaussian.of(Rows(self.table.tensor), self._known, covariance=self._way.method == "gaussian")
        return (_Measured(found),)


class Mapped(NewRows):
    """Rows that are the donor's, brought to the model's space by one map."""

    def __init__(self, table: Table, donor: Tensor, shared: Shared, targets: Numbers) -> None:
        """Say which.

        Args:
            table: the model's table.
            donor: where the donor's tokens lie: ``[V, d]``.
            shared: the anchors that the map is fitted to.
            targets: the new tokens' numbers in the donor.
        """
        super().__init__(table, len(targets))
        self.held = 8 * table.width * donor.shape[1]
        self._donor, self._shared, self._targets = donor, shared, targets

    def make(self, first: int, last: int) -> Array:
        """See :meth:`NewRows.make`."""
        found = RECENT.get(self, self._fitted)[0].map
        return found.apply(Rows(self._donor).take(self._targets[first:last]))

    def _fitted(self) -> tuple[_Fitted]:
        shared = self._shared
        with threadpool_limits(1, user_api="blas"):
            found = LandmarkMap.of(Rows(self._donor), shared.donor, Rows(self.table.tensor), shared.model)
        return (_Fitted(found),)


@dataclass(frozen=True)
class _Measured:
    gaussian: Gaussian

    @property
    def nbytes(self) -> int:
        return int(self.gaussian.spread.nbytes)


@dataclass(frozen=True)
class _Fitted:
    map: LandmarkMap

    @property
    def nbytes(self) -> int:
        return int(self.map.matrix.nbytes)


class MeanRow(NewRows):
    """One row: the mean of the rows of all tokens that the model has."""

    def __init__(self, table: Table, tokens: Numbers) -> None:
        """Say of what.

        Args:
            table: the model's table.
            tokens: the numbers of the model's tokens, ascending: rows that no token has are not counted.
        """
        super().__init__(table, 1)
        self._tokens = tokens

    def make(self, first: int, last: int) -> Array:
        """See :meth:`NewRows.make`."""
        return RECENT.get(self, self._mean)[0][first:last]

    def _mean(self) -> tuple[Array]:
        width = self.shape[1]
        total, step = np.zeros(width), tile_rows(width)
        for start in range(0, self.table.rows, step):
            stop = min(start + step, self.table.rows)
            begin, end = np.searchsorted(self._tokens, [start, stop])
            if begin < end:
                values = read_wide(self.table.tensor, start * width, stop * width).reshape(stop - start, width)
                total += values[self._tokens[begin:end] - start].sum(0)
        return ((total / max(len(self._tokens), 1))[None],)
