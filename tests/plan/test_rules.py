"""Rules: another method, other models or other parameters for some tensors, in every form of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.errors import MethodError, PlanError, RecipeError, WeightsmithError
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.load import load_recipe

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "norm"


@pytest.fixture
def three(write_model):
    """Return the folders of a base and two models, as texts."""
    return [str(write_model(name, llama_tensors(i))) for i, name in enumerate(("base", "a", "b"))]


def tensors(count=3):
    return [{name: value.astype(np.float64) for name, value in llama_tensors(i).items()} for i in range(count)]


def ties(base, models, density, weight=1.0):
    """TIES of whole tensors: trim, elect, and the mean of those that agree."""
    trimmed = []
    for model in models:
        delta = (model.astype(np.float32) - base.astype(np.float32)).astype(np.float64).ravel()
        kept = np.zeros(delta.size, bool)
        kept[np.argsort(-np.abs(delta), kind="stable")[: int(density * delta.size)]] = True
        trimmed.append(weight * delta * kept)
    total = sum(trimmed)
    out = np.zeros_like(total)
    for i in range(total.size):
        sign = 1 if total[i] >= 0 else -1
        agreeing = [delta[i] for delta in trimmed if delta[i] * sign > 0]
        out[i] = sum(agreeing) / (weight * len(agreeing)) if agreeing else 0.0
    return base + out.reshape(base.shape)


def check(merged, expected):
    assert set(merged) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(merged[name].numpy(), values, rtol=1e-5, atol=1e-6, err_msg=name)


def recipe(method, models, base=None, **more):
    document = {"merge_method": method, "models": [{"model": model} for model in models], **more}
    return yaml.safe_dump({**document, **({"base_model": base} if base else {})})


def test_the_first_rule_that_holds_decides_and_the_method_takes_the_rest(three):
    """The recipe of the guide: norms by mean, embeddings from one model, the head trimmed less."""
    base, a, b = three
    merged = ws.merge_recipe(
        recipe(
            "ties",
            [a, b],
            base,
            parameters={"density": 0.2, "weight": 1},
            rules=[
                {"filter": "norm", "merge_method": "linear", "parameters": {"weight": 0.5}},
                {"scope": {"names": "*embed_tokens*"}, "merge_method": "passthrough", "models": [{"model": a}]},
                {"filter": "lm_head", "parameters": {"density": 0.5}},
                {"scope": {"regex": "norm|head"}, "merge_method": "slerp", "parameters": {"t": 0.5}},
            ],
        )
    )
    of_base, of_a, of_b = tensors()
    expected = {}
    for name, start in of_base.items():
        if "norm" in name:
            expected[name] = (of_a[name] + of_b[name]) / 2
        elif name == EMBEDDINGS:
            expected[name] = of_a[name]
        else:
            expected[name] = ties(start, [of_a[name], of_b[name]], 0.5 if name == HEAD else 0.2)
    check(merged, expected)
    assert merged.plan().methods == {"ties": 5, "linear": 3, "passthrough": 1}
    warning = "rules[3] (regex: norm|head) has no effect: before it, rules[0] and rules[2] decided all tensors"
    assert any(warning in text for text in merged.warnings)
    # What is passed through is copied as it is.
    assert np.array_equal(merged[EMBEDDINGS].numpy(), llama_tensors(1)[EMBEDDINGS])


def test_the_guides_recipe_does_what_its_comments_say(write_model, tmp_path, monkeypatch):
    for i, name in enumerate("BAC"):
        write_model(name, llama_tensors(i))
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "recipes.md").read_text()
    (text,) = [block for block in guide.split("```") if block.startswith("yaml") and "\nrules:" in block]
    merged = ws.merge_recipe(text.removeprefix("yaml"))
    base, a, c = tensors()
    assert not merged.warnings
    for name, start in base.items():
        if "norm" in name:
            expected = (a[name] + c[name]) / 2
        elif name in (EMBEDDINGS, HEAD):
            expected = a[name] if name == EMBEDDINGS else start
        else:
            expected = ties(start, [a[name], c[name]], 0.5 if "q_proj" in name else 0.2)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_rule_leaves_tensors_of_the_base_untouched(three):
    base, a, b = three
    rule = {"filter": "lm_head", "merge_method": "passthrough", "models": [{"model": base}]}
    merged = ws.merge("task_arithmetic", [a, b], base, weight=0.5, rules=[rule])
    of_base, of_a, of_b = tensors()
    expected = {n: start + 0.5 * (of_a[n] - start) + 0.5 * (of_b[n] - start) for n, start in of_base.items()}
    check(merged, expected | {HEAD: of_base[HEAD]})


def test_the_nearest_of_rule_model_and_merge_gives_a_parameter(three):
    """Rule's model, rule, model, merge: each gives what no nearer one gives."""
    base, a, b = three
    document = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": a, "parameters": {"weight": 0.9}}, {"model": b}],
        "parameters": {"weight": 0.3, "lambda": 2},
        "rules": [
            {"filter": "q_proj", "merge_method": "linear", "parameters": {"normalize": False}},
            {"filter": "up_proj", "parameters": {"weight": 0.5}},
            {"filter": "norm", "models": [{"model": b}, {"model": a, "parameters": {"weight": 0.1}}]},
            {"filter": "lm_head", "models": [{"model": a, "parameters": {"weight": 7}}], "parameters": {"lambda": 0.1}},
        ],
    }
    merged = ws.merge_recipe(yaml.safe_dump(document))
    of_base, of_a, of_b = tensors()
    expected = {}
    for name, start in of_base.items():
        delta_a, delta_b = of_a[name] - start, of_b[name] - start
        if "q_proj" in name:
            expected[name] = 0.9 * of_a[name] + 0.3 * of_b[name]
        elif "up_proj" in name:
            expected[name] = start + 2 * 0.5 * (delta_a + delta_b)
        elif "norm" in name:
            expected[name] = start + 2 * (0.1 * delta_a + 0.3 * delta_b)
        elif name == HEAD:
            expected[name] = start + 0.1 * 7 * delta_a
        else:
            expected[name] = start + 2 * (0.9 * delta_a + 0.3 * delta_b)
    check(merged, expected)


def test_a_rules_parameters_may_be_schedules_and_conditions_that_fall_through_to_the_merge(write_model):
    a, b = (str(write_model(name, llama_tensors(i, layers=5))) for i, name in enumerate("ab"))
    weights = [{"filter": "up_proj", "value": [0, 1]}, {"scope": {"layers": [0, 1]}, "value": 3}]
    text = recipe(
        "linear", [a, b], parameters={"weight": 1}, rules=[{"filter": "layers", "models": [{"model": a}, {"model": b, "parameters": {"weight": weights}}]}]
    )  # fmt: skip
    merged = ws.merge_recipe(text)
    one, other = ({n: v.astype(np.float64) for n, v in llama_tensors(i, layers=5).items()} for i in range(2))
    expected = {}
    for name, value in one.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        weight = layer / 4 if "up_proj" in name else 3 if layer == 0 else 1
        expected[name] = (value + weight * other[name]) / (1 + weight)
    check(merged, expected)


def test_rules_of_slices_look_at_the_output_and_take_of_each_slice_what_is_there(write_model):
    a, b = (str(write_model(name, llama_tensors(i, layers=4))) for i, name in enumerate("ab"))
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}, {"model": b, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 3]}, {"model": a, "layer_range": [2, 4]}]},
    ]
    document = {
        "merge_method": "linear",
        "slices": slices,
        "parameters": {"weight": [0.2, 0.4]},
        "rules": [
            {"scope": {"layers": [2, 4], "names": "*up_proj*"}, "merge_method": "passthrough", "models": [{"model": a}]},
            {"filter": "q_proj", "parameters": {"weight": 1}, "models": [{"model": b, "parameters": {"weight": 3}}, {"model": a}]},
        ],
    }  # fmt: skip
    merged = ws.merge_recipe(yaml.safe_dump(document))
    one, other = (
        {n: v.astype(np.float64) for n, v in llama_tensors(i, layers=4).items()} for i in range(2)
    )  # fmt: skip
    for layer, (in_a, in_b) in enumerate([(0, 0), (1, 1), (2, 1), (3, 2)]):
        for kind in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"):
            of_a, of_b = one[f"model.layers.{in_a}.{kind}"], other[f"model.layers.{in_b}.{kind}"]
            share = 0.75 if "q_proj" in kind else 0.5
            expected = of_a if layer >= 2 and "up_proj" in kind else (1 - share) * of_a + share * of_b
            np.testing.assert_allclose(merged[f"model.layers.{layer}.{kind}"].numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged[HEAD].numpy(), (one[HEAD] + other[HEAD]) / 2, rtol=1e-5, atol=1e-6)


def test_a_slice_without_any_of_a_rules_models_is_refused(write_model):
    a, b = (str(write_model(name, llama_tensors(i))) for i, name in enumerate("ab"))
    slices = [{"sources": [{"model": m, "layer_range": [i, i + 1]}]} for i, m in enumerate((a, b))]
    document = {"merge_method": "passthrough", "slices": slices}
    rule = {"filter": "up_proj", "models": [{"model": a}]}
    with pytest.raises(PlanError, match=r"rules\[0\]: model.layers.1.mlp.up_proj.weight is made of .*b alone, none of"):
        ws.merge_recipe(yaml.safe_dump({**document, "rules": [rule]}))


def test_rules_of_modules_hold_by_module_and_never_for_what_is_carried(write_model):
    visual = {"visual.block.norm.weight": np.arange(3, dtype=np.float32)}
    a, b = (
        str(write_model(name, llama_tensors(i) | {k: v + i for k, v in visual.items()})) for i, name in enumerate("ab")
    )
    document = {
        "merge_method": "slerp",
        "base_model": a,
        "modules": {"model": {"models": [{"model": b}]}},
        "parameters": {"t": 0.5},
        "rules": [
            {"scope": {"modules": "model", "names": "*norm*"}, "merge_method": "linear", "parameters": {"weight": 1}},
            {"filter": "visual", "merge_method": "linear", "parameters": {"weight": 1}},
            {"scope": {"modules": "visual"}, "parameters": {"t": 0.1}},
        ],
    }
    merged = ws.merge_recipe(yaml.safe_dump(document))
    # linear has no use for the base, and b alone is listed.
    assert np.array_equal(merged["model.norm.weight"].numpy(), llama_tensors(1)["model.norm.weight"])
    assert np.array_equal(merged["visual.block.norm.weight"].numpy(), visual["visual.block.norm.weight"])
    assert merged.plan().methods == {"slerp": 5, "linear": 3, "carried": 2}
    idle = [text for text in merged.warnings if "has no effect" in text]
    assert idle == [
        "rules[1] (filter: visual) has no effect: it is for none of the tensors that are merged",
        "rules[2] (modules: visual) has no effect: it is for none of the tensors that are merged",
    ]


def test_statistics_of_a_layer_or_model_range_over_the_tensors_of_one_rule(three):
    """Trimming over the model: of the tensors that the method and rule are the same for, and of no others."""
    base, a, _ = three
    merged = ws.merge_recipe(
        recipe(
            "ties",
            [a],
            base,
            parameters={"density": 0.3, "weight": 1, "trim_scope": "model"},
            rules=[{"filter": "proj", "parameters": {"density": 0.1}}, {"filter": "norm", "merge_method": "linear"}],
        )
    )
    one, other = llama_tensors(0), llama_tensors(1)
    for density, chosen in ((0.1, [n for n in one if "proj" in n]), (0.3, [EMBEDDINGS, HEAD])):
        deltas = np.concatenate([(other[name] - one[name]).ravel() for name in chosen])
        kept = np.zeros(deltas.size, bool)
        kept[np.argsort(-np.abs(deltas), kind="stable")[: int(density * deltas.size)]] = True
        expected = np.concatenate([one[name].ravel() for name in chosen]) + deltas * kept
        found = np.concatenate([merged[name].numpy().ravel() for name in chosen])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    for name in (n for n in one if "norm" in n):
        assert np.array_equal(merged[name].numpy(), other[name])


def test_compat_and_seed_hold_for_the_methods_of_rules(three):
    base, a, b = three
    rule = {"filter": "proj", "merge_method": "dare_linear", "parameters": {"density": 0.5}}

    def merged(**settings):
        return ws.merge("linear", [a, b], base, weight=1.0, rules=[rule], **settings)

    def alone(**settings):
        return ws.merge("dare_linear", [a, b], base, weight=1.0, density=0.5, **settings)

    name = "model.layers.0.mlp.up_proj.weight"
    for settings in ({}, {"seed": 3}, {"compat": "mergekit"}):
        assert np.array_equal(merged(**settings)[name].numpy(), alone(**settings)[name].numpy())
    assert not np.array_equal(merged()[name].numpy(), merged(seed=3)[name].numpy())
    assert not np.array_equal(merged()[name].numpy(), merged(compat="mergekit")[name].numpy())
    # mergekit makes an unlisted base an input of methods without use for a base; not where a rule says who takes part.
    of_base, of_a, of_b = tensors()
    whole = merged(compat="mergekit")[EMBEDDINGS].numpy()
    np.testing.assert_allclose(whole, (of_base[EMBEDDINGS] + of_a[EMBEDDINGS] + of_b[EMBEDDINGS]) / 3, atol=1e-6)
    pair = {"filter": "embed", "models": [a, b]}
    named = ws.merge("linear", [a, b], base, weight=1.0, compat="mergekit", rules=[pair])[EMBEDDINGS].numpy()
    np.testing.assert_allclose(named, (of_a[EMBEDDINGS] + of_b[EMBEDDINGS]) / 2, atol=1e-6)


def test_the_order_of_a_rules_models_is_the_methods(three):
    _, a, b = three
    rule = {"filter": "norm", "merge_method": "nuslerp", "models": [b, a], "parameters": {"weight": [0.0, 1.0]}}
    merged = ws.merge("linear", [a, b], weight=1.0, rules=[rule])
    np.testing.assert_allclose(
        merged["model.norm.weight"].numpy(), llama_tensors(1)["model.norm.weight"], rtol=1e-5, atol=1e-6
    )


def test_steps_have_rules_of_their_own_and_python_writes_the_recipe(three, tmp_path):
    base, a, b = three
    step = ws.merge("linear", [a, b], weight=1.0, rules=[{"filter": "norm", "merge_method": "karcher"}])
    merged = ws.merge(
        "task_arithmetic",
        [step, ws.open(b)],
        base,
        weight=0.5,
        rules=[{"filter": "lm_head", "merge_method": "passthrough", "models": [step]}],
    )
    again = ws.merge_recipe(merged.to_yaml())
    assert again.to_yaml() == merged.to_yaml()
    check(again, {name: merged[name].numpy() for name in merged})
    _, of_a, of_b = tensors()
    np.testing.assert_allclose(merged[HEAD].numpy(), (of_a[HEAD] + of_b[HEAD]) / 2, rtol=1e-5, atol=1e-6)


def test_python_and_yaml_and_flags_are_one_recipe(three, capsys):
    from weightsmith.cli.main import main

    base, a, b = three
    of_rules = [
        {"scope": {"names": "*norm*"}, "merge_method": "linear", "models": [{"model": a, "parameters": {"weight": 0.3}}, {"model": b, "parameters": {"weight": 0.7}}]},
        {"scope": {"names": "*embed*"}, "merge_method": "passthrough", "models": [{"model": a}]},
        {"scope": {"names": "lm_head.*"}, "parameters": {"density": 0.5}},
    ]  # fmt: skip
    python = ws.merge(
        "ties",
        [a, b],
        base,
        weight=1.0,
        density=0.4,
        rules=[
            {"scope": {"names": "*norm*"}, "merge_method": "linear", "parameters": {"weight": [0.3, 0.7]}},
            {"scope": {"names": "*embed*"}, "merge_method": "passthrough", "models": [a]},
            {"scope": {"names": "lm_head.*"}, "parameters": {"density": 0.5}},
        ],
    ).recipe
    flags = ["--method", "ties", "--base", base, "--model", a, "--model", b, "-p", "weight=1.0", "-p", "density=0.4"]
    for rule in ("*norm*=linear,weight=[0.3,0.7]", f"*embed*=passthrough,model={a}", "lm_head.*=density=0.5"):
        flags += ["--rule", rule]
    with pytest.raises(SystemExit) as end:
        main(["merge", *flags, "--print-recipe"])
    assert end.value.code == 0
    text = load_recipe(recipe("ties", [a, b], base, parameters={"weight": 1.0, "density": 0.4}, rules=of_rules))
    assert python == text
    assert load_recipe(capsys.readouterr().out) == text
    assert load_recipe(to_yaml(text)) == text


def test_an_output_says_which_methods_made_it_and_is_made_again(three, tmp_path, capsys):
    from weightsmith.cli.main import main

    base, a, b = three
    flags = ["--method", "ties", "--base", base, "--model", a, "--model", b, "-p", "weight=1", "-p", "density=0.5"]
    flags += ["--rule", "*norm*=linear", "--rule", f"*embed*=passthrough,model={b}"]
    codes = []
    for arguments in (["merge", *flags, "--quiet", "out"], ["reproduce", "out"], ["plan", *flags, "--json"]):
        full = [str(tmp_path / "out") if word == "out" else word for word in arguments]
        with pytest.raises(SystemExit) as end:
            main(full)
        codes.append(end.value.code)
    assert codes == [0, 0, 0]
    plan = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert plan["methods"] == {"ties": 5, "linear": 3, "passthrough": 1}
    by_name = {entry["name"]: entry for entry in plan["tensors"]}
    assert by_name[EMBEDDINGS]["method"] == "passthrough"
    assert [source["model"] for source in by_name[EMBEDDINGS]["inputs"]] == [b]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by `ties`, and for some tensors `linear`, `passthrough` from:" in card
    assert "\n\nThe method `ties`: Yadav et al." in card
    written = read_safetensors(tmp_path / "out")
    assert np.array_equal(written[EMBEDDINGS], llama_tensors(2)[EMBEDDINGS])


def test_what_is_missing_from_a_rules_models_is_anothers_to_give(write_model):
    extra = {"extra.weight": np.ones(3, np.float32)}
    a, b = str(write_model("a", llama_tensors(0))), str(write_model("b", llama_tensors(1) | extra))
    rules = [{"filter": "extra", "merge_method": "passthrough", "models": [a]}]
    with pytest.raises(PlanError, match=r"rules\[0\]: extra.weight is in b but not in a"):
        ws.merge("linear", [a, b], weight=1.0, rules=rules)
    first = ws.merge("linear", [a, b], weight=1.0, on_missing="first", rules=rules)
    assert np.array_equal(first["extra.weight"].numpy(), extra["extra.weight"])
    assert "extra.weight" not in ws.merge("linear", [a, b], weight=1.0, on_missing="skip", rules=rules)


def test_a_head_from_a_model_of_its_own_unties_the_config(write_model):
    config = {"model_type": "llama", "num_hidden_layers": 2}
    tied = {name: value for name, value in llama_tensors(0).items() if name != HEAD}
    a = str(write_model("a", tied, config | {"tie_word_embeddings": True}))
    b = str(write_model("b", llama_tensors(1), config | {"tie_word_embeddings": False}))

    def merged(model):
        rule = {"filter": "lm_head", "merge_method": "passthrough", "models": [model]}
        return ws.merge("linear", [a, b], weight=1.0, rules=[rule])

    for model, head in ((a, tied[EMBEDDINGS]), (b, llama_tensors(1)[HEAD])):
        result = merged(model)
        assert np.array_equal(result[HEAD].numpy(), head)
        assert result.config["tie_word_embeddings"] is False
    alone = ws.merge("linear", [a], weight=1.0, rules=[{"filter": "lm_head", "parameters": {"weight": 2}}])
    assert any("rules[0] (filter: lm_head) has no effect" in text for text in alone.warnings)


def test_a_quantised_model_may_be_passed_through_and_is_never_merged(write_model):
    config = {"model_type": "llama", "num_hidden_layers": 2}
    a, b = str(write_model("a", llama_tensors(0), config)), str(
        write_model("b", llama_tensors(1), config | {"quantization_config": {"quant_method": "gptq"}})
    )  # fmt: skip
    rules = [
        {"filter": "norm", "merge_method": "passthrough", "models": [b]},
        {"filter": "*", "merge_method": "passthrough", "models": [a]},
    ]
    merged = ws.merge("linear", [a, b], weight=1.0, rules=rules)
    assert np.array_equal(merged["model.norm.weight"].numpy(), llama_tensors(1)["model.norm.weight"])
    with pytest.raises(PlanError, match=r"b is quantised"):
        ws.merge("linear", [a, b], weight=1.0, rules=rules[:1])
    rules.insert(0, {"filter": "mlp", "merge_method": "karcher"})
    with pytest.raises(PlanError, match=r"rules\[0\]: .*b is quantised"):
        ws.merge("linear", [a, b], weight=1.0, rules=rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"filter": "norm", "merge_method": "liner"}, r"rules\[0\]: there is no method 'liner' \(did you mean 'linear'"),
        ({"filter": "norm", "parameters": {"densty": 1}}, r"rules\[0\].*no parameter 'densty' \(did you mean 'density'"),
        ({"filter": "norm", "merge_method": "linear", "parameters": {"density": 1}}, r"rules\[0\].*'linear' has no parameter 'density'"),
        ({"filter": "norm", "parameters": {"density": 2}}, r"rules\[0\]: density is 2; it must be in"),
        ({"filter": "norm", "merge_method": "slerp", "parameters": {"t": 0.5}}, r"rules\[0\]: method 'slerp' takes exactly 1 model.*2 are given"),
        ({"filter": "norm", "merge_method": "slerp", "models": ["A"]}, r"rules\[0\]: method 'slerp' needs the parameter 't' \(for model.layers.0.input_layernorm"),
        ({"filter": "norm", "merge_method": "passthrough"}, r"rules\[0\]: method 'passthrough' takes exactly 1"),
        ({"filter": "norm", "models": ["BASE"]}, r"rules\[0\]: method 'ties' takes at least 1 model.*0 are given"),
        ({"filter": "norm", "models": ["elsewhere"]}, r"rules\[0\].models: elsewhere is none of the models"),
        ({"filter": "norm", "models": ["A", "A"]}, r"rules\[0\]: a model is named twice"),
        ({"filter": "norm", "models": []}, r"rules\[0\].models is \[\]"),
        ({"merge_method": "linear"}, r"rules\[0\]: say with filter or scope"),
        ({"filter": "norm"}, r"rules\[0\]: the rule changes nothing"),
        ({"filter": "norm", "methd": "linear"}, r"rules\[0\]: unknown key 'methd'.*known are filter, scope, merge_method, models, parameters"),
        ({"filter": "norm", "models": [{"model": "A", "prefix": "x"}]}, r"rules\[0\].models\[0\]: unknown key 'prefix'.*known are model, parameters"),
        ({"filter": "norm", "models": [{"model": "A", "parameters": {"normalize": True}}]}, r"rules\[0\].models\[0\].parameters: normalize of method 'ties' is one value"),
        ({"filter": "norm", "parameters": {"weight": [1, 2, 3]}}, r"rules\[0\]: weight has 3 values for 2 models"),
        ({"scope": {"names": "*"}, "merge_method": "linear", "parameters": 3}, r"rules\[0\].parameters must be a mapping"),
        ({"filter": "norm", "merge_method": 5}, r"rules\[0\].merge_method must be a text"),
        ({"scope": {"layer": [0, 1]}, "merge_method": "linear"}, r"rules\[0\].scope: unknown key 'layer' \(did you mean 'layers'"),
        ("norm=linear", r"rules\[0\] must be a mapping"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_rule_is_said_with_its_place(three, rule, message):
    base, a, b = three
    if isinstance(rule, dict) and rule.get("models"):
        named = {"A": a, "BASE": base}
        models = [
            {**entry, "model": named[entry["model"]]} if isinstance(entry, dict) else named.get(entry, entry)
            for entry in rule["models"]
        ]
        rule = {**rule, "models": models}
    with pytest.raises(WeightsmithError, match=message) as caught:
        ws.merge("ties", [a, b], base, weight=1.0, density=0.5, rules=[rule])
    assert "\n" not in str(caught.value)


def test_a_parameter_is_one_that_some_method_of_the_merge_takes(three):
    base, a, _ = three
    rules = [{"filter": "norm", "merge_method": "linear"}]
    text = recipe("slerp", [a], base, parameters={"t": 0.5, "weight": 1}, rules=rules)
    assert ws.merge_recipe(text).plan().methods == {"slerp": 6, "linear": 3}
    with pytest.raises(MethodError, match=r"no parameter 'weight'"):
        ws.merge_recipe(recipe("slerp", [a], base, parameters={"t": 0.5, "weight": 1}))
    with pytest.raises(
        MethodError, match=r"parameters: no method of this merge has a parameter 'wieght' \(did you mean 'weight'\?\); slerp takes: t; linear takes: weight, normalize"
    ):  # fmt: skip
        ws.merge_recipe(recipe("slerp", [a], base, parameters={"t": 0.5, "wieght": 1}, rules=rules))
    document = yaml.safe_load(recipe("slerp", [a], base, rules=rules))
    document["models"][0]["parameters"] = {"t": 0.5}
    with pytest.raises(RecipeError, match=r"models\[0\].parameters: t of method 'slerp' is one value for all models"):
        ws.merge_recipe(yaml.safe_dump(document))


def test_parameters_under_a_base_that_a_rule_merges_as_a_model_have_an_effect(three):
    base, a, _ = three
    document = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": base, "parameters": {"weight": 3}}, {"model": a, "parameters": {"weight": 1}}],
    }
    assert any("is the base: parameters" in text for text in ws.merge_recipe(yaml.safe_dump(document)).warnings)
    document["rules"] = [{"filter": "norm", "merge_method": "linear"}]
    merged = ws.merge_recipe(yaml.safe_dump(document))
    assert not merged.warnings
    of_base, of_a, _ = tensors()
    name = "model.norm.weight"
    np.testing.assert_allclose(merged[name].numpy(), (3 * of_base[name] + of_a[name]) / 4, rtol=1e-5)


def test_a_scope_over_the_model_names_the_rule_that_lacks_one_value(three):
    base, a, _ = three
    rules = [{"filter": "proj", "parameters": {"density": [0.1, 0.9]}}]
    text = recipe("ties", [a], base, parameters={"weight": 1, "density": 0.5, "trim_scope": "model"}, rules=rules)
    with pytest.raises(PlanError, match=r"rules\[0\]: density differs between"):
        ws.merge_recipe(text)
