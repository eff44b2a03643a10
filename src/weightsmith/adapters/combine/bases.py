"""Reversible Model Merging on adapters: a few basis adapters and coefficients, from which each adapter comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from weightsmith.adapters import factors
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine import layout
from weightsmith.adapters.combine.inputs import Inputs, Site
from weightsmith.adapters.combine.making import FLOAT64, Made, Maker
from weightsmith.adapters.combine.registry import basis
from weightsmith.adapters.combine.report import LayerReport
from weightsmith.bundle.reversible import Reversible
from weightsmith.bundle.tiles import rounded
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import PlanError
from weightsmith.kernels.convert import widen
from weightsmith.methods.parameters import Param

DESCRIPTION_FILE = "weightsmith-basis.json"
FORMAT = 1
COEFFICIENTS = "coefficients"
# Of A, and of B.
SIDES = ("A", "B")


@basis(
    "rmm",
    source="Alipour and Amiri, Towards reversible model merging for low-rank weights, 2025, arXiv:2510.14163; inferred "
    "from the abstract and summaries by others",
)
def rmm(
    inputs: Inputs,
    *,
    basis: Annotated[
        int, Param("p, how many basis adapters; as many as adapters give these back exactly", minimum=1)
    ] = 2,
    centre: Annotated[
        bool, Param("store the mean beside the basis, which is then one of the differences from it")
    ] = False,
    rank: Annotated[
        int | None, Param("the rank of the basis adapters; also --rank; by default the largest", minimum=1)
    ] = None,
) -> Reversible:
    """Reversible Model Merging (RMM): p basis adapters and coefficients, from which each adapter is restored.

    Each delta is brought to one form, ``A = sqrt(S) V``, ``B = U sqrt(S)`` with the largest entry of each column of U
    above 0, for factors can be turned into each other in endless ways with the same product. Then for A and for B,
    layer by
    layer: with all adapters' factors as columns of X, the eigenvectors V of the p largest eigenvalues of ``X^T X`` give
    basis factors ``X V`` and coefficients V. No other p give a smaller squared error of the factors. OUT holds a folder
    for each basis adapter, in PEFT's layout, and one for the coefficients; ``weightsmith adapter revert`` restores an
    adapter. The basis adapters are no adapters for a task. As a bundle with its base: ``weightsmith bundle create
    --kind rmm``, whose mathematics this is.
    """
    count = min(basis, len(inputs.adapters) - centre)
    if count < 1:
        raise PlanError("with a mean, a basis takes two adapters or more")
    return Reversible(basis=count, centre=centre, rank=rank or _largest(inputs))


def _largest(inputs: Inputs) -> int:
    return max((rank for site in inputs.sites.values() for rank in site.ranks if rank is not None), default=1)


class Bases(Maker):
    """The basis factors of one layer, and each adapter's coefficients."""

    def __init__(self, inputs: Inputs, site: Site, kind: Reversible, dtype: DType) -> None:
        """Decide the rank.

        Args:
            inputs: the adapters.
            site: the layer.
            kind: how the basis is found.
            dtype: the dtype that factors are written in.
        """
        super().__init__(site)
        self._inputs = inputs
        self._kind = kind
        self._dtype = dtype
        self.rank = min(kind.rank or 1, max(rank or 1 for rank in site.ranks), *site.sides)
        self.count = kind.basis + kind.centre

    @property
    def held(self) -> int:
        """See :attr:`Maker.held`."""
        return 6 * sum(self.site.sides) * (sum(rank or 0 for rank in self.site.ranks) + self.rank) * FLOAT64.itemsize

    def tensors(self) -> list[Tensor]:
        """See :meth:`Maker.tensors`: A and B of every basis adapter, and the coefficients of both."""
        keys, shapes = layout.keys(self.site), layout.shapes(self.site, self.rank)
        found: list[Tensor] = []
        for number in range(self.count):
            for key, shape in zip(keys, shapes, strict=True):
                found.append(Made(f"{folder_name(number)}/{key}", shape, self._dtype, self, len(found)))
        shape = (len(self._inputs.adapters), self._kind.basis)
        for side in SIDES:
            name = f"{COEFFICIENTS}/{self.site.module}.{side}"
            found.append(Made(name, shape, FLOAT64, self, len(found)))
        return found

    def make(self) -> tuple[Array, ...]:
        """See :meth:`Maker.make`."""
        stack = self._inputs.stack(self.site.module)
        forms = [_one_form(part, self.rank) for part in stack.parts]
        pairs = [layout.arrays(self.site, form) for form in forms]
        bases, coefficients = [], []
        for side in (0, 1):
            rows = np.stack([pair[side].reshape(-1) for pair in pairs])
            found = self._kind.basis_of(rows @ rows.T)
            coefficients.append(found)
            bases.append(self._kind.weights_of(found) @ rows)
        keys = layout.keys(self.site)
        shapes = [pair.shape for pair in pairs[0]]
        made = [
            rounded(key, bases[side][number].reshape(shapes[side]), self._dtype)
            for number in range(self.count)
            for side, key in enumerate(keys)
        ]
        self._note([*stack.parts], made, coefficients)
        return (*made, *map(np.ascontiguousarray, coefficients))

    def _note(self, parts: Sequence[LowRank], made: Sequence[Array], coefficients: Sequence[Array]) -> None:
        norms, errors = [], []
        for number, part in enumerate(parts):
            sides = [
                combined(
                    [widen(one.reshape(-1), FLOAT64) for one in made[side::2]],
                    coefficients[side][number],
                    self._kind.centre,
                )
                for side in (0, 1)
            ]
            restored = layout.product_of(
                self.site, *(one.reshape(shape.shape) for one, shape in zip(sides, made[:2], strict=True))
            )
            norms.append(factors.norm(part))
            errors.append(factors.norm(factors.total([part, restored], [1, -1])))
        site = self.site
        self.facts = LayerReport(
            site.module, site.shape, site.ranks, self.rank, math.hypot(*norms), math.hypot(*errors)
        )


def folder_name(number: int) -> str:
    """Return the folder of a basis adapter."""
    return f"basis-{number + 1}"


def combined(rows: Sequence[Array], coefficients: Array, centre: bool) -> Array:
    """Return one adapter's factor: the mean, if there is one, and its combination of the basis."""
    weights = [1.0] * centre + [float(value) for value in coefficients]
    found = np.zeros_like(rows[0])
    for weight, row in zip(weights, rows, strict=True):
        found += weight * row
    return found


def _one_form(part: LowRank, rank: int) -> LowRank:
    u, s, vt = factors.triples(part)
    return factors.padded(factors.balanced(u[:, :rank], s[:rank], vt[:rank]), rank)


@dataclass(frozen=True)
class Description:
    """What ``weightsmith-basis.json`` says.

    Attributes:
        count: how many basis adapters there are, the mean among them.
        centre: whether the first is the mean.
        tasks: name -> the adapter's config.
    """

    count: int
    centre: bool
    tasks: Mapping[str, Mapping[str, Any]]

    def to_text(self) -> str:
        """Return it as the text of its file."""
        content = {"format": FORMAT, "basis": self.count, "centre": self.centre, "tasks": dict(self.tasks)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
