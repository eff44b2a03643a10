"""Recipes: mergekit's forms, ours on top, and one clear error for everything else."""

from __future__ import annotations

import string

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.errors import RecipeError
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.json_schema import json_schema
from weightsmith.recipe.load import load_recipe

LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n- {model: b}\n"
RECIPES = {
    "linear": LINEAR + "dtype: float16\n",
    "stacking": """
slices:
- sources: [{model: org/one, layer_range: [0, 40]}]
- sources: [{model: org/two, layer_range: [20, 44]}]
merge_method: passthrough
dtype: bfloat16
""",
    "gradients": """
slices:
- sources:
  - {model: one, layer_range: [0, 40]}
  - {model: two, layer_range: [0, 40]}
merge_method: slerp
base_model: one
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - {value: 0.5}
dtype: float16
""",
    "ties": """
models:
- {model: one, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
- model: two
  parameters:
    density: 0.5
    weight: [0, 0.3, 0.7, 1]
- model: three
  parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: {model: {path: org/base, revision: main}}
parameters: {normalize: true, int8_mask: true}
tokenizer: {source: base, tokens: {<x>: {source: {kind: zero}, force: true}}, pad_to_multiple_of: 64}
chat_template: auto
""",
    "modules": """
merge_method: linear
base_model: whole
modules:
  text_decoder: {models: [{model: whole}, {model: text, prefix: model.}], parameters: {weight: 0.5}}
  vision_tower: {prefix: visual., slices: [{sources: [{model: whole, layer_range: [0, 2]}]}]}
""",
    "steps": """
steps:
  first: {merge_method: linear, models: [{model: a}, {model: b}]}
  second: {merge_method: slerp, base_model: first, models: [{model: c}], parameters: {t: 0.5}}
merge_method: ties
base_model: a
models: [{model: first}, {model: second}]
on_missing: base
on_shape_mismatch: first
compat: mergekit
seed: 7
""",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_written_out_and_fits_the_schema(name):
    import yaml

    recipe = load_recipe(RECIPES[name])
    assert load_recipe(to_yaml(recipe)) == recipe
    jsonschema.validate(yaml.safe_load(to_yaml(recipe)), json_schema())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR + "dtipe: x", r"unknown key 'dtipe' \(did you mean 'dtype'\?\)"),
        ("merge_method: a\nmodels: [{model: a, paramters: {}}]", r"models\[0\]: unknown key 'paramters'.*'parameters'"),
        ("merge_method: a\nmodels: [{model: a, parameters: {w: {filter: x}}}]", r"w\.value is missing"),
        ("merge_method: a\nslices: [{sources: [{model: a, layer_range: [1]}]}]", r"layer_range"),
        ("merge_method: a\nslices: [{sources: [], residual_weight: 1}]", "never had an effect"),
        (LINEAR + "slices: []", "exactly one of models, slices and modules"),
        ("merge_method: a", "exactly one of models, slices and modules"),
        ("merge_method: a\nmodels: []", "at least one model"),
        ("models: [{model: a}]", "merge_method is missing"),
        (LINEAR + "dtype: bfloat17", r"did you mean 'bfloat16'\?"),
        (LINEAR + "dtype: int64", "takes one of float64"),
        (LINEAR + "on_missing: ignore", "error, base, first, skip"),
        (LINEAR + "tokenizer: {}\ntokenizer_source: base", "either tokenizer or tokenizer_source"),
        (LINEAR + "seed: -1", "seed is -1"),
        (LINEAR + "dtype: a\ndtype: b", "line 6: the key 'dtype' is given twice"),
        ("- 1\n- 2", "is a list"),
        ("a: [1", "line 2: not YAML"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("merge_method: a\nmodels: [{model: {model: x, override_architecture: y}}]", "override_architecture"),
        (LINEAR + "---\n" + LINEAR, "2 documents without a name"),
        (LINEAR + "chat_template: ${x}", "no variable 'x'"),
        (LINEAR + "include: other.yaml", "recipes that are files"),
        ("steps: {a: {merge_method: m, models: [{model: b}]}, b: {merge_method: m, models: [{model: a}]}}\n" + LINEAR,
         "circle: a -> b -> a"),
        ("x: " + "[" * 60 + "]" * 60, "nested more than 40"),
        (LINEAR + "parameters: {w: [{scope: {regex: '('}, value: 1}]}", "not a regular expression"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(text + "\n")
    assert "\n" not in str(caught.value)


def test_aliases_that_multiply_are_refused():
    text = "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    for i, name in enumerate("bcdefgh"):
        text += f"{name}: &{name} [" + ",".join([f"*{'abcdefg'[i]}"] * 10) + "]\n"
    with pytest.raises(RecipeError, match="aliases counted"):
        load_recipe(text)


def test_documents_with_names_become_steps_in_any_order():
    recipe = load_recipe(
        "merge_method: linear\nmodels: [{model: part}, {model: c}]\n---\n"
        "name: part\nmerge_method: linear\nmodels: [{model: linear}, {model: b}]\n---\n"
        "name: linear\nmerge_method: passthrough\nmodels: [{model: a}]\n"
    )
    assert list(recipe.steps) == ["part", "linear"]
    # A step called like a method does not change what the word means elsewhere.
    assert recipe.merge_method == "linear"
    assert recipe.steps["linear"].merge_method == "passthrough"


def test_if_all_documents_have_names_the_last_is_the_result():
    text = "name: {}\nmerge_method: linear\nmodels: [{{model: {}}}]\n"
    recipe = load_recipe(text.format("one", "a") + "---\n" + text.format("two", "one"))
    assert recipe.name == "two"
    assert list(recipe.steps) == ["one"]


def test_included_files_lie_beneath_the_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "dtype: float16\nparameters: {weight: 1, normalize: false}\nvariables: {m: a}\n"
    )
    (tmp_path / "r.yaml").write_text(
        "include: base.yaml\nmerge_method: linear\nmodels: [{model: '${m}'}]\nparameters: {weight: 2}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.dtype == "float16"
    assert recipe.parameters == {"weight": 2, "normalize": False}
    assert recipe.models[0].model == "a"
    assert load_recipe(tmp_path / "r.yaml", {"m": "b"}).models[0].model == "b"


@pytest.mark.parametrize("name", ["../other.yaml", "/etc/passwd", "r.yaml", "missing.yaml"])
def test_includes_cannot_leave_the_folder_or_go_in_circles(tmp_path, name):
    (tmp_path / "r.yaml").write_text(f"include: {name}\n{LINEAR}")
    with pytest.raises(RecipeError, match="outside|itself|cannot read"):
        load_recipe(tmp_path / "r.yaml")


def test_a_variable_that_is_the_whole_value_keeps_its_type():
    recipe = load_recipe(
        "variables: {w: [0, 1], d: models, n: 3}\nmerge_method: linear\n"
        "models: [{model: '${d}/m-${n}', parameters: {weight: '${w}'}}]\nseed: ${n}\n"
    )
    assert recipe.models[0].model == "models/m-3"
    assert recipe.models[0].parameters["weight"] == (0, 1)
    assert recipe.seed == 3


@settings(max_examples=300)
@given(st.text(alphabet=string.printable, max_size=200).map(lambda text: text + "\n"))
def test_no_text_whatever_raises_anything_but_our_error(text):
    with pytest.raises(RecipeError):
        load_recipe(text)


scalars = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(-9, 9), st.sampled_from(["a", "b: c", "*", "é"]))
values = st.one_of(scalars, st.lists(scalars, min_size=1, max_size=3))
conditions = st.fixed_dictionaries({"value": values}, optional={"filter": st.sampled_from(["mlp", "*", "a b"])})
parameters = st.dictionaries(st.sampled_from(["weight", "t"]), st.one_of(values, st.lists(conditions, min_size=1)))
models = st.fixed_dictionaries({"model": st.sampled_from(["a", "b/c@d", "e+f"])}, optional={"parameters": parameters})


@given(st.lists(models, min_size=1, max_size=3), parameters, st.sampled_from([None, "float16"]))
def test_any_recipe_survives_being_written_out(inputs, shared, dtype):
    from weightsmith.recipe.load import validate

    recipe = validate({"merge_method": "x", "models": inputs, "parameters": shared, "dtype": dtype}, "it")
    assert load_recipe(to_yaml(recipe)) == recipe
