"""Tensors that are computed: a method applied to other tensors, which may be computed themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from weightsmith.architecture.stacks import role
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType, working_dtype
from weightsmith.methods.block import Form, Work
from weightsmith.methods.registry import Granularity, Method


class Group:
    """The computed tensors that share one statistic: a tensor by itself, a layer, or a whole model.

    Members are added while a plan is made; after that a group does not change.

    Attributes:
        members: the tensors, in order.
        size: number of elements in all of them.
        kept: the statistic by this group's id, once a tensor of several was read from Python.
    """

    def __init__(self) -> None:
        self.members: list[Computed] = []
        self.kept: dict[int, Any] = {}
        self._offsets: dict[int, int] = {}
        self.size = 0

    def add(self, member: Computed) -> None:
        """Add the next tensor of the scope."""
        self.members.append(member)
        self._offsets[id(member)] = self.size
        self.size += member.size

    def offset_of(self, member: Computed) -> int:
        """Index of the member's first element in the scope."""
        return self._offsets[id(member)]


class Computed(Tensor):
    """The result of a method on one tensor of a base and of several models, all of one shape.

    Attributes:
        method: the method.
        base: the base's tensor, or None.
        models: the models' tensors.
        fishers: importances of the base, if there is one, and of the models: a tensor or None for each; or empty.
        inputs: all tensors that are read: the base's, if there is one, the models', and those of the importances.
        labels: a stable name for each model: random masks depend on it.
        parameters: the method's parameters, resolved for this tensor; per-model ones are tuples.
        seed: the recipe's seed.
        label: the name that random masks depend on; the tensor's name in the checkpoint it is part of.
        group: the tensors that the method's statistic ranges over, this one among them.
        rounds: whether an operation that takes this tensor as input sees it rounded to ``dtype``; otherwise it
            sees the result as it was computed.
        casts: a dtype to round inputs to before anything is computed (what mergekit's ``dtype`` does), or None.
        working: the dtype of the arithmetic.
    """

    def __init__(
        self,
        name: str,
        dtype: DType,
        method: Method,
        models: tuple[Tensor, ...],
        base: Tensor | None = None,
        *,
        parameters: Mapping[str, Any],
        labels: tuple[str, ...] = (),
        seed: int = 0,
        group: Group | None = None,
        rounds: bool = False,
        casts: DType | None = None,
        fishers: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.name = name
        self.shape = models[0].shape
        self.size = models[0].size
        self.dtype = dtype
        self.method = method
        self.base = base
        self.models = models
        self.parameters = parameters
        self.labels = labels or tuple(str(i) for i in range(len(models)))
        self.seed = seed
        self.rounds = rounds
        self.casts = casts
        self.fishers = fishers
        weights = models if base is None else (base, *models)
        self.inputs = (*weights, *(one for one in fishers if one is not None))
        self.working = working_dtype([_working_of(tensor) for tensor in weights])
        self.group = group or Group()
        self.group.add(self)

    @cached_property
    def form(self) -> Form:
        """What the method may know of this tensor before it is read."""
        return Form(self.shape, role(self.name), self.working.itemsize)

    @cached_property
    def reads(self) -> Granularity:
        """What a block of this tensor must hold."""
        return self.method.reads(self.parameters, self.form)

    @cached_property
    def work(self) -> Work | None:
        """What the method's linear algebra costs here."""
        work = self.method.work
        return None if work is None else work(self.parameters, self.form, len(self.models))

    @property
    def columns(self) -> int:
        """Length of the vectors that may not be cut: 1 where any stretch of elements will do."""
        return columns(self.shape, self.reads)

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; the elements are computed."""
        from weightsmith.engine.evaluate import Evaluator
        from weightsmith.kernels.convert import narrow

        groups = [part.group for part in computed_within(self) if len(part.group.members) > 1]
        known: dict[int, Any] = {}
        for group in groups:
            known |= group.kept
        values = Evaluator(known).values(self, start, stop)
        # What ranges over other tensors as well is not gathered again for each of them.
        for group in groups:
            group.kept = {id(group): known[id(group)]} if id(group) in known else {}
        return narrow(values, self.dtype)


def carried(tensor: Tensor, dtype: DType) -> Tensor | None:
    """Return the tensor of a file whose bytes are those of a result, or None if there is something to compute.

    Args:
        tensor: the result, stored or computed.
        dtype: the dtype it is written in.
    """
    while isinstance(tensor, Computed):
        carries = tensor.method.carries
        if carries is None or not carries(tensor.parameters) or tensor.dtype != dtype:
            return None
        if tensor.casts not in (None, dtype):
            return None
        tensor = tensor.models[0]
    return tensor if tensor.dtype == dtype and not is_made(tensor) else None


def is_made(tensor: Tensor) -> bool:
    """Whether a tensor's values come from arithmetic, rather than straight from a file."""
    return isinstance(tensor, Computed) or hasattr(tensor, "read_wide")


def columns(shape: tuple[int, ...], reads: Granularity) -> int:
    """Return the length of the vectors of a tensor that a block may not cut.

    Args:
        shape: the tensor's shape.
        reads: what a block must hold.
    """
    size = 1
    for length in shape:
        size *= length
    if reads == "elements":
        return 1
    if reads == "tensor" or len(shape) < 2:
        return max(size, 1)
    return max(shape[-1] if reads == "rows" else size // max(shape[0], 1), 1)


def computed_within(tensor: Tensor) -> Iterator[Computed]:
    """Yield every computed tensor that this one rests on, inputs before what is computed from them."""
    if isinstance(tensor, Computed):
        for part in tensor.inputs:
            if isinstance(part, Computed):
                yield from computed_within(part)
        yield tensor


def stored_within(tensor: Tensor) -> Iterator[Tensor]:
    """Yield every tensor that is read, not computed, to make this one."""
    if isinstance(tensor, Computed):
        for part in tensor.inputs:
            if isinstance(part, Computed):
                yield from stored_within(part)
            else:
                yield part
    else:
        yield tensor


def _working_of(tensor: Tensor) -> DType:
    return tensor.working if isinstance(tensor, Computed) else tensor.dtype
