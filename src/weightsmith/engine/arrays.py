"""Methods on arrays that lie in memory, for tests, notebooks and one's own scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from weightsmith.checkpoint.tensor import Array, ArrayTensor
from weightsmith.dtypes import promote
from weightsmith.engine.backend import NUMPY, Backend, choose_backend
from weightsmith.engine.evaluate import Evaluator, Mapper, blocks, in_turn
from weightsmith.engine.expression import Computed
from weightsmith.engine.threads import ThreadMapper
from weightsmith.methods.registry import get_method
from weightsmith.methods.settings import complete


def merge_arrays(
    method: str,
    models: Sequence[Array],
    base: Array | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "tensor",
    labels: Sequence[str] = (),
    block_size: int = 1 << 17,
    threads: int = 1,
    device: str | None = None,
    backend: str | None = None,
) -> Array:
    """Merge arrays of one shape by a method, as the engine merges tensors of files.

    Args:
        method: the method's name.
        models: arrays of one shape, of any floating dtype.
        base: the base's array, for methods that take one.
        parameters: the method's parameters; per-model ones as sequences, or one value for all.
        seed: seed of random methods.
        name: the tensor's name, which random masks depend on.
        labels: a name for each model, which random masks depend on; by default the positions.
        block_size: elements to compute at a time; the result does not depend on it.
        threads: how many threads compute; the result does not depend on it.
        device: what to compute on: ``cpu``, the default, or ``cuda``, ``cuda:1``.
        backend: ``numpy`` or ``torch``; by default NumPy on the CPU, PyTorch on a GPU.

    Returns:
        The merged array, in the models' shape, float32 (float64 if an input is), not rounded further.

    Raises:
        MethodError: if the method does not take these parameters or this number of models.
        DeviceError: if there is no such device, or PyTorch is wanted and not installed.
    """
    chosen = get_method(method)
    tensor = Computed(
        name,
        promote([array.dtype for array in models]),
        chosen,
        tuple(ArrayTensor(name, np.asarray(model)) for model in models),
        None if base is None else ArrayTensor(name, np.asarray(base)),
        parameters=complete(chosen, parameters or {}, len(models), has_base=base is not None),
        labels=tuple(labels),
        seed=seed,
    )
    with ThreadMapper(threads, matrices=tensor.reads == "tensor") as mapper:
        return evaluate(tensor, mapper, block_size=block_size, backend=choose_backend(device, backend))


def evaluate(
    tensor: Computed, mapper: Mapper = in_turn, *, block_size: int = 1 << 17, backend: Backend = NUMPY
) -> Array:
    """Compute a tensor whole.

    Args:
        tensor: what is computed.
        mapper: runs blocks, in order.
        block_size: elements to compute at a time; the result does not depend on it.
        backend: what computes.

    Returns:
        An array of its shape, in the dtype of its arithmetic.
    """
    evaluator = Evaluator(backend=backend)
    evaluator.prepare(tensor, mapper)
    stretches = blocks(tensor.size, tensor.columns, block_size)
    parts = list(mapper(lambda part: evaluator.result(tensor, *part, tensor.working)[0], stretches))
    if not parts:
        return np.zeros(tensor.shape, tensor.working)
    return np.concatenate(parts).reshape(tensor.shape)
