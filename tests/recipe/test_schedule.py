"""Schedules and conditions, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from weightsmith.recipe.load import load_recipe
from weightsmith.recipe.schedule import Place, constant, rules, value_at


def setting(text: str):
    recipe = load_recipe(f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{x: {text}}}")
    return recipe.parameters["x"]


def evaluate(found, where):
    return resolve([{"x": found}], "x", where)


def resolve(levels, parameter, where):
    return value_at(rules(levels, parameter), where)


def at(position: float | None, name: str = "model.layers.3.mlp.w", layer: int | None = 3, module: str | None = None):
    return Place(name, layer, position, module)


@pytest.mark.parametrize(
    ("values", "position", "expected"),
    [
        ("[0, 1]", 0.25, 0.25),
        ("[0, 0.5, 1, 3]", 0.5, 0.75),
        ("[0, 10]", 1.0, 10.0),
        ("[2]", 0.7, 2),
        ("[5, 1]", None, 5),
        ("[true, false]", 0.4, True),
        ("[a, b, c]", 0.6, "b"),
        ("[a, b, c]", 1.0, "c"),
        ("0.3", 0.9, 0.3),
    ],
)
def test_a_list_is_spread_over_the_layers(values, position, expected):
    assert evaluate(setting(values), at(position)) == pytest.approx(expected)


def test_the_first_condition_that_holds_counts():
    found = setting("[{filter: attn, value: 1}, {filter: mlp, value: [0, 1]}, {value: 3}]")
    assert evaluate(found, at(0.5, "layers.0.attn.q")) == 1
    assert evaluate(found, at(0.5, "layers.0.mlp.up")) == 0.5
    assert evaluate(found, at(0.5, "norm")) == 3
    assert evaluate(setting("[{filter: attn, value: 1}]"), at(0.5, "norm")) is None
    assert evaluate(setting("{filter: '*', value: 2}"), at(0.5, "norm")) == 2


@pytest.mark.parametrize(
    ("scope", "holds"),
    [
        ("{layers: [2, 4]}", True),
        ("{layers: [4, 6]}", False),
        ("{names: 'model.*.mlp.?'}", True),
        ("{names: ['*.attn.*', 'lm_head*']}", False),
        ("{regex: 'layers\\.[0-3]\\.'}", True),
        ("{modules: [text, vision]}", True),
        ("{modules: vision}", False),
        ("{layers: [0, 9], names: '*norm*'}", False),
    ],
)
def test_a_scope_holds_where_all_that_it_says_does(scope, holds):
    found = evaluate(setting(f"[{{scope: {scope}, value: 1}}]"), at(0.5, module="text"))
    assert found == (1 if holds else None)


def test_the_nearest_level_that_gives_a_value_wins():
    levels = [{"w": setting("[{filter: attn, value: 1}]")}, {}, {"w": 2, "v": 5}, {"w": 3}]
    assert resolve(levels, "w", at(0.5, "attn")) == 1
    assert resolve(levels, "w", at(0.5, "mlp")) == 2
    assert resolve(levels, "v", at(0.5)) == 5
    assert resolve(levels, "u", at(0.5)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", True),
        ("{value: 2}", True),
        ("[{filter: '*', value: 2}, 3]", True),
        ("[]", True),
        ("[1, 2]", False),
        ("{value: [1, 2]}", False),
        ("[{filter: attn, value: 1}, 2]", False),
    ],
)
def test_what_is_the_same_for_all_tensors_is_known_to_be(text, expected):
    assert constant(rules([{"x": setting(text)}], "x")) is expected
