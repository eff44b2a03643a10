"""What a method sees: the same stretch of one tensor from every model.

Nothing here imports NumPy, so that ``weightsmith methods`` can list every method without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

# An array of NumPy or of any namespace of the Python array API standard.
Array = Any
Stat = TypeVar("Stat")


@dataclass(frozen=True)
class Sweep:
    """One pass over the blocks of a scope.

    The blocks of a sweep are the same whatever the block size, the threads and the machine.

    Attributes:
        function: what to compute of each block. One of :mod:`weightsmith.methods.sweeps` may be answered by a
            fused loop.
        combine: None, to be sent the list of all results, in the order of the blocks; or a function that joins
            what was found so far and the result of the next block, to be sent a list of one, or an empty list
            where there are no blocks.
        only: None for all blocks, or the index of the one block to visit.
        sampled: whether to visit, instead of the blocks, a few hundred short stretches from all over the scope.
    """

    function: Callable[[Block], Any]
    combine: Callable[[Any, Any], Any] | None = None
    only: int | None = None
    sampled: bool = False


# A statistic of a whole tensor (or layer, or model) is computed by a generator. It yields a sweep, is sent the
# list of results, may yield again, and returns the statistic in the end.
Statistic = Generator[Sweep, list[Any], Stat]


@dataclass(frozen=True)
class Form:
    """What a method may know of a tensor before it is read.

    Attributes:
        shape: the lengths of its axes.
        role: what it is for, as far as its name tells: ``embedding``, ``head``, ``norm``, ``mlp``, ... or ``other``;
            see :func:`weightsmith.architecture.stacks.role`.
        itemsize: bytes of an element of the working dtype: 4 or 8.
    """

    shape: tuple[int, ...]
    role: str = "other"
    itemsize: int = 4


@dataclass(frozen=True)
class Scope:
    """What a statistic ranges over.

    Attributes:
        size: number of elements in all tensors of the scope.
        models: number of models, the base not counted.
        form: what is known of the tensor, where the scope is one tensor.
        fishers: whether any of its blocks has importances.
    """

    size: int
    models: int
    form: Form | None = None
    fishers: bool = False


class OnDemand(Sequence[Array]):
    """Arrays that are made when they are asked for, and not kept."""

    def __init__(self, count: int, make: Callable[[int], Array]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            return OnDemand(len(chosen), lambda i: self._make(chosen[i]))
        return self._make(range(self._count)[index])


@dataclass(frozen=True)
class Work:
    """What linear algebra on whole matrices costs.

    Attributes:
        operations: floating-point operations, those of a statistic that takes matrices apart included.
        elements: the most that is held at a time, counted in elements of the working dtype: the task vectors that the
            method asks for, the result, and the workspace of LAPACK.
        decompositions: singular value or eigenvalue decompositions.
    """

    operations: float
    elements: int
    decompositions: int = 0


@dataclass(frozen=True)
class Block:
    """A stretch of one tensor from the base and from every model, in the working dtype (float32 or float64).

    All arrays have one shape, which depends on what the method declares to read:

    - ``elements``: ``[n]``, any n consecutive elements;
    - ``rows``: ``[r, c]``, r whole vectors along the last axis (a 1-D tensor or a scalar is one row);
    - ``filters``: ``[r, c]``, r whole slices along the first axis, flattened (a 1-D tensor is one slice);
    - ``tensor``: the tensor's own shape, all of it; see :class:`WholeBlock`.

    Attributes:
        base: the base's stretch, or None where there is no base.
        models: one stretch per model, the base not among them.
        start: index of the first element in the scope of the method's statistic: in the tensor, or, where the
            scope is a layer or the model, in the sequence of all tensors of that scope.
        draw: ``draw(i)`` gives uniform random numbers in [0, 1) for model i, float32, in the blocks' shape;
            they depend on seed, tensor, model and element alone.
        role: what the tensor is for; see :class:`Form`.
        fishers: one stretch of importances per model, None for a model without; empty where none has any.
        base_fisher: the base's importances, or None.
    """

    base: Array
    models: Sequence[Array]
    start: int
    draw: Callable[[int], Array]
    role: str = "other"
    fishers: tuple[Array | None, ...] = ()
    base_fisher: Array | None = None

    @cached_property
    def deltas(self) -> Sequence[Array]:
        """The task vectors: every model minus the base (the models themselves where there is no base)."""
        if self.base is None:
            return self.models
        return tuple(model - self.base for model in self.models)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the arrays."""
        return tuple((self.models[0] if self.base is None else self.base).shape)

    @cached_property
    def xp(self) -> Any:
        """The array namespace (NumPy, torch, ...) that the arrays belong to."""
        from array_api_compat import array_namespace

        return array_namespace(self.models[0] if self.base is None else self.base)

    @cached_property
    def positions(self) -> Array:
        """Index of every element in the statistic's scope: int64, in the blocks' shape."""
        from array_api_compat import device

        first = self.models[0] if self.base is None else self.base
        shape = first.shape
        size = 1
        for length in shape:
            size *= length
        xp = self.xp
        flat = xp.arange(self.start, self.start + size, dtype=xp.int64, device=device(first))
        return xp.reshape(flat, shape)


class WholeBlock(Block):
    """A whole tensor. Base, models and task vectors are read each time that they are asked for, and not kept.

    Go through them one at a time, and memory does not grow with their number.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        xp: Any,
        read: Callable[[int], Array],
        subtract: Callable[[int], Array],
        models: int,
        *,
        has_base: bool,
        **others: Any,
    ) -> None:
        """Say how to read a tensor.

        Args:
            shape: the tensor's shape.
            xp: the array namespace.
            read: gives model i; the base where i is -1.
            subtract: gives model i minus the base.
            models: number of models, the base not counted.
            has_base: whether there is a base.
            others: attributes of a block: start, draw, role, fishers, base_fisher.
        """
        self.__dict__.update(
            _shape=shape,
            _read=read if has_base else None,
            models=OnDemand(models, read),
            deltas=OnDemand(models, subtract if has_base else read),
            xp=xp,
            **others,
        )

    @property
    def base(self) -> Array:
        """The base's tensor, read now, or None where there is no base."""
        read = self.__dict__["_read"]
        return None if read is None else read(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        shape: tuple[int, ...] = self.__dict__["_shape"]
        return shape


def rank_in_rows(xp: Any, magnitudes: Array) -> Array:
    """Return the rank of every value among the values of its row, from 0; equal values in order of position.

    Args:
        xp: the array's namespace. One that has a function of this name is asked; the standard knows no ranks.
        magnitudes: non-negative numbers ``[r, c]``; NaN ranks last.

    Returns:
        ``[r, c]`` in the same dtype.
    """
    own = getattr(xp, "rank_in_rows", None)
    if own is not None:
        return own(magnitudes)
    order = xp.argsort(magnitudes, axis=-1, stable=True)
    return xp.astype(xp.argsort(order, axis=-1, stable=True), magnitudes.dtype)
