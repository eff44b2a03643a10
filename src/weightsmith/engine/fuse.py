"""Methods as fused loops: a method's result, or what its statistic asks of every block, as one compiled program.

The method runs once on symbolic arrays; what it does to them becomes the program. Whatever cannot be recorded is left
to NumPy: the caller gets None and goes the plain way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.expression import Computed, columns, is_made
from weightsmith.kernels import native, philox, select
from weightsmith.kernels.program import (
    LONGEST_ROW,
    SHORTEST_ROW,
    Collect,
    Histogram,
    Program,
    Store,
    Terminal,
    load,
    rounded,
    storable,
)
from weightsmith.kernels.trace import Lazy, Positions, Recorder, Total, Unknown, Untraceable
from weightsmith.methods.block import Block
from weightsmith.methods.sweeps import Equal, Histograms, Numbers, Patterns, Within

Request = Numbers | Patterns | Within | Histograms | Equal


class SymbolicBlock(Block):
    """A block of symbolic arrays."""

    @cached_property
    def xp(self) -> Any:
        """The recorder."""
        return self.models[0].recorder

    @cached_property
    def positions(self) -> Any:
        """The indices of elements, for comparisons."""
        return Positions(self.xp)


class Fused:
    """A program for a computed tensor, or for all tensors of a scope that are alike.

    Attributes:
        program: the program.
    """

    def __init__(self, program: Program, request: Request | None) -> None:
        self.program = program
        self._request = request

    def answer(self, inputs: Sequence[Array], count: int, index: int, position: int) -> Any:
        """Run over a stretch and return what the request, called on the block, would return."""
        request = self._request
        outputs = [np.empty(count, dtype) for dtype in self.program.outputs]
        found = self.program.run(inputs, outputs, count, index, position).values
        if isinstance(request, Patterns):
            return [select.patterns(output) for output in outputs]
        if isinstance(request, Equal):
            return (position + select.equal(select.patterns(outputs[0]), request.pattern)).tolist()
        if isinstance(request, Within):
            return [select.Gathered.of_block(*one) for one in found]
        if isinstance(request, Histograms):
            return [self.program.width, *found]
        return [float(value) for value in found]

    def compute(self, inputs: Sequence[Array], out: Array, index: int, position: int) -> tuple[int, list[int]]:
        """Run over a stretch and write the results; return counts of what is not finite, in results and in inputs."""
        results = self.program.run(inputs, [out], len(out), index, position)
        return results.values[0], results.counts.tolist()


def result_program(tensor: Computed, statistic: Any, dtype: DType) -> Fused | None:
    """Return the program of a computed tensor's method, rounded to a dtype; None if there is none.

    Args:
        tensor: the computed tensor.
        statistic: what its method's statistic returned.
        dtype: the floating dtype of the results.
    """
    if not storable(dtype) or not _fusable(tensor):
        return None
    if tensor.method.statistic is not None or tensor.method.random:
        return _result_program(tensor, statistic, dtype)
    # The same for every tensor with these parameters: models of experts have tens of thousands.
    try:
        given = tuple(sorted(tensor.parameters.items()))
        # Written out as well: 0.0 equals -0.0, and is another parameter.
        key = (tensor.method.function, given, repr(given), dtype, *signature(tensor))
        found = _SHARED.get(key, _SHARED)
    except TypeError:
        return _result_program(tensor, statistic, dtype)
    if found is _SHARED:
        if len(_SHARED) >= _MOST_SHARED:
            _SHARED.clear()
        found = _SHARED[key] = _result_program(tensor, statistic, dtype)
    return found  # type: ignore[no-any-return]


_SHARED: dict[Any, Any] = {}
_MOST_SHARED = 256


def _result_program(tensor: Computed, statistic: Any, dtype: DType) -> Fused | None:
    def terminals(block: Block) -> list[Terminal]:
        result = _lazy(tensor.method.call(block, statistic, tensor.parameters))
        if result.kind == "f64":
            # To the dtype of the arithmetic before any other, as everywhere: rounding once is another result.
            result = block.xp.astype(result, tensor.working)
        return [Store(result, dtype)]

    return _compiled(tensor, terminals, None, counts=len(tensor.inputs))


def request_program(tensor: Computed, request: Any) -> Fused | None:
    """Return the program that answers what a statistic asks of every block; None if there is none."""
    if not isinstance(request, Request) or not _fusable(tensor):
        return None

    def terminals(block: Block) -> list[Terminal]:
        if isinstance(request, Numbers):
            return [_total(value) for value in request.values(block)]
        values = [_lazy(value) for value in request.values(block)]
        dtypes = {value.dtype for value in values}
        if len(dtypes) != 1:
            raise Untraceable("selection is among values of one dtype")
        (dtype,) = dtypes
        width = 8 * dtype.itemsize
        if isinstance(request, Within):
            most = (1 << width) - 1
            bounds = [(low, min(high, most)) for low, high in request.ranges]
            return [Collect(value, low, high) for value, (low, high) in zip(values, bounds, strict=True)]
        if isinstance(request, Histograms):
            bounds = [request.of(prefix, width) for prefix in request.prefixes]
            return [Histogram(value, low, shift) for value, (low, shift) in zip(values, bounds, strict=True)]
        return [Store(value, dtype) for value in values]

    return _compiled(tensor, terminals, request, counts=0)


def signature(tensor: Computed) -> tuple[Any, ...]:
    """Return what, beside method and parameters, a tensor's program depends on."""
    name = (tensor.name, tensor.seed, tensor.labels) if tensor.method.random else None
    sources = tuple((source_dtype(part, tensor.working), isinstance(part, Computed)) for part in tensor.inputs)
    rows = columns(tensor.shape, tensor.reads)
    importances = tuple(one is not None for one in tensor.fishers)
    role = tensor.form.role
    return name, sources, tensor.working, tensor.casts, tensor.base is None, tensor.reads, rows, role, importances


def source_dtype(part: Tensor, working: DType) -> DType:
    """Return the dtype in which a program is given an input: a file's own, or that of the arithmetic."""
    return working if is_made(part) else part.dtype


def _fusable(tensor: Computed) -> bool:
    if native.library() is None or tensor.reads == "tensor":
        return False
    return tensor.reads == "elements" or SHORTEST_ROW <= columns(tensor.shape, tensor.reads) <= LONGEST_ROW


def _compiled(tensor: Computed, terminals: Any, request: Request | None, counts: int) -> Fused | None:
    library = native.library()
    if library is None:
        return None
    rows = None if tensor.reads == "elements" else columns(tensor.shape, tensor.reads)
    recorder = Recorder(rows)
    try:
        block = _symbolic(tensor, recorder, counted=counts > 0)
        return Fused(Program(library, recorder, terminals(block), counts=counts), request)
    except (Untraceable, Exception):
        # Whatever a method does that symbolic arrays do not know, it may do to real ones; if it is a mistake of
        # the method's, it shows itself there.
        if os.environ.get("WEIGHTSMITH_KERNELS") == "strict":
            raise
        return None
    finally:
        recorder.forget()


def _symbolic(tensor: Computed, recorder: Recorder, *, counted: bool) -> SymbolicBlock:
    weights = len(tensor.models) + (tensor.base is not None)

    def source(slot: int, part: Tensor) -> Lazy:
        # Like the plain way, this counts what is not finite in stored tensors alone: others have been counted.
        weight = slot < weights
        count = slot if weight and counted and not isinstance(part, Computed) else -1
        dtype = source_dtype(part, tensor.working)
        value = load(recorder, slot, dtype, tensor.working, count)
        if weight and tensor.casts is not None and dtype != tensor.casts:
            value = rounded(recorder, value, tensor.casts)
        return value

    def draw(model: int) -> Lazy:
        if not tensor.method.random:
            # Programs of methods that do not say that they draw are shared by tensors.
            raise Untraceable("random numbers that the method does not declare")
        key = philox.key_of(tensor.seed, tensor.name, tensor.labels[model])
        return recorder.record("uniform", (), kind="f32", single=False, numbers=key)

    values = [source(slot, part) for slot, part in enumerate(tensor.inputs)]
    base = None if tensor.base is None else values.pop(0)
    models = tuple(values[: len(tensor.models)])
    given = iter(values[len(models) :])
    fishers = [None if one is None else next(given) for one in tensor.fishers]
    return SymbolicBlock(
        base=base,
        models=models,
        start=Unknown(),  # type: ignore[arg-type]
        draw=draw,
        role=tensor.form.role,
        base_fisher=fishers.pop(0) if fishers and base is not None else None,
        fishers=tuple(fishers),
    )


def _lazy(value: Any) -> Lazy:
    if not isinstance(value, Lazy):
        raise Untraceable(f"a result that is {type(value).__name__}")
    if value.single and value.recorder.columns is not None:
        # A constant for the whole block, or one column; NumPy knows which of them is a result.
        raise Untraceable("a result of one value a row")
    return value


def _total(value: Any) -> Total:
    if not isinstance(value, Total):
        raise Untraceable(f"a total that is {type(value).__name__}")
    return value
