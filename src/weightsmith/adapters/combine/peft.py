"""PEFT's own combinations (``add_weighted_adapter``), where they are another thing: ``compat: peft``.

Held against PEFT 0.21.2. Its ``linear``, ``ties`` and ``magnitude_prune`` work on A and on B apart, each with the
square root of its weight, and so add B_i A_j of different adapters. Its result's config keeps ``use_rslora`` of the
first adapter, and with it a scale of sqrt(r) that nobody asked for. DARE's masks come from PyTorch's generator, whose
numbers are not drawn again here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import numpy as np

from weightsmith.adapters import factors
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine import layout
from weightsmith.adapters.combine.inputs import Inputs, Site
from weightsmith.adapters.combine.making import FLOAT64, Made, Maker
from weightsmith.adapters.combine.registry import Combiner
from weightsmith.adapters.combine.report import LayerReport
from weightsmith.adapters.kinds.low_rank import MAGNITUDE, scale
from weightsmith.adapters.layer import Layer
from weightsmith.bundle.tiles import rounded
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import MethodError, PlanError, did_you_mean
from weightsmith.kernels.convert import widen
from weightsmith.methods.parameters import Param, read_parameters

Merge = Callable[[Sequence[Array], Sequence[float]], Array]


def _none() -> None:
    """Take nothing."""


def _pruned(*, density: Annotated[float, Param("share of the entries that is kept", minimum=0)]) -> None:
    """Take a density."""


def _elected(
    *,
    density: Annotated[float, Param("share of the entries that is kept", minimum=0)],
    majority_sign_method: Annotated[
        Literal["total", "frequency"], Param("elect signs by the sum of the entries, or of their signs")
    ] = "total",
) -> None:
    """Take a density, and how signs are elected."""


_METHODS: Mapping[str, Callable[..., None]] = {
    "linear": _none,
    "cat": _none,
    "svd": _none,
    "ties": _elected,
    "ties_svd": _elected,
    "magnitude_prune": _pruned,
    "magnitude_prune_svd": _pruned,
}
_ON_FACTORS = ("linear", "ties", "magnitude_prune")


def combiner(name: str) -> Combiner:
    """Return one of PEFT's combinations.

    Raises:
        MethodError: if PEFT has none of that name, or it is random.
    """
    if name.startswith("dare"):
        raise MethodError(
            f"{name} of PEFT draws its masks from PyTorch's generator, whose numbers cannot be drawn again here; "
            "without compat, dare_linear and dare_ties work on the deltas"
        )
    if name not in _METHODS:
        raise MethodError(
            f"PEFT has no combination {name!r}{did_you_mean(name, _METHODS)}; of PEFT's there are {', '.join(_METHODS)}"
        )
    return Combiner(
        name, "products", None, "PEFT's own combination.", "peft 0.21.2", read_parameters(_METHODS[name], name)
    )


def combination(
    inputs: Inputs, method: str, parameters: Mapping[str, Any], rank: int | None, dtype: DType
) -> tuple[list[Maker], dict[str, Any]]:
    """Return what makes every layer as PEFT does, and the config that PEFT writes.

    Args:
        inputs: the adapters.
        method: the combination's name.
        parameters: its parameters.
        rank: ``svd_rank``.
        dtype: the dtype that factors are written in.

    Raises:
        PlanError: if PEFT refuses them, or its result cannot be loaded.
    """
    # One alone is only ever multiplied with its weight.
    method = "linear" if len(inputs.adapters) == 1 else method
    for adapter in inputs.adapters:
        dora = any(MAGNITUDE in parts for parts in adapter.modules.values())
        if adapter.kind.peft_type != "LORA" or dora:
            raise PlanError(f"{adapter.name} is no plain LoRA, and PEFT combines only these; leave out compat")
    saved = [adapter.name for adapter in inputs.adapters if adapter.plain]
    if len(saved) > 1:
        raise PlanError(
            f"{' and '.join(saved)} have saved modules or biases, which PEFT cannot combine; leave out compat"
        )
    ranks = [max(site.ranks[number] or 0 for site in inputs.sites.values()) for number in range(len(inputs.adapters))]
    if rank is not None and not method.endswith("svd"):
        raise MethodError(f"PEFT's {method} takes no rank; its svd does")
    if method in _ON_FACTORS:
        if len({*ranks, *(one for site in inputs.sites.values() for one in site.ranks if one)}) > 1:
            raise PlanError(
                f"PEFT's {method} adds factors, and these have different ranks; leave out compat, or use svd"
            )
        new = ranks[0]
    else:
        new = sum(ranks) if method == "cat" else rank or max(ranks)
    if "density" in parameters and not parameters["density"] * new:
        raise MethodError("density is 0, so nothing is kept")
    config = {**inputs.configs[0], "r": new, "lora_alpha": new, "alpha_pattern": {}, "rank_pattern": {}}
    config["target_modules"] = _targets(inputs.configs)
    # What the config says of PEFT's result is what PEFT multiplies it with.
    inflation = math.sqrt(new) if config.get("use_rslora") else 1.0
    makers = [PeftProduct(inputs, site, method, parameters, new, inflation, dtype) for site in inputs.sites.values()]
    return [*makers], config


class PeftProduct(Maker):
    """A layer's factors, as PEFT combines them."""

    def __init__(
        self,
        inputs: Inputs,
        site: Site,
        method: str,
        parameters: Mapping[str, Any],
        rank: int,
        inflation: float,
        dtype: DType,
    ) -> None:
        """Stand for a layer.

        Args:
            inputs: the adapters.
            site: the layer.
            method: the combination's name.
            parameters: its parameters.
            rank: of the result.
            inflation: the scale that the result's config gives it.
            dtype: the dtype that factors are written in.
        """
        super().__init__(site)
        self._inputs = inputs
        self._method = method
        self._parameters = parameters
        self.rank = rank if method == "cat" else min(rank, *site.sides)
        self._inflation = inflation
        self._dtype = dtype

    @property
    def held(self) -> int:
        """See :attr:`Maker.held`."""
        rows, columns = self.site.sides
        low = 6 * sum(rank or 0 for rank in self.site.ranks) * (rows + columns)
        dense = (2 * len(self.site.ranks) + 4) * rows * columns if self._method.endswith("_svd") else 0
        return (low + dense) * FLOAT64.itemsize

    def tensors(self) -> list[Tensor]:
        """See :meth:`Maker.tensors`."""
        pairs = zip(layout.keys(self.site), layout.shapes(self.site, self.rank), strict=True)
        return [Made(key, shape, self._dtype, self, place) for place, (key, shape) in enumerate(pairs)]

    def make(self) -> tuple[Array, ...]:
        """See :meth:`Maker.make`."""
        stack = self._inputs.stack(self.site.module)
        if self._method in _ON_FACTORS:
            numbers = [number for number, rank in enumerate(self.site.ranks) if rank]
            down, up = self._on_factors([self._inputs.layer(number, self.site.module) for number in numbers])
        else:
            down, up = layout.arrays(self.site, factors.padded(self._on_products(stack.parts), self.rank))
        names = layout.keys(self.site)
        made = tuple(rounded(name, part, self._dtype) for name, part in zip(names, (down, up), strict=True))
        wide = [widen(part.reshape(-1), FLOAT64).reshape(part.shape) for part in made]
        written = layout.product_of(self.site, *wide)
        found = LowRank(written.left * self._inflation, written.right)
        true = stack.sum()
        apart = factors.norm(factors.total([found, true], [1, -1]))
        site = self.site
        self.facts = LayerReport(
            site.module, site.shape, site.ranks, self.rank, factors.norm(found), 0.0, factors.norm(true), apart
        )
        return made

    def _on_factors(self, layers: Sequence[Layer]) -> tuple[Array, Array]:
        """Return A and B, each combined by itself, with the square root of weight times scale; A takes the sign."""
        names = ("lora_embedding_A", "lora_embedding_B") if self.site.form == "embedding" else ("lora_A", "lora_B")
        weights = [
            weight * scale(layer, layer.length("r"))
            for weight, layer in zip(self._weights_of_layers(), layers, strict=True)
        ]
        down = self._merge(
            [layer.array(names[0]) for layer in layers], [math.copysign(math.sqrt(abs(w)), w) for w in weights]
        )
        up = self._merge([layer.array(names[1]) for layer in layers], [math.sqrt(abs(w)) for w in weights])
        return down, up

    def _weights_of_layers(self) -> list[float]:
        return [weight for weight, rank in zip(self._inputs.weights, self.site.ranks, strict=True) if rank]

    def _on_products(self, parts: Sequence[LowRank]) -> LowRank:
        weights = self._inputs.weights
        if self._method == "cat":
            # PEFT multiplies A, and leaves B.
            taken = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part.rank]
            return LowRank(
                np.concatenate([part.left for part, _ in taken], axis=1),
                np.concatenate([part.right * weight for part, weight in taken]),
            )
        if self._method == "svd":
            u, s, vt = factors.triples(factors.total(parts, weights))
        else:
            there = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part.rank]
            merged = self._merge([part.left @ part.right for part, _ in there], [weight for _, weight in there])
            u, s, vt = factors.with_signs(*np.linalg.svd(merged, full_matrices=False))
        return LowRank(u[:, : self.rank] * s[: self.rank], vt[: self.rank])

    def _merge(self, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
        density = self._parameters.get("density")
        kept = [tensor if density is None else _largest(tensor, density) for tensor in tensors]
        if not self._method.startswith("ties"):
            return np.asarray(sum(weight * tensor for weight, tensor in zip(weights, kept, strict=True)))
        frequency = self._parameters["majority_sign_method"] == "frequency"
        votes = sum(np.sign(tensor) if frequency else tensor for tensor in kept)
        majority = np.where(np.asarray(votes) >= 0, 1.0, -1.0)
        agree = [np.sign(tensor) == majority for tensor in kept]
        total = sum(weight * tensor * mask for weight, tensor, mask in zip(weights, kept, agree, strict=True))
        return np.asarray(total / np.maximum(sum(mask.astype(np.float64) for mask in agree), 1.0))


def _largest(tensor: Array, density: float) -> Array:
    if density >= 1:
        return tensor
    order = np.argsort(-np.abs(tensor).reshape(-1), kind="stable")[: int(density * tensor.size)]
    mask = np.zeros(tensor.size)
    mask[order] = 1.0
    return tensor * mask.reshape(tensor.shape)


def _targets(configs: Sequence[Mapping[str, Any]]) -> Any:
    given = [config.get("target_modules") for config in configs]
    if all(isinstance(names, str) for names in given):
        return "|".join(f"({names})" for names in given)
    if all(isinstance(names, list) for names in given):
        return sorted(reduce(or_, (set(names) for names in given if isinstance(names, list))))
    raise PlanError(
        "target_modules is a list in some of the adapters and a pattern in others, which PEFT cannot combine"
    )
