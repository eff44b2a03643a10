"""What is taken out of a fine-tune, against NumPy's decompositions; and what cannot be."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.cli.main import main
from weightsmith.errors import CheckpointError, MethodError, OutputError, PlanError
from weightsmith.extraction.difference import Difference
from weightsmith.extraction.modules import Modules
from weightsmith.extraction.placement import target_names, task_type
from weightsmith.extraction.ranks import Candidate, Ranks, choose

PREFIX = "base_model.model."


@pytest.fixture
def models(write_model):
    base, change = llama_tensors(0, hidden=12, vocabulary=20), llama_tensors(1, hidden=12, vocabulary=20)
    tuned = {name: values + np.float32(0.1) * change[name] for name, values in base.items()}
    # Decaying singular values, as changes have them.
    for name, values in tuned.items():
        if values.ndim == 2:
            u, s, vt = np.linalg.svd(change[name], full_matrices=False)
            tuned[name] = base[name] + ((u * s / np.arange(1, len(s) + 1) ** 1.5) @ vt).astype(np.float32)
    return write_model("base", base), write_model("tuned", tuned), base, tuned


def changes(models) -> dict[str, np.ndarray[Any, Any]]:
    _, _, base, tuned = models
    return {name: tuned[name].astype(np.float64) - base[name] for name in tuned if tuned[name].ndim == 2}


def extract(models, **settings):
    return ws.extract(models[1], models[0], threads=1, **settings)


def restored(adapter: Any, name: str) -> np.ndarray[Any, Any]:
    stem = PREFIX + name.removesuffix(".weight")
    if f"{stem}.lora_embedding_A" in adapter:
        down, up = (adapter[f"{stem}.lora_embedding_{side}"].numpy().astype(np.float64) for side in "AB")
        return (up @ down).T
    down, up = (adapter[f"{stem}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB")
    return up @ down


def test_a_fixed_rank_keeps_the_leading_triples(models):
    adapter = extract(models, rank=3)
    report = {one.name: one for one in adapter.report().matrices}
    for name, change in changes(models).items():
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        np.testing.assert_allclose(restored(adapter, name), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
        one = report[name]
        assert one.error == pytest.approx(math.sqrt((s[3:] ** 2).sum() / (s**2).sum()), rel=1e-4)
        assert one.weight_error == pytest.approx(
            math.sqrt((s[3:] ** 2).sum()) / np.linalg.norm(models[3][name].astype(np.float64)), rel=1e-4
        )
        share = s / s.sum()
        assert one.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_factors_are_balanced(models):
    adapter = extract(models, rank=2)
    down = adapter[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"].numpy()
    up = adapter[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"].numpy()
    np.testing.assert_allclose(np.linalg.norm(down, axis=1), np.linalg.norm(up, axis=0), rtol=1e-5)


def test_energy_takes_the_least_rank_that_reaches_it(models):
    for share in (0.5, 0.9, 0.99):
        for one in extract(models, energy=share).report().matrices:
            s = np.linalg.svd(changes(models)[one.name], compute_uv=False)
            kept = np.cumsum(s**2) / (s**2).sum()
            assert one.rank == 1 + int((kept < share).sum())
            assert one.energy >= share - 1e-6


def test_the_effective_rank_is_rounded_up(models):
    for one in extract(models, effective_rank=True).report().matrices:
        assert one.rank == math.ceil(one.effective_rank)


@pytest.mark.parametrize("budget", [700, 1_000, 2_345, 5_000])
def test_a_budget_is_kept_to_the_byte_and_spent_where_it_keeps_most(models, budget):
    adapter = extract(models, budget=budget)
    report = adapter.report()
    spent = sum(tensor.nbytes for tensor in adapter.values())
    assert spent == report.nbytes <= budget
    whole = sum(models[3][name].nbytes for name in report.whole)
    costs = {name: 4 * sum(change.shape) for name, change in changes(models).items()}
    squares = {name: np.linalg.svd(change, compute_uv=False) ** 2 for name, change in changes(models).items()}
    ranks = dict.fromkeys(costs, 0) | {one.name: one.rank for one in report.matrices}
    assert spent == whole + sum(costs[name] * rank for name, rank in ranks.items())
    # No triple that is left would fit.
    assert all(budget - spent < costs[name] for name, rank in ranks.items() if rank < len(squares[name]))
    kept = sum(squares[name][:rank].sum() for name, rank in ranks.items())
    # The best of a finely divisible budget is what no choice exceeds.
    offers = sorted(((s / costs[name], costs[name]) for name in costs for s in squares[name]), reverse=True)
    left, most = float(budget - whole), 0.0
    for gain, cost in offers:
        most += gain * min(cost, left)
        left -= min(cost, left)
    assert most - max(s[0] for s in squares.values()) <= kept <= most + 1e-9


def test_taking_by_gain_is_the_best_choice_for_what_it_spends():
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = [np.sort(rng.random(3))[::-1] for _ in range(3)]
        costs = [4, 6, 10]
        candidates = [Candidate(one, float((one**2).sum()), cost) for one, cost in zip(values, costs, strict=True)]
        ranks = choose(Ranks(budget=30), candidates)
        spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
        kept = sum((one[:rank] ** 2).sum() for one, rank in zip(values, ranks, strict=True))
        choices = [
            sum((one[:rank] ** 2).sum() for one, rank in zip(values, choice, strict=True))
            for choice in itertools.product(range(4), repeat=3)
            if sum(cost * rank for cost, rank in zip(costs, choice, strict=True)) <= spent
        ]
        # Off the best by less than the one triple that did not fit.
        assert kept > max(choices) - max(float(one[0] ** 2) for one in values)
        assert spent <= 30


def test_max_rank_bounds_every_rule(models):
    for settings in ({"energy": 1.0}, {"budget": 100_000}, {"effective_rank": True}):
        assert max(one.rank for one in extract(models, max_rank=2, **settings).report().matrices) == 2


def test_the_randomised_error_is_measured(write_model):
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = rng.standard_normal((90, 120)).astype(np.float32)
    u, _, vt = np.linalg.svd(rng.standard_normal((90, 120)), full_matrices=False)
    tuned = (base + (u * 0.9 ** np.arange(90)) @ vt).astype(np.float32)
    paths = write_model("base", {name: base}), write_model("tuned", {name: tuned})
    change = tuned.astype(np.float64) - base
    best = math.sqrt((np.linalg.svd(change, compute_uv=False)[8:] ** 2).sum()) / np.linalg.norm(change)
    adapter = ws.extract(paths[1], paths[0], rank=8, decomposition="randomized")
    (one,) = adapter.report().matrices
    assert one.error == pytest.approx(
        np.linalg.norm(change - restored(adapter, name)) / np.linalg.norm(change), rel=1e-6
    )
    assert best <= one.error < 1.05 * best
    assert one.effective_rank is None
    # The energy of the whole change is known, whichever values are.
    (by_energy,) = ws.extract(paths[1], paths[0], energy=0.9, max_rank=20, decomposition="randomized").report().matrices
    assert by_energy.rank in (11, 12)
    assert by_energy.energy == pytest.approx(0.9, abs=0.02)


def test_a_change_of_low_rank_comes_back_whole(models, write_model):
    base = models[2]
    rng = np.random.default_rng(5)
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = {
        **base,
        name: base[name] + (rng.standard_normal((24, 2)) @ rng.standard_normal((2, 12))).astype(np.float32),
    }
    report = ws.extract(write_model("low", tuned), models[0], energy=1.0, threads=1).report()
    assert [(one.name, one.rank) for one in report.matrices] == [(name, 2)]
    assert report.error < 1e-6
    assert report.whole == report.left_out == ()
    assert report.unchanged == len(base) - 1


def test_dora_is_never_further_off_than_the_lora_of_its_rank(models, write_model):
    for rank in (1, 2, 5):
        plain = {one.name: one.error for one in extract(models, rank=rank).report().matrices}
        for one in extract(models, rank=rank, dora=True).report().matrices:
            assert one.error <= plain[one.name] * (1 + 1e-6)
    # A fine-tune whose rows are longer alone is no change of direction: the magnitude says it all.
    base = models[2]
    gains = np.linspace(0.5, 2, 24, dtype=np.float32)[:, None]
    name = "model.layers.0.mlp.up_proj.weight"
    longer = write_model("longer", {**base, name: base[name] * gains})
    (one,) = ws.extract(longer, models[0], rank=1, dora=True, threads=1).report().matrices
    (plain_one,) = ws.extract(longer, models[0], rank=1, threads=1).report().matrices
    assert one.error < 1e-6 < 0.1 < plain_one.error


def test_dora_keeps_a_matrix_whole_whose_rows_have_no_direction(models, write_model):
    base = {name: values.copy() for name, values in models[2].items()}
    base["model.layers.0.mlp.up_proj.weight"][3] = 0
    adapter = ws.extract(models[1], write_model("zeros", base), rank=2, dora=True, threads=1)
    assert "model.layers.0.mlp.up_proj.weight" in adapter.report().whole


def test_the_bytes_do_not_depend_on_threads_or_memory(models, tmp_path):
    found = []
    for number, (threads, memory) in enumerate([(1, None), (3, None), (2, 400_000_000)]):
        adapter = ws.extract(models[1], models[0], budget=2_500, threads=threads, memory=memory)
        adapter.save(tmp_path / str(number), threads=threads, memory=memory)
        found.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
        report = json.loads((tmp_path / str(number) / "weightsmith_extract.json").read_text())
        assert report == {"settings": report["settings"], **adapter.report().to_json(seconds=False)}
    assert found[0] == found[1] == found[2]
    assert not ws.reproduce(tmp_path / "1").problems
    assert not ws.verify(tmp_path / "1").problems


def test_spectra_that_do_not_fit_are_computed_twice_to_the_same_bytes(models, monkeypatch):
    kept = extract(models, energy=0.9)
    monkeypatch.setattr("weightsmith.extraction.extraction._KEPT", 0)
    again = extract(models, energy=0.9)
    for name, tensor in kept.items():
        assert tensor.numpy().tobytes() == again[name].numpy().tobytes()


def test_sixteen_bits_are_told_of_in_the_error(models):
    wide, narrow = (extract(models, energy=1.0, dtype=dtype) for dtype in (None, "bfloat16"))
    factor = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"
    assert (wide[factor].dtype, narrow[factor].dtype) == (np.float32, np.dtype(ml_dtypes.bfloat16))
    assert wide.report().error < 1e-6 < 1e-3 < narrow.report().error < 1e-2
    for one in narrow.report().matrices:
        change = changes(models)[one.name]
        assert one.error == pytest.approx(
            np.linalg.norm(change - restored(narrow, one.name)) / np.linalg.norm(change), rel=1e-4
        )


def test_what_is_left_out_counts(models):
    change = {name: models[3][name].astype(np.float64) - models[2][name] for name in models[3]}
    adapter = extract(models, energy=1.0, only_matrices=True, exclude=["*q_proj*"])
    report = adapter.report()
    out = {one.name: one for one in report.left_out}
    assert {name for name, values in change.items() if values.ndim == 1 or "q_proj" in name} == set(out)
    for name, one in out.items():
        assert one.norm == pytest.approx(np.linalg.norm(change[name]), rel=1e-6)
    lost = math.sqrt(sum(one.norm**2 for one in out.values()))
    assert report.error == pytest.approx(lost / math.sqrt(sum((v**2).sum() for v in change.values())), rel=1e-4)
    assert not any("norm" in name or "q_proj" in name for name in adapter)


def test_tensors_are_kept_whole_where_asked(models, tmp_path):
    adapter = extract(models, rank=1, whole=["*embed*"])
    adapter.save(tmp_path / "out")
    written = read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(written[f"{PREFIX}model.embed_tokens.weight"], models[3]["model.embed_tokens.weight"])
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.embed_tokens" in settings["modules_to_save"]
    assert settings["target_modules"] == ["lm_head", "up_proj", "q_proj"]


def test_modules_are_named_as_asked(models):
    adapter = extract(models, rank=1, rename=[r"^model\.layers=decoder.blocks", "q_proj=query"])
    assert f"{PREFIX}decoder.blocks.1.self_attn.query.lora_A.weight" in adapter
    assert "query" in adapter.config["target_modules"]
    with pytest.raises(PlanError, match="two tensors"):
        extract(models, rank=1, rename=[r"layers\.\d=layers.0"])


def test_names_under_which_peft_would_find_nothing_are_told(write_model):
    names = [f"vit.encoder.layer.{i}.attention.attention.query.weight" for i in range(2)]
    base, tuned = ({name: np.full((4, 4), value, np.float32) for name in names} for value in (0, 1))
    pair = write_model("base", base), write_model("tuned", tuned)
    (warning,) = extract(pair, rank=1).warnings
    assert "attention.attention.query as attention.q_proj" in warning
    assert "--rename" in warning
    assert not extract(pair, rank=1, rename=[r"attention\.attention\.query=attention.q_proj"]).warnings
    assert not extract(pair, kind="sign").warnings


def test_short_names_are_used_only_where_they_fit_nothing_else():
    paths = {"a", "a.q", "a.k", "b", "b.q", "q_more"}
    assert target_names(["a.q", "b.q"], paths) == ["q"]
    assert target_names(["a.q"], paths) == ["a.q"]
    # "q" is a module of its own, and the end of another's name.
    assert target_names(["q"], {"q", "a", "a.q"}) == "q"


def test_modules_are_told_by_names_shapes_and_biases():
    def forms(shapes, **config):
        arrays = {name: ws.Checkpoint("x", {}) for name in shapes}
        from weightsmith.checkpoint.tensor import ArrayTensor

        arrays = {name: ArrayTensor(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}
        modules = Modules(arrays, config)
        return {name: module.form if (module := modules.find(name)) else None for name in arrays}

    found = forms(
        {
            "wte.weight": (9, 4),
            "h.0.attn.c_attn.weight": (4, 12),
            "h.0.attn.c_attn.bias": (12,),
            "h.0.attn.c_proj.weight": (4, 4),
            "embed_out.weight": (9, 4),
            "text_projection.weight": (4, 4),
            "embeddings_project.weight": (4, 8),
            "patch.embeds.weight": (4, 4),
            "patch.conv.weight": (4, 3, 2, 2),
            "patch.depthwise.weight": (4, 1, 3, 3),
            "up.deconv.weight": (3, 4, 2, 2),
            "up.deconv.bias": (4,),
            "experts.weight": (5, 4, 4),
            "conv1d.weight": (5, 4, 3),
            "A_log": (4, 4),
        }
    )
    assert found == {
        "wte.weight": "embedding",
        "h.0.attn.c_attn.weight": "transposed",
        "h.0.attn.c_attn.bias": None,
        "h.0.attn.c_proj.weight": "transposed",
        "embed_out.weight": "linear",
        "text_projection.weight": "linear",
        "embeddings_project.weight": "linear",
        "patch.embeds.weight": None,
        "patch.conv.weight": "convolution",
        "patch.depthwise.weight": None,
        "up.deconv.weight": None,
        "up.deconv.bias": None,
        "experts.weight": None,
        "conv1d.weight": "convolution",
        "A_log": None,
    }
    # GPT-BigCode has the names, and linear layers.
    big = {"h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4)}
    assert forms(big, model_type="gpt_bigcode")["h.0.attn.c_proj.weight"] == "linear"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no rule for the rank"),
        ({"rank": 4, "energy": 0.5}, "several rules"),
        ({"rank": 0}, "whole number from 1"),
        ({"energy": 1.5}, "share above 0"),
        ({"energy": 0.5, "decomposition": "randomized"}, "max_rank"),
        ({"effective_rank": True, "max_rank": 4, "decomposition": "randomized"}, "effective rank needs all"),
        ({"rank": 4, "density": 0.1}, "density means nothing"),
        ({"kind": "sparse"}, "either density, or rank"),
        ({"kind": "sparse", "density": 2}, "share above 0"),
        ({"kind": "sign", "rank": 4}, "rank means nothing"),
        ({"kind": "quantized", "bits": 2, "quantizer": "log2"}, "from 3 to 8"),
        ({"kind": "quantized", "bits": 4}, "give bits, such as 4, and quantizer, one of linear, log2, tanh"),
        ({"kind": "lara", "rank": 4}, "one of lora"),
        ({"rank": 4, "dtype": "float8_e4m3fn"}, "too coarse"),
        ({"rank": 4, "rename": ["("]}, "PATTERN=REPLACEMENT"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(models, settings, said):
    with pytest.raises(MethodError, match=said):
        extract(models, **settings)


def test_models_that_cannot_be_compared_are_refused(models, write_model, tmp_path):
    with pytest.raises(PlanError, match="nothing to extract"):
        ws.extract(models[0], models[0], rank=1)
    broken = {name: values.copy() for name, values in models[3].items()}
    broken["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="1 values that are NaN"):
        ws.extract(write_model("broken", broken), models[0], rank=1).save(tmp_path / "nan")
    quantised = write_model("codes", models[3], {"quantization_config": {"bits": 4}})
    with pytest.raises(PlanError, match="quantised"):
        ws.extract(quantised, models[0], rank=1)
    extract(models, rank=1).save(tmp_path / "lora")
    with pytest.raises(PlanError, match="is an adapter"):
        ws.extract(tmp_path / "lora", models[0], rank=1)
    with pytest.raises(OutputError, match="a folder"):
        extract(models, rank=1).save(tmp_path / "lora.safetensors")
    with pytest.raises(PlanError, match="kept whole take"):
        extract(models, budget=10)
    with pytest.raises(PlanError, match="smallest takes 96"):
        extract(models, budget=10, only_matrices=True)
    with pytest.raises(PlanError, match="--memory allows"):
        ws.extract(models[1], models[0], rank=1, memory=1_000)


def test_norms_alone_are_no_lora(models, write_model):
    tuned = {**models[2], "model.norm.weight": models[3]["model.norm.weight"]}
    with pytest.raises(PlanError, match=r"no matrix changed .* model.norm.weight"):
        ws.extract(write_model("norms", tuned), models[0], rank=1)
    adapter = ws.extract(write_model("norms", tuned), models[0], kind="sign")
    np.testing.assert_array_equal(adapter[f"{PREFIX}model.norm.weight"].numpy(), tuned["model.norm.weight"])


def test_the_models_are_left_as_they_are(models):
    finetuned = ws.open(models[1])
    ws.extract(finetuned, models[0], rank=1, rename=["norm=nrm"])
    assert all(tensor.name == name for name, tensor in finetuned.items())


def test_a_value_beyond_sixteen_bits_is_told_of(models, write_model, tmp_path):
    far = {name: values * np.float32(1e12) if values.ndim == 2 else values for name, values in models[3].items()}
    with pytest.raises(OutputError, match="wider dtype"):
        ws.extract(write_model("far", far), models[0], rank=1, dtype="float16").save(tmp_path / "out")


def test_what_the_base_lacks_is_kept_whole(models, write_model):
    tuned = {**models[3], "score.weight": np.ones((2, 12), np.float32)}
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 2}
    adapter = ws.extract(write_model("classifier", tuned, config), models[0], rank=1, threads=1)
    np.testing.assert_array_equal(adapter[f"{PREFIX}score.weight"].numpy(), tuned["score.weight"])
    assert adapter.config["task_type"] == "SEQ_CLS"


def test_names_that_a_heads_wrapper_adds_are_seen_through(models, write_model):
    wrapped = {f"outer.{name}": values for name, values in models[3].items()}
    bare = {name.partition(".")[2]: values for name, values in models[2].items() if name != "lm_head.weight"}
    report = ws.extract(write_model("wrapped", wrapped), models[0], rank=2, threads=1).report()
    assert len(report.matrices) == 6
    assert report.error == pytest.approx(extract(models, rank=2).report().error, rel=1e-9)
    found = ws.extract(models[1], write_model("bare", bare), rank=2, threads=1)
    assert len(found.report().matrices) == 5
    assert "lm_head.weight" in found.report().whole
    back = ws.extract(write_model("b", bare), write_model("c", {**models[3]}), rank=2, threads=1)
    assert len(back.report().matrices) == 5
    assert not back.warnings
    with pytest.raises(PlanError, match="no tensor of the same name"):
        ws.extract(write_model("other", {"x.y.weight": np.ones((2, 2), "f4")}), models[0], rank=1)


def test_a_head_of_its_own_is_a_change_of_the_embeddings_it_was_tied_to(models, write_model):
    tied = {name: values for name, values in models[2].items() if name != "lm_head.weight"}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_model("tied", tied, config)
    adapter = ws.extract(models[1], base, energy=1.0, threads=1)
    change = models[3]["lm_head.weight"].astype(np.float64) - models[2]["model.embed_tokens.weight"]
    np.testing.assert_allclose(restored(adapter, "lm_head.weight"), change, atol=1e-5)
    assert "ensure_weight_tying" not in adapter.config


def test_what_the_base_keeps_is_told(models, write_model):
    fewer = {name: values for name, values in models[3].items() if ".layers.1." not in name}
    (warning,) = ws.extract(write_model("fewer", fewer), models[0], rank=1, threads=1).warnings
    assert "the base has 3 tensors that the fine-tune lacks" in warning


def test_matrices_an_earlier_run_wrote_are_reported_too(models, tmp_path):
    whole = extract(models, rank=2)
    whole.save(tmp_path / "whole")
    report = whole.report()
    # As after a resumed run: nothing was made in this process.
    assert extract(models, rank=2).report().to_json(seconds=False) == report.to_json(seconds=False)


def test_a_difference_is_that_of_the_whole_tensor_in_tiles(models):
    base, tuned = ws.open(models[0]), ws.open(models[1])
    name = "lm_head.weight"
    change, sums = Difference(name, base[name], tuned[name]).matrix()
    np.testing.assert_array_equal(change, (models[3][name] - models[2][name]).reshape(-1))
    assert sums.change == pytest.approx((change.astype(np.float64) ** 2).sum(), rel=1e-12)


def test_the_command_says_what_is_lost(models, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["extract", str(models[1]), str(models[0]), *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    code, out, err = run(tmp_path / "a", "--rank", 2)
    assert code == 0
    assert "model.layers.1.mlp.up_proj.weight 24x12" in out
    assert "kept whole: 3" in out
    assert "of the change is lost" in out.splitlines()[-1]
    code, out, _ = run(tmp_path / "b", "--budget", "3kB", "--json", "--quiet")
    assert code == 0
    found = json.loads(out)
    assert found["bytes"] <= 3_000
    assert all(entry["seconds"] > 0 for entry in found["matrices"])
    code, _, err = run(tmp_path / "c")
    assert code == 1
    assert "give one of rank" in err


def test_models_of_two_kinds_are_told(write_model):
    tuned = write_model("llama", llama_tensors(1))
    other = write_model("other", llama_tensors(2), {"model_type": "mistral"})
    (warning,) = ws.extract(tuned, other, rank=2, threads=1).warnings
    assert "of the kind llama" in warning
    assert "of the kind mistral" in warning


@pytest.mark.parametrize(("name", "task"), [("T5", "SEQ_2_SEQ_LM"), ("Whisper", None), ("MoonshineStreaming", None)])
def test_models_that_take_no_tokens_have_no_task_that_hands_them_tokens(name, task):
    config = {"architectures": [f"{name}ForConditionalGeneration"], "is_encoder_decoder": True}
    assert task_type(config) == task
