"""LoRA on a base, as a lazy checkpoint: ``W + s B A``, formed block by block.

Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. With rank r, ``s = alpha / r``; rank-stabilised LoRA
(Kalajdzievski, 2023, arXiv:2312.03732): ``s = alpha / sqrt(r)``. Layout and settings are those of PEFT.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.patterns import Patterns
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError, PlanError, did_you_mean, shown
from weightsmith.kernels.convert import narrow, widen

_PREFIX = "base_model.model."
_TILE = 65_536
_FLOAT64 = np.dtype(np.float64)
# module . lora_A . weight, or module . lora_embedding_A (a bare parameter)
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?$")


class LowRankTensor(Tensor):
    """A base's tensor with a product of two factors added.

    The product is formed over tiles of rows that the shape alone decides, not the stretch asked for: a matrix product
    sums in an order of its own for every number of rows. It is formed in float64, so that the order that a machine's
    BLAS prefers is lost when the sum with the base is rounded to float32.

    Attributes:
        base: the base's tensor.
    """

    base: Tensor

    @abstractmethod
    def factors(self) -> tuple[Array, Array]:
        """Return matrices whose product, row by row, is the change: ``[rows, rank]`` and ``[rank, columns]``.

        Both are float64.
        """

    def change(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop`` of the product: ``[n]``, float64."""
        left, right = RECENT.get(self, self.factors)
        rows, width = len(left), right.shape[1]
        tile = max(_TILE // width, 1)
        change = np.empty(stop - start)
        for first in range(start // width // tile * tile, -(-stop // width), tile):
            last = min(first + tile, rows)
            begin, end = max(start, first * width), min(stop, last * width)
            product = (left[first:last] @ right).reshape(-1)
            change[begin - start : end - start] = product[begin - first * width : end - first * width]
        return change


class FoldedTensor(LowRankTensor):
    """A base's tensor with an adapter's low-rank change added.

    Attributes:
        base: the base's tensor, ``[out, in]`` (or ``[in, out]`` where the layer is stored transposed; or a
            convolution's ``[out, in, height, width]``).
    """

    def __init__(self, base: Tensor, down: Tensor, up: Tensor, scale: float, *, transposed: bool) -> None:
        """Combine a tensor with two factors.

        Args:
            base: the base's tensor.
            down: A, ``[rank, in]`` (a convolution's ``[rank, in, height, width]``).
            up: B, ``[out, rank]`` (a convolution's ``[out, rank, 1, 1]``).
            scale: s.
            transposed: whether the base holds the transpose of ``[out, in]``.
        """
        self.name = base.name
        self.shape = base.shape
        self.dtype = base.dtype
        self.base = base
        self._down = down
        self._up = up
        self._scale = scale
        self._transposed = transposed

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to the base's dtype."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in the base's dtype: ``[n]``, float32 (float64 if the base is)."""
        base = widen(self.base.read(start, stop), _FLOAT64)
        return narrow(base + self.change(start, stop), dtypes.working_dtype([self.dtype]))

    @property
    def rank(self) -> int:
        """The rank of the change, at most."""
        return self._down.shape[0]

    def factors(self) -> tuple[Array, Array]:
        """See :meth:`LowRankTensor.factors`; the scale is in the first."""
        down = widen(self._down.read(0, self._down.size), _FLOAT64).reshape(self._down.shape[0], -1)
        up = widen(self._up.read(0, self._up.size), _FLOAT64).reshape(-1, self._up.shape[1])
        if self._transposed:
            return down.T * self._scale, np.ascontiguousarray(up.T)
        return up * self._scale, down


@dataclass(frozen=True)
class _Settings:
    """What an adapter's config says of its scale."""

    rank: float
    alpha: float
    ranks: Patterns
    alphas: Patterns
    stabilised: bool
    transposed: bool

    def scale(self, module: str, rank: int) -> float:
        """Return s for one module, whose factors have this rank."""
        stated = self.ranks.value(module, self.rank)
        if stated != rank:
            raise CheckpointError(f"the adapter's config gives {module} rank {stated}, and its factors have {rank}")
        alpha = self.alphas.value(module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank


def fold(base: Checkpoint, adapter: Checkpoint, *, name: str | None = None) -> Checkpoint:
    """Fold a LoRA into its base, lazily.

    Args:
        base: the model.
        adapter: an adapter in PEFT's layout: LoRA with any ranks, alphas and scaling, on linear layers,
            embeddings and convolutions, with trained biases and ``modules_to_save``.
        name: the result's name.

    Returns:
        The base with the adapter's change in every tensor it is for; the rest is the base's own.

    Raises:
        CheckpointError: if the adapter is of another kind, or does not fit its own config.
        PlanError: if the base lacks a tensor that the adapter changes, or it has another shape.
    """
    settings = _read_settings(adapter)
    tensors: dict[str, Tensor] = dict(base)
    for module, (down, up, embedding) in _factors(adapter).items():
        target = _find(f"{module}.weight", base, adapter)
        if embedding:
            # An embedding's factors are stored transposed: A [rank, vocabulary], B [width, rank].
            rank, transposed = down.shape[0], True
        else:
            rank, transposed = down.shape[0], settings.transposed
        folded = FoldedTensor(base[target], down, up, settings.scale(module, rank), transposed=transposed)
        _check_shape(folded, down, up, adapter, transposed=transposed)
        tensors[target] = folded
    for key, tensor in adapter.items():
        if _FACTOR.match(key) is None:
            target = _find(_plain_name(key), base, adapter)
            if base[target].shape != tensor.shape:
                raise PlanError(
                    f"{adapter.name} brings {target} as {list(tensor.shape)}, and {base.name} has it as "
                    f"{list(base[target].shape)}"
                )
            tensors[target] = tensor
    files = {**base.companions.files, **adapter.companions.files}
    return Checkpoint(
        name or f"{base.name}+{adapter.name}",
        tensors,
        Companions(base.config, files),
        base.identities + adapter.identities,
        base.components,
    )


def _read_settings(adapter: Checkpoint) -> _Settings:
    config = adapter.config
    kind = config.get("peft_type")
    if kind is None:
        raise CheckpointError(f"{adapter.name} is no adapter: it has no adapter_config.json with a peft_type")
    if kind != "LORA":
        kind = kind[:40] if isinstance(kind, str) else shown(kind)
        raise CheckpointError(f"{adapter.name} is an adapter of the kind {kind}, which cannot be folded yet; LORA can")
    if config.get("use_dora"):
        raise CheckpointError(f"{adapter.name} uses DoRA, which cannot be folded yet; plain LoRA can")
    if config.get("alora_invocation_tokens"):
        raise CheckpointError(f"{adapter.name} acts on some tokens alone (aLoRA), so no plain weights equal it")
    if config.get("layer_replication"):
        raise CheckpointError(f"{adapter.name} replicates layers, which cannot be folded yet")
    return _Settings(
        rank=_number(adapter, "r", config.get("r", 8)),
        alpha=_number(adapter, "lora_alpha", config.get("lora_alpha", 8)),
        ranks=_patterns(adapter, "rank_pattern"),
        alphas=_patterns(adapter, "alpha_pattern"),
        stabilised=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _number(adapter: Checkpoint, key: str, value: Any) -> float:
    # Written so, NaN and whole numbers beyond a float's range are refused as well.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise CheckpointError(f"{adapter.name}: adapter_config.json gives {key} as {shown(value)}, which is no number")
    return value


def _patterns(adapter: Checkpoint, key: str) -> Patterns:
    patterns = adapter.config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{adapter.name}: adapter_config.json gives {key} as {shown(patterns)}, which is no map")
    for pattern, value in patterns.items():
        _number(adapter, f"{key}[{shown(pattern)}]", value)
    try:
        return Patterns(patterns)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.name}: {key} in adapter_config.json: {error}") from error


def _factors(adapter: Checkpoint) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Return module -> A, B and whether it is an embedding."""
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in adapter.items():
        match = _FACTOR.match(key)
        if match is None:
            if ".lora_" in key:
                raise CheckpointError(f"{adapter.name} holds {key}, which is no part of plain LoRA")
            continue
        module = _plain_name(match["module"])
        if match["side"] in sides.setdefault(module, {}):
            raise CheckpointError(f"{adapter.name} holds lora_{match['side']} of {module} twice, the second as {key}")
        sides[module][match["side"]] = tensor
        if match["embedding"]:
            embeddings.add(module)
    for module, found in sides.items():
        if set(found) != {"A", "B"}:
            raise CheckpointError(f"{adapter.name} has only lora_{next(iter(found))} for {module}, and needs both")
        for side, tensor in found.items():
            if len(tensor.shape) < 2 or not tensor.size or not dtypes.is_float(tensor.dtype):
                raise CheckpointError(
                    f"{adapter.name}: lora_{side} of {module} is {dtypes.name_of(tensor.dtype)} "
                    f"{list(tensor.shape)}; a matrix of floats, and no empty one, is needed"
                )
    return {module: (found["A"], found["B"], module in embeddings) for module, found in sides.items()}


def _plain_name(key: str) -> str:
    key = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", key)


def _find(name: str, base: Checkpoint, adapter: Checkpoint) -> str:
    """Return the base's name of a tensor; bases saved without their head's wrapper lack its first part."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in base:
            return candidate
    raise PlanError(f"{adapter.name} changes {name}, which {base.name} does not have{did_you_mean(name, base)}")


def _check_shape(folded: FoldedTensor, down: Tensor, up: Tensor, adapter: Checkpoint, *, transposed: bool) -> None:
    if not dtypes.is_float(folded.dtype):
        raise PlanError(f"{adapter.name} changes {folded.name}, which is {dtypes.name_of(folded.dtype)}, not weights")
    inner = down.size // max(down.shape[0], 1)
    own = (folded.shape[0], folded.size // max(folded.shape[0], 1)) if folded.shape else (1, 1)
    product = (inner, up.shape[0]) if transposed else (up.shape[0], inner)
    if len(up.shape) < 2 or up.shape[1] != down.shape[0] or up.size != up.shape[0] * up.shape[1] or own != product:
        raise PlanError(
            f"{adapter.name}: factors of {list(up.shape)} and {list(down.shape)} do not fit {folded.name}, which is "
            f"{list(folded.shape)}"
        )
