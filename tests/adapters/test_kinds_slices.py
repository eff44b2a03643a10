"""Trained rows and columns, held against layers that permute and train whole blocks, as the authors' code does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from one_layer import Case, check, checkpoint, draw, folded, refused

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.adapters.fold import fold

OUT, IN = 12, 8


def paca(config: dict[str, Any], factor: float) -> Case:
    places = np.array([7, 0, 3])

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        kept = np.delete(np.arange(IN), places)
        return x[:, kept] @ weight[:, kept].T + x[:, places] @ (factor * parts["paca_w"]).T + bias

    parts = {"paca_w": draw(1, OUT, 3), "paca_indices": places}
    return Case({"peft_type": "PACA", "r": 3, **config}, parts, forward, (OUT, IN))


def s2ft_rows(units: int, start: int | None, count: int) -> Case:
    """A layer whose outputs are permuted, trained from ``start`` on, and read in their old order."""
    order = np.random.default_rng(units).permutation(units)
    places = np.arange(OUT).reshape(units, -1)[order].reshape(-1)
    parts = {"s2": draw(2, count, IN), "s2_row_order": order}
    parts |= {} if start is None else {"s2_start": np.array([start])}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        permuted = x @ weight[places].T + bias[places]
        first = start or 0
        permuted[:, first : first + count] += x @ parts["s2"].T
        back = np.empty_like(permuted)
        back[:, places] = permuted
        return back

    return Case({"peft_type": "S2FT"}, parts, forward, (OUT, IN))


def s2ft_columns(units: int, start: int, count: int) -> Case:
    order = np.random.default_rng(units + 1).permutation(units)
    places = np.arange(IN).reshape(units, -1)[order].reshape(-1)
    parts = {"s2": draw(3, OUT, count), "s2_column_order": order, "s2_start": np.array([start])}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        moved = x[:, places]
        return moved @ weight[:, places].T + moved[:, start : start + count] @ parts["s2"].T + bias

    return Case({"peft_type": "S2FT"}, parts, forward, (OUT, IN))


CASES = {
    "paca": paca({}, 8 / 3),
    "paca, alpha of its own": paca({"paca_alpha": 2, "alpha_pattern": {"q": 9}}, 9 / 3),
    "s2ft rows, channels": s2ft_rows(OUT, None, 5),
    "s2ft rows, heads": s2ft_rows(4, 3, 6),
    "s2ft columns, channels": s2ft_columns(IN, 2, 3),
    "s2ft columns, heads": s2ft_columns(4, 4, 4),
    "s2ft, as many rows as columns": s2ft_rows(6, 0, IN),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_s2ft_permuted_is_taken_back_to_its_bases_order(fused):
    """A block with heads and channels computes the same before and after; so do its weights in the base's order."""
    rng = np.random.default_rng(0)
    names = {"v": (OUT, IN), "o": (IN, OUT), "up": (OUT, IN), "gate": (OUT, IN), "down": (IN, OUT)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    heads, channels = rng.permutation(4), rng.permutation(OUT)
    head_places = np.arange(OUT).reshape(4, -1)[heads].reshape(-1)
    places = {"v": head_places, "o": head_places, "up": channels, "gate": channels, "down": channels}
    trained = {"v": draw(1, 3, IN), "down": draw(2, IN, 4)}
    start = {"v": 3, "down": 2}

    expected = {name: array.copy() for name, array in base.items()}
    expected["v"][head_places[3:6]] += trained["v"]
    expected["down"][:, channels[2:6]] += trained["down"]
    given = expected if fused else base
    permuted = {
        name: array[:, places[name]] if name in ("o", "down") else array[places[name]] for name, array in given.items()
    }
    held: dict[str, Any] = {}
    for name in names:
        part = "s2_column_order" if name in ("o", "down") else "s2_row_order"
        held[f"base_model.model.m.{name}.{part}"] = heads if name in "vo" else channels
        if name in trained and not fused:
            held[f"base_model.model.m.{name}.s2"] = trained[name]
            held[f"base_model.model.m.{name}.s2_start"] = np.array([start[name]])
    tuned = checkpoint("tuned", {f"m.{name}.weight": array for name, array in permuted.items()})
    found = fold(tuned, checkpoint("order", held, {"peft_type": "S2FT", "s2_permuted": True}))
    for name in names:
        np.testing.assert_allclose(found[f"m.{name}.weight"].numpy(), expected[name], atol=1e-6)


def test_an_adapter_on_disk_holds_its_places_as_integers(write_model, tmp_path):
    case = paca({}, 8 / 3)
    folder = tmp_path / "paca"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**case.config, "task_type": "CAUSAL_LM", "bias": "none"}))
    named = {f"base_model.model.m.q.{part}": array for part, array in case.parts.items()}
    write_safetensors(folder / "adapter_model.safetensors", named)
    found = ws.open(f"{write_model('base', case.base())}+{folder}")
    assert np.array_equal(found["m.q.weight"].numpy(), folded(case)["m.q.weight"].numpy())


def test_biases_move_back_with_their_rows_only_if_training_moved_them():
    order = np.array([2, 0, 1])
    case = Case({"peft_type": "S2FT", "s2_permuted": True}, {"s2_row_order": order}, lambda x, *_: x, (OUT, IN))
    bias = case.base()["m.q.bias"]
    assert np.array_equal(folded(case)["m.q.bias"].numpy(), bias)
    case.config["s2_permuted_bias"] = True
    found = folded(case)["m.q.bias"].numpy()
    assert np.array_equal(found.reshape(3, 4)[order].reshape(-1), bias)


def parts_of(case: Case, **changed: Any) -> Case:
    case.parts = {name: value for name, value in {**case.parts, **changed}.items() if value is not None}
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (parts_of(paca({}, 1), paca_indices=None), "does not hold paca_indices: which columns were trained"),
        (parts_of(paca({}, 1), paca_indices=np.array([0, 1, 8])), "places from 0 to 8, and 0 to 7 are there"),
        (paca({"r": 4}, 1), "gives it rank 4, and it has 3 columns"),
        (parts_of(s2ft_rows(4, 0, 3), s2_row_order=None), "S2FT needs s2 and s2_row_order, or"),
        (parts_of(s2ft_rows(4, 0, 3), s2=None, s2_start=None), "it holds an order and no trained rows"),
        (parts_of(s2ft_rows(4, 0, 3), s2_row_order=np.arange(5)), "orders 5 units, which do not divide 12"),
        (parts_of(s2ft_rows(4, 0, 3), s2_row_order=np.array([0, 1, 1, 2])), "no order of 4 units: some come twice"),
        (s2ft_rows(4, 11, 2), "s2 begins at 11 and has 2 rows or columns, and the weight has 12"),
        (parts_of(s2ft_columns(4, 0, 2), s2=draw(1, OUT, 9)), "s2 has 9 rows or columns, and the weight has 8"),
    ],
)
def test_what_does_not_fit_is_refused(case, message):
    assert message in refused(case)
