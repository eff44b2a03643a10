"""What an adapter is, and how much it changes: norms and ranks through its factors, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from weightsmith import dtypes
from weightsmith.adapters import factors
from weightsmith.adapters.adapter import Adapter, Names
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.fold import fold
from weightsmith.adapters.folded import FoldedTensor
from weightsmith.adapters.kinds.low_rank import factors_of_experts, scale
from weightsmith.adapters.layer import Layer, Weight
from weightsmith.adapters.layouts.normal import normalize
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import CheckpointError, PlanError
from weightsmith.methods.matrices import effective_rank


@dataclass(frozen=True)
class InspectedLayer:
    """One layer of an adapter.

    Attributes:
        module: its name.
        shape: the weight's shape, where the adapter or a base tells it.
        parameters: how many numbers the adapter holds for it.
        rank: of the change, at most; None where it is no product of factors.
        scale: what the factors are multiplied with, where the kind has such a number.
        norm: Frobenius norm of the change; None where it cannot be told without a base.
        spectral: its largest singular value.
        effective: its effective rank: the exponential of the entropy of its singular values as shares of their sum; of
            experts in one parameter the mean of theirs.
        relative: its norm as a share of that of the base's weight; None without a base.
    """

    module: str
    shape: tuple[int, ...] | None
    parameters: int
    rank: int | None
    scale: float | None
    norm: float | None
    spectral: float | None
    effective: float | None
    relative: float | None


@dataclass(frozen=True)
class Inspection:
    """What an adapter is.

    Attributes:
        name: how a person names it.
        kind: how people name its kind.
        base: the model that its config names, or None.
        targets: the last parts of its modules' names -> how many modules have them.
        tensors: how many tensors it holds.
        parameters: how many numbers.
        nbytes: how many bytes.
        dtypes: dtype -> how many tensors.
        settings: the keys of its config that bear on the weights.
        layers: every layer.
        saved: tensors that are not changed but replaced: biases, saved modules.
        reason: why norms are not known, or None.
    """

    name: str
    kind: str
    base: str | None
    targets: dict[str, int]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    settings: dict[str, Any]
    layers: tuple[InspectedLayer, ...]
    saved: tuple[str, ...]
    reason: str | None = None

    @property
    def norm(self) -> float | None:
        """Frobenius norm of all changes together, where they are known."""
        found = [layer.norm for layer in self.layers if layer.norm is not None]
        return math.hypot(*found) if len(found) == len(self.layers) and found else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"norm": self.norm}


def inspect(adapter: Source, base: Source | None = None, *, threads: int | None = None) -> Inspection:
    """Look at an adapter: what it is, and how much it changes.

    Of products of two factors, norms and singular values are found through the factors, which are read a layer at a
    time; the product is not formed. Of other kinds they take the base, and a whole matrix.

    Args:
        adapter: the adapter.
        base: the model that it is for.
        threads: how many threads to use; by default one per core.

    Raises:
        CheckpointError: if it is no adapter, cannot be read, or holds what is not finite.
        PlanError: if it does not fit the base.
    """
    checkpoint = as_checkpoint(adapter)
    if not checkpoint.is_adapter:
        raise CheckpointError(
            f"{checkpoint.name} is no adapter: it has no adapter_config.json; 'weightsmith inspect' shows models"
        )
    model = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
    opened = Adapter(normalize(checkpoint, model))
    if model is not None:
        opened.bind(model)
    checkpoint = opened.checkpoint
    looking = _Looking(opened, model)
    with ThreadMapper(threads or default_threads(), matrices=True) as mapper:
        layers = tuple(mapper(looking.layer, opened.modules))
    unknown = [layer for layer in layers if layer.norm is None]
    reason = None
    if unknown:
        reason = f"what {opened.kind.title} changes depends on the weights it is put on: name the base (--base)"
    targets: dict[str, int] = {}
    for module in opened.modules:
        last = module.rpartition(".")[2]
        targets[last] = targets.get(last, 0) + 1
    found: dict[str, int] = {}
    for tensor in checkpoint.values():
        found[dtypes.name_of(tensor.dtype)] = found.get(dtypes.name_of(tensor.dtype), 0) + 1
    config = checkpoint.config
    named = config.get("base_model_name_or_path")
    keys = [key for one in opened.kind.settings for key in (one.name, one.patterns) if key is not None]
    return Inspection(
        checkpoint.name,
        opened.kind.title,
        named if isinstance(named, str) else None,
        targets,
        len(checkpoint),
        sum(tensor.size for tensor in checkpoint.values()),
        sum(tensor.nbytes for tensor in checkpoint.values()),
        found,
        {key: config[key] for key in keys if config.get(key) not in (None, {})},
        layers,
        tuple(opened.plain),
        reason,
    )


class _Looking:
    """Looks at one layer after the other."""

    def __init__(self, adapter: Adapter, base: Checkpoint | None) -> None:
        self._adapter = adapter
        self._folded = None if base is None else fold(base, adapter.checkpoint)
        self._names = None if self._folded is None else Names(self._folded)

    def layer(self, module: str) -> InspectedLayer:
        adapter = self._adapter
        weight = self._experts(module)
        if weight is not None:
            return _of_experts(adapter.layer(module, weight), weight)
        tensor = self._tensor(module)
        try:
            layer = adapter.layer(module, None if tensor is None else tensor.view)
        except CheckpointError:
            if tensor is not None:
                raise
            # Some kinds do not tell how long a layer is.
            parts = adapter.modules[module].values()
            return InspectedLayer(module, None, sum(part.size for part in parts), None, None, None, None, None, None)
        change = self._change(module, tensor)
        rank = change.rank if isinstance(change, LowRank) else None
        values = _values(layer, change)
        norm = None if values is None else float(np.linalg.norm(values))
        relative = None
        if tensor is not None and norm is not None:
            own = _norm_of(tensor.view)
            relative = norm / own if own else None
        return InspectedLayer(
            module,
            layer.known_shape,
            sum(part.size for part in layer.parts.values()),
            rank,
            scale(layer, layer.length("r")) if adapter.kind.peft_type == "LORA" else None,
            norm,
            None if values is None else float(values.max(initial=0.0)),
            None if values is None else effective_rank(xp, values),
            relative,
        )

    def _experts(self, module: str) -> Weight | None:
        """Return the weights of several experts that a module's parts change, as one; None for any other module."""
        if module in self._adapter.experts:
            return Weight(self._adapter.experts[module])
        if self._folded is None or module not in self._folded:
            return None
        # A parameter of this name, and no module's weight.
        tensor = self._folded[module]
        return tensor.view if isinstance(tensor, FoldedTensor) and len(tensor.shape) == 3 else None

    def _tensor(self, module: str) -> FoldedTensor | None:
        if self._folded is None or self._names is None:
            return None
        name = self._adapter.weight_name(module, self._folded)
        tensor = self._folded[self._names.find(name, self._adapter.name)]
        if not isinstance(tensor, FoldedTensor):
            raise PlanError(f"{self._adapter.name}: {module} has no weight of its own in the base")
        return tensor

    def _change(self, module: str, tensor: FoldedTensor | None) -> LowRank | Array | None:
        """Return what is added: a product, or a matrix; None where that takes a base."""
        if tensor is None:
            try:
                found = self._adapter.change(module)
            except CheckpointError:
                # The kind forms nothing without the base; what a header shows was checked before.
                return None
            return found if isinstance(found, LowRank) else None
        found = tensor.terms[0].make()
        return found if isinstance(found, LowRank) else tensor.change()


def _of_experts(layer: Layer, weight: Weight) -> InspectedLayer:
    """Look at a change of several experts: the norm of all together, the largest singular value, the mean rank."""
    left, right = factors_of_experts(layer)
    values = [_values(layer, LowRank(*one)) for one in zip(left, right, strict=True)]
    found = np.stack([one for one in values if one is not None])
    norm = float(np.linalg.norm(found))
    own = math.hypot(*(float(np.linalg.norm(rows)) for _, rows in Weight(weight.tensor).tiles()))
    rank = left.shape[2]
    return InspectedLayer(
        layer.name,
        layer.known_shape,
        sum(part.size for part in layer.parts.values()),
        rank,
        scale(layer, rank),
        norm,
        float(found.max(initial=0.0)),
        float(np.mean([effective_rank(xp, one) for one in found])),
        norm / own if own else None,
    )


def _values(layer: Layer, change: LowRank | Array | None) -> Array | None:
    """Return the singular values of a change, falling."""
    if change is None:
        return None
    parts: Sequence[Array] = [change.left, change.right] if isinstance(change, LowRank) else [change]
    if not all(np.isfinite(part).all() for part in parts):
        raise layer.error("values are NaN or infinite")
    if isinstance(change, LowRank):
        return factors.values(change)
    found: Array = np.linalg.svd(change, compute_uv=False)
    return found


def _norm_of(weight: Weight) -> float:
    return math.hypot(*(float(np.linalg.norm(rows)) for _, rows in weight.tiles()))
