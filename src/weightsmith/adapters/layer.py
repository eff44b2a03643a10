"""One layer that an adapter changes: its weight, what the adapter holds for it, and the settings that apply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.forms import Shape
from weightsmith.adapters.settings import Settings
from weightsmith.checkpoint.rows import FLOAT64, read_wide, tile_rows
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import widen


class Weight:
    """A base's weight as the layer uses it: ``[out, in]``, or ``[out, in, height, width]`` of a convolution.

    Attributes:
        tensor: the base's tensor.
        transposed: whether the base stores it as ``[in, out]``; of the weights of several experts, ``[experts, out,
            in]``, whether the last two axes are exchanged.
        shape: as the layer uses it.
    """

    def __init__(self, tensor: Tensor, *, transposed: bool = False) -> None:
        """Look at a tensor, perhaps transposed."""
        self.tensor = tensor
        self.transposed = transposed
        self.shape: Shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1]) if transposed else tensor.shape

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

    def rows(self, start: int, stop: int) -> Array:
        """Read some rows: ``[stop - start, columns]``, float64; of a transposed weight all of it is read for them."""
        if self.transposed:
            return self.matrix()[start:stop]
        columns = self.sides[1]
        return read_wide(self.tensor, start * columns, stop * columns).reshape(stop - start, columns)

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """Read it in tiles of rows: the first row of each, and ``[n, columns]``, float64."""
        rows, columns = self.sides
        if self.transposed:
            yield 0, self.matrix()
            return
        step = tile_rows(columns)
        for start in range(0, rows, step):
            yield start, self.rows(start, min(start + step, rows))


class Layer:
    """One layer that an adapter changes.

    Attributes:
        adapter: the adapter's name.
        name: the module's name.
        parts: what the adapter holds for it, by part.
        shared: what it holds for all layers, by part.
        siblings: how many layers the adapter changes, this one among them.
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
        siblings: int = 1,
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
            siblings: see the attributes.
        """
        self.adapter = adapter
        self.name = name
        self.parts = parts
        self.shared = shared
        self.siblings = siblings
        self._settings = settings
        self._lengths = lengths
        self._shape = shape
        self._weight = weight

    def __contains__(self, part: str) -> bool:
        """Whether the adapter holds a part for this layer."""
        return part in self.parts

    def array(self, part: str) -> Array:
        """Read a part, of this layer or shared, as float64, in its shape."""
        tensor = self._tensor(part)
        return read_wide(tensor, 0, tensor.size).reshape(tensor.shape)

    def numbered(self, part: str) -> list[Array]:
        """Read all parts of a name that ends in a number, in order: ``part.0``, ``part.1`` and so on.

        Raises:
            CheckpointError: if a number is missing.
        """
        names = {name for name in self.parts if name.startswith(f"{part}.")}
        wanted = [f"{part}.{number}" for number in range(len(names))]
        if names != set(wanted):
            raise self.error(f"it has {', '.join(sorted(names))}, which are not numbered from 0 to {len(names) - 1}")
        return [self.array(name) for name in wanted]

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
        tensor = self.parts.get(part, self.shared.get(part))
        if tensor is None:
            raise self.error(f"{part}, which all layers share, is not in the adapter's file")
        return tensor

    def has(self, name: str) -> bool:
        """Whether the layer's form names such a length."""
        return name in self._lengths

    @property
    def has_weight(self) -> bool:
        """Whether there is a base."""
        return self._weight is not None

    def length(self, name: str) -> int:
        """Return the length that the layer's form names."""
        (length,) = self._lengths[name]
        return length

    def __getitem__(self, part: str) -> Shape:
        """Return the shape of a part, of this layer or shared.

        Raises:
            CheckpointError: if the adapter does not hold it.
        """
        return self._tensor(part).shape

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
    def known_shape(self) -> Shape | None:
        """The weight's shape, or None if the adapter alone does not tell it."""
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
        return float(self._number(name))

    def whole(self, name: str) -> int:
        """Return a setting that is a whole number."""
        return int(self._number(name))

    def _number(self, name: str) -> float:
        value = self._settings.value(name, self.name)
        if not isinstance(value, int | float):
            raise self.error(f"adapter_config.json must give {name}, a number")
        return value

    def given(self, name: str) -> bool:
        """Whether a setting has a value."""
        return self._settings.value(name, self.name) is not None

    def wholes(self, name: str) -> tuple[int, ...]:
        """Return a setting that is a list of whole numbers."""
        value = self._settings.value(name, self.name)
        return tuple(int(one) for one in value) if isinstance(value, tuple) else ()

    def flag(self, name: str) -> bool:
        """Return a setting that is true or false."""
        return bool(self._settings.value(name, self.name))

    def among(self, name: str) -> bool:
        """Whether the layer is one of those that a setting names."""
        return self._settings.among(name, self.name)

    def text(self, name: str) -> str | None:
        """Return a setting that is text, or None where there is none."""
        value = self._settings.value(name, self.name)
        return None if value is None else str(value)

    def error(self, text: str) -> CheckpointError:
        """Return an error that names the adapter and the layer."""
        return CheckpointError(f"{self.adapter}: {self.name}: {text}")
