"""Methods are written once, against the array API standard: torch tensors give what NumPy arrays give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from weightsmith import conformance
from weightsmith.engine.expression import columns
from weightsmith.kernels import philox
from weightsmith.methods.block import Block, Form, Scope
from weightsmith.methods.registry import Method, all_methods
from weightsmith.methods.settings import complete

torch = pytest.importorskip("torch")
SHAPE = (24, 36)


# Every method as its example has it, and the ways of computing that no example takes.
EXAMPLES = [(name, dict(method.example)) for name, method in sorted(all_methods().items())]
VARIANTS = [
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}),
    ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": 0.5, "tangent": "projection"}),
    ("karcher", {"filter_wise": True, "weight": 2.0}),
    ("variance_corrected", {"eps": 0.0}),
    ("sparse_soup", {"mask": "union", "min_zeros": 0.0}),
    ("sparse_soup", {"mask": "first", "min_zeros": 0.0}),
    ("geometric", {"mixed": "sign"}),
    ("harmonic", {"mixed": "zero"}),
    ("krum", {"byzantine": 0, "select": 2}),
    ("model_stock", {"filter_wise": True}),
    ("ties", {"weight": 0.5, "density": 0.3, "rescale": True}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.2}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "gamma": 0.2, "trim_scope": "row"}),
    ("consensus", {"multi_task": "ties", "k": 1}),
    ("pcb", {"density": 0.8, "clip": 0.01, "inter": "pairs"}),
    ("magmax", {"weight": 0.5}),
    ("dare_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("dare_linear", {"weight": 0.5, "density": 0.3, "object": "weights"}),
    ("della", {"weight": 0.5, "density": 0.3, "trim_scope": "tensor"}),
    ("sce", {"select_topk": 1.0}),
    ("tsv", {"weight": 0.5, "svd": "randomized"}),
    ("iso_c", {"mean_over": "rank", "tolerance": 0.1}),
    ("star", {"eta": 80.0, "rank": 3, "svd": "randomized"}),
    ("low_rank", {"weight": 0.5, "keep": "effective_rank"}),
    ("knots", {"density": 0.3, "trim_scope": "model"}),
    ("knots", {"density": 0.3, "concatenate": "out", "coordinates": "unscaled"}),
]


def run(method: Method, models: list[Any], base: Any, wrap: Any) -> Any:
    """Drive a method on one block that holds the whole tensor."""
    given = conformance.parameters_for(method, len(models))
    parameters = complete(method, given, len(models), has_base=base is not None)
    reads = method.reads(parameters, Form(SHAPE))
    vector = columns(SHAPE, reads)
    shape = SHAPE if reads == "tensor" else (-1,) if reads == "elements" else (-1, vector)

    def draw(model: int) -> Any:
        return wrap(philox.uniform((1, model), 0, models[0].size).reshape(SHAPE)).reshape(shape)

    block = Block(
        base=None if base is None else wrap(base).reshape(shape),
        models=tuple(wrap(model).reshape(shape) for model in models),
        start=0,
        draw=draw,
    )
    statistic = None
    if method.statistic is not None:
        generator = method.start_statistic(Scope(models[0].size, len(models), Form(SHAPE)), parameters)
        try:
            sweep = next(generator)
            while True:
                sweep = generator.send([sweep.function(block)])
        except StopIteration as end:
            statistic = end.value
    return method.call(block, statistic, parameters)


@pytest.mark.parametrize(("name", "given"), EXAMPLES + VARIANTS, ids=str)
def test_torch_tensors_give_what_numpy_arrays_give(name, given):
    method = replace(all_methods()[name], example=given)
    models, base = conformance.inputs_for(method, SHAPE)
    expected = np.asarray(run(method, models, base, np.asarray))
    found = run(method, models, base, torch.from_numpy)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
