"""Modules of a recipe: which tensors each has, in every model, and what is carried."""

from __future__ import annotations

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.errors import PlanError

HEAD = "lm_head.weight"


def vision_tensors(seed):
    rng = np.random.default_rng(seed)
    names = ("patch_embed.proj.weight", "blocks.0.norm.weight", "merger.norm.weight", "deepstack_merger_list.0.weight")
    return {name: rng.standard_normal(3).astype(np.float32) for name in names}


def vlm_tensors(seed, *, text="model.language_model.", visual="model.visual."):
    """Return a Llama under a text tower's prefix, a small vision tower, and the head outside both."""
    tensors = {name.replace("model.", text, 1): value for name, value in llama_tensors(seed).items()}
    return {visual + name: value for name, value in vision_tensors(seed).items()} | tensors


def write_recipe(base, modules):
    """Return a linear merge of modules, each ``name -> {model: weight}``."""
    lines = [f"merge_method: linear\nbase_model: {base}\nmodules:"]
    for name, weights in modules.items():
        models = ", ".join(f"{{model: {m}, parameters: {{weight: {w}}}}}" for m, w in weights.items())
        lines.append(f"  {name}: {{models: [{models}]}}")
    return "\n".join(lines) + "\n"


def assert_mean(merged, names, one, other, share=0.5):
    assert names
    for name in names:
        np.testing.assert_allclose(
            merged[name].numpy(), (1 - share) * one[name] + share * other[name], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("text", ["model.language_model.", "model."])
def test_the_head_outside_the_text_decoders_prefix_is_part_of_it(write_model, text):
    whole, language = vlm_tensors(0, text=text, visual="visual."), llama_tensors(1)
    a, b = write_model("vlm", whole), write_model("text", language)
    merged = ws.merge_recipe(write_recipe(a, {"text_decoder": {a: 0.5, b: 0.5}}))
    assert list(merged) == list(ws.open(a))
    under_text = {name.replace("model.", text, 1): value for name, value in language.items()}
    assert HEAD in under_text
    assert_mean(merged, list(under_text), whole, under_text)
    for carried in set(whole) - set(under_text):
        assert np.array_equal(merged[carried].numpy(), whole[carried])
    with pytest.raises(PlanError, match="there is no module 'audio'"):
        ws.merge_recipe(write_recipe(a, {"audio": {a: 1}}))


def test_a_head_is_found_beside_one_text_tower_and_inside_another(write_model):
    old = {
        name if "visual" in name else f"language_model.{name}": value
        for name, value in vlm_tensors(1, text="model.").items()
    }
    new = vlm_tensors(0)
    a, b = write_model("new", new), write_model("old", old)
    recipe = write_recipe(a, {"text_decoder": {a: 0.5, b: 0.5}})
    merged = ws.merge_recipe(recipe)
    np.testing.assert_allclose(merged[HEAD].numpy(), (new[HEAD] + old[f"language_model.{HEAD}"]) / 2, rtol=1e-5)


def test_a_module_of_its_own_takes_the_head_from_the_text_decoder(write_model):
    one, other = vlm_tensors(0), vlm_tensors(1)
    a, b = write_model("a", one), write_model("b", other)
    merged = ws.merge_recipe(write_recipe(a, {"text_decoder": {a: 0.5, b: 0.5}, "lm_head": {b: 1}}))
    assert np.array_equal(merged[HEAD].numpy(), other[HEAD])
    assert_mean(merged, [name for name in one if name.startswith("model.language")], one, other)


def test_a_head_that_the_base_ties_to_its_embeddings_is_merged_where_another_model_has_its_own(write_model):
    one, other = vlm_tensors(0), vlm_tensors(1)
    embeddings = one["model.language_model.embed_tokens.weight"]
    del one[HEAD]
    a = write_model("a", one, {"model_type": "vlm", "tie_word_embeddings": True, "num_hidden_layers": 2})
    b = write_model("b", other, {"model_type": "vlm", "tie_word_embeddings": False, "num_hidden_layers": 2})
    merged = ws.merge_recipe(write_recipe(a, {"text_decoder": {a: 0.5, b: 0.5}}))
    np.testing.assert_allclose(merged[HEAD].numpy(), (embeddings + other[HEAD]) / 2, rtol=1e-5)
    assert merged.config["tie_word_embeddings"] is False
    assert HEAD not in ws.merge_recipe(write_recipe(a, {"text_decoder": {a: 1}}))


def test_the_text_decoders_slices_take_the_head_from_the_last(write_model):
    one, other = vlm_tensors(0), vlm_tensors(1)
    a, b = write_model("a", one), write_model("b", other)
    merged = ws.merge_recipe(
        f"merge_method: passthrough\nbase_model: {a}\nmodules: {{text_decoder: {{slices: ["
        f"{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}, {{sources: [{{model: {b}, layer_range: [1, 2]}}]}}]}}}}\n"
    )
    assert np.array_equal(merged[HEAD].numpy(), other[HEAD])
    assert merged.config["num_hidden_layers"] == 3


@pytest.mark.parametrize(("text", "visual"), [("model.", "visual."), ("model.language_model.", "model.visual.")])
def test_a_tensor_belongs_to_the_module_with_the_longest_prefix(write_model, text, visual):
    one, other = (vlm_tensors(seed, text=text, visual=visual) for seed in range(2))
    a, b = write_model("a", one), write_model("b", other)
    shares = {"text_decoder": 0.25, "vision_tower": 0.5, "multi_modal_projector": 0.75}
    recipe = write_recipe(a, {name: {a: 1 - share, b: share} for name, share in shares.items()})
    merged = ws.merge_recipe(recipe)
    assert sorted(merged) == sorted(one)
    owned = dict.fromkeys(one, "text_decoder") | {
        name: "multi_modal_projector" if "merger" in name else "vision_tower" for name in one if name.startswith(visual)
    }
    for module, share in shares.items():
        assert_mean(merged, [name for name in one if owned[name] == module], one, other, share)


def test_a_tower_alone_has_all_that_lies_under_its_prefix(write_model):
    one, other = vlm_tensors(0), vlm_tensors(1)
    a, b = write_model("a", one), write_model("b", other)
    merged = ws.merge_recipe(write_recipe(a, {"vision_tower": {a: 0.5, b: 0.5}}))
    assert_mean(merged, [name for name in one if name.startswith("model.visual.")], one, other)
    assert np.array_equal(merged[HEAD].numpy(), one[HEAD])


def test_a_tensor_of_two_modules_is_an_error_that_names_both(write_model):
    a = write_model("a", vlm_tensors(0))
    with pytest.raises(PlanError, match="belongs to two modules, 'text_decoder' and 'language_model'; give one"):
        ws.merge_recipe(write_recipe(a, {"text_decoder": {a: 1}, "language_model": {a: 1}}))


def test_the_head_of_a_t5_is_part_of_its_shared_table_as_in_mergekit(write_model):
    names = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", HEAD)
    config = {"model_type": "t5", "tie_word_embeddings": False, "num_layers": 1}
    one, other = ({name: np.full(2, i + j, np.float32) for j, name in enumerate(names)} for i in (0, 4))
    a, b = write_model("a", one, config), write_model("b", other, config)
    merged = ws.merge_recipe(write_recipe(a, {"shared": {a: 0.5, b: 0.5}}))
    assert_mean(merged, ["shared.weight", HEAD], one, other)
    assert np.array_equal(merged[names[1]].numpy(), one[names[1]])


def test_layers_of_two_towers_are_trimmed_by_themselves(write_model):
    names = [f"{tower}.encoder.layers.0.mlp.weight" for tower in ("text_model", "vision_model")]
    changes = {name: scale * np.arange(1.0, 11.0) for name, scale in zip(names, (1, 100), strict=True)}
    a, b = write_model("a", {name: np.zeros(10) for name in names}), write_model("b", changes)
    merged = ws.merge_recipe(
        f"merge_method: ties\nbase_model: {a}\nparameters: {{weight: 1, density: 0.5, trim_scope: layer}}\n"
        f"modules:\n  text_model: {{models: [{{model: {b}}}]}}\n  vision_model: {{models: [{{model: {b}}}]}}\n"
    )
    for name in names:
        assert np.array_equal(merged[name].numpy(), changes[name] * (np.arange(10) >= 5))
