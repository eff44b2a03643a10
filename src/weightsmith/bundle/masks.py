"""One vector for all tasks and a bit per weight and task: EMR-Merging and the compression by TALL-masks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from weightsmith.bundle.description import Entry
from weightsmith.bundle.kind import Group, Kind, Made, Stored, Survey, shared_name, task_name
from weightsmith.bundle.tiles import Bits, Together, Values, bytes_of_bits, pack, unpack
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import working_dtype
from weightsmith.errors import MethodError
from weightsmith.kernels.convert import narrow, widen

_UINT8 = np.dtype(np.uint8)
_FLOAT32 = np.dtype(np.float32)
VECTOR, MASK, RESCALER = "vector", "mask", "rescaler"


@dataclass(frozen=True)
class _Masked(Kind):
    """A kind whose tasks are masks over one vector."""

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`."""
        tensors: list[Tensor] = []
        for group in groups:
            tensors += self._of_group(group, tasks)[1]
        return Made(groups, tensors)

    def restore(self, entry: Entry, base: Tensor, stored: Stored) -> Tensor:
        """See :meth:`Kind.restore`."""
        vector = stored.shared(VECTOR, entry.shape)
        mask = stored.own(MASK, (bytes_of_bits(base.size),), _UINT8)
        return MaskedTensor(entry, base, vector, mask, self._scale(stored), stored)

    @abstractmethod
    def _tile(self, group: Group, tasks: Sequence[str], start: int, stop: int) -> tuple[list[Array], list[float]]:
        """Return the vector and the packed masks of a tile, and what is summed over the tensor."""

    def _scale(self, stored: Stored) -> Tensor | None:
        """Return the number that a task's masked vector is multiplied with, where there is one."""
        return None

    def _of_group(self, group: Group, tasks: Sequence[str]) -> tuple[Together, list[Tensor]]:
        """Return what the tensors of a group are made by, and the tensors."""
        together = Together(
            group.size,
            [1, *(8 for _ in group.models)],
            lambda start, stop: self._tile(group, tasks, start, stop),
        )
        vector = Values(
            shared_name(VECTOR, group.name), group.shape, group.dtype, lambda start, stop: together.read(0, start, stop)
        )
        return together, [vector, *(_mask(group, task, together, i) for i, task in enumerate(group.models, 1))]


def _mask(group: Group, task: str, together: Together, which: int) -> Bits:
    return Bits(task_name(task, MASK, group.name), group.size, lambda start, stop: together.read(which, start, stop))


@dataclass(frozen=True)
class Emr(_Masked):
    """EMR-Merging: elect, mask and rescale.

    Per entry, with the task vectors ``d_t``: the sign of their mean is elected (a mean of 0 counts as minus); the
    unified vector has that sign, and the largest magnitude among the ``d_t`` that agree with it. A task's mask
    keeps the entries whose signs agree; its rescaler brings the sum of magnitudes back:
    ``theta_t = theta_0 + l_t m_t u`` with ``l_t = sum |d_t| / sum |m_t u|``.

    Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024, arXiv:2405.17461.

    Attributes:
        rescaler: ``model``: both sums over the whole model, as the paper writes them; ``tensors``: sums of the means
            over each tensor, as the authors' code computes them for models of several tensors. They differ where small
            tensors change more than large ones.
    """

    name: ClassVar[str] = "emr"
    summary: ClassVar[str] = "a unified vector; per task a bit per weight and one rescaler"

    rescaler: Literal["model", "tensors"] = "model"

    def __post_init__(self) -> None:
        self._check_choice("rescaler", "model", "tensors")

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`; rescalers come last, when what they are sums of has been computed."""
        tensors: list[Tensor] = []
        parts: list[tuple[Group, Together]] = []
        for group in groups:
            together, made = self._of_group(group, tasks)
            parts.append((group, together))
            tensors += made
        changed = dict.fromkeys(task for group in groups for task in group.models)
        tensors += [self._rescaler(task, parts) for task in changed]
        return Made(groups, tensors)

    def _tile(self, group: Group, tasks: Sequence[str], start: int, stop: int) -> tuple[list[Array], list[float]]:
        changes = group.changes(start, stop)
        total = np.zeros(stop - start)
        for change in changes:
            total += change
        sign = np.where(total > 0, group.working.type(1), group.working.type(-1))
        largest = np.zeros(stop - start, group.working)
        masks, sums = [], []
        for change in changes:
            # Above 0 where the signs agree, and then the magnitude.
            agreeing = change * sign
            np.maximum(largest, agreeing, out=largest)
            masks.append(agreeing > 0)
            sums.append(float(np.abs(change, out=change).sum(dtype=np.float64)))
        for mask in masks:
            sums.append(float((largest * mask).sum(dtype=np.float64)))
        # Nothing added, so that 0 has no sign.
        return [largest * sign + 0, *map(pack, masks)], sums

    def _rescaler(self, task: str, parts: Sequence[tuple[Group, Together]]) -> Tensor:
        def compute(start: int, stop: int) -> Array:
            pairs = []
            for group, together in parts:
                if task in group.models:
                    sums, which = together.sums(), list(group.models).index(task)
                    weight = group.size if self.rescaler == "tensors" else 1
                    pairs.append((sums[which] / weight, sums[which + len(group.models)] / weight))
            changed, kept = (math.fsum(column) for column in zip(*pairs, strict=True))
            # A task that is outvoted everywhere keeps nothing, whatever it is multiplied with.
            return np.full(stop - start, changed / kept if kept > 0 else 1.0)

        return Values(task_name(task, RESCALER), (), _FLOAT32, compute)

    def _scale(self, stored: Stored) -> Tensor:
        return stored.of_model(RESCALER, (), _FLOAT32)


@dataclass(frozen=True)
class Tall(_Masked):
    """Compression by TALL-masks.

    The multi-task vector ``D`` is the sum of the task vectors ``d_t``. A task's mask keeps the entries in which the
    task is closer to ``D`` than to the base, up to a factor: ``m_t = |d_t| > lambda_t |D - d_t|``. Restored:
    ``theta_t = theta_0 + m_t D``.

    Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv:2405.07813.
    The authors choose lambda for each task from 0.2, 0.3, 0.4, 0.5 and 0.6 on validation data; the default is the
    middle of these.

    Attributes:
        lambda_: one value for all tasks, or one for each, in the order of the models: 0 or more.
    """

    name: ClassVar[str] = "tall"
    summary: ClassVar[str] = "the sum of the task vectors; per task a bit per weight"

    lambda_: float | tuple[float, ...] = 0.4

    def __post_init__(self) -> None:
        values = self.lambda_ if isinstance(self.lambda_, tuple) else (self.lambda_,)
        for value in values:
            # Written so, NaN is refused as well.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise self._wrong("lambda_", "numbers from 0 are needed")

    def make(self, groups: Sequence[Group], tasks: Sequence[str], survey: Survey) -> Made:
        """See :meth:`Kind.make`."""
        if isinstance(self.lambda_, tuple) and len(self.lambda_) != len(tasks):
            raise MethodError(
                f"lambda has {len(self.lambda_)} values for {len(tasks)} models; give one for each, or one for all"
            )
        return super().make(groups, tasks, survey)

    def _tile(self, group: Group, tasks: Sequence[str], start: int, stop: int) -> tuple[list[Array], list[float]]:
        changes = group.changes(start, stop)
        total = np.zeros(stop - start)
        for change in changes:
            total += change
        vector = total.astype(group.working)
        masks = [
            np.abs(change) > self._lambda_of(tasks.index(task)) * np.abs(vector - change)
            for task, change in zip(group.models, changes, strict=True)
        ]
        return [vector, *map(pack, masks)], []

    def _lambda_of(self, task: int) -> float:
        return float(self.lambda_[task] if isinstance(self.lambda_, tuple) else self.lambda_)


class MaskedTensor(Tensor):
    """A base's tensor with those entries of a vector added that a mask keeps."""

    def __init__(
        self, entry: Entry, base: Tensor, vector: Tensor, mask: Tensor, scale: Tensor | None, stored: Stored
    ) -> None:
        self.name = stored.name
        self.shape = entry.shape
        self.dtype = entry.dtype
        self._base = base
        self._vector = vector
        self._mask = mask
        self._scale_tensor = scale
        self._stored = stored
        self._working = working_dtype([base.dtype, entry.dtype])

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded once."""
        values = widen(self._base.read(start, stop), self._working)
        change = widen(self._vector.read(start, stop), working_dtype([self._vector.dtype]))
        mask = unpack(self._mask, start, stop)
        with np.errstate(all="ignore"):
            return narrow(values + np.where(mask, change * self._scale, 0).astype(self._working), self.dtype)

    @cached_property
    def _scale(self) -> Array:
        if self._scale_tensor is None:
            return np.ones((), np.float32)
        scale = self._scale_tensor.numpy()
        if not np.isfinite(scale):
            raise self._stored.fail(f"the task's {RESCALER} is {scale}")
        return scale
