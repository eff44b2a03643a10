"""Statistics over several tensors: those of the tensors laid end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.arrays import merge_arrays
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.expression import Computed, Group
from weightsmith.methods.registry import get_method
from weightsmith.methods.settings import complete

SHAPES = [(40, 50), (300,), (), (0, 3), (4, 5, 6)]
# How far the models lie from the base in each tensor: what makes a scope matter.
SPREADS = [0.1, 1.0, 1.0, 1.0, 3.0]


def inputs(models: int = 2) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Return the models and the base of every tensor, the base zero so that results are task vectors."""
    rng = np.random.default_rng(0)
    return [
        ([(spread * rng.standard_normal(shape)).astype(np.float32) for _ in range(models)], np.zeros(shape, np.float32))
        for shape, spread in zip(SHAPES, SPREADS, strict=True)
    ]


def merge_as_one_scope(name: str, **given: Any) -> list[np.ndarray]:
    """Merge tensors that share one statistic, as the plan puts them together for a layer or a model."""
    method, group, shared = get_method(name), Group(), {}
    parameters = complete(method, given, 2, has_base=True)
    made = [
        Computed(
            f"t{i}",
            np.dtype(np.float32),
            method,
            tuple(ArrayTensor(f"t{i}", model) for model in models),
            ArrayTensor(f"t{i}", base),
            parameters=parameters,
            group=group,
        )
        for i, (models, base) in enumerate(inputs())
    ]
    return [
        Evaluator(shared).values(tensor, 0, tensor.size).reshape(tensor.shape)
        if tensor.size
        else np.zeros(tensor.shape)
        for tensor in made
    ]


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ties", {"weight": 1.0, "density": 0.3, "trim_scope": "model"}),
        ("ties", {"weight": 1.0, "density": [0.2, 0.6], "rescale": True, "trim_scope": "layer"}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.3, "gamma": 0.1, "trim_scope": "model"}),
        ("breadcrumbs_ties", {"weight": 1.0, "density": 0.3, "gamma": 0.1, "rescale": True, "trim_scope": "layer"}),
        ("ramplus_tl", {"epsilon": 0.3, "r": 0.7, "alpha": 5.0}),
        ("consensus", {"density": 0.3}),
        ("consensus", {"multi_task": "ties", "k": 1}),
        ("localize_and_stitch", {}),
        ("localize_and_stitch", {"density": [0.2, 0.6], "trim_scope": "layer"}),
        ("pcb", {}),
        ("pcb", {"density": [0.2, 0.9], "clip": 0.1, "inter": "pairs", "trim_scope": "layer"}),
        ("sign_only", {"mean_scope": "model"}),
    ],
)
def test_a_scope_of_tensors_is_as_one_long_tensor(name, given):
    found = flat(merge_as_one_scope(name, **given))
    whole = [flat([models[i] for models, _ in inputs()]) for i in range(2)]
    expected = merge_arrays(name, whole, np.zeros_like(whole[0]), parameters=given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    one_by_one = flat(
        [
            merge_arrays(name, models, base, parameters={**given, str(get_method(name).scope): "tensor"})
            for models, base in inputs()
        ]
    )
    assert not np.allclose(found, one_by_one, rtol=1e-3), "this case does not show the scope"


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_l1_rescaling_over_a_scope_restores_the_sum_over_all_of_it(name):
    found = merge_as_one_scope(name, weight=[1.0, 0.0], density=0.3, rescale_by="l1", trim_scope="model")
    models = [models[0] for models, _ in inputs()]
    assert np.abs(flat(found)).sum(dtype=np.float64) == pytest.approx(
        np.abs(flat(models)).sum(dtype=np.float64), rel=1e-6
    )
    assert abs(np.abs(found[1]).sum() / np.abs(models[1]).sum() - 1) > 1e-3


def test_della_over_a_scope_keeps_more_of_the_tensors_that_changed_more():
    given = {"weight": [1.0, 0.0], "density": 0.5, "epsilon": 0.4, "rescale": False}
    found = merge_as_one_scope("della_linear", **given, trim_scope="model")
    # The first tensor holds nearly all of the smaller entries, the last the larger ones.
    assert np.mean(found[0] != 0) == pytest.approx(0.1 + 0.8 * 0.5 * found[0].size / 2421, abs=0.05)
    assert np.mean(found[4] != 0) > 0.8
