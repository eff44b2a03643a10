"""A step's tensor where a tensor of a file is expected: computed as it is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.gathered import resized
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.expression import Computed, computed_within
from weightsmith.kernels.convert import narrow


class Evaluated(Tensor):
    """A computed tensor that stands for itself: what it rests on is no part of the expression that it is put into.

    Attributes:
        computed: the tensor.
    """

    def __init__(self, computed: Computed, shared: dict[int, Any]) -> None:
        """Wrap a computed tensor.

        Args:
            computed: the tensor.
            shared: statistics that range over several tensors, for all that one merge wraps so.
        """
        self.name = computed.name
        self.shape = computed.shape
        self.size = computed.size
        self.dtype = computed.dtype
        self.computed = computed
        self._evaluator = Evaluator(shared)
        self._whole = any(part.reads == "tensor" for part in computed_within(computed))

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to this tensor's dtype."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop`` as another computed tensor would see them: ``[n]``, wide."""
        computed = self.computed
        if not self._whole:
            return np.asarray(self._evaluator.values(computed, start, stop, computed.working))
        # An evaluator keeps whole matrices; this one would for as long as the plan is there.
        (values,) = RECENT.get(self, lambda: (Evaluator().values(computed, 0, self.size, computed.working),))
        stretch: Array = values[start:stop]
        return stretch


class Rearranger:
    """Makes tensors of the models of one merge into others of other rows: longer, shorter, or in another order.

    Attributes:
        owners: id of a tensor that was made so -> name of the checkpoint that it is of.
    """

    def __init__(self) -> None:
        self.owners: dict[int, str] = {}
        self._statistics: dict[int, Any] = {}
        self._evaluated: dict[int, Evaluated] = {}

    def read(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is read by itself: that of a file as it is, that of a step computed."""
        if not isinstance(tensor, Computed):
            return tensor
        if id(tensor) not in self._evaluated:
            self._evaluated[id(tensor)] = Evaluated(tensor, self._statistics)
        return self._evaluated[id(tensor)]

    def own(self, made: Tensor, owner: Checkpoint) -> Tensor:
        """Note whose a tensor is that was made of others, and return it."""
        self.owners[id(made)] = owner.name
        return made

    def with_rows(self, tensor: Tensor, rows: int, owner: Checkpoint) -> Tensor:
        """Return a tensor of a file, or of a step, with so many rows: its first, or all and zeros behind them.

        Args:
            tensor: a tensor of at least one axis.
            rows: the length of the first axis.
            owner: the checkpoint that it is of.
        """
        return self.own(resized(self.read(tensor), rows), owner)
