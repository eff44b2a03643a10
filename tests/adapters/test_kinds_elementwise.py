"""Products entry by entry and norms of matrices, held against plain computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_layer import Case, check, draw, folded

OUT, IN = 9, 14


def hut(*, residual: bool) -> Case:
    parts = {"hut_A": draw(1, OUT, 3), "hut_B": draw(2, 3, IN)}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        total = np.repeat(bias[None], len(x), axis=0)
        for o in range(OUT):
            for i in range(IN):
                factor = residual + sum(parts["hut_A"][o, k] * parts["hut_B"][k, i] for k in range(3))
                total[:, o] += x[:, i] * weight[o, i] * factor
        return total

    return Case({"peft_type": "HUT"} | ({} if residual else {"hut_residual": False}), parts, forward)


def map_(*, scalar: bool) -> Case:
    numbers = {"map_alpha": np.float32(7.5), "map_beta": np.float32(-2.5)}
    parts = {"lora_A.weight": draw(1, 3, IN), "lora_B.weight": draw(2, OUT, 3)}
    parts |= {name: np.asarray(value) if scalar else np.array([value]) for name, value in numbers.items()}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        delta = parts["lora_B.weight"] @ parts["lora_A.weight"]
        return 7.5 * x @ (weight / np.linalg.norm(weight)).T - 2.5 * x @ (delta / np.linalg.norm(delta)).T + bias

    return Case({"peft_type": "MAP"}, parts, forward)


CASES = {
    "hut": hut(residual=True),
    "hut, products that start as ones": hut(residual=False),
    "map": map_(scalar=True),
    "map, numbers in vectors": map_(scalar=False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


def test_an_increment_of_zeros_has_no_direction_and_adds_nothing():
    case = map_(scalar=True)
    case.parts["lora_B.weight"] = np.zeros((OUT, 3), np.float32)
    base = case.base()["m.q.weight"].astype(float)
    np.testing.assert_allclose(folded(case)["m.q.weight"].numpy(), 7.5 * base / np.linalg.norm(base), rtol=1e-6)


def test_a_base_of_zeros_has_no_direction_either():
    case = map_(scalar=True)
    found = folded(case, {**case.base(), "m.q.weight": np.zeros((OUT, IN), np.float32)})["m.q.weight"].numpy()
    assert np.linalg.norm(found.astype(float)) == pytest.approx(2.5, rel=1e-6)
