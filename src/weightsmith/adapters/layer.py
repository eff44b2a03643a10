"""One layer that an adapter changes: its weight, what the adapter holds for it, and the settings that apply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.forms import Shape
from weightsmith.adapters.settings import Settings
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import widen

FLOAT64 = np.dtype(np.float64)
# Elements of a tile of rows: rows of a weight are worked on by tiles that its shape alone decides.
TILE = 1 << 16


def tile_rows(width: int) -> int:
    """Return how many rows of this width are worked on at a time."""
    return max(TILE // max(width, 1), 1)


class Weight:
    """A base's weight as the layer uses it: ``[out, in]``, or ``[out, in, height, width]`` of a convolution.

    Attributes:
        tensor: the base's tensor.
        transposed: whether the base stores it as ``[in, out]``.
        shape: as the layer uses it.
    """

    def __init__(self, tensor: Tensor, *, transposed: bool = False) -> None:
        """Look at a tensor, perhaps transposed."""
        self.tensor = tensor
        self.transposed = transposed
        self.shape: Shape = tensor.shape[::-1] if transposed else tensor.shape

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the matrix ``[out, everything else]``."""
        rows = self.shape[0] if self.shape else 1
        return rows, self.tensor.size // max(rows, 1)

    def matrix(self) -> Array:
        """Read all of it: ``[out, columns]``, float64."""
        whole = read_wide(self.tensor, 0, self.tensor.size)
        rows, columns = self.sides
        return np.ascontiguousarray(whole.reshape(columns, rows).T) if self.transposed else whole.reshape(rows, columns)

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Read it in tiles of rows: the first row of each, and ``[n, columns]``, float64."""
        rows, columns = self.sides
        if self.transposed:
            yield 0, self.matrix()
            return
        step = tile_rows(columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, read_wide(self.tensor, start * columns, stop * columns).reshape(stop - start, columns)


def read_wide(tensor: Tensor, start: int, stop: int) -> Array:
    """Read elements as float64, of a computed tensor before they are rounded: ``[stop - start]``."""
    wide = getattr(tensor, "read_wide", None)
    return widen(wide(start, stop) if wide is not None else tensor.read(start, stop), FLOAT64)


class Layer:
    """One layer that an adapter changes.

    Attributes:
        adapter: the adapter's name.
        name: the module's name.
        parts: what the adapter holds for it, by part.
        shared: what it holds for all layers, by part.
    """

    def __init__(
        self,
        adapter: str,
        name: str,
        parts: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        settings: Settings,
        lengths: Mapping[str, Shape],
        shape: Shape | None,
        weight: Weight | None,
    ) -> None:
        """Collect what is known of a layer.

        Args:
            adapter: see the attributes.
            name: see the attributes.
            parts: see the attributes.
            shared: see the attributes.
            settings: the adapter's.
            lengths: the lengths that its form names.
            shape: the weight's, if it is known.
            weight: the base's weight; None where there is no base.
        """
        self.adapter = adapter
        self.name = name
        self.parts = parts
        self.shared = shared
        self._settings = settings
        self._lengths = lengths
        self._shape = shape
        self._weight = weight

    def __contains__(self, part: str) -> bool:
        """Whether the adapter holds a part for this layer."""
        return part in self.parts

    def __getitem__(self, part: str) -> Shape:
        """Return the shape of a part, of this layer or shared."""
        return self._tensor(part).shape

    def array(self, part: str) -> Array:
        """Read a part, of this layer or shared, as float64, in its shape."""
        tensor = self._tensor(part)
        return read_wide(tensor, 0, tensor.size).reshape(tensor.shape)

    def integers(self, part: str, stop: int) -> Array:
        """Read a part that holds places: int64, in its shape.

        Args:
            part: which.
            stop: the number that all must lie below.

        Raises:
            CheckpointError: if they are no integers from 0 to ``stop - 1``.
        """
        tensor = self._tensor(part)
        found = tensor.numpy()
        if not (np.issubdtype(found.dtype, np.integer) or found.dtype == np.bool_):
            whole = widen(found.reshape(-1), FLOAT64).reshape(found.shape)
            # Layouts without integers keep them as floats.
            if not (np.isfinite(whole).all() and (whole == np.rint(whole)).all()):
                raise self.error(f"{part} is {dtypes.name_of(tensor.dtype)}, and holds places, which are integers")
            found = whole
        if found.size and (found.min() < 0 or found.max() >= stop):
            raise self.error(
                f"{part} holds places from {found.min():.0f} to {found.max():.0f}, and 0 to {stop - 1} are there"
            )
        places: Array = found.astype(np.int64)
        return places

    def require(self, why: str, *parts: str) -> None:
        """Check that the adapter holds parts, for this layer or for all.

        Raises:
            CheckpointError: if it lacks one; ``why`` says why nothing else can stand for it.
        """
        missing = [part for part in parts if part not in self.parts and part not in self.shared]
        if missing:
            raise self.error(f"the adapter does not hold {' and '.join(missing)}: {why}; store it beside the rest")

    def _tensor(self, part: str) -> Tensor:
        return self.parts[part] if part in self.parts else self.shared[part]

    def length(self, name: str) -> int:
        """Return the length that the layer's form names."""
        (length,) = self._lengths[name]
        return length

    @property
    def shape(self) -> Shape:
        """The weight's shape.

        Raises:
            CheckpointError: if the adapter alone does not tell it.
        """
        if self._shape is None:
            raise self.error("its shape does not follow from the adapter: name the base")
        return self._shape

    @property
    def rows(self) -> int:
        """Rows of the weight as a matrix ``[out, everything else]``."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix ``[out, everything else]``."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def weight(self) -> Weight:
        """The base's weight.

        Raises:
            CheckpointError: if there is no base.
        """
        if self._weight is None:
            raise self.error("what the adapter does depends on the base's weight: name the base")
        return self._weight

    def number(self, name: str) -> float:
        """Return a setting that is a number."""
        value = self._settings.value(name, self.name)
        if value is None:
            raise self.error(f"adapter_config.json must give {name}, a number")
        return float(value)

    def whole(self, name: str) -> int:
        """Return a setting that is a whole number."""
        return int(self.number(name))

    def flag(self, name: str) -> bool:
        """Return a setting that is true or false."""
        return bool(self._settings.value(name, self.name))

    def text(self, name: str) -> str | None:
        """Return a setting that is text, or None where there is none."""
        value = self._settings.value(name, self.name)
        return None if value is None else str(value)

    def error(self, text: str) -> CheckpointError:
        """Return an error that names the adapter and the layer."""
        return CheckpointError(f"{self.adapter}: {self.name}: {text}")
