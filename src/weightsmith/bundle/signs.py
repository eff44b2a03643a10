"""One bit per weight and one number per matrix: BitDelta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from weightsmith.bundle.description import Entry
from weightsmith.bundle.kind import Group, Kind, Made, Stored, Survey, task_name
from weightsmith.bundle.tiles import Bits, Together, Values, bytes_of_bits, pack, unpack
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import working_dtype
from weightsmith.kernels.convert import narrow, widen

_UINT8 = np.dtype(np.uint8)
_FLOAT32 = np.dtype(np.float32)
SIGN, SCALE = "sign", "scale"


@dataclass(frozen=True)
class BitDelta(Kind):
    """BitDelta: the sign of every entry of a task vector, and one scale per matrix.

    ``W_t = W_0 + a sign(d_t)`` with ``a = mean |d_t|``, which is the scale of least squared error for these signs.
    Matrices of layers are stored so; norms, biases, embeddings and heads are kept whole, as in the paper, and so are
    tensors of more axes (experts that are stored as one), of which it does not speak. The paper then trains the scales
    on data (scale distillation); this is its first step, without data.

    Liu et al., BitDelta: Your Fine-Tune May Only Be Worth One Bit, NeurIPS 2024, arXiv:2402.10193.

    Attributes:
        tensors: ``layers``: the two-dimensional weights of layers; ``all``: every tensor of two or more axes, with one
            scale each.
        zeros: the sign of entries that do not change: ``minus``, as the paper defines it; or ``plus``, as the authors'
            code computes it. Fine-tunes stored in 16 bits leave many entries as they are.
    """

    name: ClassVar[str] = "bitdelta"
    summary: ClassVar[str] = "nothing shared; per task a bit per weight and a scale per matrix, all else whole"

    tensors: Literal["layers", "all"] = "layers"
    zeros: Literal["minus", "plus"] = "minus"

    def __post_init__(self) -> None:
        self._check_choice("tensors", "layers", "all")
        self._check_choice("zeros", "minus", "plus")

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`."""
        taken = [group for group in groups if self._takes(group)]
        return Made(taken, [one for group in taken for task in group.models for one in self._of_task(group, task)])

    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """See :meth:`Kind.restore`."""
        signs = stored.own(SIGN, (bytes_of_bits(base.size),), _UINT8)
        return SignedTensor(entry, base, signs, stored.own(SCALE, (), _FLOAT32), stored)

    def _takes(self, group: Group) -> bool:
        axes = len(group.shape)
        return axes == 2 and group.place is not None if self.tensors == "layers" else axes >= 2

    def _of_task(self, group: Group, task: str) -> list[Tensor]:
        def tile(start: int, stop: int) -> tuple[list[Array], list[float]]:
            change = group.change(task, start, stop)
            signs = change > 0 if self.zeros == "minus" else change >= 0
            return [pack(signs)], [float(np.abs(change).sum(dtype=np.float64))]

        together = Together(group.size, [8], tile)

        def scale(start: int, stop: int) -> Array:
            return np.full(stop - start, together.sums()[0] / group.size)

        return [
            Bits(task_name(task, SIGN, group.name), group.size, lambda start, stop: together.read(0, start, stop)),
            Values(task_name(task, SCALE, group.name), (), _FLOAT32, scale),
        ]


class SignedTensor(Tensor):
    """A base's tensor with one number added to its entries, or taken from them."""

    def __init__(self, entry: Entry, base: Tensor, signs: Tensor, scale: Tensor, stored: Stored) -> None:
        self.name = stored.name
        self.shape = entry.shape
        self.dtype = entry.dtype
        self._base = base
        self._signs = signs
        self._scale_tensor = scale
        self._stored = stored
        self._working = working_dtype([base.dtype, entry.dtype])

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded once."""
        values = widen(self._base.read(start, stop), self._working)
        signs = unpack(self._signs, start, stop)
        return narrow(values + np.where(signs, self._scale, -self._scale), self.dtype)

    @cached_property
    def _scale(self) -> Array:
        scale = self._scale_tensor.numpy()
        if not np.isfinite(scale):
            raise self._stored.fail(f"the {SCALE} is {scale}")
        return scale.astype(self._working)
