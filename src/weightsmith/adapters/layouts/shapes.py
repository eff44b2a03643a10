"""The parts of a module in PEFT's shapes, whatever shapes its layout has for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.layouts import network as n
from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.network import Entry, Network
from weightsmith.adapters.layouts.tensors import Made, Renamed
from weightsmith.adapters.layouts.towers import Tower
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, PlanError, shown
from weightsmith.kernels.convert import narrow, widen

_FLOAT64 = np.dtype(np.float64)


def prepared(owner: str, entry: Entry) -> Entry:
    """Return a module with its parts as PEFT has them."""
    parts = dict(entry.parts)
    middle = parts.pop(p.MIDDLE, None)
    if middle is not None:
        parts["lora_A.weight"] = _without_middle(owner, entry, middle)
    scale = parts.pop(p.DORA_SCALE, None)
    if scale is not None:
        parts[p.MAGNITUDE] = _magnitude(owner, entry, parts, scale)
    if p.SCALED in parts or p.ON_INPUT in parts:
        parts = {"ia3_l": _scaling(owner, entry, parts)}
    return Entry(entry.component, entry.module, parts, entry.alpha, entry.origin)


def _without_middle(owner: str, entry: Entry, middle: Tensor) -> Tensor:
    """Return A of a convolution in Tucker form: ``[rank, in, h, w]`` of ``[rank, r, h, w]`` and ``[r, in, 1, 1]``."""
    down, up = entry.parts.get("lora_A.weight"), entry.parts.get("lora_B.weight")
    if (
        down is None
        or up is None
        or len(middle.shape) < 3
        or down.size != down.shape[0] * down.shape[1]
        or middle.shape[1] != down.shape[0]
        or middle.shape[0] != up.shape[1]
    ):
        raise CheckpointError(
            f"{owner}: {shown(middle.name)} is {list(middle.shape)}, and does not fit the other factors"
        )
    shape = (middle.shape[0], down.shape[1], *middle.shape[2:])

    def make() -> Array:
        core, inner = (widen(t.read(0, t.size), _FLOAT64).reshape(t.shape) for t in (middle, down))
        product = np.tensordot(core, inner.reshape(inner.shape[:2]), ([1], [0]))
        return np.moveaxis(product, -1, 1).astype(np.float32)

    return Made(down.name, shape, np.dtype(np.float32), make)


def _magnitude(owner: str, entry: Entry, parts: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """Return LyCORIS' ``dora_scale`` as PEFT has it: ``[out]``, of a convolution ``[1, out, 1, 1]``."""
    if entry.kind != "LORA":
        raise CheckpointError(
            f"{owner}: {shown(scale.name)} scales the weight after {entry.kind}, which PEFT's layout has for LoRA alone"
        )
    out, axes = parts["lora_B.weight"].shape[0], len(parts["lora_A.weight"].shape)
    if scale.shape[:1] != (out,) or scale.size != out:
        across = scale.size == parts["lora_A.weight"].shape[1] and scale.shape[:1] == (1,)
        raise CheckpointError(
            f"{owner}: {shown(scale.name)} is {list(scale.shape)}: "
            + (
                "it holds a magnitude for each column of the weight, and PEFT's DoRA one for each row"
                if across
                else f"[{out}, 1] is needed, a magnitude for each row of the weight"
            )
        )
    return Renamed(scale, shape=(out,) if axes == 2 else (1, out) + (1,) * (axes - 2))


def _scaling(owner: str, entry: Entry, parts: Mapping[str, Tensor]) -> Tensor:
    """Return PEFT's vector of IA3, ``[out, 1]`` or ``[1, in]``; LyCORIS keeps what is added to one."""
    weight, on_input = parts.get(p.SCALED), parts.get(p.ON_INPUT)
    if weight is None or on_input is None or set(parts) != {p.SCALED, p.ON_INPUT} or len(weight.shape) != 1:
        raise CheckpointError(
            f"{owner}: {shown(entry.origin)} has {' and '.join(sorted(parts))}; IA3 of a linear layer has weight, a "
            "vector, and on_input"
        )
    flag = n.number_of(owner, on_input)
    if flag not in (0, 1):
        raise CheckpointError(f"{owner}: {shown(on_input.name)} is {flag}, and must be 0 or 1")
    shape = (1, weight.size) if flag else (weight.size, 1)

    def make() -> Array:
        return (1 + widen(weight.read(0, weight.size), _FLOAT64)).astype(np.float32).reshape(shape)

    return Made(weight.name, shape, np.dtype(np.float32), make)


def fitted(entry: Entry, tower: Tower) -> Entry:
    """Return a module with factors of as many axes as the base's weight: kohya keeps some linear layers as 1 x 1."""
    weight = tower.weights.get(entry.module)
    axes = len(weight.shape) if weight is not None else 0
    parts = dict(entry.parts)
    for part in ("lora_A.weight", "lora_B.weight"):
        tensor = parts.get(part)
        if tensor is None or len(tensor.shape) == axes or axes < 2:
            continue
        if axes == 2 and tensor.size == tensor.shape[0] * tensor.shape[1]:
            parts[part] = Renamed(tensor, shape=tensor.shape[:2])
        elif len(tensor.shape) == 2:
            parts[part] = Renamed(tensor, shape=(*tensor.shape, *(1,) * (axes - 2)))
    magnitude = parts.get(p.MAGNITUDE)
    if magnitude is not None and axes > 2 and len(magnitude.shape) == 1:
        parts[p.MAGNITUDE] = Renamed(magnitude, shape=(1, magnitude.size, *(1,) * (axes - 2)))
    elif magnitude is not None and axes == 2 and len(magnitude.shape) > 1:
        parts[p.MAGNITUDE] = Renamed(magnitude, shape=(magnitude.size,))
    return Entry(entry.component, entry.module, parts, entry.alpha, entry.origin)


class Sum(Tensor):
    """A base's tensor with what an adapter adds to all of it, in the base's dtype."""

    def __init__(self, base: Tensor, change: Tensor) -> None:
        """Add two tensors of one size."""
        self.name = base.name
        self.shape = base.shape
        self.dtype: DType = base.dtype
        self._base = base
        self._change = change

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements before they are rounded: ``[n]``, float64."""
        wide: Array = widen(self._base.read(start, stop), _FLOAT64) + widen(self._change.read(start, stop), _FLOAT64)
        return wide


def take_changes(network: Network, entry: Entry, tower: Tower | None) -> None:
    """Turn what is added to whole weights and biases into weights and biases that take the base's places."""
    for part, ending in ((p.CHANGE, "weight"), (p.BIAS_CHANGE, "bias")):
        change = entry.parts.pop(part, None)
        if change is None:
            continue
        if tower is None:
            raise CheckpointError(
                f"{network.name}: {shown(change.name)} is added to a whole {ending}, and PEFT's layout has what takes "
                "its place: name the base (--base)"
            )
        base = tower.weights.get(entry.module) if ending == "weight" else tower.biases.get(entry.module)
        if base is None or base.size != change.size or not dtypes.is_float(base.dtype):
            has = "no such tensor" if base is None else f"it as {dtypes.name_of(base.dtype)} {list(base.shape)}"
            raise PlanError(f"{network.name}: {shown(change.name)} is {list(change.shape)}, and the base has {has}")
        network.plain[entry.component, f"{entry.module}.{ending}"] = Sum(base, change)
