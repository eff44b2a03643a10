"""Models whose vocabularies differ in length: made longer or shorter, with a config and a tokenizer that fit."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.errors import PlanError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDINGS, HEAD)


def config(rows, **more):
    return {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": rows, **more}


def write_all(write_model, *rows, **more):
    """Write models base, a, b ... with vocabularies of these lengths."""
    return [
        str(write_model(("base", "a", "b", "c")[i], llama_tensors(i, vocabulary=length, **more), config(length)))
        for i, length in enumerate(rows)
    ]


def at_length(array, rows, dtype=np.float64):
    out = np.zeros((rows, *array.shape[1:]), dtype)
    out[: min(rows, len(array))] = array[:rows]
    return out


def tensors(*rows, length):
    """Return the models that write_all wrote, with their tables at one length, in float64."""
    found = []
    for i, own in enumerate(rows):
        given = llama_tensors(i, vocabulary=own)
        found.append({n: at_length(v, length) if n in TABLES else v.astype(np.float64) for n, v in given.items()})
    return found


def write_tokenizer(folder, count, *, last=None):
    vocabulary = {f"t{i}": i for i in range(count)}
    added = [] if last is None else [{"content": "<last>", "id": last}]
    text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})
    (Path(folder) / "tokenizer.json").write_text(text)


@pytest.mark.parametrize(("choice", "length"), [("pad", 20), ("crop", 12)])
def test_task_vectors_of_vocabularies_of_three_lengths(write_model, tmp_path, choice, length):
    """Fine-tuning transfer as published: zeros below, so that added rows come wholly from the fine-tuned model."""
    rows = (16, 20, 12)
    base, a, b = write_all(write_model, *rows)
    merged = ws.merge("task_arithmetic", [a, b], base, weight=[0.5, 2], on_shape_mismatch=choice)
    merged.save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    of_base, of_a, of_b = tensors(*rows, length=length)
    for name, start in of_base.items():
        expected = start + 0.5 * (of_a[name] - start) + 2 * (of_b[name] - start)
        assert found[name].shape == expected.shape
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    if choice == "pad":
        np.testing.assert_allclose(found[HEAD][16:], 0.5 * of_a[HEAD][16:], rtol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == length
    told = [text for text in merged.warnings if f"(on_shape_mismatch: {choice})" in text]
    assert (
        told
        == {
            "pad": [
                f"4 rows of zeros are added to base (on_shape_mismatch: pad): {HEAD}, {EMBEDDINGS}",
                f"8 rows of zeros are added to b (on_shape_mismatch: pad): {HEAD}, {EMBEDDINGS}",
            ],
            "crop": [
                f"4 rows of base are dropped (on_shape_mismatch: crop): {HEAD}, {EMBEDDINGS}",
                f"8 rows of a are dropped (on_shape_mismatch: crop): {HEAD}, {EMBEDDINGS}",
            ],
        }[choice]
    )
    assert ws.reproduce(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": [0.3, 0.7]}),
        ("ties", {"weight": 1.0, "density": 0.4}),
        ("ties", {"weight": 1.0, "density": 0.4, "trim_scope": "model"}),
        ("dare_linear", {"weight": 1.0, "density": 0.4}),
        ("model_stock", {}),
        ("karcher", {}),
        ("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.2}),
    ],
)
@pytest.mark.parametrize("choice", ["pad", "crop"])
def test_a_merge_is_that_of_models_saved_at_one_length(write_model, method, parameters, choice):
    rows = (16, 20, 12)
    written = write_all(write_model, *rows)
    length = {"pad": 20, "crop": 12}[choice]
    if method in ("linear", "karcher"):
        length = max(rows[1:]) if choice == "pad" else min(rows[1:])
    for i, name in enumerate(("base", "a", "b")):
        given = llama_tensors(i, vocabulary=rows[i])
        same = {n: at_length(v, length, np.float32) if n in TABLES else v for n, v in given.items()}
        write_model(f"same/{name}", same, config(length))

    def merged(folders, **more):
        base, a, b = folders
        return ws.merge(method, [a, b], None if method in ("linear", "karcher") else base, **parameters, **more)

    found = merged(written, on_shape_mismatch=choice)
    same = merged([folder.rpartition("/")[0] + "/same/" + folder.rpartition("/")[2] for folder in written])
    assert list(found) == list(same)
    assert all(np.array_equal(found[name].numpy(), same[name].numpy()) for name in found)


def test_results_do_not_depend_on_threads_and_blocks_that_end_within_the_added_rows(write_model, tmp_path):
    """Tables of several blocks, one of which is half a model's own and half added."""
    rows = (30_011, 40_013)
    arrays = [np.random.default_rng(i).standard_normal((n, 9)).astype(ml_dtypes.bfloat16) for i, n in enumerate(rows)]
    base, a = (
        str(write_model(name, {EMBEDDINGS: array}, config(len(array))))
        for name, array in zip("ba", arrays, strict=True)
    )
    merged = ws.merge("task_arithmetic", [a], base, weight=0.5, on_shape_mismatch="pad")
    for threads in (1, 3):
        merged.save(tmp_path / str(threads), threads=threads)
    one, three = (read_safetensors(tmp_path / name)[EMBEDDINGS] for name in ("1", "3"))
    start = at_length(arrays[0], rows[1])
    expected = (start + 0.5 * (arrays[1].astype(np.float64) - start)).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.array_equal(one.view(np.uint16), three.view(np.uint16))
    assert np.array_equal(one.view(np.uint16), expected.view(np.uint16))
    taken = ws.merge("slerp", [a], base, t=0.0, on_shape_mismatch="crop")
    assert np.array_equal(taken[EMBEDDINGS].numpy(), arrays[0])


def test_the_error_says_what_else_could_be_done(write_model):
    base, a = write_all(write_model, 16, 20)
    with pytest.raises(PlanError, match=r"lm_head.weight is \[16, 8\] in base and \[20, 8\] in a .*pad completes the shorter with rows of zeros, crop cuts all to the shortest"):  # fmt: skip
        ws.merge("slerp", [a], base, t=0.5)


@pytest.mark.parametrize("choice", ["error", "pad", "crop"])
def test_tensors_that_differ_in_another_axis_are_refused(write_model, choice):
    a = str(write_model("a", llama_tensors(0) | {"x.weight": np.zeros((2, 3), np.float32), "s": np.float32(1)}))
    for other in ({"x.weight": np.zeros((3, 4), np.float32)}, {"x.weight": np.zeros(2, np.float32)}, {"s": np.ones(2, np.float32)}):  # fmt: skip
        b = str(write_model("b", llama_tensors(1) | {"x.weight": np.zeros((2, 3), np.float32), "s": np.float32(1)} | other))  # fmt: skip
        with pytest.raises(PlanError, match="models of different shape cannot be merged") as caught:
            ws.merge("linear", [a, b], weight=1.0, on_shape_mismatch=choice)
        assert "pad" not in str(caught.value)


def test_tied_heads_take_part_with_their_embeddings(write_model):
    tied = {name: value for name, value in llama_tensors(0, vocabulary=16).items() if name != HEAD}
    a = str(write_model("a", tied, config(16, tie_word_embeddings=True)))
    b = str(write_model("b", llama_tensors(1, vocabulary=20), config(20)))
    merged = ws.merge("linear", [a, b], weight=1.0, on_shape_mismatch="pad")
    other = llama_tensors(1, vocabulary=20)
    for name in TABLES:
        expected = (at_length(tied[EMBEDDINGS], 20) + other[name]) / 2
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (merged.config["vocab_size"], merged.config["tie_word_embeddings"]) == (20, False)
    both = ws.merge("linear", [a, str(write_model("c", tied | {EMBEDDINGS: other[EMBEDDINGS]}, config(20, tie_word_embeddings=True)))], weight=1.0, on_shape_mismatch="pad")  # fmt: skip
    assert (HEAD in both, both.config["vocab_size"], both.config["tie_word_embeddings"]) == (False, 20, True)


def test_the_vocabulary_of_a_nested_config_follows_and_that_of_another_tower_stays(write_model):
    def write(name, seed, rows):
        text = {k.replace("model.", "model.language_model.", 1): v for k, v in llama_tensors(seed, vocabulary=rows).items()}  # fmt: skip
        audio = {"model.audio_tower.embed_codes.weight": np.full((16, 2), seed, np.float32)}
        nested = {"model_type": "x", "text_config": {"num_hidden_layers": 2, "vocab_size": rows}, "audio_config": {"vocab_size": 16}}  # fmt: skip
        return str(write_model(name, text | audio, nested))

    merged = ws.merge("linear", [write("a", 0, 16), write("b", 1, 20)], weight=1.0, on_shape_mismatch="pad")
    assert merged.config["text_config"]["vocab_size"] == 20
    assert merged.config["audio_config"]["vocab_size"] == 16


def test_the_config_follows_whoever_the_tables_are_taken_from(write_model):
    base, a = write_all(write_model, 16, 20)
    rule = {"scope": {"regex": "embed|head"}, "merge_method": "passthrough", "models": [a]}
    merged = ws.merge("slerp", [a], base, t=0.5, rules=[rule])
    assert merged[EMBEDDINGS].shape == (20, 8)
    assert merged.config["vocab_size"] == 20
    first = ws.merge("linear", [a], base, weight=1.0, on_shape_mismatch="first")
    assert (first[HEAD].shape[0], first.config["vocab_size"]) == (20, 20)
    with pytest.raises(PlanError, match=r"lm_head.weight has 16 rows in the result and model.embed_tokens.weight has 20, and a model has one vocab_size"):  # fmt: skip
        ws.merge("slerp", [a], base, t=0.5, on_shape_mismatch="base", rules=[{**rule, "scope": {"names": "*embed*"}}])


def test_a_config_that_does_not_count_these_rows_is_pointed_out(write_model):
    a, b = (str(write_model(name, llama_tensors(i, vocabulary=n), config(99))) for i, (name, n) in enumerate([("a", 16), ("b", 20)]))  # fmt: skip
    merged = ws.merge("linear", [a, b], weight=1.0, on_shape_mismatch="pad")
    assert merged.config["vocab_size"] == 99
    assert f"{HEAD} has 20 rows instead of 16, and the config has no vocab_size of 16" in merged.warnings


def test_a_tokenizer_whose_tokens_lost_their_rows_is_refused(write_model):
    base, a = write_all(write_model, 16, 20)
    write_tokenizer(base, 16)
    write_tokenizer(a, 18, last=19)
    with pytest.raises(PlanError, match=r"the tokenizer of .*/a numbers tokens up to 19, and the result has 16 rows .*tokenizer_source.*pad"):  # fmt: skip
        ws.merge("linear", [a, base], weight=1.0, on_shape_mismatch="crop")
    merged = ws.merge("linear", [a, base], weight=1.0, on_shape_mismatch="crop", tokenizer_source=base)
    assert merged.config["vocab_size"] == 16
    # Published models have tokenizers with more tokens than rows: they are merged, and it is said.
    write_tokenizer(base, 16, last=16)
    assert any("numbers tokens up to 16, and its model has 16 rows" in text for text in ws.average([base]).warnings)


def test_a_tokenizer_that_lacks_the_added_tokens_is_pointed_out(write_model):
    base, a = write_all(write_model, 16, 20)
    write_tokenizer(base, 16)
    write_tokenizer(a, 20)
    merged = ws.merge("task_arithmetic", [a], base, weight=1.0, on_shape_mismatch="pad")
    assert f"rows from 16 on are tokens of {a} that the tokenizer of {base} lacks; tokenizer_source: {a} takes the one that has them" in merged.warnings  # fmt: skip
    better = ws.merge("task_arithmetic", [a], base, weight=1.0, on_shape_mismatch="pad", tokenizer_source=a)
    assert not [text for text in better.warnings if "that the tokenizer of" in text]
    assert any(f"{base} has 16 of them, and takes 4 from {a}" in text for text in better.warnings)
    assert better.config["vocab_size"] == 20


@pytest.mark.parametrize("inner", ["linear", "ties", "whole"])
@pytest.mark.parametrize("choice", ["pad", "crop"])
def test_the_results_of_steps_are_made_longer_or_shorter_as_they_are_computed(write_model, tmp_path, inner, choice):
    """Against the step saved in float32 first."""
    base, a, b, c = write_all(write_model, 16, 16, 16, 20)

    @ws.method("whole_negative", reads="tensor")
    def whole_negative(block):
        return block.models[0] - block.models[1]

    try:
        if inner == "ties":
            step = ws.merge("ties", [a, b], base, weight=1.0, density=0.5, trim_scope="model")
        else:
            given = {"weight": [0.3, 0.7]} if inner == "linear" else {}
            step = ws.merge("linear" if inner == "linear" else "whole_negative", [a, b], **given)
        step.save(tmp_path / "step")
        for models in ([step, c], [c, step]):
            merged = ws.merge("linear", models, weight=[0.4, 0.6], on_shape_mismatch=choice)
            saved = [str(tmp_path / "step") if model is step else model for model in models]
            expected = ws.merge("linear", saved, weight=[0.4, 0.6], on_shape_mismatch=choice)
            merged.save(tmp_path / "out", overwrite=True, threads=2)
            found = read_safetensors(tmp_path / "out")
            for name in expected:
                assert np.array_equal(found[name], expected[name].numpy())
                assert np.array_equal(merged[name].numpy(), expected[name].numpy())
            assert ws.merge_recipe(merged.to_yaml()).warnings == merged.warnings
    finally:
        from weightsmith.methods import registry

        del registry._METHODS["whole_negative"]


def test_steps_are_not_rounded_on_the_way_unless_they_have_a_dtype(write_model):
    a, b, c = write_all(write_model, 16, 16, 20)
    wide = [llama_tensors(i, vocabulary=n)[HEAD].astype(np.float64) for i, n in enumerate((16, 16, 20))]
    for dtype in (None, "bfloat16"):
        step = ws.merge("linear", [a, b], weight=1.0, dtype=dtype)
        merged = ws.merge("linear", [step, c], weight=1.0, on_shape_mismatch="pad")
        mean = (wide[0] + wide[1]) / 2
        if dtype:
            mean = mean.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
        np.testing.assert_allclose(merged[HEAD].numpy(), (at_length(mean, 20) + wide[2]) / 2, rtol=1e-6, atol=1e-7)


def test_the_embeddings_of_a_folded_adapter_are_made_longer(write_model, tmp_path):
    base, a = write_all(write_model, 16, 20)
    rng = np.random.default_rng(5)
    down, up = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((16, 2)).astype(np.float32)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    head = "base_model.model.lm_head.lora_"
    write_safetensors(lora / "adapter_model.safetensors", {head + "A.weight": down, head + "B.weight": up})
    merged = ws.merge("linear", [f"{base}+{lora}", a], weight=1.0, on_shape_mismatch="pad")
    folded = llama_tensors(0, vocabulary=16)[HEAD] + up.astype(np.float64) @ down
    expected = (at_length(folded, 20) + llama_tensors(1, vocabulary=20)[HEAD]) / 2
    np.testing.assert_allclose(merged[HEAD].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_plan_names_the_models_of_what_was_made_longer(write_model):
    base, a, b = write_all(write_model, 16, 16, 20)
    step = ws.merge("linear", [base, a], weight=1.0)
    plan = ws.merge("linear", [step, b, a], weight=1.0, on_shape_mismatch="pad").plan()
    by_name = {entry["name"]: entry for entry in plan.to_json(1)["tensors"]}
    assert [source["model"] for source in by_name[EMBEDDINGS]["inputs"]] == [step.name, b, a]
    assert [source["model"] for source in by_name["model.norm.weight"]["inputs"]] == [base, a, b, a]


def test_a_length_of_none_is_possible(write_model):
    a = str(write_model("a", llama_tensors(0) | {"x.weight": np.zeros((0, 3), np.float32)}))
    b = str(write_model("b", llama_tensors(1) | {"x.weight": np.ones((2, 3), np.float32)}))
    for models in ([a, b], [b, a]):
        crop = ws.merge("linear", models, weight=1.0, on_shape_mismatch="crop")
        assert crop["x.weight"].numpy().shape == (0, 3)
        pad = ws.merge("linear", models, weight=1.0, on_shape_mismatch="pad")
        assert np.array_equal(pad["x.weight"].numpy(), np.full((2, 3), 0.5, np.float32))
