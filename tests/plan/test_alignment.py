"""Merges of models whose vocabularies differ, against plain computations on whole tables, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.checkpoint.staging import Staging
from weightsmith.cli.main import main
from weightsmith.errors import OutputError, PlanError, RecipeError
from weightsmith.methods import registry

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDINGS, HEAD)


def write_tokenizer(folder, tokens, special=("<s>", "</s>"), **settings):
    """Write a tokenizer that has these tokens under these numbers: byte-level, without merges."""
    vocabulary = dict(tokens) if isinstance(tokens, dict) else {token: number for number, token in enumerate(tokens)}
    added = [{"id": vocabulary[token], "content": token, "special": True} for token in special if token in vocabulary]
    content = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (Path(folder) / "tokenizer.json").write_text(json.dumps(content))
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**roles, **settings}))
    return vocabulary


class Models:
    """Tiny Llamas with tokenizers of given tokens, on disk and as arrays."""

    def __init__(self, write_model):
        self._write = write_model
        self.arrays, self.paths, self.vocabularies = {}, {}, {}

    def add(self, name, tokens, *, rows=None, tied=False, dtype=np.float32, hidden=8, **config):
        rows = rows or len(tokens)
        arrays = llama_tensors(len(self.arrays), vocabulary=rows, dtype=dtype, hidden=hidden)
        if tied:
            del arrays[HEAD]
        settings = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": tied, "vocab_size": rows}
        path = self._write(name, arrays, {**settings, "bos_token_id": 0, "eos_token_id": 1, **config})
        self.vocabularies[name] = write_tokenizer(path, tokens)
        self.arrays[name], self.paths[name] = arrays, str(path)
        return str(path)

    def table(self, name, table):
        return self.arrays[name].get(table, self.arrays[name][EMBEDDINGS]).astype(np.float64)


def plainly(models, table, order, names, *, base=None, rules=None, rows=None):
    """Return the aligned table of every model: token after token, in float64. A rule is an array and whether forced."""
    made = {}
    for name in names:
        own, made[name] = models.vocabularies[name], []
        for token in order:
            having = [one for one in names if token in models.vocabularies[one]]

            def row(one, token=token):
                return models.table(one, table)[models.vocabularies[one][token]]

            start, forced = (rules or {}).get(token, (None, False))
            if token in own and not forced:
                made[name].append(row(name))
            elif start is not None:
                made[name].append(start)
            elif base in having:
                made[name].append(row(base))
            else:
                made[name].append(np.mean([row(one) for one in having], axis=0))
        filler = np.mean(made[name], axis=0)
        made[name] += [filler] * ((rows or len(order)) - len(order))
        made[name] = np.array(made[name])
    return made


def saved(merged, tmp_path):
    merged.save(tmp_path / "out")
    return read_safetensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())


def order_of(folder):
    content = json.loads((Path(folder) / "tokenizer.json").read_text())
    return [token for token, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1])]


A = ["<s>", "</s>", "a", "b", "c", "d"]
B = ["<s>", "b", "</s>", "x", "a", "y", "c"]
C = ["q", "<s>", "</s>", "x", "c", "a"]


@pytest.fixture
def models(write_model):
    return Models(write_model)


def test_equal_vocabularies_give_the_bytes_of_a_merge_without(models, tmp_path):
    a, b = models.add("a", A), models.add("b", A)
    plain = ws.merge("slerp", [b], a, t=0.3)
    for source in ("base", "union", b):
        other = ws.merge("slerp", [b], a, t=0.3, tokenizer_source=source)
        assert other.warnings == plain.warnings == ()
        assert list(other) == list(plain)
        for name, tensor in plain.items():
            assert np.array_equal(tensor.numpy(), other[name].numpy()), name


def test_a_permuted_vocabulary_is_undone_exactly(models, write_model, tmp_path):
    a = models.add("a", A)
    order = np.random.default_rng(0).permutation(len(A))
    arrays = {n: v[order] if n in TABLES else v for n, v in models.arrays["a"].items()}
    config = json.loads((Path(a) / "config.json").read_text())
    permuted = write_model("p", arrays, config)
    write_tokenizer(permuted, [A[number] for number in order])
    for merged in (
        ws.merge("linear", [a, permuted], weight=0.5, tokenizer_source=a),
        ws.merge("ties", [permuted], a, weight=1.0, density=0.5, tokenizer_source="base"),
        ws.merge("passthrough", [permuted], a, tokenizer_source="base"),
    ):
        for name, array in models.arrays["a"].items():
            assert np.array_equal(merged[name].numpy(), array), name


@pytest.mark.parametrize("base", [None, "a"])
@pytest.mark.parametrize("table", TABLES)
def test_a_union_takes_from_each_what_it_has(models, tmp_path, table, base):
    a, b, c = models.add("a", A), models.add("b", B), models.add("c", C)
    if base is None:
        merged = ws.merge("linear", [a, b, c], weight=[0.5, 0.2, 0.3], tokenizer_source="union")
    else:
        merged = ws.merge("task_arithmetic", [b, c], a, weight=[0.2, 0.3], tokenizer_source="union")
    found, config = saved(merged, tmp_path)
    order = order_of(tmp_path / "out")
    # The first's numbers stay; others follow in the order of their own.
    assert order == [*A, "x", "y", "q"]
    assert config["vocab_size"] == 9
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    aligned = plainly(models, table, order, "abc", base=base)
    if base is None:
        expected = 0.5 * aligned["a"] + 0.2 * aligned["b"] + 0.3 * aligned["c"]
    else:
        expected = aligned["a"] + 0.2 * (aligned["b"] - aligned["a"]) + 0.3 * (aligned["c"] - aligned["a"])
    np.testing.assert_allclose(found[table], expected, rtol=1e-6, atol=1e-6)
    text = "\n".join(merged.warnings)
    assert "vocabulary: 9 tokens (6 of" in text
    assert "all models have 4" in text
    if base is None:
        assert f"{a} has 6 of them, and takes 1 from {b}, 1 from {c}, 1 as means" in text


@pytest.mark.parametrize("source", ["base", "b", "c"])
def test_the_tokenizer_of_one_of_the_models(models, tmp_path, source):
    a, b, c = models.add("a", A), models.add("b", B), models.add("c", C)
    wanted = "a" if source == "base" else source
    asked = source if source == "base" else models.paths[source]
    merged = ws.merge("task_arithmetic", [b, c], a, weight=[0.2, 0.3], tokenizer_source=asked)
    found, config = saved(merged, tmp_path)
    order = list(models.vocabularies[wanted])
    for table in TABLES:
        aligned = plainly(models, table, order, "abc", base="a")
        expected = aligned["a"] + 0.2 * (aligned["b"] - aligned["a"]) + 0.3 * (aligned["c"] - aligned["a"])
        np.testing.assert_allclose(found[table], expected, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (Path(models.paths[wanted]) / "tokenizer.json").read_bytes()  # fmt: skip
    assert config["vocab_size"] == len(order)
    assert [order[config[key]] for key in ("bos_token_id", "eos_token_id")] == ["<s>", "</s>"]


def test_generation_ids_follow_the_tokenizer(models, tmp_path):
    a, b = models.add("a", A), models.add("b", B)
    generation = {"eos_token_id": [1, 5], "bad_words_ids": [[2, 3]], "temperature": 0.5}
    (Path(a) / "generation_config.json").write_text(json.dumps(generation))
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source=b)
    saved(merged, tmp_path)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [2], "bad_words_ids": [[4, 1]], "temperature": 0.5}
    assert any("eos_token_id 5 (d) is no token of the new tokenizer" in text for text in merged.warnings)


def test_padding_is_the_mean_of_all_rows_of_each_model(models, tmp_path):
    a, b = models.add("a", A), models.add("b", B)
    merged = ws.merge("linear", [a, b], weight=[0.25, 0.75], tokenizer={"source": "union", "pad_to_multiple_of": 7})
    found, config = saved(merged, tmp_path)
    order = order_of(tmp_path / "out")
    assert config["vocab_size"] == 14
    assert len(order) == 8
    for table in TABLES:
        aligned = plainly(models, table, order, "ab", rows=14)
        np.testing.assert_allclose(found[table], 0.25 * aligned["a"] + 0.75 * aligned["b"], rtol=1e-6, atol=1e-6)


def test_rows_beyond_the_tokenizer_stay_unless_mergekit_is_to_be_matched(models, tmp_path):
    """Qwen has 152,064 rows for 151,665 tokens; mergekit cuts them off (its issue 425)."""
    a, b = models.add("a", A, rows=12), models.add("b", B, rows=10)
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source=a)
    assert merged[EMBEDDINGS].shape == (12, 8)
    assert merged.config["vocab_size"] == 12
    own, other = models.table("a", HEAD), models.table("b", HEAD)
    found = merged[HEAD].numpy()
    # Row 6 is a token of b's; rows 7 to 9 are nobody's, and 10 and 11 only a has.
    np.testing.assert_allclose(found[7:10], (own[7:10] + other[7:10]) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[[6, 10, 11]], own[[6, 10, 11]], rtol=1e-6)
    assert ws.merge("linear", [a, b], weight=0.5, tokenizer_source=a, compat="mergekit")[HEAD].shape == (6, 8)
    # A union puts its new tokens into rows that were nobody's.
    union = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")
    assert union[HEAD].shape == (12, 8)
    np.testing.assert_allclose(union[HEAD].numpy()[6], other[models.vocabularies["b"]["x"]], rtol=1e-6)


def test_padded_beside_unpadded_vocabularies(models, tmp_path):
    """For mergekit a token beyond the config's vocab_size is a KeyError (its issue 342)."""
    a = models.add("a", A, rows=16)
    b = models.add("b", [*B, "beyond"], rows=7, vocab_size=7)
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")
    found, _ = saved(merged, tmp_path)
    assert "beyond" not in order_of(tmp_path / "out")
    assert found[EMBEDDINGS].shape[0] == 16
    kept = ws.merge("linear", [a, b], weight=0.5, tokenizer_source=b)
    assert kept[EMBEDDINGS].shape[0] == 8
    assert not kept[EMBEDDINGS].numpy()[7].any()
    assert any("1 as zeros" in text for text in kept.warnings)


def test_rules_for_single_tokens(models, tmp_path):
    a, b, c = models.add("a", A), models.add("b", B), models.add("c", C)
    tokens = {
        "x": {"source": c},
        "b": {"source": {"kind": "model_token", "model": a, "token": "c"}, "force": True},
        "a": {"source": {"kind": "zero"}, "force": True},
        "q": {"source": {"kind": "zero"}},
        "<new>": {"source": {"kind": "model_token", "model": b, "token_id": 3}},
        "d": {"force": True},
    }
    merged = ws.merge("linear", [a, b, c], weight=1.0, tokenizer={"source": "union", "tokens": tokens})
    found, _ = saved(merged, tmp_path)
    order = order_of(tmp_path / "out")
    assert order == [*A, "x", "y", "q", "<new>"]
    for table in TABLES:
        rows = {name: models.table(name, table) for name in "abc"}
        zero = np.zeros(8)
        rules = {
            "x": (rows["c"][3], False),
            "b": (rows["a"][4], True),
            "a": (zero, True),
            "q": (zero, False),
            "<new>": (rows["b"][3], False),
            "d": (rows["a"][5], True),
        }
        aligned = plainly(models, table, order, "abc", rules=rules)
        np.testing.assert_allclose(found[table], sum(aligned.values()) / 3, rtol=1e-6, atol=1e-6)
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [entry["content"] for entry in added] == ["<s>", "</s>", "<new>"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<s": {}}, r"'<s' is a token of none of the models \(did you mean '<s>'\?\)"),
        ({"d": {"source": "B"}}, r"B has no token 'd'"),
        ({"d": {"source": "z"}}, r"is to come from z, which is none of the models"),
        ({"d": {"source": {"kind": "model_token", "model": "B", "token": "</S>"}}}, r"has no token '</S>' \(did you mean '</s>'\?\)"),
        ({"d": {"source": {"kind": "model_token", "model": "B", "token_id": 7}}}, r"number 7 of .*, which has 7 rows"),
    ],
)  # fmt: skip
def test_tokens_and_models_that_do_not_exist_are_named(models, tokens, message):
    a, b = models.add("a", A), models.add("b", B)
    given = json.loads(json.dumps(tokens).replace('"B"', json.dumps(b)))
    with pytest.raises(PlanError, match=message.replace("B has", f"{b} has")):
        ws.merge("linear", [a, b], weight=1.0, tokenizer={"tokens": given})


@pytest.mark.parametrize("source", [{"kind": "zero", "token": "a"}, {"kind": "model_token", "token": "a"}, {"kind": "model_token", "model": "a"}])  # fmt: skip
def test_a_source_that_is_half_given_is_refused(source):
    with pytest.raises(RecipeError, match="takes no model and no token|needs model, and either"):
        ws.merge("linear", ["a"], tokenizer={"tokens": {"t": {"source": source}}})


def test_tied_and_untied_heads_together(models, tmp_path):
    a, b = models.add("a", A, tied=True), models.add("b", B)
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")
    found, config = saved(merged, tmp_path)
    order = order_of(tmp_path / "out")
    for table in TABLES:
        aligned = plainly(models, table, order, "ab")
        np.testing.assert_allclose(found[table], (aligned["a"] + aligned["b"]) / 2, rtol=1e-6, atol=1e-6)
    assert config["tie_word_embeddings"] is False
    tied = ws.merge("linear", [a, models.add("c", C, tied=True)], weight=0.5, tokenizer_source="union")
    assert HEAD not in tied
    assert tied.config["tie_word_embeddings"] is True


def test_a_row_from_a_model_of_another_dtype_keeps_its_values(models):
    a, b = models.add("a", A, dtype=ml_dtypes.bfloat16), models.add("b", B, dtype=np.float32)
    merged = ws.merge("linear", [a, b], weight=[1.0, 0.0], normalize=False, tokenizer_source="union")
    table = merged[EMBEDDINGS]
    assert table.dtype == np.float32
    assert np.array_equal(table.numpy()[6], models.arrays["b"][EMBEDDINGS][3])


def test_means_in_a_narrow_dtype_are_rounded_once(models, tmp_path):
    for name, tokens in zip("abc", (A, B, C), strict=True):
        models.add(name, tokens, dtype=ml_dtypes.bfloat16)
    paths = list(models.paths.values())
    merged = ws.merge("linear", paths, weight=[1.0, 0, 0], normalize=False, tokenizer_source="union")
    order = [*A, "x", "y", "q"]
    expected = plainly(models, EMBEDDINGS, order, "abc")["a"].astype(ml_dtypes.bfloat16)
    assert np.array_equal(merged[EMBEDDINGS].numpy(), expected)


def test_importances_follow_the_rows_of_their_model(models, write_model):
    a, b = models.add("a", A), models.add("b", B)
    fishers = {}
    for name in "ab":
        rng = np.random.default_rng(ord(name))
        arrays = {n: rng.random(v.shape).astype(np.float32) + 0.1 for n, v in models.arrays[name].items()}
        fishers[name] = arrays
        write_model(f"f{name}", arrays)
    folders = [str(Path(a).parent / f"f{name}") for name in "ab"]

    @ws.method("by_own_importance", fisher="required")
    def by_own_importance(block):
        return sum(f * x for f, x in zip(block.fishers, block.models, strict=True)) / sum(block.fishers)

    try:
        merged = ws.merge("by_own_importance", [a, b], fisher=folders, tokenizer_source="union")
    finally:
        del registry._METHODS["by_own_importance"]
    order = [*A, "x", "y"]
    aligned = plainly(models, HEAD, order, "ab")
    weights = {}
    for name in "ab":
        own = models.vocabularies[name]
        weights[name] = np.array([fishers[name][HEAD][own[t]] if t in own else np.zeros(8) for t in order])
    expected = sum(weights[n] * aligned[n] for n in "ab") / sum(weights.values())
    np.testing.assert_allclose(merged[HEAD].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_result_of_a_step_has_its_own_union(models, tmp_path):
    a, b, c = models.add("a", A), models.add("b", B), models.add("c", C)
    inner = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union", out_dtype="bfloat16")
    outer = ws.merge("linear", [c, inner], weight=0.5, tokenizer_source="union")
    inner.save(tmp_path / "inner")
    again = ws.merge("linear", [c, str(tmp_path / "inner")], weight=0.5, tokenizer_source="union")
    assert list(outer) == list(again)
    for name, tensor in again.items():
        assert np.array_equal(outer[name].numpy(), tensor.numpy()), name
    assert outer.companions.files["tokenizer.json"] == again.companions.files["tokenizer.json"]
    assert any(text.startswith("step ") and "vocabulary:" in text for text in outer.warnings)


def test_rules_slices_and_a_base_that_is_not_listed(models, tmp_path):
    a, b = models.add("a", A), models.add("b", B)
    whole = {t: plainly(models, t, [*A, "x", "y"], "ab", base="a") for t in TABLES}
    recipe = f"""
merge_method: linear
base_model: {a}
slices:
- sources: [{{model: {b}, layer_range: [0, 2]}}]
parameters: {{weight: 1}}
rules: [{{filter: lm_head, merge_method: slerp, parameters: {{t: 0.0}}}}]
tokenizer: {{source: union}}
"""
    merged = ws.merge_recipe(recipe)
    np.testing.assert_allclose(merged[EMBEDDINGS].numpy(), whole[EMBEDDINGS]["b"], rtol=1e-6)
    np.testing.assert_allclose(merged[HEAD].numpy(), whole[HEAD]["a"], rtol=1e-6)
    assert merged.config["vocab_size"] == 8


def test_results_depend_on_neither_threads_nor_memory_and_are_verified_and_made_again(models, tmp_path):
    a, b, c = models.add("a", A), models.add("b", B), models.add("c", C)
    merged = ws.merge("dare_ties", [b, c], a, weight=0.5, density=0.5, tokenizer={"pad_to_multiple_of": 16})
    merged.save(tmp_path / "one", threads=1)
    merged.save(tmp_path / "two", threads=4, memory=200_000_000)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "weightsmith-manifest.json"}
        for n in ("one", "two")
    )
    assert one == two
    assert ws.verify(tmp_path / "one").ok
    assert ws.reproduce(tmp_path / "one").ok


@pytest.mark.parametrize("asked", ["union", "base"])
def test_a_model_without_tokenizer_is_named(models, asked):
    a, b = models.add("a", A), models.add("b", B)
    (Path(b) / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=f"{b} has no tokenizer"):
        ws.merge("slerp", [b], a, t=0.5, tokenizer_source=asked)


def test_models_of_different_width_have_no_common_vocabulary(models):
    a, b = models.add("a", A), models.add("b", B, hidden=4)
    with pytest.raises(PlanError, match=r"is \[6, 8\] in .* and \[7, 4\] in .*different width"):
        ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")


def test_without_a_tokenizer_vocabularies_of_other_lengths_are_refused_with_the_way_out(models):
    a, b = models.add("a", A), models.add("b", B)
    with pytest.raises(PlanError, match=r"tokenizer_source: union brings them to one vocabulary"):
        ws.merge("linear", [a, b], weight=0.5)
    with pytest.raises(PlanError, match=r"'unoin' is neither union, .* \(did you mean 'union'\?\)"):
        ws.merge("linear", [a, b], weight=0.5, tokenizer_source="unoin")


def test_tokens_that_the_result_lacks_are_counted_where_others_have_one_row_together(models):
    letter, byte = "A", "<0x41>"
    tokens = {"<s>": 0, "</s>": 1, letter: 2, byte: 3}
    a, b = models.add("a", tokens), models.add("b", ["<s>", "</s>", letter, "\u0120\u00e2"])
    content = json.loads((Path(a) / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = True
    content["pre_tokenizer"] = content["decoder"] = None
    (Path(a) / "tokenizer.json").write_text(json.dumps(content))
    # Both A and <0x41> take b's row of A; half a character that b has is no token of a's kind of tokenizer.
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")
    assert f"1 tokens of {b} are none of the result's" in merged.warnings


def test_a_tokenizer_that_is_not_the_model_s_is_refused(models):
    a, b = models.add("a", A), models.add("b", B)
    write_tokenizer(b, {"<s>": 0, "far": 60_000_000})
    with pytest.raises(PlanError, match="numbers tokens up to 60000000, and the model has 7 rows"):
        ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")


def test_models_of_images_take_part_without_a_tokenizer(models, write_model):
    a, b = models.add("a", A), models.add("b", B)
    rng = np.random.default_rng(0)
    tower = {"vision_tower.layers.0.proj.weight": rng.standard_normal((3, 3)).astype(np.float32)}
    for path in (a, b):
        write_safetensors(Path(path) / "model.safetensors", {**models.arrays[Path(path).name], **tower})
    vision = str(write_model("v", {"layers.0.proj.weight": tower["vision_tower.layers.0.proj.weight"]}, {"model_type": "clip_vision_model"}))  # fmt: skip
    recipe = f"""
merge_method: linear
parameters: {{weight: 1}}
base_model: {a}
modules:
  vision: {{prefix: vision_tower., models: [{{model: {a}}}, {{model: {vision}, prefix: ""}}]}}
  text: {{prefix: model., models: [{{model: {a}}}, {{model: {b}}}]}}
tokenizer_source: union
"""
    merged = ws.merge_recipe(recipe)
    aligned = plainly(models, EMBEDDINGS, [*A, "x", "y"], "ab", base="a")
    np.testing.assert_allclose(merged[EMBEDDINGS].numpy(), (aligned["a"] + aligned["b"]) / 2, rtol=1e-6, atol=1e-6)
    # The head is carried from the base, with a row for every token.
    np.testing.assert_allclose(merged[HEAD].numpy(), plainly(models, HEAD, [*A, "x", "y"], "ab", base="a")["a"])


def test_an_unfinished_run_is_not_gone_on_with_by_another_tokenizer(models, tmp_path, monkeypatch):
    a, b = models.add("a", A), models.add("b", B)

    def begin():
        return ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        begin().save(tmp_path / "out")
    monkeypatch.undo()
    models.vocabularies["b"] = write_tokenizer(b, ["<s>", "a", "</s>", "x", "b", "y", "c"])
    with pytest.raises(OutputError, match="restart"):
        begin().save(tmp_path / "out")


def test_an_adapter_that_brought_tokens_takes_part_with_them(models, tmp_path):
    """A base with an adapter is a model like any other: with the adapter's tokenizer and its longer embeddings."""
    a, b = models.add("a", A), models.add("b", B)
    rng = np.random.default_rng(5)
    longer = {table: rng.standard_normal((8, 8)).astype(np.float32) for table in TABLES}
    adapter = tmp_path / "lora"
    adapter.mkdir()
    target = "model.layers.0.self_attn.q_proj"
    factors = {f"base_model.model.{target}.lora_{x}.weight": rng.standard_normal(s) for x, s in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    saved_tables = {f"base_model.model.{name}": array for name, array in longer.items()}
    write_safetensors(adapter / "adapter_model.safetensors", {**{n: v.astype(np.float32) for n, v in factors.items()}, **saved_tables})  # fmt: skip
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    # Its new tokens are the other model's, too.
    own = write_tokenizer(adapter, [*A, "y", "<tool>"])
    merged = ws.merge("linear", [f"{a}+{adapter}", b], weight=0.5, tokenizer_source="union")
    found, config = saved(merged, tmp_path)
    order = order_of(tmp_path / "out")
    assert order == [*A, "y", "<tool>", "x"]
    assert config["vocab_size"] == 9
    for table in TABLES:
        for token, row in zip(order, found[table], strict=True):
            rows = [longer[table][own[token]]] if token in own else []
            rows += [models.table("b", table)[models.vocabularies["b"][token]]] if token in models.vocabularies["b"] else []  # fmt: skip
            np.testing.assert_allclose(row, np.mean(rows, axis=0), rtol=1e-6, atol=1e-6)


def test_biases_and_tables_under_several_names(models, write_model):
    """BERT's bias is saved twice, BART's is one row, and encoder and decoder share a table under other names."""
    rng = np.random.default_rng(0)

    def write(name, tokens, names, bias):
        rows = len(tokens)
        shape = {"final_logits_bias": (1, rows)}
        arrays = {one: rng.standard_normal((rows, 4)).astype(np.float32) for one in names}
        if bias:
            arrays[bias] = rng.standard_normal(shape.get(bias, (rows,))).astype(np.float32)
        config = {"vocab_size": rows, "model_type": "bart", "is_encoder_decoder": True, "tie_word_embeddings": False}
        path = write_model(name, arrays, config)
        return str(path), arrays, write_tokenizer(path, tokens)

    for bias in ("final_logits_bias", "lm_head.bias", None):
        a, of_a, at_a = write("a", A, ["model.shared.weight", "lm_head.weight"], bias)
        b, of_b, at_b = write("b", B, ["model.encoder.embed_tokens.weight", "lm_head.weight"], bias)
        merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union", on_missing="first")
        for table in ("model.shared.weight", "lm_head.weight", *([bias] if bias else [])):
            one = of_a[table].reshape(6, -1)
            other = of_b[table.replace("shared", "encoder.embed_tokens")].reshape(7, -1)
            rows = [
                [own[at[token]] for own, at in ((one, at_a), (other, at_b)) if token in at] for token in [*A, "x", "y"]
            ]
            expected = np.array([np.mean(having, axis=0) for having in rows])
            found = merged[table].numpy().reshape(8, -1)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=table)


def test_tables_of_another_length_are_refused_rather_than_left_in_the_old_order(models, write_model):
    a, b = models.add("a", A), models.add("b", B)
    arrays = {**models.arrays["b"], HEAD: np.zeros((9, 8), np.float32)}
    write_safetensors(Path(b) / "model.safetensors", arrays)
    with pytest.raises(PlanError, match=r"has lm_head.weight as \[9, 8\], and other tables of tokens with 7 rows"):
        ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")


def test_a_config_that_counts_other_rows_does_not_hide_the_tables(models):
    a, b = models.add("a", A), models.add("b", B, vocab_size=99)
    merged = ws.merge("linear", [a, b], weight=0.5, tokenizer_source="union")
    expected = plainly(models, HEAD, [*A, "x", "y"], "ab")
    np.testing.assert_allclose(merged[HEAD].numpy(), (expected["a"] + expected["b"]) / 2, rtol=1e-6, atol=1e-6)


def test_the_same_by_flags(models, tmp_path):
    a, b = models.add("a", A), models.add("b", B)
    flags = ["merge", "--method", "slerp", "--base", a, "--model", b, "-p", "t=0.5", "--tokenizer-source", "union"]
    with pytest.raises(SystemExit) as end:
        main([*flags, str(tmp_path / "out"), "--quiet"])
    assert end.value.code == 0
    assert read_safetensors(tmp_path / "out")[HEAD].shape == (8, 8)


@pytest.mark.parametrize("seed", range(12))
def test_vocabularies_drawn_at_random(models, seed):
    """Two to four models, some tied, some with rows to spare; with and without a base; any tokenizer; padded."""
    random = np.random.default_rng(seed)
    names = "abcd"[: random.integers(2, 5)]
    for name in names:
        tokens = ["<s>", "</s>", *(f"t{number}" for number in random.permutation(40)[: random.integers(3, 30)])]
        rows = len(tokens) + int(random.choice([0, 5]))
        models.add(name, random.permutation(tokens).tolist(), rows=rows, tied=bool(random.random() < 0.3))
    paths, weights = [models.paths[name] for name in names], random.random(len(names)).round(2) + 0.1
    base = "a" if seed % 2 else None
    source = str(random.choice(["union", paths[-1], *(["base"] if base else [])]))
    multiple = int(random.choice([1, 8, 64]))
    asked = {"source": source, "pad_to_multiple_of": multiple}
    if base:
        merged = ws.merge("task_arithmetic", paths[1:], paths[0], weight=weights[1:].tolist(), tokenizer=asked)
    else:
        merged = ws.merge("linear", paths, weight=weights.tolist(), normalize=False, tokenizer=asked)
    file = merged.companions.files["tokenizer.json"]
    content = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    order = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    rows = -(-len(order) // multiple) * multiple
    assert merged.config["vocab_size"] == rows
    for table in TABLES:
        if table not in merged:
            assert not any(HEAD in models.arrays[name] for name in names)
            continue
        aligned = plainly(models, table, order, names, base=base, rows=rows)
        parts = [aligned[name] for name in names]
        if base:
            expected = parts[0] + sum(w * (part - parts[0]) for w, part in zip(weights[1:], parts[1:], strict=True))
        else:
            expected = sum(w * part for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(merged[table].numpy(), expected, rtol=1e-5, atol=2e-6)
