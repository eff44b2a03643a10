"""Means of pruned models: masks that are kept, masks that differ, what is taken as pruned."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import MethodError
from weightsmith.methods.sparse import PRUNED


def _pruned(seed, share, shape=(60, 70), dtype=np.float32, mask_seed=None):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    chooser = rng if mask_seed is None else np.random.default_rng(mask_seed)
    kept = chooser.permutation(values.size).reshape(shape) >= share * values.size
    return np.where(kept, values, 0.0).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight", [1.0, [0.3, 0.5, 0.2], [-0.7, 1.1, 0.6]])
@pytest.mark.parametrize("method", ["linear", "sparse_soup"])
def test_a_common_mask_is_kept_to_the_entry(method, weight, dtype):
    models = [_pruned(seed, 0.8, dtype=dtype, mask_seed=9) for seed in range(3)]
    merged = merge_arrays(method, models, parameters={"weight": weight})
    np.testing.assert_array_equal(merged != 0, models[0] != 0)


@pytest.mark.parametrize("mask", ["intersection", "union", "first"])
def test_masks_that_differ_are_joined_as_asked(mask):
    models = [_pruned(seed, share) for seed, share in enumerate((0.5, 0.3, 0.7))]
    kept = [model != 0 for model in models]
    expected = {"intersection": kept[0] & kept[1] & kept[2], "union": kept[0] | kept[1] | kept[2], "first": kept[0]}
    merged = merge_arrays("sparse_soup", models, parameters={"weight": [1, 2, 3], "mask": mask})
    np.testing.assert_array_equal(merged != 0, expected[mask])
    plain = (models[0] + 2 * models[1] + 3 * models[2]) / 6
    np.testing.assert_allclose(merged, np.where(expected[mask], plain, 0), rtol=0, atol=1e-6)


def test_a_dense_model_has_no_mask():
    models = [_pruned(0, 0.5), _pruned(1, 0.0)]
    both = merge_arrays("sparse_soup", models)
    np.testing.assert_array_equal(both != 0, models[0] != 0)
    assert (merge_arrays("sparse_soup", models, parameters={"mask": "union"}) != 0).all()
    assert (merge_arrays("sparse_soup", models[::-1], parameters={"mask": "first"}) != 0).all()


@pytest.mark.parametrize(("share", "taken"), [(PRUNED - 0.01, False), (PRUNED, True)])
def test_a_few_zeros_are_no_mask(share, taken):
    models = [_pruned(0, share, (100, 50)), _pruned(1, 0.0, (100, 50))]
    merged = merge_arrays("sparse_soup", models)
    assert (merged == 0).any() == taken
    always = merge_arrays("sparse_soup", models, parameters={"min_zeros": 0.0})
    np.testing.assert_array_equal(always != 0, models[0] != 0)


def test_eight_bits_alone_are_not_pruning():
    # What the threshold is chosen for: small weights that are no more in this format.
    weights = (0.02 * np.random.default_rng(0).standard_normal((500, 500))).astype(ml_dtypes.float8_e4m3fn)
    assert 0.03 < (weights == 0).mean() < PRUNED


def test_vectors_have_no_mask():
    models = [np.array([0.0, 0.0, 1.0, 2.0], np.float32), np.array([1.0, 0.0, 3.0, 0.0], np.float32)]
    np.testing.assert_array_equal(merge_arrays("sparse_soup", models), [0.5, 0.0, 2.0, 1.0])


def test_models_of_weight_zero_have_no_mask():
    models = [_pruned(0, 0.5), _pruned(1, 0.9)]
    merged = merge_arrays("sparse_soup", models, parameters={"weight": [1.0, 0.0]})
    np.testing.assert_array_equal(merged, models[0])
    with pytest.raises(MethodError, match="the mask of a model of weight 0"):
        merge_arrays("sparse_soup", models, parameters={"weight": [0.0, 1.0], "mask": "first"})


def test_results_do_not_depend_on_blocks_and_threads():
    models = [_pruned(seed, 0.5, (300, 333)) for seed in range(3)]
    whole = merge_arrays("sparse_soup", models)
    for block_size, threads in ((1000, 1), (97, 4)):
        again = merge_arrays("sparse_soup", models, block_size=block_size, threads=threads)
        np.testing.assert_array_equal(again, whole)


# -- on files ---------------------------------------------------------------------------------------------------------


def _models(write_model, masks, shape=(200, 300)):
    paths = []
    for seed, mask in enumerate(masks):
        tensors = {
            "model.layers.0.mlp.up_proj.weight": _pruned(seed, 0.6, shape, mask_seed=mask),
            "model.layers.0.self_attn.q_proj.weight": _pruned(seed + 10, 0.0, shape),
            "model.norm.weight": np.ones(8, np.float32),
        }
        paths.append(write_model(f"m{seed}", tensors))
    return paths


def test_masks_that_differ_are_told_with_the_density(write_model, tmp_path):
    paths = _models(write_model, [1, 2])
    lazy = ws.average(paths)
    density = (lazy["model.layers.0.mlp.up_proj.weight"].numpy() != 0).mean()
    summary = lazy.save(tmp_path / "out")
    (warning,) = summary.warnings
    assert "differ in 1 of 1 sparse matrices" in warning
    assert f"the models keep 0.4 of their entries, the average {density:.3g}" in warning
    assert "sparse_soup" in warning


def test_one_mask_needs_no_word(write_model, tmp_path):
    lazy = ws.average(_models(write_model, [1, 1, 1]))
    assert lazy.save(tmp_path / "out.safetensors").warnings == ()


def test_a_mask_can_be_chosen_where_models_are_averaged(write_model, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    paths = _models(write_model, [1, 2])
    kept = [ws.open(path)[name].numpy() != 0 for path in paths]
    for mask, expected in (("intersection", kept[0] & kept[1]), ("union", kept[0] | kept[1]), ("first", kept[0])):
        lazy = ws.average(paths, [0.25, 0.75], mask=mask)
        np.testing.assert_array_equal(lazy[name].numpy() != 0, expected)
        summary = lazy.save(tmp_path / mask)
        assert summary.warnings == ()
        assert ws.reproduce(tmp_path / mask).ok


def test_zeros_that_are_no_masks_are_passed_over(write_model, tmp_path):
    dense = _pruned(0, 0.0)
    one = write_model("one", {"w": dense, "begun": np.zeros_like(dense), "delta": np.zeros_like(dense)})
    other = write_model("other", {"w": -dense, "begun": dense, "delta": dense})
    assert ws.average([one, other]).save(tmp_path / "mean.safetensors").warnings == ()
    sparse = write_model("sparse", {name: _pruned(1, 0.5) for name in ("w", "begun", "delta")})
    summed = ws.merge("linear", [one, sparse], weight=1.0, normalize=False)
    assert summed.save(tmp_path / "sum.safetensors").warnings == ()
    assert len(ws.average([one, sparse]).save(tmp_path / "both.safetensors").warnings) == 1


@pytest.mark.parametrize("kind", ["rows", "columns", "heads"])
def test_pruned_parts_of_any_form_are_found(write_model, tmp_path, kind):
    """A sample decides what is counted: whole rows, columns or runs of 8 % must not fall between its stretches."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(2):
        matrix = rng.standard_normal((512, 1024)).astype(np.float32)
        part = slice(200 + 50 * i, 200 + 50 * i + (82 if kind == "columns" else 41))
        if kind == "columns":
            matrix[:, part] = 0
        elif kind == "rows":
            matrix[part] = 0
        else:
            matrix.reshape(8, 64, 1024)[:, 5 * i : 5 * i + 6] = 0
        paths.append(write_model(f"m{i}", {"w": matrix}))
    (warning,) = ws.average(paths).save(tmp_path / "out.safetensors").warnings
    assert "differ in 1 of 1" in warning


def test_nothing_is_sampled_behind_a_url(write_model, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    for i, path in enumerate(_models(write_model, [1, 2])):
        content = (path / "model.safetensors").read_bytes()
        fsspec.filesystem("memory").pipe(f"/masks/m{i}.safetensors", content)
    monkeypatch.setattr("weightsmith.plan.masks._may_be_pruned", lambda _: pytest.fail("sampled"))
    lazy = ws.average([f"memory://masks/m{i}.safetensors" for i in range(2)])
    assert lazy.save(tmp_path / "out.safetensors").warnings == ()
