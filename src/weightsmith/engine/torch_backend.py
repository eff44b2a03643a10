"""PyTorch's tensors, on a GPU or the CPU: the same methods through their array API code.

On a GPU, bytes go from the file to pinned memory, from there to the device in the file's own dtype, are widened,
computed and rounded there, and come back to pinned memory to be written. Every thread has a stream of its own, so that
one thread's copies overlap with what others compute.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.backend import BLOCK, SWEEP, Backend, Values
from weightsmith.engine.scratch import Scratch
from weightsmith.errors import DeviceError
from weightsmith.kernels.torch import convert, philox

# Elements at a time on a GPU: enough to fill it, few enough for the temporaries of a dozen threads. As on a CPU, sums
# depend on those of a sweep.
_GPU_BLOCK = _GPU_SWEEP = 1 << 22


class TorchBackend(Backend):
    """PyTorch on one device."""

    fuses = False

    def __init__(self, device: str) -> None:
        """Find the device.

        Args:
            device: ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            DeviceError: if there is no such device; the message lists those that there are.
        """
        self.device = _find(device)
        on_gpu = self.device.type == "cuda"
        hardware = torch.cuda.get_device_name(self.device) if on_gpu else "cpu"
        self.name = f"torch {torch.__version__} on {hardware}"
        self.block = _GPU_BLOCK if on_gpu else BLOCK
        self.sweep = _GPU_SWEEP if on_gpu else SWEEP
        self.scratch = _Pinned() if on_gpu else Scratch()
        self._thread = _Thread(self.device if on_gpu else None)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See :meth:`Backend.computing`; the thread's stream is the current one, and empty in the end."""
        thread = self._thread
        taken = thread.taken
        try:
            # Without a stream this context does nothing.
            with torch.cuda.stream(thread.stream):
                try:
                    yield
                finally:
                    # Only now may what was read to be used again, and what was brought back be read.
                    if thread.stream is not None:
                        thread.stream.synchronize()
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"the memory of {self.device} is full, with a block of {self.block:,} elements for each thread; "
                "use fewer --threads, or --device cpu"
            ) from error
        finally:
            thread.taken = taken

    def load(self, tensor: Tensor, start: int, stop: int, working: DType) -> Values:
        """See :meth:`Backend.load`."""
        wide = getattr(tensor, "read_wide", None)
        if wide is not None:
            found = np.ascontiguousarray(wide(start, stop))
            room = self._room(found.nbytes)
        else:
            room = self._room((stop - start) * tensor.dtype.itemsize)
            found = tensor.read_into(start, stop, room)
        if found.ctypes.data != room.ctypes.data:
            room[:] = found.view(np.uint8)
        data = torch.from_numpy(room).to(self.device, non_blocking=True)
        values = convert.widen(data, found.dtype, convert.torch_dtype(working))
        # On the CPU nothing has been copied yet where both dtypes are one, and the room is used again.
        return values.clone() if values.data_ptr() == room.ctypes.data else values

    def empty(self, size: int, working: DType) -> Values:
        """See :meth:`Backend.empty`."""
        return torch.empty(size, dtype=convert.torch_dtype(working), device=self.device)

    def rounded(self, values: Values, dtype: DType, working: DType) -> Values:
        """See :meth:`Backend.rounded`."""
        data = convert.narrow(values, dtype).contiguous().view(torch.uint8)
        return convert.widen(data, dtype, convert.torch_dtype(working))

    def flat(self, values: Any, working: DType) -> Values:
        """See :meth:`Backend.flat`."""
        return torch.as_tensor(values, device=self.device).reshape(-1).to(convert.torch_dtype(working))

    def uniform(self, key: tuple[int, int], start: int, stop: int) -> Values:
        """See :meth:`Backend.uniform`."""
        return philox.uniform(key, start, stop, self.device)

    def nonfinite(self, arrays: Sequence[Values]) -> list[int]:
        """See :meth:`Backend.nonfinite`."""
        if not arrays:
            return []
        # In one piece: what comes back from a device is waited for.
        counts = torch.stack([torch.count_nonzero(~torch.isfinite(values)) for values in arrays])
        return [int(count) for count in counts.tolist()]

    def store(self, values: Values, dtype: DType, out: Array | None) -> tuple[Array, int]:
        """See :meth:`Backend.store`."""
        narrowed = convert.narrow(values, dtype).contiguous()
        if out is None:
            out = np.empty(len(narrowed), dtype)
        torch.from_numpy(out.view(np.uint8)).copy_(narrowed.view(torch.uint8), non_blocking=True)
        return out, int(convert.count_nonfinite(narrowed, dtype))

    def _room(self, nbytes: int) -> Array:
        """Return memory that nothing else is read to before the context of :meth:`computing` ends."""
        thread = self._thread
        thread.taken += 1
        return self.scratch.get(("input", thread.taken), nbytes)


class _Thread(threading.local):
    """What each thread has to itself.

    Attributes:
        stream: its stream, or None on the CPU.
        taken: how many rooms hold what is being read or copied.
    """

    def __init__(self, device: Any) -> None:
        self.stream = None if device is None else torch.cuda.Stream(device)
        self.taken = 0


class _Pinned(Scratch):
    """Memory that the device reads and writes by itself, while the processor goes on."""

    def _allocate(self, nbytes: int) -> Array:
        return np.asarray(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy())


def _find(text: str) -> Any:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    if device is not None and device.type == "mps":
        raise DeviceError(
            "mps has no float64, in which sums over a tensor are taken; use --device cpu, which computes as fast as "
            "the disk reads"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is not None and device.type == "cuda" and (device.index or 0) < count:
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    blind = "" if torch.backends.cuda.is_built() else f"; this build of PyTorch, {torch.__version__}, knows no GPU"
    raise DeviceError(f"there is no device {text!r}; use one of: {there}{blind}")
