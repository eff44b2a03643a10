"""What an adapter does to one weight, in one of four shapes: which rows it must see to give new rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from weightsmith.checkpoint.tensor import Array


class Change(ABC):
    """How the rows of one weight change; the weight is a matrix ``[out, everything else]`` in float64.

    Attributes:
        whole: whether :meth:`rows` must be given all rows at once.
    """

    whole: bool = False

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays that this holds."""

    @abstractmethod
    def rows(self, base: Array, start: int) -> Array:
        """Return the new rows for some rows of the base.

        Args:
            base: ``[n, columns]``, float64; not written to.
            start: which row the first of them is.

        Returns:
            ``[n, columns]``, float64.
        """

    def turned(self) -> Change | None:
        """Return what becomes of the transposed matrix, by its own rows; None where its rows do not tell."""
        return None


class Added(Change):
    """A matrix is added that does not depend on the base."""

    def __init__(self, delta: Callable[[int, int], Array], arrays: Sequence[Array]) -> None:
        """Name the matrix by its rows.

        Args:
            delta: returns rows ``start`` to ``stop`` of it: ``[n, columns]``, float64.
            arrays: what it is made from, which is held.
        """
        self._delta = delta
        self._nbytes = sum(array.nbytes for array in arrays)

    @property
    def nbytes(self) -> int:
        """See :attr:`Change.nbytes`."""
        return self._nbytes

    def delta(self, start: int, stop: int) -> Array:
        """Return rows ``start`` to ``stop`` of the matrix: ``[n, columns]``, float64."""
        return self._delta(start, stop)

    def rows(self, base: Array, start: int) -> Array:
        """See :meth:`Change.rows`."""
        added: Array = base + self.delta(start, start + len(base))
        return added


class LowRank(Added):
    """A product of two factors is added.

    Attributes:
        left: ``[out, rank]``, float64.
        right: ``[rank, columns]``, float64.
    """

    def __init__(self, left: Array, right: Array) -> None:
        """Multiply two matrices, when rows are asked for."""
        # A function of its own would hold the product that holds it: such rings are freed late, and factors are large.
        super().__init__(lambda start, stop: left[start:stop] @ right, [left, right])
        self.left = left
        self.right = right

    @property
    def rank(self) -> int:
        """The rank, at most."""
        return int(self.left.shape[1])

    def turned(self) -> LowRank:
        """See :meth:`Change.turned`."""
        return LowRank(np.ascontiguousarray(self.right.T), np.ascontiguousarray(self.left.T))


class Scaled(Change):
    """Rows and columns are multiplied by numbers, after a product of two factors was added: ``r (W + L R) c``."""

    def __init__(
        self, product: LowRank | None = None, *, rows: Array | None = None, columns: Array | None = None
    ) -> None:
        """Take what is added and multiplied.

        Args:
            product: what is added first.
            rows: a number for every row: ``[out]``, float64.
            columns: a number for every column: ``[columns]``, float64.
        """
        self._added = product
        self._rows = rows
        self._columns = columns

    @property
    def nbytes(self) -> int:
        """See :attr:`Change.nbytes`."""
        return sum(part.nbytes for part in (self._added, self._rows, self._columns) if part is not None)

    def rows(self, base: Array, start: int) -> Array:
        """See :meth:`Change.rows`."""
        changed = base if self._added is None else self._added.rows(base, start)
        if self._rows is not None:
            changed = changed * self._rows[start : start + len(base), None]
        return changed if self._columns is None else changed * self._columns

    def turned(self) -> Scaled:
        """See :meth:`Change.turned`."""
        product = None if self._added is None else self._added.turned()
        return Scaled(product, rows=self._columns, columns=self._rows)


class Rows(Change):
    """Each row changes by itself: what becomes of it depends on that row of the base alone."""

    def __init__(self, function: Callable[[Array, int], Array], arrays: Sequence[Array] = ()) -> None:
        """Take the function of :meth:`Change.rows`.

        Args:
            function: see there.
            arrays: what it uses, which is held.
        """
        self._function = function
        self._nbytes = sum(array.nbytes for array in arrays)

    @property
    def nbytes(self) -> int:
        """See :attr:`Change.nbytes`."""
        return self._nbytes

    def rows(self, base: Array, start: int) -> Array:
        """See :meth:`Change.rows`."""
        return self._function(base, start)


class Whole(Rows):
    """Rows change by what stands in other rows: the whole matrix is worked on at once."""

    whole = True

    def __init__(self, function: Callable[[Array], Array], arrays: Sequence[Array] = ()) -> None:
        """Take a function of the whole matrix.

        Args:
            function: returns the new matrix ``[out, columns]``, float64, and leaves the old one as it is.
            arrays: what it uses, which is held.
        """
        super().__init__(lambda base, _: function(base), arrays)
