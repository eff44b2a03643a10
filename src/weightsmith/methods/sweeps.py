"""What a statistic can ask of every block in a form that the engine knows: it may answer by a fused loop.

Each is a function of a block, to be the ``function`` of a :class:`~weightsmith.methods.block.Sweep`; called, it
computes the answer from the block's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.methods.block import Array, Block


@dataclass(frozen=True)
class Numbers:
    """Sums and counts.

    Attributes:
        values: gives 0-D arrays or numbers, the same number of them for every block; sum float64 arrays.
    """

    values: Callable[[Block], Sequence[Any]]

    def __call__(self, block: Block) -> list[float]:
        """Return the numbers of a block."""
        return [float(value) for value in self.values(block)]


@dataclass(frozen=True)
class Patterns:
    """The bit patterns of non-negative values.

    Attributes:
        values: gives arrays of non-negative numbers in the blocks' shape.
    """

    values: Callable[[Block], Sequence[Array]]

    def __call__(self, block: Block) -> list[Any]:
        """Return a NumPy array of unsigned integers for each array of a block."""
        from weightsmith.kernels.select import selector

        found = [(selector(array), array) for array in self.values(block)]
        return [kernel.gather(kernel.patterns(array)) for kernel, array in found]


@dataclass(frozen=True)
class Within:
    """The bit patterns that lie in a range.

    Attributes:
        values: gives arrays of non-negative numbers in the blocks' shape.
        ranges: the least and the greatest pattern wanted of each array.
    """

    values: Callable[[Block], Sequence[Array]]
    ranges: Sequence[tuple[int, int]]

    def __call__(self, block: Block) -> list[Any]:
        """Return a :class:`~weightsmith.kernels.select.Gathered` of one block for each array."""
        from weightsmith.kernels import select

        gathered = []
        for array, bounds in zip(self.values(block), self.ranges, strict=True):
            kernel = select.selector(array)
            gathered.append(select.Gathered.of_block(*kernel.within(kernel.patterns(array), *bounds)))
        return gathered


@dataclass(frozen=True)
class Histograms:
    """Counts of bit patterns by the 16 bits that follow a prefix.

    Attributes:
        values: gives arrays of non-negative numbers in the blocks' shape.
        prefixes: the bits before those 16, for each array; only values that begin with them are counted.
        level: how many times 16 bits a prefix has.
    """

    values: Callable[[Block], Sequence[Array]]
    prefixes: Sequence[int]
    level: int

    def of(self, prefix: int, width: int) -> tuple[int, int]:
        """Return the least pattern with a prefix and how far its digit is shifted, for patterns of a width in bits."""
        return digit_range(prefix, self.level, width)

    def __call__(self, block: Block) -> list[Any]:
        """Return the width of the patterns in bits, and 65,536 counts for each array."""
        from weightsmith.kernels.select import selector

        arrays = self.values(block)
        width = 8 * arrays[0].dtype.itemsize
        counts = []
        for array, prefix in zip(arrays, self.prefixes, strict=True):
            kernel = selector(array)
            counts.append(kernel.histogram(kernel.patterns(array), *self.of(prefix, width)))
        return [width, *counts]


def digit_range(prefix: int, level: int, width: int) -> tuple[int, int]:
    """Return the least pattern with a prefix and how far the 16 bits that follow it are shifted.

    Args:
        prefix: the leading bits.
        level: how many times 16 bits that is.
        width: bits of a pattern.
    """
    shift = width - 16 * (level + 1)
    return prefix << (shift + 16), shift


@dataclass(frozen=True)
class Equal:
    """The positions of the values that have one bit pattern.

    Attributes:
        values: gives one array of non-negative numbers in the blocks' shape.
        pattern: the pattern.
    """

    values: Callable[[Block], Sequence[Array]]
    pattern: int

    def __call__(self, block: Block) -> list[int]:
        """Return the indices in the scope, ascending."""
        from weightsmith.kernels.select import selector

        (array,) = self.values(block)
        kernel = selector(array)
        return [block.start + int(i) for i in kernel.equal(kernel.patterns(array), self.pattern)]
