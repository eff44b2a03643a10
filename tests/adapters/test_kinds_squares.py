"""MoRA's folds are held against its forward pass, written from the authors' layer: features are moved, not indexed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_layer import Case, adapter, check, draw, folded, refused

from weightsmith.adapters.adapter import Adapter
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.layer import Weight
from weightsmith.checkpoint.tensor import ArrayTensor


def spread(values: Any, side: int, kind: int) -> Any:
    """Shorten inputs ``[n, in]`` as the authors do."""
    length = values.shape[1]
    if kind in (1, 4, 6):
        filled = np.concatenate([values, values[:, : -length % side]], axis=1)
        pieces = filled.reshape(len(values), -1, side)
        return pieces if kind == 6 else pieces.sum(axis=1)
    groups = np.array_split(np.arange(length), side)
    return np.stack([values[:, group].sum(axis=1) for group in groups], axis=1)


def rotate(pieces: Any) -> Any:
    """Turn pair j of piece g, of features j and j + half, by g / 10000^(2 j / side)."""
    result = pieces.copy()
    half = pieces.shape[2] // 2
    for g in range(pieces.shape[1]):
        for j in range(half):
            angle = g / 10000 ** (2 * j / (2 * half))
            a, b = pieces[:, g, j], pieces[:, g, j + half]
            result[:, g, j] = a * np.cos(angle) - b * np.sin(angle)
            result[:, g, j + half] = b * np.cos(angle) + a * np.sin(angle)
    return result


def mora(kind: int) -> Any:
    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        square, out = parts["lora_A.weight"], len(weight)
        short = spread(x, len(square), kind)
        if kind == 6:
            added = (rotate(short) @ square.T).reshape(len(x), -1)
            added = np.tile(added, (1, -(-out // added.shape[1])))[:, :out]
        else:
            added = short @ square.T
            if kind in (1, 3):
                added = np.tile(added, (1, -(-out // len(square))))[:, :out]
            else:
                lengths = [len(group) for group in np.array_split(np.arange(out), len(square))]
                added = np.repeat(added, lengths, axis=1)
        return x @ weight.T + bias + added

    return forward


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("side", "shape"), [(4, (9, 14)), (4, (23, 10)), (4, (8, 12)), (8, (5, 6)), (6, (40, 7))])
def test_mora_folds_to_its_forward_pass(kind, side, shape):
    check(Case({"peft_type": "MORA", "mora_type": kind}, {"lora_A.weight": draw(1, side, side)}, mora(kind), shape))


def test_the_authors_files_name_lora_with_a_flag_and_hold_the_square_twice():
    square = draw(1, 4, 4)
    config = {"peft_type": "LORA", "use_mora": True, "mora_type": 1, "r": 8, "lora_alpha": 99, "use_dora": False}
    check(Case(config, {"lora_A.weight": square, "lora_B.weight": square}, mora(1)))
    assert "lora_A and lora_B differ" in refused(
        Case(config, {"lora_A.weight": square, "lora_B.weight": square + 1}, mora(1))
    )


def test_types_that_move_features_once_are_products_of_factors():
    case = Case({"peft_type": "MORA", "mora_type": 4}, {"lora_A.weight": draw(1, 4, 4)}, mora(4))
    weight = Weight(ArrayTensor("m.q.weight", case.base()["m.q.weight"]))
    product = Adapter(adapter(case)).change("m.q", weight)
    assert isinstance(product, LowRank)
    summed = weight.matrix() + product.left @ product.right
    np.testing.assert_allclose(summed, folded(case)["m.q.weight"].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "side", "shape", "message"),
    [
        ({"mora_type": 5}, 4, (9, 14), "known are 1, 2, 3, 4 and 6"),
        ({"mora_type": 6}, 5, (9, 14), "an even one"),
        ({"mora_type": 1}, 9, (9, 4), "do not fill it"),
        ({"mora_type": "one"}, 4, (9, 14), "no whole number"),
    ],
)
def test_what_fits_no_layer_is_refused(config, side, shape, message):
    case = Case({"peft_type": "MORA", **config}, {"lora_A.weight": draw(1, side, side)}, mora(1), shape)
    assert message in refused(case)


def test_a_matrix_that_is_no_square_is_refused():
    assert "lora_A [s, s]" in refused(Case({"peft_type": "MORA"}, {"lora_A.weight": draw(1, 4, 5)}, mora(1)))
