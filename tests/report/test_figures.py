"""The figures of reports are held against plain NumPy in float64 on whole tensors, put together by scope."""

from __future__ import annotations

import itertools
import json

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors
from weightsmith.architecture.components import component
from weightsmith.report import distribution, measure
from weightsmith.report.findings import TOPS, Report, Scope

BF16 = np.dtype(ml_dtypes.bfloat16)
TABLES = ("total", "components", "layers", "cells", "tensors")


def tuned(base, seed, dtype=None, share=0.8, scale=0.01):
    """A fine-tune: some entries of every tensor moved."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, array in base.items():
        moved = rng.standard_normal(array.shape) * scale * (rng.random(array.shape) < share)
        found[name] = (array.astype(np.float64) + moved).astype(dtype or array.dtype)
    return found


@pytest.fixture(params=[np.float32, BF16], ids=["float32", "bfloat16"])
def family(request, write_model):
    """A base and three models, written, and their tensors."""
    base = llama_tensors(0, hidden=32, vocabulary=50, dtype=request.param)
    tensors = {"base": base, **{label: tuned(base, seed) for seed, label in enumerate("xyz", 1)}}
    tensors["y"]["lm_head.weight"][3, 4] = np.nan
    tensors["base"]["model.layers.1.mlp.up_proj.weight"][0, :3] = np.inf
    return {name: write_model(name, one) for name, one in tensors.items()}, tensors


def layer(name):
    parts = name.split(".")
    inside = parts[1] == "layers"
    return ".".join(parts[:3]) if inside else "before" if "embed" in name else "after"


def belongs(scope, name):
    return (
        scope.tensor in (None, name)
        and scope.layer in (None, layer(name))
        and scope.component in (None, component(name))
    )


def joined(scope, tensors, labels):
    """Return the entries of a scope in each model, those finite in all: ``[labels, n]`` float64."""
    names = [name for name in tensors["base"] if belongs(scope, name)]
    whole = np.array(
        [np.concatenate([tensors[label][name].astype(np.float64).ravel() for name in names]) for label in labels]
    )
    return whole[:, np.isfinite(whole).all(axis=0)]


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def close(value, tolerance=2e-6):
    return pytest.approx(value, rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("table", TABLES)
def test_changes_are_those_of_whole_tensors(family, table):
    paths, tensors = family
    rows = getattr(ws.report(paths["x"], paths["y"], paths["z"], base=paths["base"]).changes, table)
    assert {row.model for row in rows} == {"x", "y", "z"}
    for row in rows:
        base, *models = joined(row.scope, tensors, ["base", "x", "y", "z"])
        w = models["xyz".index(row.model)]
        tau = w - base
        taus = [one - base for one in models]
        positive = sum(np.maximum(one, 0) for one in taus)
        negative = sum(np.maximum(-one, 0) for one in taus)
        assert row.entries == len(base)
        assert row.base_norm == close(np.linalg.norm(base))
        assert row.norm == close(np.linalg.norm(w))
        assert row.delta_norm == close(np.linalg.norm(tau))
        assert row.relative == close(np.linalg.norm(tau) / np.linalg.norm(base))
        assert row.changed == np.mean(w != base)
        assert row.largest == close(np.abs(tau).max())
        assert row.mass == close(np.abs(tau).sum())
        lost = np.where(positive > negative, np.maximum(-tau, 0), np.maximum(tau, 0))
        lost[positive == negative] = np.abs(tau)[positive == negative] / 2
        assert row.against == close(lost.sum() / np.abs(tau).sum())
        assert row.cosine_base == close(cosine(w, base))
        assert row.delta_cosine_base == close(cosine(tau, base))


@pytest.mark.parametrize("table", TABLES)
def test_agreements_and_conflicts_are_those_of_whole_tensors(family, table):
    paths, tensors = family
    found = ws.report(paths["x"], paths["y"], paths["z"], base=paths["base"])
    rows = getattr(found.agreements, table)
    assert [(row.first, row.second) for row in rows[:3]] == [("x", "y"), ("x", "z"), ("y", "z")]
    for row in rows:
        base, *models = joined(row.scope, tensors, ["base", "x", "y", "z"])
        a, b = (models["xyz".index(label)] for label in (row.first, row.second))
        one, other = a - base, b - base
        both = (one != 0) & (other != 0)
        positive = np.maximum(one, 0) + np.maximum(other, 0)
        negative = np.maximum(-one, 0) + np.maximum(-other, 0)
        assert row.cosine == close(cosine(one, other))
        assert row.distance == close(np.linalg.norm(a - b))
        assert row.equal == np.mean(a == b)
        assert row.both_moved == both.mean()
        if both.any():
            assert row.same_sign == np.mean(np.sign(one[both]) == np.sign(other[both]))
        assert row.conflict == close(np.minimum(positive, negative).sum() / (positive + negative).sum())
    for row in getattr(found.conflicts, table):
        base, *models = joined(row.scope, tensors, ["base", "x", "y", "z"])
        taus = np.array(models) - base
        positive, negative = np.maximum(taus, 0).sum(0), np.maximum(-taus, 0).sum(0)
        several = (taus != 0).sum(0) > 1
        assert row.models == ("x", "y", "z")
        assert row.share == close(np.minimum(positive, negative).sum() / np.abs(taus).sum())
        assert row.contested == close(np.mean(((positive > 0) & (negative > 0))[several]))


def top_sets(tau, top):
    k = int(np.ceil(top * len(tau)))
    threshold = np.sort(np.abs(tau))[-k]
    return (np.abs(tau) >= threshold) & (tau != 0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("table", ["total", "components", "layers"])
def test_overlaps_are_those_of_sorted_entries(family, table, exact):
    paths, tensors = family
    found = ws.report(paths["x"], paths["y"], paths["z"], base=paths["base"], exact=exact)
    for row in getattr(found.overlaps, table):
        counts = np.zeros(4)
        entries = 0
        for name in tensors["base"]:
            if belongs(row.scope, name):
                scope = Scope(tensor=name)
                base, *models = joined(scope, tensors, ["base", "x", "y", "z"])
                one, other = (top_sets(models["xyz".index(label)] - base, row.top) for label in (row.first, row.second))
                # Scaled to the tensor, of which entries that are not finite are part.
                scale = tensors["base"][name].size / len(base) if not exact else 1
                counts += scale * np.array(
                    [(one & other).sum(), one.sum(), other.sum(), one.sum() * other.sum() / len(base)]
                )
                entries += scale * len(base)
        common, first, second, chance = counts
        assert row.overlap == pytest.approx(common / min(first, second))
        assert row.chance == pytest.approx(chance / min(first, second))
        assert row.sizes == pytest.approx((first / entries, second / entries))
    assert {row.top for row in found.overlaps.total} == set(TOPS)


@pytest.mark.parametrize("exact", [False, True])
def test_histograms_are_those_of_all_entries(family, exact):
    paths, tensors = family
    found = ws.report(paths["x"], base=paths["base"], exact=exact)
    for row in [*found.histograms.total, *found.histograms.components]:
        base, x = joined(row.scope, tensors, ["base", "x"])
        tau = (x - base).astype(np.float32).astype(np.float64)
        rel = 1e-2  # A tensor with entries that are not finite stands in for them.
        assert row.zero == pytest.approx(np.mean(tau == 0), rel=rel, abs=1e-9)
        assert sum(row.positive) + sum(row.negative) + row.zero == pytest.approx(1)
        expected, _ = np.histogram(tau, np.array(row.edges))
        assert np.array(row.positive) * len(tau) == pytest.approx(expected, rel=rel)
        expected, _ = np.histogram(-tau, np.array(row.edges))
        assert np.array(row.negative) * len(tau) == pytest.approx(expected, rel=rel)
        # float32 rounds values across an edge: none here.
        assert row.mean == pytest.approx(tau.mean(), rel=rel, abs=1e-9)
        assert row.deviation == pytest.approx(tau.std(), rel=rel)
        central = tau - tau.mean()
        assert row.kurtosis == pytest.approx(np.mean(central**4) / np.mean(central**2) ** 2 - 3, abs=0.05)
        for top, reached in zip(row.tops, row.quantiles, strict=True):
            # Right to the bin, and bins are a factor of 1.42 wide.
            assert 1 / 1.43 <= reached / np.sort(np.abs(tau))[-int(np.ceil(top * len(tau)))] <= 1.43


@pytest.mark.parametrize("kind", ["standard_normal", "laplace"])
@pytest.mark.parametrize("scale", [0.9, 0.01, 0.0137])
def test_what_a_top_reaches_is_found_between_the_bounds_of_bins(kind, scale):
    values = np.sort(np.abs(scale * getattr(np.random.default_rng(3), kind)(size=200_000)))
    edges = [2.0 ** (half / 2) for half in range(-60, 20)]
    shares = np.histogram(values, edges)[0] / len(values)
    for top in (0.01, 0.05, 0.2):
        assert distribution._reached(shares, edges, top) == pytest.approx(values[-round(top * len(values))], rel=0.03)
    # All in one bin, and less than the top that moved at all.
    assert 0.5 <= distribution._reached(np.array([0.0, 1.0, 0.0]), [0.25, 0.5, 1.0, 2.0], 0.05) <= 1.0
    assert distribution._reached(np.array([0.0, 0.01, 0.0]), [0.25, 0.5, 1.0, 2.0], 0.05) == 0.0


def test_a_sample_is_spread_over_the_tensor_and_always_the_same():
    size = 3 * distribution.SAMPLE + 12_345
    cuts = [0, 1000, 70_000, 70_001, 150_000, size]
    parts = [start + distribution.sample_places(size, start, stop) for start, stop in itertools.pairwise(cuts)]
    places = np.concatenate(parts)
    assert len(places) == distribution.SAMPLE
    assert (np.diff(places) > 0).all()
    # One in each stretch, wherever blocks are cut, and in no step with rows.
    bounds = np.arange(distribution.SAMPLE + 1) * size // distribution.SAMPLE
    assert ((bounds[:-1] <= places) & (places < bounds[1:])).all()
    assert (distribution.sample_places(size, 0, size) == places).all()
    assert np.abs(np.bincount(places % 64, minlength=64) / len(places) * 64 - 1).max() < 0.15


def test_sampled_overlaps_come_near_exact_ones(write_model):
    rng = np.random.default_rng(0)
    base = {"model.layers.0.mlp.up_proj.weight": rng.standard_normal((400, 1000)).astype(np.float32)}
    common = rng.standard_normal((400, 1000))
    models = [
        {
            name: (array + 0.01 * (common + rng.standard_normal(array.shape))).astype(np.float32)
            for name, array in base.items()
        }
        for _ in range(2)
    ]
    paths = [write_model(name, one) for name, one in zip(("base", "x", "y"), (base, *models), strict=True)]
    rough, exact = (ws.report(*paths[1:], base=paths[0], exact=one) for one in (False, True))
    for one, other in zip(rough.overlaps.total, exact.overlaps.total, strict=True):
        assert other.sizes[0] == pytest.approx(one.top, abs=1e-6)
        assert one.overlap == pytest.approx(other.overlap, abs=0.06)
        assert one.overlap > 2 * one.chance or one.top == 0.2
    (sampling, *_) = rough.sampling
    assert (sampling.looked_at, sampling.of) == (distribution.SAMPLE, 400_000)
    assert not [one for one in exact.sampling if one.unit == "entries"]


def without_times(report):
    content = report.to_json()
    del content["timings"]
    return json.dumps(content)


def test_threads_make_no_difference(family):
    paths, _ = family
    sources = [paths[label] for label in "xyz"]
    found = {without_times(ws.report(*sources, base=paths["base"], threads=threads)) for threads in (1, 2, 5)}
    assert len(found) == 1


def test_blocks_make_no_difference_but_in_last_digits(family, monkeypatch):
    paths, _ = family
    sources = [paths[label] for label in "xyz"]
    whole = ws.report(*sources, base=paths["base"])
    monkeypatch.setattr(measure, "BLOCK", 100)
    cut = ws.report(*sources, base=paths["base"])
    assert cut.overlaps == whole.overlaps
    assert cut.health == whole.health
    for one, other in zip(whole.agreements.tensors, cut.agreements.tensors, strict=True):
        assert one.cosine == pytest.approx(other.cosine, abs=1e-9)
        assert (one.equal, one.same_sign) == (other.equal, other.same_sign)


def test_models_are_compared_where_they_have_the_same_tensors(write_model):
    base = llama_tensors(0, vocabulary=16)
    x, y = tuned(base, 1), tuned(base, 2)
    y["model.embed_tokens.weight"] = np.ones((20, 8), np.float32)
    del y["model.norm.weight"]
    y["extra"] = np.full((3, 9), np.nan, np.float32)
    found = ws.report(write_model("x", x), write_model("y", y), base=write_model("base", base))
    assert [(d.model, d.tensor, d.kind, d.base, d.found) for d in found.health.differences] == [
        ("y", "model.embed_tokens.weight", "shape", "[16, 8]", "[20, 8]"),
        ("y", "model.norm.weight", "missing", "[8]", ""),
        ("y", "extra", "extra", "", "[3, 9]"),
    ]
    by_model = {row.model: row.entries for row in found.changes.total}
    everything = sum(array.size for array in base.values())
    assert by_model == {"x": everything, "y": everything - 16 * 8 - 8}
    # A pair is compared over what both have, and its cosine is of that alone.
    names = [name for name in base if name in y and y[name].shape == base[name].shape]
    one, other = (np.concatenate([(m[n] - base[n]).ravel() for n in names]).astype(np.float64) for m in (x, y))
    assert found.agreements.total[0].cosine == close(cosine(one, other), 1e-5)
    assert found.agreements.total[0].entries == len(one)
    assert [row.models for row in found.conflicts.total] == [("x", "y")]
    assert found.conflicts.total[0].entries == len(one)
    # What is compared with nothing is looked at for its health.
    assert [(row.model, row.tensor, row.nan) for row in found.health.nonfinite] == [("y", "extra", 27)]


def test_a_head_that_is_tied_is_no_missing_tensor(write_model):
    base = llama_tensors(0)
    x = tuned(base, 1)
    del x["lm_head.weight"]
    config = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 2}
    found = ws.report(write_model("x", x, config), base=write_model("base", base))
    assert [(one.tensor, one.kind) for one in found.health.differences] == [("lm_head.weight", "tied")]
    assert (found.models[0].tied, found.base.tied) == (True, False)


def test_dtypes_and_whole_numbers(write_model):
    base = llama_tensors(0)
    base["steps"] = np.arange(4)
    x = {name: array if name == "steps" else array.astype(np.float16) for name, array in base.items()}
    found = ws.report(write_model("x", x), base=write_model("base", base))
    assert all(one.kind == "dtype" for one in found.health.differences)
    assert "steps" not in {one.name for one in found.tensors}
    assert found.tensors[0].dtypes == {"base": "float32", "x": "float16"}
    assert found.changes.total[0].relative < 1e-3


def test_models_of_any_float_dtype_are_measured_with_their_own_values(write_model):
    base = llama_tensors(0)
    models = {"f8": tuned(base, 1, ml_dtypes.float8_e4m3fn), "f16": tuned(base, 2, np.float16)}
    models["f64"] = tuned(base, 3, np.float64, scale=1e-9)
    paths = [write_model(name, one) for name, one in models.items()]
    found = ws.report(*paths, base=write_model("base", base))
    for row in found.changes.tensors:
        one, other = (tensors[row.scope.tensor].astype(np.float64) for tensors in (base, models[row.model]))
        assert row.delta_norm == close(np.linalg.norm(other - one))
        assert row.changed == np.mean(other != one)
    assert {row.scope.tensor for row in found.changes.tensors} == set(base)


def test_what_is_kept_in_whole_numbers_is_told_of(write_model):
    base = {"a.weight": np.ones((4, 16), np.float32), "b.weight": np.ones((64, 64), np.uint8)}
    found = ws.report(write_model("x", base), base=write_model("base", base))
    (note,) = found.notes
    assert note == "of base, 1 of 2 tensors hold whole numbers (a quantised model's, perhaps) and are in no figure"


def test_dead_and_duplicated_rows_are_named(write_model):
    base = llama_tensors(0, vocabulary=30)
    base["model.embed_tokens.weight"][[4, 9]] = 0
    x = tuned(base, 1)
    x["model.embed_tokens.weight"][[4, 9, 12]] = 0
    x["lm_head.weight"][[7, 8]] = x["lm_head.weight"][3]
    found = ws.report(write_model("x", x), base=write_model("base", base))
    rows = {(row.model, row.tensor): row for row in found.health.rows}
    assert rows["base", "model.embed_tokens.weight"].first_dead == (4, 9)
    embedding, head = rows["x", "model.embed_tokens.weight"], rows["x", "lm_head.weight"]
    assert (embedding.dead, embedding.new_dead, embedding.duplicated, embedding.rows) == (3, 1, 0, 30)
    assert (head.duplicated, head.first_duplicated) == (2, ((7, 3), (8, 3)))
    assert len(rows) == 3


def test_without_a_base_the_first_model_stands_in(write_model):
    base = llama_tensors(0)
    paths = [write_model(name, one) for name, one in (("x", base), ("y", tuned(base, 1)))]
    found = ws.report(*paths)
    assert (found.base.label, found.base_named, [one.label for one in found.models]) == ("x", False, ["y"])
    alone = ws.report(paths[0])
    assert (alone.models, alone.changes.total, alone.tensors) == ((), (), ())
    assert Report.from_json(json.loads(json.dumps(alone.to_json()))) == alone


def test_everything_is_finite_whatever_the_weights_are(write_model):
    base = {
        "a.weight": np.zeros((16, 16), np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "one": np.ones((), np.float32),
    }
    wild = {
        "a.weight": np.full((16, 16), 3e38, np.float32),
        "empty": base["empty"],
        "one": np.full((), np.nan, np.float32),
    }
    tiny = {name: array + np.float32(1e-45) for name, array in base.items()}
    paths = [write_model(name, one) for name, one in (("base", base), ("wild", wild), ("tiny", tiny), ("same", base))]
    for exact in (False, True):
        found = ws.report(*paths[1:], base=paths[0], exact=exact)
        assert Report.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
