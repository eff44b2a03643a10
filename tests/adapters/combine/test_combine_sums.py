"""Sums of adapters are held against dense float64 sums, and what is cut off against plain SVDs."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from lora_files import MLP, Q0, Q1, SHAPES, best, deltas, relative, true_sum, write_lora

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.adapters import factors
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.patterns import Patterns
from weightsmith.adapters.peft_config import patterns
from weightsmith.errors import CheckpointError, MethodError, OutputError, PlanError


def three(tmp_path: Path) -> list[Path]:
    """Return adapters of different ranks and scales."""
    return [
        write_lora(tmp_path / "a", 3, 1),
        write_lora(tmp_path / "b", 2, 2, alpha=7),
        write_lora(tmp_path / "c", 4, 3, use_rslora=True),
    ]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, -0.25, 2], [0.3, 0, 0.7]])
@pytest.mark.parametrize("method", ["linear", "cat", "orthogonal"])
def test_the_default_is_the_true_weighted_sum(tmp_path, method, weights):
    given = three(tmp_path)
    merged = ws.adapters.merge(given, method, weight=weights)
    merged.save(tmp_path / "out")
    found, wanted = deltas(tmp_path / "out"), true_sum(given, weights)
    for module, matrix in wanted.items():
        assert relative(found[module], matrix) < 1e-6
        rank = next(layer.rank for layer in merged.report().layers if layer.module == module)
        assert rank == sum(r for r, weight in zip((3, 2, 4), weights, strict=True) if weight)
    report = merged.report()
    off = np.sqrt(sum(np.sum((found[module] - matrix) ** 2) for module, matrix in wanted.items()))
    whole = np.sqrt(sum(np.sum(matrix**2) for matrix in wanted.values()))
    assert report.error == pytest.approx(off / whole, rel=1e-4)


@pytest.mark.parametrize(("method", "options"), [("linear", {"rank": 2}), ("svd", {}), ("cat", {"rank": 5})])
def test_a_smaller_rank_is_the_best_of_that_rank_and_its_error_is_told(tmp_path, method, options):
    given, weights = three(tmp_path), [1.0, 0.5, -1.0]
    merged = ws.adapters.merge(given, method, weight=weights, **options)
    merged.save(tmp_path / "out")
    rank = options.get("rank", 4)
    for layer in merged.report().layers:
        wanted = true_sum(given, weights)[layer.module]
        found = deltas(tmp_path / "out")[layer.module]
        assert layer.rank == rank == np.linalg.matrix_rank(found, tol=1e-4)
        assert relative(found, best(wanted, rank)) < 1e-5
        assert layer.relative == pytest.approx(relative(found, wanted), rel=1e-5)


def test_energy_keeps_the_least_rank_that_holds_the_share(tmp_path):
    given = three(tmp_path)
    merged = ws.adapters.merge(given, energy=0.8)
    for layer in merged.report().layers:
        s = np.linalg.svd(true_sum(given, [1, 1, 1])[layer.module], compute_uv=False)
        shares = np.cumsum(s**2) / np.sum(s**2)
        assert shares[layer.rank - 1] >= 0.8 > shares[layer.rank - 2]
        assert layer.relative**2 == pytest.approx(1 - shares[layer.rank - 1], rel=1e-4)
    assert {layer.rank for layer in ws.adapters.merge(given, energy=0.8, rank=1).report().layers} == {1}
    assert {layer.rank for layer in ws.adapters.merge(given, energy=1.0).report().layers} == {9}


def test_ranks_that_adapters_share_are_kept_once(tmp_path):
    one = write_lora(tmp_path / "a", 3, 1)
    merged = ws.adapters.merge([one, one], weight=[0.25, 0.75])
    merged.save(tmp_path / "out")
    assert merged.report().ranks == (3, 3)
    for module, delta in deltas(one).items():
        assert relative(deltas(tmp_path / "out")[module], delta) < 1e-6


def test_a_sum_that_cancels_is_zero_and_still_an_adapter(tmp_path):
    one = write_lora(tmp_path / "a", 3, 1)
    merged = ws.adapters.merge([one, one], weight=[1, -1])
    merged.save(tmp_path / "out")
    assert merged.report().ranks == (1, 1)
    assert all(np.abs(delta).max() < 1e-12 for delta in deltas(tmp_path / "out").values())
    assert ws.adapters.inspect(tmp_path / "out").norm == pytest.approx(0, abs=1e-12)


def test_layers_that_only_some_adapters_change_take_part_alone(tmp_path):
    a = write_lora(tmp_path / "a", 3, 1, shapes={Q0: SHAPES[Q0], MLP: SHAPES[MLP]})
    b = write_lora(tmp_path / "b", 2, 2, shapes={Q0: SHAPES[Q0], Q1: SHAPES[Q1]})
    merged = ws.adapters.merge([a, b], weight=[2, 3])
    merged.save(tmp_path / "out")
    found, wanted = deltas(tmp_path / "out"), true_sum([a, b], [2, 3])
    assert set(found) == {Q0, Q1, MLP}
    assert {layer.module: layer.rank for layer in merged.report().layers} == {Q0: 5, MLP: 3, Q1: 2}
    for module, matrix in wanted.items():
        assert relative(found[module], matrix) < 1e-6


def test_embeddings_and_convolutions_keep_their_forms(tmp_path):
    shapes = {"embed_tokens": (40, 16), "conv": (10, 6, 3, 3), "one": (8, 5, 7)}
    given = [write_lora(tmp_path / "a", 3, 1, shapes=shapes), write_lora(tmp_path / "b", 2, 2, shapes=shapes)]
    for number, options in enumerate(({}, {"rank": 2}, {"method": "cat"}, {"method": "lego", "rank": 4})):
        out = tmp_path / f"out{number}"
        merged = ws.adapters.merge(given, weight=[1, -0.5], **options)
        merged.save(out)
        stored = read_safetensors(out)
        rank = merged.report().ranks[0]
        assert stored["base_model.model.embed_tokens.lora_embedding_A"].shape == (rank, 40)
        assert stored["base_model.model.conv.lora_A.weight"].shape == (rank, 6, 3, 3)
        assert stored["base_model.model.conv.lora_B.weight"].shape == (10, rank, 1, 1)
        assert stored["base_model.model.one.lora_B.weight"].shape == (8, rank, 1)
        if options.get("method") != "lego":
            for module, matrix in true_sum(given, [1, -0.5]).items():
                wanted = best(matrix, rank)
                assert relative(deltas(out)[module], wanted) < 1e-6


def test_concatenation_keeps_the_inputs_own_numbers(tmp_path):
    given = three(tmp_path)[:2]
    ws.adapters.merge(given, "cat", weight=[0.5, 1]).save(tmp_path / "out")
    name = f"base_model.model.{Q0}.lora_A.weight"
    own = [read_safetensors(folder)[name] for folder in given]
    assert np.array_equal(read_safetensors(tmp_path / "out")[name], np.concatenate(own))


def test_the_dtype_is_the_inputs_unless_given_and_the_error_tells_of_it(tmp_path):
    given = [write_lora(tmp_path / name, 3, seed, dtype=ml_dtypes.bfloat16) for seed, name in enumerate("ab")]
    for dtype, kind in ((None, ml_dtypes.bfloat16), ("float32", np.float32), ("float16", np.float16)):
        out = tmp_path / str(dtype)
        merged = ws.adapters.merge(given, dtype=dtype)
        merged.save(out)
        assert {value.dtype for value in read_safetensors(out).values()} == {np.dtype(kind)}
        for layer in merged.report().layers:
            off = relative(deltas(out)[layer.module], true_sum(given, [1, 1])[layer.module])
            assert layer.relative == pytest.approx(off, rel=1e-2)
    with pytest.raises(MethodError, match="too coarse for factors"):
        ws.adapters.merge(given, dtype="float8_e4m3fn")
    big = write_lora(tmp_path / "big", 2, 5, alpha=1e7)
    with pytest.raises(OutputError, match="is beyond float16"):
        ws.adapters.merge([big, big], "cat", dtype="float16").save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_threads_memory_and_a_second_run_make_the_same_bytes(tmp_path):
    given = three(tmp_path)
    texts = []
    for number, options in enumerate(({"threads": 1}, {"threads": 4}, {"threads": 2, "memory": 200_000_000})):
        out = tmp_path / f"out{number}"
        ws.adapters.merge(given, rank=3, weight=[1, 2, 3]).save(out, **options)
        texts.append((out / "adapter_model.safetensors").read_bytes())
        assert not ws.verify(out).problems
        assert not ws.reproduce(out).problems
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(PlanError, match="MB of memory"):
        ws.adapters.merge(given).save(tmp_path / "no", memory=1_000_000)
    with pytest.raises(PlanError, match="--memory allows"):
        ws.adapters.merge(given, memory=1000)


def test_the_config_is_that_of_what_is_written(tmp_path):
    common = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    a = write_lora(tmp_path / "a", 3, 1, use_rslora=True, **common)
    b = write_lora(tmp_path / "b", 2, 2, shapes={Q0: SHAPES[Q0]}, **common | {"lora_dropout": 0.0})
    merged = ws.adapters.merge([a, b])
    assert merged.warnings == ()
    merged.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert "lora_dropout" not in config
    assert config["use_rslora"] is False
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {Q0: 5}
    assert config["target_modules"] == ["mlp", "q_proj"]


def test_targets_are_whole_names_where_the_inputs_do_not_list_ends_of_names(tmp_path):
    a = write_lora(tmp_path / "a", 3, 1, target_modules=".*q_proj|.*mlp")
    b = write_lora(tmp_path / "b", 2, 2, shapes={Q1: SHAPES[Q1]}, layers_to_transform=[1])
    for number, given in enumerate(([a], [b])):
        ws.adapters.merge(given).save(tmp_path / f"out{number}")
        config = json.loads((tmp_path / f"out{number}" / "adapter_config.json").read_text())
        assert set(config["target_modules"]) == set(deltas(given[0]))


def test_rank_patterns_give_every_module_its_own_rank():
    ranks = {"a.q": 2, "x.a.q": 3, "y.a.q": 4, "a_q": 5, "z.a_q": 4, "b": 4, "c": 4, "d": 4}
    found = patterns(ranks, 4)
    assert {module: Patterns(found).value(module, 4) for module in ranks} == ranks
    assert patterns({"a": 2, "b": 2}, 2) == {}


def test_products_are_taken_apart_without_being_formed():
    rng = np.random.default_rng(0)
    for rows, rank, columns in ((9, 3, 7), (4, 6, 5), (5, 0, 4), (3, 8, 2)):
        product = LowRank(rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)))
        dense = product.left @ product.right
        u, s, vt = factors.triples(product)
        np.testing.assert_allclose((u * s) @ vt, dense, atol=1e-12)
        wanted = np.linalg.svd(dense, compute_uv=False)[: len(s)]
        np.testing.assert_allclose(s, wanted, atol=1e-12)
        np.testing.assert_allclose(factors.values(product), wanted, atol=1e-12)
        assert factors.norm(product) == pytest.approx(np.linalg.norm(dense), abs=1e-12)
        assert all(column[np.abs(column).argmax()] > 0 for column in u.T if column.size)


def test_what_cannot_be_combined_is_refused_with_the_reason(tmp_path, write_model):
    a = write_lora(tmp_path / "a", 3, 1)
    with pytest.raises(PlanError, match="nothing to combine"):
        ws.adapters.merge([])
    with pytest.raises(MethodError, match="2 weights for 1 adapters"):
        ws.adapters.merge([a], weight=[1, 2])
    with pytest.raises(MethodError, match="finite numbers"):
        ws.adapters.merge([a], weight=float("nan"))
    with pytest.raises(MethodError, match="there is no method 'liner'.*did you mean 'linear'"):
        ws.adapters.merge([a], "liner")
    with pytest.raises(MethodError, match="works on whole models"):
        ws.adapters.merge([a], "transfer")
    with pytest.raises(MethodError, match="has no parameter 'densty'.*it takes: none"):
        ws.adapters.merge([a], densty=1)
    with pytest.raises(MethodError, match="rank is 0; a whole number"):
        ws.adapters.merge([a], rank=0)
    with pytest.raises(MethodError, match="energy is 1.5; a share"):
        ws.adapters.merge([a], energy=1.5)
    other = write_lora(tmp_path / "other", 3, 1, shapes={Q0: (24, 17)})
    with pytest.raises(PlanError, match="they are not of one model"):
        ws.adapters.merge([a, other])
    with pytest.raises(CheckpointError, match="is no adapter"):
        ws.adapters.merge([write_model("plain", {"w": np.zeros((2, 2), np.float32)})])
    broken = write_lora(tmp_path / "broken", 2, 1)
    bad = {name: value.copy() for name, value in read_safetensors(broken).items()}
    next(iter(bad.values()))[0, 0] = np.nan
    from conftest import write_safetensors

    write_safetensors(broken / "adapter_model.safetensors", bad)
    with pytest.raises(CheckpointError, match="values are NaN or infinite"):
        ws.adapters.merge([broken])
    with pytest.raises(OutputError, match="an adapter is a folder"):
        ws.adapters.merge([a]).save(tmp_path / "x.safetensors")


def test_adapters_of_other_bases_or_without_a_layer_in_common_are_warned_of(tmp_path):
    a = write_lora(tmp_path / "a", 3, 1, base_model_name_or_path="one")
    b = write_lora(tmp_path / "b", 3, 1, shapes={"other.proj": (5, 4)}, base_model_name_or_path="two")
    told = " ".join(ws.adapters.merge([a, b]).warnings)
    assert "different bases (one, two)" in told
    assert "no layer is changed by another adapter too" in told
