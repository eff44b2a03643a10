"""Fisher checkpoints: the importances of weights, given beside the models, checked from headers and handed to methods."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.errors import MethodError, PlanError, RecipeError, WeightsmithError
from weightsmith.methods import registry

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(autouse=True)
def methods():
    """Two methods for these tests: the mean by importance, and one that takes what importances there are."""

    @ws.method("by_importance", fisher="required")
    def by_importance(block, *, weight: ws.PerModel[float] = 1.0):
        """Return sum w F x / sum w F."""
        total = sum(w * fisher for w, fisher in zip(weight, block.fishers, strict=True))
        return sum(w * f * x for w, f, x in zip(weight, block.fishers, block.models, strict=True)) / total

    @ws.method("toward", base="required", maximum=1, fisher="optional")
    def toward(block, *, share: float = 0.5):
        """Move to the model where it, or the base, matters."""
        own = block.fishers[0] if block.fishers and block.fishers[0] is not None else 1
        other = 1 if block.base_fisher is None else block.base_fisher
        return (share * own * block.models[0] + (1 - share) * other * block.base) / (share * own + (1 - share) * other)

    yield
    for name in ("by_importance", "toward"):
        del registry._METHODS[name]


def importances(seed, **more):
    return {name: np.abs(value) + np.float32(0.1) for name, value in llama_tensors(seed + 100, **more).items()}


@pytest.fixture
def given(write_model, tmp_path):
    """Models base, a, b, with Fisher checkpoints fbase, fa, fb that are bare files."""
    for i, name in enumerate(("base", "a", "b")):
        write_model(name, llama_tensors(i))
        write_safetensors(tmp_path / f"f{name}.safetensors", importances(i))
    names = {name: str(tmp_path / name) for name in ("base", "a", "b")}
    return names | {f"f{name}": str(tmp_path / f"f{name}.safetensors") for name in ("base", "a", "b")}


def wide(seed, of=llama_tensors):
    return {name: value.astype(np.float64) for name, value in of(seed).items()}


def mean(models, fishers, weights=(1, 1)):
    total = sum(w * f for w, f in zip(weights, fishers, strict=True))
    return sum(w * f * x for w, f, x in zip(weights, fishers, models, strict=True)) / total


def test_every_weight_is_merged_by_its_importance(given, tmp_path):
    merged = ws.merge("by_importance", [given["a"], given["b"]], fisher=[given["fa"], given["fb"]], weight=[1, 3])
    merged.save(tmp_path / "out", threads=2)
    found = read_safetensors(tmp_path / "out")
    a, b, fa, fb = wide(1), wide(2), wide(1, importances), wide(2, importances)
    for name in a:
        expected = mean([a[name], b[name]], [fa[name], fb[name]], (1, 3))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    entry = merged.plan().to_json(1)["tensors"][0]
    assert [source["model"] for source in entry["inputs"]] == [given[name] for name in ("a", "b", "fa", "fb")]
    manifest = json.loads((tmp_path / "out" / "weightsmith.json").read_text())
    assert given["fb"] in json.dumps(manifest["inputs"])
    assert ws.reproduce(tmp_path / "out").ok


@pytest.mark.parametrize("of_base", [False, True])
@pytest.mark.parametrize("of_model", [False, True])
def test_what_is_optional_may_be_left_out(given, of_base, of_model):
    merged = ws.merge(
        "toward",
        [given["a"]],
        given["base"],
        share=0.3,
        fisher=[given["fa"]] if of_model else None,
        base_fisher=given["fbase"] if of_base else None,
    )
    base, a, fbase, fa = wide(0), wide(1), wide(0, importances), wide(1, importances)
    for name in base:
        own, other = 0.3 * fa[name] if of_model else 0.3, 0.7 * fbase[name] if of_base else 0.7
        expected = (own * a[name] + other * base[name]) / (own + other)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_python_and_yaml_and_flags_are_one_recipe(given, tmp_path, capsys):
    from weightsmith.cli.main import main

    python = ws.merge(
        "toward", [ws.open(given["a"])], given["base"], fisher=[ws.open(given["fa"])], base_fisher=given["fbase"]
    )
    document = {
        "merge_method": "toward",
        "base_model": given["base"],
        "base_fisher": {"model": {"path": given["fbase"]}},
        "models": [{"model": given["a"], "fisher": given["fa"]}],
    }
    assert python.recipe == ws.merge_recipe(yaml.safe_dump(document)).recipe
    with pytest.raises(SystemExit) as end:
        main(["merge", "--method", "toward", "--base", given["base"], "--model", given["a"], "--fisher", f"{given['a']}={given['fa']}", "--base-fisher", given["fbase"], "--print-recipe"])  # fmt: skip
    assert end.value.code == 0
    assert ws.load_recipe(capsys.readouterr().out) == python.recipe
    assert ws.merge_recipe(python.to_yaml()).recipe == python.recipe


def test_slices_and_modules_look_importances_up_under_the_names_of_each_model(write_model, tmp_path):
    """Layer 1 of a goes with layer 0 of b, and so do their importances."""
    a, b = (str(write_model(name, llama_tensors(i))) for i, name in enumerate("ab"))
    fa, fb = (str(tmp_path / f"f{name}.safetensors") for name in "ab")
    for i, file in enumerate((fa, fb)):
        write_safetensors(Path(file), importances(i))
    sources = [{"model": a, "fisher": fa, "layer_range": [1, 2]}, {"model": b, "fisher": fb, "layer_range": [0, 1]}]
    merged = ws.merge_recipe(yaml.safe_dump({"merge_method": "by_importance", "slices": [{"sources": sources}]}))
    suffix = "self_attn.q_proj.weight"
    one, other = f"model.layers.1.{suffix}", f"model.layers.0.{suffix}"
    expected = mean(
        [wide(0)[one], wide(1)[other]], [wide(0, importances)[one], wide(1, importances)[other]]
    )  # fmt: skip
    np.testing.assert_allclose(merged[other].numpy(), expected, rtol=1e-5, atol=1e-6)

    tower = {f"visual.{name}": value for name, value in llama_tensors(2).items()}
    whole = str(write_model("whole", tower | {"other.weight": np.ones(2, np.float32)}))
    fwhole = str(tmp_path / "fwhole.safetensors")
    write_safetensors(Path(fwhole), {f"visual.{name}": value for name, value in importances(2).items()})
    modules = {"visual": {"models": [{"model": whole, "fisher": fwhole}, {"model": a, "fisher": fa, "prefix": ""}]}}
    merged = ws.merge_recipe(
        yaml.safe_dump({"merge_method": "by_importance", "base_model": whole, "modules": modules})
    )  # fmt: skip
    expected = mean([wide(2)[NORM], wide(0)[NORM]], [wide(2, importances)[NORM], wide(0, importances)[NORM]])
    np.testing.assert_allclose(merged[f"visual.{NORM}"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(merged["other.weight"].numpy(), np.ones(2))


def test_rules_hand_importances_to_the_methods_that_take_them(given):
    rules = [{"filter": "norm", "merge_method": "by_importance"}]
    merged = ws.merge(
        "linear", [given["a"], given["b"]], weight=1.0, fisher=[given["fa"], given["fb"]], rules=rules
    )  # fmt: skip
    a, b, fa, fb = wide(1), wide(2), wide(1, importances), wide(2, importances)
    for name in a:
        expected = mean([a[name], b[name]], [fa[name], fb[name]]) if "norm" in name else (a[name] + b[name]) / 2
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    # A base whose method has no use for a base is a model like any other, with its own importances.
    rule = {"filter": "norm", "merge_method": "by_importance", "models": [given["base"], given["a"]]}
    merged = ws.merge(
        "slerp", [given["a"]], given["base"], t=0.5, fisher=[given["fa"]], base_fisher=given["fbase"], rules=[rule]
    )
    expected = mean([wide(0)[NORM], a[NORM]], [wide(0, importances)[NORM], fa[NORM]])
    np.testing.assert_allclose(merged[NORM].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_importances_may_be_the_result_of_a_step(given):
    fisher = ws.merge("linear", [given["fa"], given["fb"]], weight=1.0)
    merged = ws.merge("toward", [given["a"]], given["base"], fisher=[fisher])
    base, a = wide(0), wide(1)
    weight = (wide(1, importances)[HEAD] + wide(2, importances)[HEAD]) / 2
    expected = (0.5 * weight * a[HEAD] + 0.5 * base[HEAD]) / (0.5 * weight + 0.5)
    np.testing.assert_allclose(merged[HEAD].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(ws.merge_recipe(merged.to_yaml())[HEAD].numpy(), merged[HEAD].numpy())
    circle = "steps: {s: {merge_method: linear, models: [{model: a, fisher: s}]}}\nmerge_method: linear\nmodels: [{model: s}]\n"  # fmt: skip
    with pytest.raises(RecipeError, match="the steps go in a circle: s -> s"):
        ws.load_recipe(circle)


def test_tied_heads_take_the_importances_of_their_embeddings(write_model, tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 2}
    tied = {name: value for name, value in llama_tensors(0).items() if name != HEAD}
    a = str(write_model("a", tied, config | {"tie_word_embeddings": True}))
    b = str(write_model("b", llama_tensors(1), config | {"tie_word_embeddings": False}))
    fa = importances(0)
    write_safetensors(tmp_path / "fa.safetensors", {name: value for name, value in fa.items() if name != HEAD})
    write_safetensors(tmp_path / "fb.safetensors", importances(1))
    merged = ws.merge(
        "by_importance", [a, b], fisher=[tmp_path / "fa.safetensors", tmp_path / "fb.safetensors"]
    )  # fmt: skip
    expected = mean([tied[EMBEDDINGS].astype(np.float64), wide(1)[HEAD]], [fa[EMBEDDINGS], importances(1)[HEAD]])
    np.testing.assert_allclose(merged[HEAD].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("choice", "rows"), [("pad", 20), ("crop", 16)])
def test_importances_are_made_longer_or_shorter_with_their_weights(write_model, tmp_path, choice, rows):
    sizes = (16, 20)
    folders, fishers = [], []
    for i, size in enumerate(sizes):
        folders.append(str(write_model("ab"[i], llama_tensors(i, vocabulary=size))))
        fishers.append(str(tmp_path / f"f{i}.safetensors"))
        write_safetensors(tmp_path / f"f{i}.safetensors", importances(i, vocabulary=size))
    merged = ws.merge("by_importance", folders, fisher=fishers, on_shape_mismatch=choice)[HEAD].numpy()
    assert merged.shape == (rows, 8)
    models, given = ([of(i, vocabulary=size)[HEAD] for i, size in enumerate(sizes)] for of in (llama_tensors, importances))  # fmt: skip
    expected = mean([m[:16].astype(np.float64) for m in models], [f[:16] for f in given])
    np.testing.assert_allclose(merged[:16], expected, rtol=1e-5, atol=1e-6)
    # What a model lacks has no importance: the other model's rows come out whole.
    np.testing.assert_allclose(merged[16:], models[1][16:rows], rtol=1e-6)


def test_masks_do_not_depend_on_fisher_checkpoints_of_the_same_name(write_model, tmp_path, given):
    """Random masks depend on the models' short names, which two of one name share out in the order they are opened."""

    @ws.method("drawn", fisher="optional", random=True)
    def drawn(block):
        return block.models[0] * (block.draw(0) < 0.5) + block.models[1] * (block.draw(1) < 0.5)

    try:
        names = [str(write_model(f"{kind}/x", llama_tensors(i))) for i, kind in enumerate(("one", "two"))]
        fisher = write_model("three/x", importances(0))
        with_fisher = ws.merge("drawn", names, fisher=[fisher, None])
        assert np.array_equal(with_fisher[HEAD].numpy(), ws.merge("drawn", names)[HEAD].numpy())
    finally:
        del registry._METHODS["drawn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, r"fa.safetensors, the Fisher checkpoint of .*/a, has no tensor model.norm.weight; a Fisher checkpoint holds for each weight"),
        ({NORM: None, HEAD: None}, r"has no tensor lm_head.weight \(and 1 more tensors are like that\)"),
        ({NORM: np.ones(9, np.float32)}, r"has model.norm.weight as \[9\], and the weight is \[8\]"),
        ({NORM: np.ones(8, np.int32)}, r"has model.norm.weight as int32, not as floats"),
    ],
)  # fmt: skip
def test_a_fisher_checkpoint_that_does_not_fit_is_refused_before_a_weight_is_read(given, tmp_path, changes, message):
    kept = {name: value for name, value in (importances(1) | changes).items() if value is not None}
    write_safetensors(tmp_path / "fa.safetensors", kept)
    with pytest.raises(PlanError, match=message):
        ws.merge("by_importance", [given["a"], given["b"]], fisher=[given["fa"], given["fb"]])
    rules = [{"filter": "*", "merge_method": "by_importance"}]
    with pytest.raises(PlanError, match=r"^rules\[0\]: .*fa.safetensors"):
        ws.merge("linear", [given["a"], given["b"]], weight=1, fisher=[given["fa"], given["fb"]], rules=rules)


def test_what_is_required_and_missing_is_asked_for(given):
    with pytest.raises(PlanError, match=r"method 'by_importance' needs a Fisher checkpoint of every model, and .*/b has none: give it as fisher under the model"):  # fmt: skip
        ws.merge("by_importance", [given["a"], given["b"]], fisher=[given["fa"], None])
    with pytest.raises(PlanError, match=r"rules\[0\]: method 'by_importance' needs"):
        ws.merge("linear", [given["a"]], weight=1, rules=[{"filter": "norm", "merge_method": "by_importance"}])


def test_what_has_no_effect_is_refused(given):
    a, fa, base, fbase = (given[name] for name in ("a", "fa", "base", "fbase"))
    with pytest.raises(MethodError, match=r"fa.safetensors is given as the Fisher checkpoint of .*/a, and 'linear' has no use for one: take it away, or merge by a method that has: .*by_importance"):  # fmt: skip
        ws.merge("linear", [a], weight=1, fisher=[fa])
    with pytest.raises(MethodError, match="takes part in no tensor whose method has a use for one"):
        ws.merge("by_importance", [a], base, fisher=[fa], base_fisher=fbase)
    document = {
        "merge_method": "toward",
        "base_model": base,
        "models": [{"model": base, "fisher": fbase}, {"model": a}],
    }
    with pytest.raises(MethodError, match=r"which is the base: give it as base_fisher"):
        ws.merge_recipe(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_fisher": "f"}, "base_fisher needs the base_model"),
        ({"models": None, "slices": [{"base_fisher": "f", "sources": [{"model": "a", "layer_range": [0, 1]}]}]}, r"slices\[0\].*base_fisher is for the slice's own base_model"),
        ({"models": [{"model": "a", "fishr": "f"}]}, r"unknown key 'fishr' \(did you mean 'fisher'"),
        ({"models": [{"model": "a", "fisher": 3}]}, r"models\[0\].fisher must be a text"),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense_are_refused(change, message):
    document = {"merge_method": "linear", "models": [{"model": "a"}], **change}
    with pytest.raises(RecipeError, match=message):
        ws.load_recipe(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))


def test_counts_and_flags_that_do_not_fit_are_refused(given, capsys):
    from weightsmith.cli.main import main

    with pytest.raises(WeightsmithError, match="fisher has 1 entries for 2 models"):
        ws.merge("by_importance", [given["a"], given["b"]], fisher=[given["fa"]])
    for text in (given["fa"], f"{given['b']}={given['fb']}", f"{given['a']}="):
        with pytest.raises(SystemExit) as end:
            main(["plan", "--method", "by_importance", "--model", given["a"], "--fisher", text])
        assert end.value.code == 2
        assert "write MODEL=CHECKPOINT" in capsys.readouterr().err


def test_a_slice_with_a_base_of_its_own_has_its_fisher_and_names_its_files(given):
    source = {"model": given["a"], "layer_range": [0, 2]}
    document = {
        "merge_method": "toward",
        "base_model": given["b"],
        "base_fisher": given["fb"],
        "slices": [{"base_model": given["base"], "base_fisher": given["fbase"], "sources": [source]}],
    }
    with pytest.raises(MethodError, match="fb.safetensors is given as the Fisher checkpoint of a model that takes part in no"):  # fmt: skip
        ws.merge_recipe(yaml.safe_dump(document))
    del document["base_fisher"]
    merged = ws.merge_recipe(yaml.safe_dump(document))
    base, a, fbase = wide(0), wide(1), wide(0, importances)
    expected = (a[HEAD] + fbase[HEAD] * base[HEAD]) / (1 + fbase[HEAD])
    np.testing.assert_allclose(merged[HEAD].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert {identity.path for identity in merged.identities} >= {given["base"] + "/model.safetensors", given["fbase"]}
