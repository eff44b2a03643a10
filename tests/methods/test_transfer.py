"""Arithmetic between bases: identities, roles, numbers of the authors' code, real files."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.arrays import merge_arrays
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.expression import Computed, Group
from weightsmith.errors import MethodError, PlanError
from weightsmith.methods.registry import get_method
from weightsmith.methods.settings import complete


def near(tensors, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return {n: (a + size * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in tensors.items()}


def saved(merged, folder):
    merged.save(folder)
    return read_safetensors(folder)


# -- transfer ---------------------------------------------------------------------------------------------------------


def test_a_is_to_b_as_c_is_to_what_is_made():
    rng = np.random.default_rng(0)
    source, change, shift = (rng.standard_normal((6, 5)) for _ in range(3))
    merged = merge_arrays("transfer", [source + change, source], source + shift)
    np.testing.assert_allclose(merged, source + shift + change, rtol=1e-12)
    taken_out = merge_arrays("transfer", [source + change, source], merged, parameters={"lambda": -1.0})
    np.testing.assert_allclose(taken_out, source + shift, atol=1e-12)


def test_partial_adaptation_scales_both_changes():
    rng = np.random.default_rng(0)
    base, instruction, knowledge = (rng.standard_normal((6, 5)) for _ in range(3))
    given = {"lambda": 0.5, "target_share": 0.3}
    merged = merge_arrays("transfer", [base + instruction, base], base + knowledge, parameters=given)
    np.testing.assert_allclose(merged, base + 0.5 * instruction + 0.3 * knowledge, rtol=1e-12)
    # The same by task arithmetic on the common base.
    both = merge_arrays(
        "task_arithmetic", [base + instruction, base + knowledge], base, parameters={"weight": [0.5, 0.3]}
    )
    np.testing.assert_allclose(merged, both, rtol=1e-12)


def test_what_fine_tuning_left_alone_is_left_alone_in_the_target():
    rng = np.random.default_rng(0)
    source, target = (rng.standard_normal(100).astype(ml_dtypes.bfloat16) for _ in range(2))
    assert np.array_equal(merge_arrays("transfer", [source, source], target), target.astype(np.float32))


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("transfer", 1, True, "takes exactly 2 model.* beside the base, and 1 are given; base_model is the model to "
         "change; the models are, in this order, the source's fine-tune, the source's base"),
        ("chat_vector", 3, True, "takes exactly 2 .*, and 3 are given; base_model is the model to change"),
        ("transfer", 2, False, "needs a base: give base_model .*; base_model is the model to change; the models are"),
        ("rws", 2, True, "takes at least 3 .*, and 2 are given; base_model is the model to patch; the models are, in "
         "this order, the pretrained model, the model trained on clean data, models trained on corrupted data"),
        ("rws_signature", 2, False, "takes exactly 3 .*; the models are, in this order, the pretrained model, "),
    ],
)  # fmt: skip
def test_a_wrong_number_of_models_is_told_with_the_role_of_each(method, models, base, message, write_model):
    paths = [write_model(f"m{i}", llama_tensors(i)) for i in range(models)]
    with pytest.raises((MethodError, PlanError), match=message):
        ws.merge(method, paths, base=write_model("base", llama_tensors(9)) if base else None)


def test_the_base_may_have_another_role_as_well(write_model, tmp_path):
    """A source with the target's own base: plain task arithmetic; a patch of the clean model itself."""
    base = llama_tensors(0)
    one, two = near(base, 1), near(base, 2)
    b, w1, w2 = write_model("b", base), write_model("w1", one), write_model("w2", two)
    moved = saved(ws.merge("transfer", [w1, b], base=b, lambda_=0.7), tmp_path / "moved")
    patched = saved(ws.merge("rws", [b, w1, w2], base=w1), tmp_path / "patched")
    for name, array in base.items():
        np.testing.assert_allclose(moved[name], array + 0.7 * (one[name] - array), atol=1e-6)
        expected = merge_arrays("rws", [array, one[name], two[name]], one[name])
        np.testing.assert_array_equal(patched[name], expected)


def test_transfers_follow_one_another_in_steps(write_model, tmp_path):
    tensors = [llama_tensors(seed) for seed in range(5)]
    t, f1, s1, f2, s2 = (write_model(f"m{i}", one) for i, one in enumerate(tensors))
    merged = ws.merge("transfer", [f2, s2], base=ws.merge("transfer", [f1, s1], base=t), lambda_=0.5)
    found = saved(merged, tmp_path / "out")
    for name in tensors[0]:
        a, b, c, d, e = (np.float64(one[name]) for one in tensors)
        np.testing.assert_allclose(found[name], a + (b - c) + 0.5 * (d - e), atol=1e-5)


# -- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_interpolation_begins_and_ends_at_the_models_exactly(dtype):
    rng = np.random.default_rng(0)
    base, model = (rng.standard_normal(1000).astype(dtype) * 10.0 ** rng.integers(-6, 6, 1000) for _ in range(2))
    base, model = base.astype(dtype), model.astype(dtype)
    for share, expected in ((0.0, base), (1.0, model)):
        merged = merge_arrays("interpolate", [model], base, parameters={"lambda": share})
        assert np.array_equal(merged, expected.astype(np.float32))
    half = merge_arrays("wise_ft", [model], base)
    np.testing.assert_allclose(half, merge_arrays("linear", [base, model], parameters={"weight": 1.0}), rtol=1e-5)


# -- adaptive model averaging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", ["linear", "all"])
def test_ratios_go_by_group_and_role(mixed, write_model, tmp_path):
    before, after = llama_tensors(0, layers=4), llama_tensors(1, layers=4)
    config = {"model_type": "llama", "num_hidden_layers": 4}
    groups = [
        {"scope": {"layers": [0, 2]}, "value": 0.5},
        {"scope": {"layers": [2, 4]}, "value": 0.1},
        {"value": 0.3},
    ]
    merged = ws.merge(
        "ama",
        [write_model("after", after, config)],
        base=write_model("before", before, config),
        ratio=groups,
        mean_ratio=0.25,
        mixed=mixed,
    )
    found = saved(merged, tmp_path / "out")
    outside = 1.0 if mixed == "linear" else 0.3
    shares = {"model.embed_tokens.weight": outside, "model.norm.weight": outside, "lm_head.weight": 0.25}
    for name in before:
        ratio = shares.get(name, 0.5 if ".0." in name or ".1." in name else 0.1)
        if "layernorm" in name and mixed == "linear":
            ratio = 1.0
        expected = ratio * np.float64(before[name]) + (1 - ratio) * np.float64(after[name])
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
    if mixed == "linear":
        assert np.array_equal(found["model.norm.weight"], before["model.norm.weight"])


# -- backward compatible interpolation --------------------------------------------------------------------------------

# What rng = default_rng(2) draws: weight [2, 3] and bias [2] of an old and two new layers, and the old one's importances.
_RNG = np.random.default_rng(2)
LAYERS = [{"weight": _RNG.standard_normal((2, 3)), "bias": _RNG.standard_normal(2)} for _ in range(3)]
FISHER = {"weight": _RNG.exponential(size=(2, 3)), "bias": _RNG.exponential(size=2)}
FISHER["weight"][0, 1] = 0.0

# interpolate_weights of nlp/bcwi/utils.py, amazon-science/regression-constraint-model-upgrade, in float64, with the
# importances divided by the mean of all eight: number of new models, alpha, with Fisher, weight, bias.
BCWI = [
    (1, 0.3, False, [0.2535634834, -0.5445005179, 0.5603781528, -0.9498297975, 0.309735482, -0.2112529671],
     [0.2208437988, 0.1627033398]),
    (2, 0.3, False, [0.3459907989, -0.5631775201, 0.2626192914, -1.1534309213, 0.7193365887, 0.1318106777],
     [0.1773083267, 0.3410990275]),
    (1, 0.7, True, [0.2109465435, -0.5538228364, -0.1336624103, -2.0677148461, 1.1489079159, 0.512473286],
     [0.0875130815, 0.4318440051]),
    (1, 1.0, True, [0.1890533818, -0.5227484415, -0.4130635434, -2.4414673826, 1.7997073827, 1.144165872],
     [-0.3254228369, 0.7738065867]),
]  # fmt: skip


def with_fisher(news: int, fisher: dict[str, Any], **given: Any) -> dict[str, np.ndarray]:
    """Merge the layers as a plan with a Fisher checkpoint of the base does."""
    method, group, shared = get_method("bcwi"), Group(), {}
    parameters = complete(method, given, news, has_base=True)
    tensors = {}
    for name in LAYERS[0]:
        old, *new = (ArrayTensor(name, layer[name]) for layer in LAYERS[: news + 1])
        own = (ArrayTensor(name, fisher[name]), *[None] * news) if name in fisher else ()
        tensors[name] = Computed(
            name, np.dtype(np.float64), method, tuple(new), old, parameters=parameters, fishers=own, group=group
        )
    return {
        name: Evaluator(shared).values(tensor, 0, tensor.size).reshape(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("news", "alpha", "weighed", "weight", "bias"), BCWI)
def test_interpolation_with_the_old_model_is_that_of_its_authors(news, alpha, weighed, weight, bias):
    found = with_fisher(news, FISHER if weighed else {}, alpha=alpha)
    assert found["weight"] == pytest.approx(np.reshape(weight, (2, 3)), abs=1e-9)
    assert found["bias"] == pytest.approx(np.array(bias), abs=1e-9)


def test_only_ratios_of_importances_count_and_equal_ones_are_as_none():
    scaled = with_fisher(1, {name: 1e-20 * array for name, array in FISHER.items()}, alpha=0.6)
    plain = with_fisher(1, FISHER, alpha=0.6)
    for name in LAYERS[0]:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-12)
    equal = with_fisher(2, {name: np.full(array.shape, 7.0) for name, array in FISHER.items()}, alpha=0.6)
    none = with_fisher(2, {}, alpha=0.6)
    for name in LAYERS[0]:
        np.testing.assert_allclose(equal[name], none[name], rtol=1e-12)


def test_an_important_weight_stays_old_and_an_unimportant_one_becomes_new():
    old, new = LAYERS[0]["weight"], LAYERS[1]["weight"]
    fisher = {"weight": np.where(np.arange(6).reshape(2, 3) % 2, 1e12, 0.0), "bias": np.zeros(2)}
    found = with_fisher(1, fisher, alpha=0.999999999)["weight"]
    np.testing.assert_allclose(found, np.where(fisher["weight"] > 0, old, new), rtol=1e-6)
    # 0 / 0: nothing is known of those entries, and only the old model is wanted.
    assert np.array_equal(with_fisher(1, fisher, alpha=1.0)["weight"], old)


def test_a_tensor_without_importances_counts_as_of_mean_importance():
    found = with_fisher(1, {"weight": FISHER["weight"]}, alpha=0.6)
    np.testing.assert_allclose(found["bias"], 0.6 * LAYERS[0]["bias"] + 0.4 * LAYERS[1]["bias"], rtol=1e-12)
    mean = FISHER["weight"] / FISHER["weight"].mean()
    expected = (0.6 * mean * LAYERS[0]["weight"] + 0.4 * LAYERS[1]["weight"]) / (0.6 * mean + 0.4)
    np.testing.assert_allclose(found["weight"], expected, rtol=1e-12)


def test_importances_over_a_tensor_have_their_mean_there():
    found = with_fisher(1, FISHER, alpha=0.6, fisher_scope="model")["weight"]
    method = get_method("bcwi")
    alone = Computed(
        "weight",
        np.dtype(np.float64),
        method,
        (ArrayTensor("weight", LAYERS[1]["weight"]),),
        ArrayTensor("weight", LAYERS[0]["weight"]),
        parameters=complete(method, {"alpha": 0.6, "fisher_scope": "tensor"}, 1, has_base=True),
        fishers=(ArrayTensor("weight", FISHER["weight"]), None),
    )
    own = Evaluator().values(alone, 0, 6).reshape(2, 3)
    assert np.abs(own - found).max() > 1e-3
    mean = FISHER["weight"] / FISHER["weight"].mean()
    expected = (0.6 * mean * LAYERS[0]["weight"] + 0.4 * LAYERS[1]["weight"]) / (0.6 * mean + 0.4)
    np.testing.assert_allclose(own, expected, rtol=1e-12)


@pytest.mark.parametrize("news", [1, 3])
def test_a_merge_takes_the_importances_of_a_fisher_checkpoint(news, write_model, tmp_path):
    old, *new = (llama_tensors(seed) for seed in range(news + 1))
    rng = np.random.default_rng(0)
    fisher = {name: rng.exponential(size=array.shape).astype(np.float32) for name, array in old.items()}
    fisher["model.norm.weight"][:] = 0
    paths = [write_model(f"m{i}", one) for i, one in enumerate([old, *new, fisher])]
    merged = ws.merge("bcwi", paths[1:-1], base=paths[0], base_fisher=paths[-1], alpha=0.4)
    found = saved(merged, tmp_path / "out")
    mean = np.concatenate([array.ravel() for array in fisher.values()]).mean(dtype=np.float64)
    for name, array in old.items():
        weight = 0.4 * fisher[name] / mean
        average = sum(np.float64(one[name]) for one in new) / news
        expected = (weight * array + 0.6 * average) / (weight + 0.6)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_importances_of_a_new_model_are_refused(write_model, tmp_path):
    b, m = (write_model(name, llama_tensors(seed)) for seed, name in enumerate("bm"))
    merged = ws.merge("bcwi", [m], base=b, fisher=[m], alpha=0.4)
    with pytest.raises(MethodError, match="give base_fisher"):
        merged.save(tmp_path / "out")


# -- robust weight signatures -----------------------------------------------------------------------------------------


def drawn_like_theirs() -> list[np.ndarray]:
    """Return P, S, C1, C2 and T [2, 1, 1, 3] as default_rng(1) draws them, each with a bias of two that is not used."""
    rng = np.random.default_rng(1)
    pretrained, bias = rng.standard_normal((2, 1, 1, 3)), rng.standard_normal(2)
    found = [pretrained]
    for _ in range(4):
        found.append(pretrained + 0.5 * rng.standard_normal((2, 1, 1, 3)))
        rng.standard_normal(bias.shape)
    return found


# decompose of model_patching.py with get_projection of tools.py, VITA-Group/Robust_Weight_Signatures, in float64:
# one signature; two with their default (alpha 1, halved, and entering as its square); two with strengths of their own.
RWS = [
    (1, {}, [0.2093914516, 1.7231968252, 0.2653874484, -1.0511116812, 0.586269775, -0.5300982959]),
    (2, {"squared": True}, [-0.086341811, 1.6435817957, 0.5412828275, -0.920374824, 0.4926421581, -0.4255252328]),
    (2, {"squared": True, "weight": [None, None, 0.8, 0.3]},
     [0.0981925984, 1.7053180555, 0.3996658862, -0.9968926604, 0.5581512944, -0.4787328178]),
    (2, {"weight": [None, None, 0.64, 0.09]},
     [0.0981925984, 1.7053180555, 0.3996658862, -0.9968926604, 0.5581512944, -0.4787328178]),
    (2, {"alpha": 0.5}, [-0.086341811, 1.6435817957, 0.5412828275, -0.920374824, 0.4926421581, -0.4255252328]),
]  # fmt: skip


@pytest.mark.parametrize(("signatures", "given", "expected"), RWS)
def test_patches_are_those_of_the_authors(signatures, given, expected):
    pretrained, clean, *corrupted, target = drawn_like_theirs()
    merged = merge_arrays("rws", [pretrained, clean, *corrupted[:signatures]], target, parameters=given)
    assert merged == pytest.approx(np.reshape(expected, (2, 1, 1, 3)), abs=1e-9)


def test_a_signature_has_nothing_of_what_clean_training_changes():
    pretrained, clean, corrupted, *_ = drawn_like_theirs()
    signature = merge_arrays("rws_signature", [pretrained, clean, corrupted])
    assert abs(np.sum(signature * (clean - pretrained))) < 1e-12
    # Clean training that changed nothing explains nothing; corrupted training that did as the clean one left no more.
    untouched = merge_arrays("rws_signature", [pretrained, pretrained, corrupted])
    np.testing.assert_allclose(untouched, corrupted - pretrained, rtol=1e-12)
    same = merge_arrays("rws_signature", [pretrained, clean, pretrained + 3 * (clean - pretrained)])
    np.testing.assert_allclose(same, 0, atol=1e-12)


def test_a_patch_comes_off_again_and_a_stored_signature_does_the_same(write_model, tmp_path):
    pretrained = llama_tensors(0)
    models = [near(pretrained, seed) for seed in (1, 2, 3)]
    p, s, c, t = (write_model(name, one) for name, one in zip("psct", [pretrained, *models], strict=True))
    patched = saved(ws.merge("rws", [p, s, c], base=t, alpha=0.8), tmp_path / "patched")
    restored = saved(ws.merge("rws", [p, s, c], base=tmp_path / "patched", alpha=-0.8), tmp_path / "restored")
    saved(ws.merge("rws_signature", [p, s, c]), tmp_path / "signature")
    stored = [tmp_path / "signature"]
    by_hand = saved(ws.merge("linear", [t, *stored], weight=[1.0, 0.8], normalize=False), tmp_path / "by-hand")
    off = ws.merge("linear", [tmp_path / "by-hand", *stored], weight=[1.0, -0.8], normalize=False)
    off = saved(off, tmp_path / "off")
    for name, target in models[2].items():
        assert np.abs(patched[name] - target).max() > 0.01
        limit = 4 * np.finfo(np.float32).eps * np.abs(target).max()
        np.testing.assert_allclose(restored[name], target, rtol=0, atol=limit)
        np.testing.assert_allclose(by_hand[name], patched[name], rtol=0, atol=limit)
        np.testing.assert_allclose(off[name], target, rtol=0, atol=limit)


def test_only_chosen_tensors_are_patched(write_model, tmp_path):
    pretrained = llama_tensors(0)
    p, s, c, t = (write_model(name, near(pretrained, i)) for i, name in enumerate("psct"))
    first = [{"filter": "layers.0.", "value": 1.0}, {"value": 0.0}]
    found = saved(ws.merge("rws", [p, s, c], base=t, alpha=first), tmp_path / "out")
    target = read_safetensors(t)
    for name in pretrained:
        assert np.array_equal(found[name], target[name]) == ("layers.0." not in name)


def test_norms_become_those_of_the_corrupted_models_by_a_rule(write_model, tmp_path):
    tensors = [llama_tensors(seed) for seed in range(5)]
    p, s, c1, c2, t = (str(write_model(f"m{i}", one)) for i, one in enumerate(tensors))
    rule = {"filter": "norm", "merge_method": "linear", "models": [{"model": c1}, {"model": c2}]}
    recipe = {
        "merge_method": "rws",
        "base_model": t,
        "models": [{"model": one} for one in (p, s, c1, c2)],
        "rules": [{**rule, "parameters": {"weight": 1}}],
    }
    found = saved(ws.merge_recipe(json.dumps(recipe)), tmp_path / "out")
    for name in tensors[0]:
        arrays = [one[name] for one in tensors]
        patched = merge_arrays("rws", arrays[:4], arrays[4])
        expected = (arrays[2] + arrays[3]) / 2 if "norm" in name else patched
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_strengths_belong_to_signatures():
    pretrained, clean, *corrupted, target = drawn_like_theirs()
    for weight in (0.5, [0.5, None, None, 0.5], [None, 0.0, 0.5, 0.5]):
        with pytest.raises(MethodError, match="weight is the strength of one corruption's signature"):
            merge_arrays("rws", [pretrained, clean, *corrupted], target, parameters={"weight": weight})


def test_a_broken_entry_stays_in_its_place():
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(50) for _ in range(4)]
    for broken in range(4):
        for value in (np.nan, np.inf):
            arrays = [array.copy() for array in models]
            arrays[broken][7] = value
            merged = merge_arrays("rws", arrays[1:], arrays[0])
            assert not np.isfinite(merged[7])
            assert np.isfinite(np.delete(merged, 7)).all()


@pytest.mark.parametrize(
    ("other", "name"),
    [("analogy", "transfer"), ("chat_vector", "transfer"), ("re_adapt", "transfer"), ("mi", "interpolate"),
     ("wise_ft", "interpolate"), ("bang", "interpolate"), ("hma", "ama"), ("robust_weight_signatures", "rws")],
)  # fmt: skip
def test_methods_are_found_by_the_names_they_are_published_under(other, name):
    assert get_method(other) is get_method(name)
