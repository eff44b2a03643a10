"""What a report is about: models, adapters on a base, recipes with steps, and merged folders with their inputs."""

from __future__ import annotations

import importlib
import json
import shutil

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.errors import CheckpointError, ReportError


@pytest.fixture
def family(write_model):
    base = llama_tensors(0, hidden=16, vocabulary=40)
    rng = np.random.default_rng(1)
    models = {
        label: {
            name: array + scale * rng.standard_normal(array.shape).astype(np.float32) for name, array in base.items()
        }
        for label, scale in (("x", 0.01), ("y", 0.03), ("z", 0.02))
    }
    models["base"] = base
    return {name: write_model(name, one) for name, one in models.items()}, models


def recipe(paths, method="task_arithmetic", more=""):
    return f"""merge_method: {method}
base_model: {paths["base"]}
models:
  - model: {paths["x"]}
    parameters: {{weight: 0.7}}
  - model: {paths["y"]}
    parameters: {{weight: [0.2, 0.4]}}
{more}"""


def test_labels_are_short_and_each_another(write_model, tmp_path):
    base = llama_tensors(0)
    paths = [write_model(name, base) for name in ("base", "a/model", "b/model")]
    found = ws.report(*paths[1:], base=paths[0])
    assert [one.label for one in found.models] == ["model", "model#2"]
    assert found.models[1].reference == str(paths[2])
    assert found.agreements.total[0].equal == 1


def test_opened_checkpoints_are_taken_as_they_are(family):
    paths, _ = family
    found = ws.report(ws.open(paths["x"]), base=ws.open(paths["base"]))
    assert found.changes == ws.report(paths["x"], base=paths["base"]).changes


def test_adapters_are_measured_on_their_base(family, tmp_path):
    paths, _ = family
    ws.extract(paths["x"], base=paths["base"], rank=4).save(tmp_path / "adapter")
    on_top = f"{paths['base']}+{tmp_path / 'adapter'}"
    found = ws.report(on_top, f"{paths['base']}+0.5*{tmp_path / 'adapter'}", base=paths["base"])
    whole, half = found.changes.total
    assert whole.delta_norm == pytest.approx(2 * half.delta_norm, rel=1e-5)
    assert found.agreements.total[0].cosine == pytest.approx(1, abs=1e-6)
    assert [one.computed for one in (found.base, *found.models)] == [False, True, True]
    assert found.spectra[0].ranks[-1] <= 4
    with pytest.raises(ReportError, match=r"adapter is an adapter, not a model: name it on its base, as BASE\+"):
        ws.report(tmp_path / "adapter", base=paths["base"])


def test_a_recipe_is_reported_on_before_it_is_run(family, tmp_path):
    paths, _ = family
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(paths, more="parameters: {lambda: 0.5}\ndtype: float32\n"))
    found = ws.report(file)
    assert (found.kind, found.base.label, [one.label for one in found.models]) == ("recipe", "base", ["x", "y"])
    assert found.changes == ws.report(paths["x"], paths["y"], base=paths["base"]).changes
    facts = found.recipe
    assert (facts.method, facts.dtype, dict(facts.parameters)) == ("task_arithmetic", "float32", {"lambda": "0.5"})
    assert [(one.model, dict(one.parameters)) for one in facts.inputs] == [
        ("x", {"weight": "0.7"}),
        ("y", {"weight": "[0.2, 0.4]"}),
    ]
    assert ws.report(ws.load_recipe(file)).changes == found.changes


def test_steps_of_a_recipe_are_inputs_as_they_will_be(family):
    paths, models = family
    text = f"""merge_method: task_arithmetic
base_model: {paths["base"]}
models: [{{model: half, parameters: {{weight: 1}}}}, {{model: {paths["z"]}, parameters: {{weight: 1}}}}]
steps:
  half:
    merge_method: ties
    base_model: {paths["base"]}
    models: [{{model: {paths["x"]}}}, {{model: {paths["y"]}}}]
    parameters: {{weight: 1, density: 0.5}}
"""
    found = ws.report(ws.load_recipe(text))
    assert [(one.label, one.computed) for one in found.models] == [("half", True), ("z", False)]
    assert found.recipe.steps == ("half",)
    merged = ws.merge("ties", [paths["x"], paths["y"]], base=paths["base"], weight=1, density=0.5)
    for row in found.changes.tensors:
        if row.model == "half":
            delta = merged[row.scope.tensor].numpy() - models["base"][row.scope.tensor]
            assert row.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)


def test_a_merged_folder_tells_how_much_of_each_input_is_in_it(family, tmp_path):
    paths, models = family
    ws.merge_recipe(recipe(paths)).save(tmp_path / "out")
    found = ws.report(tmp_path / "out")
    assert (found.kind, found.result.label, found.recipe.method) == ("merged", "out", "task_arithmetic")
    # Weights run from 0.2 to 0.4 over the layers, outside them the first holds; and float32 rounds the result.
    assert [row.coefficients for row in found.composition.layers] == [
        pytest.approx((0.7, weight), abs=1e-4) for weight in (0.2, 0.2, 0.4, 0.2)
    ]
    for row in found.composition.tensors:
        names = [row.scope.tensor]
        base, x, y = (
            np.concatenate([models[m][n].ravel() for n in names]).astype(np.float64) for m in ("base", "x", "y")
        )
        out = np.concatenate([ws.open(tmp_path / "out")[n].numpy().ravel() for n in names]) - base
        design = np.array([x - base, y - base]).T
        expected = np.linalg.lstsq(design, out, rcond=None)[0]
        assert row.coefficients == pytest.approx(expected, abs=1e-5)
        assert row.cosines == pytest.approx(
            [out @ tau / np.linalg.norm(out) / np.linalg.norm(tau) for tau in design.T], abs=1e-6
        )
        assert row.r_squared == pytest.approx(1 - np.sum((out - design @ expected) ** 2) / np.sum(out**2), abs=1e-6)
        assert sum(row.contributions) == pytest.approx(row.r_squared, abs=1e-6)
        assert row.delta_norm == pytest.approx(np.linalg.norm(out), rel=1e-5)
    assert found.merged.files == {"model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size}
    assert {one.state for one in found.merged.inputs} == {"same"}
    # The result elects no sign, and is compared with the base as the others are.
    assert {row.model for row in found.changes.total} == {"x", "y", "out"}
    assert [(row.first, row.second) for row in found.agreements.total] == [("x", "y")]


def test_the_same_input_twice_takes_equal_shares(family, tmp_path):
    paths, _ = family
    copy = shutil.copytree(paths["x"], tmp_path / "copy")
    ws.merge("task_arithmetic", [paths["x"], copy], base=paths["base"], weight=[0.9, 0.1]).save(tmp_path / "out")
    (row,) = ws.report(tmp_path / "out").composition.total
    assert row.coefficients == pytest.approx((0.5, 0.5), abs=1e-4)
    assert row.r_squared == pytest.approx(1, abs=1e-5)


def test_a_single_file_is_a_merge_as_well(family, tmp_path):
    paths, _ = family
    ws.merge("task_arithmetic", [paths["x"]], base=paths["base"], weight=0.5).save(tmp_path / "out.safetensors")
    found = ws.report(tmp_path / "out.safetensors")
    assert found.kind == "merged"
    assert found.composition.total[0].coefficients == pytest.approx((0.5,), abs=1e-4)


def test_inputs_that_are_gone_or_changed_are_told_of(family, tmp_path):
    paths, _ = family
    ws.merge_recipe(recipe(paths)).save(tmp_path / "out")
    shutil.rmtree(paths["y"])
    (paths["x"] / "model.safetensors").touch()
    found = ws.report(tmp_path / "out")
    assert [one.label for one in found.models] == ["x"]
    assert any("y cannot be opened any more" in note for note in found.notes)
    assert any("x/model.safetensors was changed since" in note for note in found.notes)
    states = {one.path.split("/")[-2]: one.state for one in found.merged.inputs}
    assert states == {"base": "same", "x": "changed", "y": "missing"}
    shutil.rmtree(paths["base"])
    alone = ws.report(tmp_path / "out")
    assert (alone.base.label, alone.models, alone.result) == ("out", (), None)


def test_a_folder_that_is_gone_is_not_looked_for_on_a_hub(family, tmp_path, monkeypatch):
    """``org/model`` is a hub's way to name models, and a folder's that was named from the one above."""
    paths, _ = family
    monkeypatch.chdir(tmp_path)
    for name in "bxy":
        shutil.copytree(paths.get(name, paths["base"]), tmp_path / "models" / name)
    ws.merge_recipe(
        """
steps:
  mean: {merge_method: linear, models: [{model: models/x}, {model: models/y}], parameters: {weight: 1}}
merge_method: task_arithmetic
base_model: models/b
models: [{model: mean}, {model: models/x}]
parameters: {weight: 0.5}
"""
    ).save(tmp_path / "out")

    def resolve(model, revision):
        raise AssertionError(f"{model} was looked for on a hub")

    monkeypatch.setattr("weightsmith.checkpoint.resolve", resolve)
    shutil.rmtree(tmp_path / "models" / "y")
    found = ws.report("out")
    assert [one.label for one in found.models] == ["x"]
    assert any(note.startswith("mean cannot be opened any more") for note in found.notes)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    alone = ws.report("../out")
    assert alone.models == ()
    assert any(
        "there is no models/b/model.safetensors here; run the report in the folder that the merge was run in" in note
        for note in alone.notes
    )


def test_layers_put_together_anew_are_not_taken_apart_by_number(family, tmp_path):
    paths, _ = family
    text = f"""merge_method: passthrough
slices:
  - sources: [{{model: {paths["x"]}, layer_range: [1, 2]}}]
  - sources: [{{model: {paths["y"]}, layer_range: [0, 1]}}]
"""
    ws.merge_recipe(text).save(tmp_path / "out")
    found = ws.report(tmp_path / "out")
    assert found.composition.total == ()
    assert any("puts layers together anew" in note for note in found.notes)


@pytest.mark.parametrize(
    ("sources", "base", "message"),
    [
        ([], None, "name what the report is to be about"),
        (["recipe.yaml", "x"], None, "name the recipe alone"),
        (["x", "recipe.yaml"], None, "name the recipe alone"),
        (["recipe.yaml"], "base", "a recipe names its base itself"),
    ],
)
def test_what_cannot_be_reported_on_is_refused(family, tmp_path, sources, base, message):
    paths, _ = family
    (tmp_path / "recipe.yaml").write_text(recipe(paths))
    with pytest.raises(ReportError, match=message):
        ws.report(*[tmp_path / one for one in sources], base=base)


def test_a_model_that_is_not_there_is_named(family, tmp_path):
    paths, _ = family
    with pytest.raises(CheckpointError, match="nowhere"):
        ws.report(tmp_path / "nowhere", base=paths["base"])


def test_vocabularies_are_compared_token_by_token(family):
    paths, _ = family

    def tokenizer(label, *tokens):
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (paths[label] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))

    tokenizer("base", "a", "b", "c")
    tokenizer("x", "a", "b", "c")
    tokenizer("y", "a", "c", "b", "d")
    (paths["z"] / "tokenizer.json").write_text("{}")
    found = ws.report(paths["x"], paths["y"], paths["z"], base=paths["base"])
    x, y, z = found.models
    assert x.vocabulary == found.base.vocabulary
    assert (y.vocabulary.size, z.vocabulary) == (4, None)
    (row,) = found.health.tokens
    assert (row.model, row.added, row.removed, row.moved, row.examples) == ("y", 1, 0, 2, ("d", "c", "b"))
    assert any("tokens of z are not known" in note for note in found.notes)


def test_a_model_of_nothing_but_nan_has_the_tensors_of_the_base(family, write_model):
    paths, models = family
    nan = write_model("nan", {name: np.full_like(array, np.nan) for name, array in models["base"].items()})
    for found in (ws.report(nan, base=paths["base"]), ws.report(paths["x"], base=nan)):
        codes = [one.code for one in found.findings]
        assert "nonfinite" in codes
        assert "incomparable" not in codes


def test_a_recipe_that_merges_by_tokens_is_not_told_to(family, tmp_path):
    paths, _ = family
    for label, tokens in (("base", "abc"), ("x", "abc"), ("y", "acbd")):
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}}
        (paths[label] / "tokenizer.json").write_text(json.dumps(tokenizer))
        (paths[label] / "tokenizer_config.json").write_text("{}")
    by_number, by_tokens = tmp_path / "number.yaml", tmp_path / "tokens.yaml"
    by_number.write_text(recipe(paths))
    by_tokens.write_text(recipe(paths, more="tokenizer: {source: union}\n"))
    found = {one.code: one for one in ws.report(by_number).findings}
    assert (found["vocabulary"].level, "tokenizer: {source: union}" in found["vocabulary"].action) == ("warning", True)
    found = {one.code: one for one in ws.report(by_tokens).findings}
    assert (found["vocabulary"].level, found["vocabulary"].action) == ("note", "")
    # The result has another vocabulary than the base as well, and is no input.
    ws.merge_recipe(by_tokens).save(tmp_path / "out")
    merged = ws.report(tmp_path / "out")
    assert {row.model for row in merged.health.tokens} == {"y", "out"}
    assert [one.models for one in merged.findings if one.code == "vocabulary"] == [("y",)]


def test_packages_that_are_functions_stay_so_when_they_are_imported(family):
    for module in ("weightsmith.plan.compile", "weightsmith.report.create"):
        importlib.import_module(module)
    paths, _ = family
    assert ws.plan(recipe(paths)).tasks
    assert ws.report(paths["x"], base=paths["base"]).models
    assert ws.report.findings.FORMAT == 1
