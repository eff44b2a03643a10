import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import read_safetensors, write_safetensors
from tests.report.example import example_report
from tests.report.families import mixed, trained, tuned
from tests.report.plain import measured
from weightsmith.api import merge_recipe
from weightsmith.recipe.load import load_recipe
from weightsmith.report.advice import MOST, advice, with_conclusions
from weightsmith.report.findings import RecipeFacts, Report, Spectrum

QUERIES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)]


@pytest.fixture(scope="module")
def base():
    return trained(0)


def _advice(base, models, **given):
    found = advice(measured(base, models, **given))
    assert all(one.figures for one in found)
    assert all(math.isfinite(figure.value) for one in found for figure in one.figures)
    return {one.code: one for one in found}


def _weights(found):
    return [model.parameters["weight"] for model in load_recipe(found.action).models]


def _sum_norm(base, models, weights):
    return math.sqrt(
        sum(
            np.linalg.norm(sum(w * (m[name].astype("f8") - base[name]) for w, m in zip(weights, models, strict=True)))
            ** 2
            for name in base
        )
    )


def test_independent_fine_tunes_are_summed_at_the_strength_of_one(base):
    models = {str(seed): tuned(base, seed) for seed in range(4)}
    found = _advice(base, models)
    assert list(found) == ["orthogonal"]
    weights = _weights(found["orthogonal"])
    one = _sum_norm(base, [models["0"]], [1.0])
    assert _sum_norm(base, models.values(), weights) == pytest.approx(one, rel=0.03)


def test_fine_tunes_that_agree_are_averaged(base):
    common = tuned(base, 9)
    models = {label: tuned(common, seed, size=0.03) for seed, label in enumerate("abc")}
    found = _advice(base, models)
    assert found["aligned"].level == "warning"
    assert load_recipe(found["aligned"].action).merge_method == "linear"
    ratio = _sum_norm(base, models.values(), [1, 1, 1]) / _sum_norm(base, [models["a"]], [1])
    assert found["aligned"].figures[1].value == pytest.approx(ratio, rel=0.03)
    assert "relative" in found["aligned"].text
    # As much of each model's change is common as that it looks like another base.
    assert "orthogonal" not in found


def test_models_that_undo_each_other_are_told(base):
    a = tuned(base, 1)
    found = _advice(base, {"a": a, "b": mixed(base, [(a, -0.5), (tuned(base, 2), 0.7)])})
    assert found["opposed"].models == ("a", "b")
    assert found["opposed"].figures[0].value == pytest.approx(-0.5 / math.hypot(0.5, 0.7), abs=0.02)
    assert found["conflict"].figures[0].value > found["conflict"].figures[1].value + 0.03


def test_many_models_conflict_by_number_alone(base):
    found = _advice(base, {str(seed): tuned(base, seed) for seed in range(8)})
    share, chance = (one.value for one in found["conflict"].figures)
    assert chance == pytest.approx((1 - 1 / math.sqrt(8)) / 2, abs=1e-3)
    assert share == pytest.approx(chance, abs=0.01)
    assert "so many" in found["conflict"].text


def test_a_model_that_moved_further_is_given_less_weight(base):
    models = {"a": tuned(base, 1, size=0.01), "b": tuned(base, 2, size=0.01), "loud": tuned(base, 3, size=0.05)}
    found = _advice(base, models)
    assert found["norms"].models == ("loud",)
    assert found["norms"].figures[0].value == pytest.approx(5, rel=0.02)
    assert _weights(found["norms"]) == pytest.approx([1.0, 1.0, 0.2], abs=0.03)
    # Which weights to take is said once.
    assert not found["orthogonal"].action


def test_layers_with_more_conflict_than_others_are_named_with_a_rule(base, tmp_path):
    models = {label: tuned(base, seed) for seed, label in enumerate("ab")}
    other = mixed(base, [(models["a"], -1.0)])
    models["b"] |= {name: array for name, array in other.items() if name.startswith("model.layers.3.")}
    report = measured(base, models)
    found = {one.code: one for one in advice(report)}
    assert found["layers"].scope.layer == "model.layers.3"
    assert found["layers"].figures[0].value == pytest.approx(0.5, abs=1e-6)
    result = _run(found["layers"].action, base, models, tmp_path)
    for name, part in (("model.layers.3.mlp.up_proj.weight", 0.25), ("model.layers.2.mlp.up_proj.weight", 0.5)):
        expected = base[name] + part * sum(models[label][name] - base[name] for label in "ab")
        np.testing.assert_allclose(result[name], expected, atol=1e-6)


def _run(recipe, base, models, folder):
    for label, tensors in {"base": base, **models}.items():
        write_safetensors(folder / f"{label}.safetensors", tensors)
    recipe = re.sub(r"models/(\w+)", lambda found: f"{folder}/{found[1]}.safetensors", recipe)
    merge_recipe(recipe).save(folder / "merged.safetensors")
    return read_safetensors(folder / "merged.safetensors")


def test_the_same_entries_changed_most_are_told(base):
    # Movement in the same few places, with signs of their own.
    draw = np.random.default_rng(0)
    places = {name: draw.random(array.shape) < 0.05 for name, array in base.items()}

    def sparse(seed):
        noise = np.random.default_rng(seed)
        return {
            name: (array + 0.02 * noise.standard_normal(array.shape) * np.where(places[name], 1.0, 0.05)).astype("f4")
            for name, array in base.items()
        }

    found = _advice(base, {"a": sparse(1), "b": sparse(2)})
    assert found["same-entries"].figures[0].value > 0.5
    assert "orthogonal" in found


def test_embeddings_that_moved_most_are_taken_from_one_model(base, tmp_path):
    models = {label: tuned(base, seed, size=0.02) for seed, label in enumerate("ab")}
    models["b"]["model.embed_tokens.weight"] = tuned(base, 8, size=0.3)["model.embed_tokens.weight"]
    found = _advice(base, models)
    assert found["tables"].models == ("b",)
    assert found["tables"].scope.component == "embedding"
    result = _run(found["tables"].action, base, models, tmp_path)
    np.testing.assert_array_equal(result["model.embed_tokens.weight"], models["b"]["model.embed_tokens.weight"])


def test_frozen_parts_are_told(base):
    found = _advice(base, {"a": tuned(base, 1, only="mlp"), "b": tuned(base, 2)})
    assert found["frozen"].models == ("a",)
    assert "mlp_up and mlp_down" in found["frozen"].text
    assert "as they were" in found["frozen"].text
    changed, still = (one.value for one in found["frozen"].figures)
    mlp = sum(array.size for name, array in base.items() if "mlp" in name)
    assert changed == 8
    assert still == pytest.approx(1 - mlp / sum(array.size for array in base.values()))


def test_changes_of_low_rank_are_to_be_extracted(base):
    found = _advice(base, {"a": tuned(base, 1, rank=4), "b": tuned(base, 2)}, spectra=QUERIES)
    assert found["low-rank"].models == ("a",)
    assert found["low-rank"].figures[0].value in (3, 4)
    assert re.fullmatch(r"weightsmith extract models/a models/base a-lora --rank [34]", found["low-rank"].action)


def test_what_is_an_adapter_already_is_not_to_be_extracted(base):
    report = measured(base, {"a": tuned(base, 1, rank=4)}, spectra=QUERIES)
    adapted = tuple(dataclasses.replace(one, computed=True) for one in report.models)
    assert advice(dataclasses.replace(report, models=adapted)) == ()


def test_spectra_that_are_not_known_far_enough_say_nothing(base):
    report = measured(base, {"a": tuned(base, 1, rank=4)}, spectra=QUERIES)
    unknown = tuple(dataclasses.replace(one, ranks=(None, None, None)) for one in report.spectra)
    assert all(isinstance(one, Spectrum) for one in unknown)
    assert advice(dataclasses.replace(report, spectra=unknown)) == ()


@pytest.mark.parametrize(
    ("method", "weight", "parameters", "ratio"),
    [
        ("task_arithmetic", "1.5", {}, 1.5 * math.sqrt(3)),
        ("task_arithmetic", "1.0", {"lambda": "0.2"}, 0.2 * math.sqrt(3)),
        ("linear", "1.0", {}, None),
        ("task_arithmetic", "[0.2, 1.5]", {}, None),
        ("ties", "5.0", {}, None),
    ],
)
def test_the_strength_of_a_recipe_is_foreseen(base, method, weight, parameters, ratio):
    models = {label: tuned(base, seed) for seed, label in enumerate("abc")}
    recipe = (method, {label: {"weight": weight} for label in models}, parameters)
    found = _advice(base, models, kind="recipe", recipe=recipe)
    if ratio is None:
        assert "strength" not in found
        return
    assert found["strength"].figures[0].value == pytest.approx(ratio, rel=0.05)
    one = _sum_norm(base, [models["a"]], [1.0])
    assert _sum_norm(base, models.values(), _weights(found["strength"])) == pytest.approx(one, rel=0.03)


def test_a_mean_of_many_keeps_little(base):
    models = {label: tuned(base, seed) for seed, label in enumerate("abcde")}
    found = _advice(base, models, kind="recipe", recipe=("linear", {label: {} for label in models}, {}))
    assert found["strength"].figures[0].value == pytest.approx(1 / math.sqrt(5), rel=0.05)


def test_dare_on_large_changes_is_warned_of(base):
    models = {"a": tuned(base, 1, size=0.01), "b": tuned(base, 2, size=0.9)}
    recipe = ("dare_ties", {label: {} for label in models}, {})
    assert _advice(base, models, kind="recipe", recipe=recipe)["dare"].models == ("b",)
    assert "dare" not in _advice(base, models, kind="recipe", recipe=("ties", *recipe[1:]))


def test_with_the_wrong_base_nothing_else_is_said(base):
    models = {"a": tuned(base, 1), "root": base, "b": tuned(base, 2)}
    found = _advice(trained(5), models)
    assert list(found) == ["base-first"]
    assert found["base-first"].action == "weightsmith report models/a models/b --base models/root"
    found = _advice(tuned(base, 4), models)
    assert list(found) == ["better-base"]


def test_a_stranger_is_left_out_of_all_else(base):
    models = {"a": tuned(base, 1), "x": trained(5), "b": tuned(base, 2)}
    found = _advice(base, models)
    assert list(found) == ["leave-out", "orthogonal"]
    assert found["orthogonal"].models == ("a", "b")


def test_a_model_of_which_a_part_is_foreign_takes_no_part(base):
    other = {name: (trained(8) if ".mlp." in name else base)[name] for name in base}
    found = _advice(base, {"a": tuned(base, 1), "half": other, "b": tuned(base, 2)})
    assert list(found) == ["orthogonal"]
    assert found["orthogonal"].models == ("a", "b")


def test_copies_count_once(base):
    a = tuned(base, 1)
    found = _advice(base, {"a": a, "copy": dict(a), "b": tuned(base, 2), "base again": dict(base)})
    assert list(found) == ["orthogonal"]
    assert found["orthogonal"].models == ("a", "b")


def test_without_a_base_only_that_is_said(base):
    models = {"a": tuned(base, 1), "root": base, "b": tuned(base, 2)}
    found = _advice(tuned(base, 3), models, base_named=False)
    assert list(found) == ["name-base"]
    assert found["name-base"].action == "weightsmith report models/base models/a models/b --base models/root"


def test_a_step_of_a_recipe_is_said_to_need_its_step(base):
    report = measured(base, {"a": tuned(base, 1), "b": tuned(base, 2)})
    step = report.models[0].reference
    facts = RecipeFacts("", "ties", (), {}, (step,), "")
    (found,) = advice(dataclasses.replace(report, kind="recipe", recipe=facts))
    first, *rest = found.action.splitlines()
    assert first == f"# beside the steps that make {step}"
    assert [one.model for one in load_recipe("\n".join(rest)).models] == [step, report.models[1].reference]
    # A command that names it would find nothing.
    models = {"a": tuned(base, 1), "root": base, "b": tuned(base, 2)}
    report = dataclasses.replace(measured(tuned(base, 3), models, base_named=False), kind="recipe", recipe=facts)
    (found,) = advice(report)
    assert (found.code, found.action) == ("name-base", "")
    assert "as base_model in the recipe" in found.text


def test_one_model_that_is_sound_gets_no_advice(base):
    assert advice(measured(base, {"a": tuned(base, 1)})) == ()


@pytest.mark.parametrize("kind", ["models", "recipe", "merged"])
def test_conclusions_of_any_report_are_few_sorted_and_survive_json(kind):
    for seed in range(8):
        report = with_conclusions(example_report(6, 6, kind, seed))
        assert 0 < len(report.advice) <= MOST
        gravity = [{"error": 0, "warning": 1}.get(one.level, 2) for one in report.advice]
        assert gravity == sorted(gravity)
        assert len(report.base_tests) == 6
        assert Report.from_json(report.to_json()) == report
        for one in report.advice:
            if one.action.startswith("merge_method"):
                load_recipe(one.action)


def test_names_that_yaml_would_misread_are_quoted(base):
    models = {"no": tuned(base, 1), "1e3: [x]": tuned(base, 2)}
    report = measured(base, models)
    odd = tuple(dataclasses.replace(one, reference=one.label) for one in report.models)
    (found,) = advice(dataclasses.replace(report, models=odd))
    assert [str(model.model) for model in load_recipe(found.action).models] == ["no", "1e3: [x]"]


def test_the_zoo_is_a_family_and_its_root_is_found():
    zoo = Path(__file__).parents[2] / "examples" / "zoo"
    models = {
        name: {key: array.astype("f4") for key, array in read_safetensors(zoo / name).items()}
        for name in ("covered", "thick", "mnist", "base")
    }
    root = models.pop("base")
    report = with_conclusions(measured(root, models))
    assert [one.shares for one in report.base_tests] == [True, True, True]
    assert [one.code for one in report.findings] == ["healthy"]
    assert [one.code for one in report.advice] == ["orthogonal"]
    sibling = models.pop("mnist")
    report = with_conclusions(measured(sibling, {**models, "root": root}))
    assert {one.shares for one in report.base_tests} == {True}
    assert [(one.code, one.models) for one in report.advice] == [("better-base", ("root",))]
