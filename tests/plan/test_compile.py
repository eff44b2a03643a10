"""From recipes to tensors: who takes part, what is refused, what is carried, and where things come from."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.errors import MethodError, PlanError, RecipeError, WeightsmithError


def models(write_model, *changes, config=None):
    """Write models a, b, c ... from one seed each, with tensors added, changed or (None) removed."""
    folders = []
    for i, change in enumerate(changes):
        tensors = llama_tensors(i) | change
        kept = {name: value for name, value in tensors.items() if value is not None}
        folders.append(write_model("abcdef"[i], kept, config))
    return folders


EXTRA = {"extra.weight": np.ones(3, np.float32)}


def test_a_tensor_that_some_models_lack_is_an_error_with_a_choice(write_model):
    a, b = models(write_model, EXTRA, {"model.norm.weight": None})
    with pytest.raises(PlanError, match=r"extra.weight is in a but not in b \(and 1 more.*on_missing: base, first or"):
        ws.average([a, b])
    first = ws.merge("linear", [a, b], weight=1.0, on_missing="first")
    assert np.array_equal(first["extra.weight"].numpy(), EXTRA["extra.weight"])
    assert any("taken from a alone: extra.weight, model.norm.weight" in text for text in first.warnings)
    skip = ws.merge("linear", [a, b], weight=1.0, on_missing="skip")
    assert set(first) - set(skip) == {"extra.weight", "model.norm.weight"}
    assert any("left out" in text for text in skip.warnings)
    base = ws.merge("task_arithmetic", [a], b, weight=1.0, on_missing="base")
    assert "extra.weight" not in base
    assert "model.norm.weight" not in base


def test_a_tensor_of_an_unused_base_alone_is_the_bases_to_give(write_model):
    a, b = models(write_model, EXTRA, {})
    with pytest.raises(PlanError, match="extra.weight is in a but not in b"):
        ws.merge("linear", [b], a, weight=1.0)
    for rule in ("base", "first"):
        merged = ws.merge("linear", [b], a, weight=1.0, on_missing=rule)
        assert np.array_equal(merged["extra.weight"].numpy(), EXTRA["extra.weight"])
    assert "extra.weight" not in ws.merge("linear", [b], a, weight=1.0, on_missing="skip")


def test_parameters_under_the_base_are_pointed_out(write_model):
    a, b = models(write_model, {}, {})
    text = f"merge_method: task_arithmetic\nbase_model: {a}\nmodels:\n- {{model: {a}, parameters: {{weight: 1}}}}\n"
    merged = ws.merge_recipe(text + f"- {{model: {b}, parameters: {{weight: 0.5}}}}\n")
    assert any("parameters given under it have no effect" in warning for warning in merged.warnings)


def test_models_of_different_vocabulary_are_refused_with_both_sizes(write_model):
    a, b = models(write_model, {}, llama_tensors(1, vocabulary=20))
    with pytest.raises(PlanError, match=r"embed_tokens.weight is \[20, 8\] in b|\[16, 8\] in a.*on_shape_mismatch"):
        ws.average([a, b])
    merged = ws.merge("slerp", [b], a, t=0.5, on_shape_mismatch="base")
    assert np.array_equal(merged["lm_head.weight"].numpy(), llama_tensors(0)["lm_head.weight"])


def test_integers_and_booleans_are_carried_from_the_base(write_model):
    ids = {"ids": np.arange(4), "mask": np.array([True, False])}
    other = {"ids": np.arange(4) + 9, "mask": np.array([False, False])}
    a, b, c = models(write_model, ids, other, other)
    merged = ws.merge("ties", [b, c], a, weight=1.0, density=0.5, dtype="bfloat16")
    assert np.array_equal(merged["ids"].numpy(), ids["ids"])
    assert np.array_equal(merged["mask"].numpy(), ids["mask"])
    assert merged.plan().tasks[list(merged).index("ids")].dtype == np.int64


def test_a_float_beside_an_integer_is_refused(write_model):
    a, b = models(write_model, {"x": np.ones(2, np.float32)}, {"x": np.ones(2, np.int64)})
    with pytest.raises(PlanError, match="x cannot be merged: it is float32 in a, int64 in b"):
        ws.average([a, b])


def test_quantised_models_are_refused(write_model):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (a,) = models(write_model, {}, config=config)
    with pytest.raises(PlanError, match=r"is quantised \(gptq\)"):
        ws.average([a, a])


def test_a_tied_head_stands_in_for_a_missing_one_and_the_config_is_untied(write_model, tmp_path):
    tied = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 2}
    own = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 2}
    first, second = llama_tensors(0), llama_tensors(1)
    del first["lm_head.weight"]
    a, b = write_model("a", first, tied), write_model("b", second, own)
    merged = ws.average([a, b])
    expected = (first["model.embed_tokens.weight"] + second["lm_head.weight"]) / 2
    np.testing.assert_allclose(merged["lm_head.weight"].numpy(), expected, rtol=1e-6)
    assert merged.config["tie_word_embeddings"] is False
    assert "lm_head.weight" not in ws.average([a, a])


def test_an_untied_t5_merges_whatever_names_its_table_has(write_model):
    config = {"model_type": "t5", "tie_word_embeddings": False, "num_layers": 1}
    rng = np.random.default_rng(0)
    one, other = ({n: rng.standard_normal((4, 2)) for n in ("shared.weight", "lm_head.weight")} for _ in range(2))
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    a = write_model("a", one, config)
    b = write_model("b", other | dict.fromkeys(names, other["shared.weight"]), config)
    merged = ws.average([a, b])
    expected = (one["shared.weight"] + other["shared.weight"]) / 2
    for name in ("shared.weight", *names):
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12)
    assert merged.config["tie_word_embeddings"] is False
    headless = write_model("headless", {"shared.weight": one["shared.weight"]}, config)
    with pytest.raises(PlanError, match="lm_head.weight is in b but not in headless"):
        ws.average([headless, b])


@pytest.mark.parametrize(
    ("method", "count", "base", "parameters", "message"),
    [
        ("ties", 2, False, {"weight": 1.0}, "needs a base"),
        ("slerp", 2, True, {"t": 0.5}, "takes exactly 1 model.* 2 are given"),
        ("model_stock", 1, True, {}, "takes at least 2"),
        ("linear", 2, False, {}, "needs 'weight' for every model"),
        ("linear", 2, False, {"weight": [1.0]}, "1 values for 2 models"),
        ("linear", 2, False, {"wieght": 1.0}, r"no parameter 'wieght' \(did you mean 'weight'"),
        ("ties", 2, True, {"weight": 1.0, "density": 1.5}, r"density is 1.5; it must be in \[0, 1\]"),
        ("ties", 2, True, {"weight": 1.0, "normalize": 3}, "normalize is 3; it takes true or false"),
        ("ties", 2, True, {"weight": "x"}, "weight is 'x'; it takes a number"),
        ("della", 2, True, {"weight": 1.0, "density": 0.9}, "both must lie within"),
        ("linear", 2, False, {"weight": [1.0, -1.0]}, "sum to zero"),
        ("liner", 1, False, {}, r"no method 'liner' \(did you mean 'linear'"),
    ],
)
def test_what_a_method_cannot_work_with_is_refused_before_a_weight_is_read(
    write_model, method, count, base, parameters, message
):
    folders = models(write_model, *[{}] * 3)
    with pytest.raises(WeightsmithError, match=message):
        ws.merge(method, folders[1 : count + 1], folders[0] if base else None, **parameters)


def test_a_shared_parameter_under_a_model_is_refused(write_model):
    a, b = models(write_model, {}, {})
    text = (
        f"merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1, normalize: false}}}}, {{model: {b}}}]\n"
    )
    with pytest.raises(RecipeError, match=r"models\[0\].parameters: normalize .* one value for all models"):
        ws.merge_recipe(text)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_ties_trims_over_a_layer_or_the_whole_model(write_model, scope):
    """Against one sort over the concatenated task vectors."""
    base, one = llama_tensors(0), llama_tensors(1)
    a, b = models(write_model, {}, {})
    merged = ws.merge("ties", [b], a, weight=1.0, density=0.3, trim_scope=scope)
    groups: dict[str, list[str]] = {}
    for name in merged:
        layered = name.startswith("model.layers.")
        key = "all" if scope == "model" else name.split(".")[2] if layered else name
        groups.setdefault(key, []).append(name)
    assert len(groups) == (1 if scope == "model" else 5)
    for names in groups.values():
        deltas = np.concatenate([(one[name] - base[name]).ravel() for name in names])
        kept = np.zeros(deltas.size, bool)
        kept[np.argsort(-np.abs(deltas), kind="stable")[: int(0.3 * deltas.size)]] = True
        expected = np.concatenate([base[name].ravel() for name in names]) + deltas * kept
        found = np.concatenate([merged[name].numpy().ravel() for name in names])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_scope_over_the_model_needs_one_density(write_model):
    a, b = models(write_model, {}, {})
    with pytest.raises(PlanError, match="density differs between"):
        ws.merge("ties", [b], a, weight=1.0, density=[[0.1, 0.9]], trim_scope="model")


def test_steps_are_fused_without_rounding_or_files(write_model, tmp_path):
    bf16 = ml_dtypes.bfloat16
    tensors = [{k: v.astype(bf16) for k, v in llama_tensors(i).items()} for i in range(3)]
    a, b, c = (write_model(n, t) for n, t in zip("abc", tensors, strict=True))
    inner = ws.average([a, b])
    merged = ws.average([inner, c])
    for name in merged:
        wide = [t[name].astype(np.float64) for t in tensors]
        # Sums of bfloat16 are exact here; rounding the inner average first would show.
        expected = ((wide[0] + wide[1]) / 2 + wide[2]) / 2
        np.testing.assert_array_equal(merged[name].numpy(), expected.astype(np.float32).astype(bf16))
    again = ws.merge_recipe(merged.to_yaml())
    assert again.to_yaml() == merged.to_yaml()
    assert all(np.array_equal(again[n].numpy(), merged[n].numpy()) for n in merged)


def test_a_merge_of_merges_of_merges_is_one_recipe(write_model):
    a, b, c = models(write_model, {}, {}, {})
    left = ws.average([ws.average([a, b]), c])
    right = ws.merge("slerp", [ws.average([a, b])], c, t=0.5)
    merged = ws.merge("ties", [left, right], a, weight=1.0, density=0.5)
    recipe = ws.merge_recipe(merged.to_yaml())
    assert len(recipe.recipe.steps) == 3
    assert all(np.array_equal(recipe[n].numpy(), merged[n].numpy()) for n in merged)


def test_python_yaml_and_flags_are_one_recipe(write_model, tmp_path):
    a, b, c = models(write_model, {}, {}, {})
    python = ws.merge("ties", [b, c], base=a, weight=[0.5, 0.25], density=0.4)
    yaml = ws.merge_recipe(
        f"merge_method: ties\nbase_model: {a}\nparameters: {{density: 0.4}}\nmodels:\n"
        f"- {{model: {b}, parameters: {{weight: 0.5}}}}\n- {{model: {c}, parameters: {{weight: 0.25}}}}\n"
    )
    assert python.recipe == yaml.recipe


def test_config_and_tokenizer_come_from_the_base_or_from_whom_the_recipe_names(write_model):
    a, b = models(write_model, {}, {})
    for folder in (a, b):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {folder.name: 0}}}))
        (folder / "generation_config.json").write_text(json.dumps({"from": folder.name}))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "from": folder.name}))

    def sources(merged):
        files = merged.companions.files
        return merged.config["from"], files["tokenizer.json"].parent.name, files["generation_config.json"].parent.name

    assert sources(ws.average([b, a])) == ("b", "b", "b")
    assert sources(ws.merge("linear", [b], a, weight=1.0)) == ("a", "a", "a")
    assert sources(ws.merge("slerp", [b], a, t=0.1, tokenizer_source=str(b))) == ("a", "b", "a")
    with pytest.raises(PlanError, match="nor one of the models that are merged"):
        ws.merge("slerp", [b], a, t=0.1, tokenizer_source="c")
    assert any("numbers 1 of" in text for text in ws.average([a, b]).warnings)


def test_slices_pick_layers_and_the_ends_come_from_the_first_and_last_slice(write_model):
    a, b = models(write_model, llama_tensors(0, layers=3), llama_tensors(1, layers=4))
    merged = ws.merge_recipe(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: {a}, layer_range: [0, 3]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [1, 3]}}]\n"
    )
    one, other = llama_tensors(0, layers=3), llama_tensors(1, layers=4)
    origin = [(one, 0), (one, 1), (one, 2), (other, 1), (other, 2)]
    for layer, (tensors, index) in enumerate(origin):
        found = merged[f"model.layers.{layer}.mlp.up_proj.weight"].numpy()
        assert np.array_equal(found, tensors[f"model.layers.{index}.mlp.up_proj.weight"])
    assert np.array_equal(merged["model.embed_tokens.weight"].numpy(), one["model.embed_tokens.weight"])
    assert np.array_equal(merged["lm_head.weight"].numpy(), other["lm_head.weight"])
    assert merged.config["num_hidden_layers"] == 2  # the config of this fixture counts no 3 layers: a warning says so
    assert any("no key with the old number of layers" in text for text in merged.warnings)


@pytest.mark.parametrize("layer", ["mtp.layers.0", "model.mtp_layers.0"])
def test_multi_token_prediction_layers_come_from_the_last_slice_as_the_head_does(write_model, layer):
    names = [f"{layer}.mlp.up_proj.weight", f"{layer}.embed_tokens.weight", "mtp.fc.weight"]
    further = [{name: np.full(3, i, np.float32) for name in names} for i in range(2)]
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "layer_types": ["full", "linear"]}
    a, b = models(write_model, *further, config=config)
    merged = ws.merge_recipe(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [1, 2]}}]\n"
    )
    found = {name: merged[name].numpy() for name in merged}
    assert np.array_equal(
        found["model.layers.2.mlp.up_proj.weight"], llama_tensors(1)["model.layers.1.mlp.up_proj.weight"]
    )
    assert all(np.array_equal(found[name], further[1][name]) for name in names)
    assert len([name for name in found if "mtp" in name]) == len(names)
    layers = {"num_hidden_layers": 3, "layer_types": ["full", "linear", "linear"]}
    assert {key: merged.config[key] for key in config} == {**config, **layers}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (("[0, 9]", "[0, 9]"), r"\[0, 9\] does not lie in the 2 layers"),
        (("[0, 1]", "[0, 2]"), "1 and 2 layers; all sources"),
        (("[1, 1]", "[1, 1]"), "does not lie"),
    ],
)
def test_layer_ranges_that_do_not_fit_are_refused(write_model, ranges, message):
    a, b = models(write_model, {}, {})
    sources = ", ".join(f"{{model: {m}, layer_range: {r}}}" for m, r in zip((a, b), ranges, strict=True))
    with pytest.raises(PlanError, match=message):
        ws.merge_recipe(f"merge_method: linear\nparameters: {{weight: 1}}\nslices: [{{sources: [{sources}]}}]\n")


def test_layers_of_different_shape_merge_where_both_models_agree(write_model):
    """A pruned model: its layers differ from one another, and one lacks a part."""
    pruned = {
        "model.layers.1.mlp.up_proj.weight": np.ones((3, 8), np.float32),
        "model.layers.0.self_attn.q_proj.weight": None,
    }
    a, b = models(write_model, pruned, pruned)
    merged = ws.average([a, b])
    assert merged["model.layers.1.mlp.up_proj.weight"].shape == (3, 8)
    assert "model.layers.0.self_attn.q_proj.weight" not in merged


def test_random_masks_follow_the_models_names_and_not_their_order_or_folder(write_model, tmp_path):
    a, _, c = models(write_model, {}, {}, {})
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "b").rename(tmp_path / "moved" / "b")
    one = ws.merge("dare_linear", [moved, c], a, weight=1.0, density=0.5, seed=3)
    other = ws.merge("dare_linear", [c, moved], a, weight=1.0, density=0.5, seed=3)
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), rtol=1e-6, atol=1e-7)
        if one[name].size > 100:
            changed = np.mean(one[name].numpy() != llama_tensors(0)[name])
            assert 0.6 < changed < 0.9  # 1 - 0.5 ** 2


def test_the_output_says_what_it_was_made_from(write_model, tmp_path):
    a, b = models(write_model, {}, {})
    merged = ws.merge("slerp", [b], a, t=0.3, chat_template="chatml")
    merged.save(tmp_path / "out")
    assert ws.load_recipe(tmp_path / "out" / "weightsmith.yaml") == merged.recipe
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "merge_method: slerp" in card
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_comes_up_as_companions_are_written_is_among_the_warnings_of_the_run(write_model, tmp_path):
    config = {"model_type": "own", "num_hidden_layers": 2, "auto_map": {"AutoModel": "modeling_own.Own"}}
    a, b = models(write_model, {}, {"extra.weight": np.ones(3, np.float32)}, config=config)
    merged = ws.merge("linear", [a, b], weight=1.0, on_missing="skip")
    assert len(merged.warnings) == 1
    summary = merged.save(tmp_path / "out")
    assert summary.warnings[0] == merged.warnings[0]
    assert [text for text in summary.warnings[1:] if "names code of its model in auto_map" in text]
    assert len(summary.warnings) == 2
    assert merged.save(tmp_path / "one.safetensors").warnings == merged.warnings


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64"])
def test_any_floating_dtype_can_be_written(write_model, tmp_path, dtype):
    a, b = models(write_model, {}, {})
    ws.merge("linear", [a, b], weight=1.0, dtype=dtype).save(tmp_path / "out")
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    for name, found in read_safetensors(tmp_path / "out").items():
        wide = (llama_tensors(0)[name].astype(np.float64) + llama_tensors(1)[name]) / 2
        assert found.dtype == kind
        np.testing.assert_array_equal(found.astype(np.float32), wide.astype(np.float32).astype(kind).astype(np.float32))


def test_a_method_in_a_file_is_a_method_like_any_other(write_model, tmp_path):
    from weightsmith.methods.registry import load_plugin

    (tmp_path / "mine.py").write_text(
        "import weightsmith as ws\n"
        "@ws.method(base='required', maximum=1, properties=('idempotent',), example={'share': 0.5})\n"
        "def halfway(block, *, share: ws.PerModel[float]):\n"
        "    '''Part of the way to the model.'''\n"
        "    return block.base + share[0] * block.deltas[0]\n"
    )
    (added,) = load_plugin(str(tmp_path / "mine.py"))
    try:
        a, b = models(write_model, {}, {})
        merged = ws.merge("halfway", [b], a, share=0.25)
        name = "lm_head.weight"
        expected = 0.75 * llama_tensors(0)[name] + 0.25 * llama_tensors(1)[name]
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(MethodError, match="needs a base"):
            ws.merge("halfway", [b], share=0.25)
    finally:
        from weightsmith.methods import registry

        del registry._METHODS[added.name]
