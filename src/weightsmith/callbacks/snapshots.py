"""Copies of a model's weights in memory of our own, while the model trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import PlanError, shown

# PyTorch gives NumPy no arrays of these: their bits are taken as integers.
_BITS = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": ("uint8", ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": ("uint8", ml_dtypes.float8_e5m2fnuz),
}


class Snapshots:
    """One set of buffers on the CPU, into which weights are copied again and again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Any] = {}

    def take(self, tensors: Mapping[str, Any]) -> dict[str, Array]:
        """Copy tensors.

        Args:
            tensors: name -> PyTorch tensor, on any device.

        Returns:
            name -> array of the same shape and dtype; valid until the next call.
        """
        import torch

        devices = set()
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                # Only from pinned memory and to it are copies as fast as the bus.
                pinned = tensor.is_cuda
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                self._buffers[name] = buffer
            buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.synchronize(device)
        return {name: as_array(self._buffers[name]) for name in tensors}


def as_array(tensor: Any) -> Array:
    """Return a PyTorch tensor on the CPU as an array that shares its memory."""
    import torch

    bits = _BITS.get(str(tensor.dtype).removeprefix("torch."))
    if bits is None:
        found: Array = tensor.numpy()
        return found
    return np.asarray(tensor.view(getattr(torch, bits[0])).numpy()).view(bits[1])


def weights_of(model: Any) -> dict[str, Any]:
    """Return what is averaged of a model: its parameters and buffers, as it would save them.

    Tensors that share their memory are taken once, under the first name.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        Tensor name -> tensor, on the model's own devices; not copied.

    Raises:
        PlanError: if its weights are shared out among processes, or not in memory.
    """
    import torch

    found: dict[str, Any] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in unwrapped(model).state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        _check_whole(name, tensor)
        # Empty tensors have no memory to share.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and owners.setdefault(place, name) != name:
            continue
        found[name] = tensor
    return found


def unwrapped(model: Any) -> Any:
    """Return the model within those that distribute or compile it."""
    import torch

    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise PlanError(_SHARED_OUT.format("the model's weights are"))
    if any(hasattr(parameter, "ds_id") and not parameter.numel() for parameter in model.parameters()):
        raise PlanError(_SHARED_OUT.format("the model's weights are"))
    return model


_SHARED_OUT = (
    "{} shared out among processes (FSDP, ZeRO-3, tensor parallelism), and a callback sees only a part; average the "
    "checkpoints as they are saved: weightsmith average --update STATE CHECKPOINT"
)


def _check_whole(name: str, tensor: Any) -> None:
    import torch

    if hasattr(tensor, "full_tensor") or hasattr(tensor, "local_shards"):
        raise PlanError(_SHARED_OUT.format(f"{shown(name)} is"))
    if tensor.is_meta:
        raise PlanError(f"{shown(name)} is on the device meta: it is offloaded, and has no values to average")
    if tensor.layout is not torch.strided:
        raise PlanError(f"{shown(name)} is sparse, which no checkpoint here holds")
