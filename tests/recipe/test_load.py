"""Recipes: mergekit's forms, ours on top, and one clear error for everything else."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys

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
    "rules": """
merge_method: ties
base_model: base
base_fisher: of-base
models: [{model: a}, {model: {model: {path: b, revision: main}}, fisher: {model: {path: of-b}}}]
parameters: {density: 0.2, weight: 1}
rules:
- {filter: norm, merge_method: linear, parameters: {weight: [0, 1]}}
- {scope: {names: "*embed*"}, merge_method: passthrough, models: [{model: a, parameters: {scale: 2}}]}
- {filter: lm_head, scope: {layers: [0, 4], regex: x, modules: [m]}, parameters: {density: {value: 0.5}}}
- {filter: "*", merge_method: linear, models: [{model: {model: {path: b, revision: main}}}]}
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
        (LINEAR + "rules: [{filter: x}]", r"rules\[0\]: the rule changes nothing"),
        (LINEAR + "rules: [{filter: x, merge_method: m}, {merge_method: m}]", r"rules\[1\]: say with filter or scope"),
        (LINEAR + "rules: [{filter: x, merge_metod: m}]", r"rules\[0\]: unknown key 'merge_metod' \(did you mean 'merge_method'"),
        (LINEAR + "rules: [{filter: x, models: [{modle: a}]}]", r"models\[0\].*modle.*known are model, parameters"),
        (LINEAR + "rules: {norm: linear}", "rules must be a list"),
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


GROWING = {
    "letters that multiply": "a: &a " + "x" * 500_000 + "\nb: [*a, *a, *a]\n",
    "entries without end": "x: [" + "1," * 400_000 + "1]\n",
    "nesting without end": "x: " + "[" * 400_000 + "\n",
    "documents without end": "---\n" * 200_000,
    "a circle": "a: &a [*a]\n",
    "merges that multiply": "a: &a {x: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [*{chr(97 + i)}, *{chr(97 + i)}]}}\n" for i in range(20)
    ),
    "a number in hexadecimal": "x: 0x" + "f" * 900_000 + "\n",
    "a number in base sixty": "x: 1" + ":0" * 400_000 + "\n",
    "a text of variables": "variables: {v: " + "x" * 300_000 + "}\nmerge_method: '" + "${v}" * 100_000 + "'\n",
    "lists of variables": "variables: {v: [" + "1," * 20_000 + "1]}\nmodels: [" + "'${v}'," * 20_000 + "]\n",
    "wrong entries": LINEAR + "parameters: {w: [" + "{}," * 15_000 + "{}]}\n",
    "unknown keys": LINEAR + "".join(f"k{i}: 1\n" for i in range(20_000)),
    "a very long key": LINEAR + "k" * 900 + ": 1\n",
    "more than is read": LINEAR + "#" * 1_000_000,
    "steps in a row": "steps:\n" + "".join(
        f"  s{i}: {{merge_method: m, models: [{{model: s{i + 1}}}]}}\n" for i in range(100)
    ) + LINEAR,
}  # fmt: skip


LOAD_ALL = """
import json, resource, sys, time
from weightsmith.errors import RecipeError
from weightsmith.recipe.load import load_recipe
texts = json.load(sys.stdin)
ours = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (ours + 150_000_000,) * 2)
for name, text in texts.items():
    began = time.monotonic()
    try:
        load_recipe(text)
    except RecipeError as error:
        assert len(str(error)) < 2000, name
    else:
        raise AssertionError(name)
    assert time.monotonic() - began < 15, name
"""


def test_recipes_that_would_grow_are_refused_in_seconds_and_little_memory():
    """A text of a megabyte takes PyYAML's scanner a second; what it may ask for beyond is bounded."""
    done = subprocess.run([sys.executable, "-c", LOAD_ALL], input=json.dumps(GROWING), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: 3\n", "3 is not the name of a file"),
        ('include: "a\\0b"\n', "cannot be the name of a file"),
        ("include: pipe\n", "no regular file"),
        ("include: link.yaml\n", "outside the recipe's folder"),
        ("include: [twice.yaml, twice.yaml]\n", "more than 100 files"),
        ("x: !!timestamp abc\n", "not YAML that a recipe may hold"),
        ("x: !!bool abc\n", "not YAML that a recipe may hold"),
        ("x: !!int ''\n", "not YAML that a recipe may hold"),
        ("x: !!set [1]\n", "not YAML that a recipe may hold"),
        ("x: 2001-99-99\n", "not YAML that a recipe may hold"),
        ("a [: 1\n" + LINEAR, r"unknown key 'a \['"),
        (LINEAR + "tokenizer: {tokens: {'': {}}}\n", "tokenizer.tokens"),
        (LINEAR + "tokenizer: union\n", r"tokenizer must be a mapping of keys \(source, tokens, pad_to_multiple_of\)"),
        (LINEAR + "steps: [1]\n---\nname: x\n" + LINEAR, "steps must be a mapping"),
    ],
)
def test_files_and_values_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "outside.yaml").write_text("dtype: float16\n")
    folder = tmp_path / "recipes"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    # Each includes the next twice: a thousand million in thirty small files.
    (folder / "twice.yaml").write_text("include: [t0.yaml, t0.yaml]\n")
    for i in range(30):
        (folder / f"t{i}.yaml").write_text(f"include: [t{i + 1}.yaml, t{i + 1}.yaml]\n")
    (folder / "t30.yaml").write_text("dtype: float16\n")
    (folder / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(folder / "r.yaml")


def test_a_recipe_can_come_through_a_pipe_but_not_for_ever(tmp_path):
    """As ``weightsmith merge <(program) OUT`` gives it."""
    script = "import sys\nfrom weightsmith.recipe.load import load_recipe\nprint(load_recipe(sys.argv[1]).merge_method)"
    command = f"{sys.executable} -c '{script}' <(cat {tmp_path / 'r.yaml'})"
    (tmp_path / "r.yaml").write_text(LINEAR)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "linear\n"
    with pytest.raises(RecipeError, match="more than 1,000,000 bytes"):
        load_recipe("/dev/zero")


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


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.1e-2", "+1e-3"])
def test_numbers_with_an_exponent_are_numbers(text):
    recipe = f"merge_method: nearswap\nbase_model: a\nmodels: [{{model: b}}]\nparameters: {{t: {text}}}\n"
    assert load_recipe(recipe).parameters == {"t": 0.001}
