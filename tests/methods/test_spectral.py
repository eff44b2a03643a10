"""The spectral, subspaces and knots families: their authors' numbers, what rotations and scales do, and their edges."""

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
from weightsmith.errors import MethodError
from weightsmith.methods.block import Form
from weightsmith.methods.registry import get_method
from weightsmith.methods.settings import complete

# Every method, with parameters under which it does something of its own to matrices.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_cts", {"common_space_fraction": 0.5}),
    ("star", {}),
    ("timber", {}),
    ("low_rank", {"weight": 1.0}),
    ("subspace_boosting", {"beta": 0.3}),
    ("knots", {}),
    ("knots_dare", {}),
]


def change(method: str, deltas: list[np.ndarray], **given: Any) -> np.ndarray:
    """Return what a merge changes of a base of zeros, where the models are the task vectors themselves."""
    known = get_method(method)
    deltas = deltas[: known.maximum]
    options = {key: given.pop(key) for key in ("threads", "backend", "seed", "name") if key in given}
    given = {
        key: [value] * len(deltas) if known.parameters[key].per_model and not isinstance(value, list) else value
        for key, value in given.items()
    }
    return merge_arrays(method, deltas, np.zeros_like(deltas[0]), parameters=given, **options)


def drawn(shape: tuple[int, ...] = (12, 18), count: int = 3, seed: int = 0, dtype: Any = np.float64) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(count)]


def rotation(length: int, seed: int = 9) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((length, length)))[0]


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


# --- the authors' numbers ---------------------------------------------------------------------------------------------
# What the authors' functions return for these two task matrices, in float64, rounded to six digits. The matrices are
# numpy.random.default_rng(0).standard_normal((5, 6)) times [4, 2, 1, 0.5, 0.25, 0.125], twice, rounded to three.
TASKS = [
    [
        [0.503, -0.264, 0.64, 0.052, -0.134, 0.045],
        [5.216, 1.894, -0.704, -0.633, -0.156, 0.005],
        [-9.3, -0.438, -1.246, -0.366, -0.136, -0.04],
        [1.647, 2.085, -0.129, 0.683, -0.166, 0.044],
        [3.614, 0.188, -0.743, -0.461, -0.114, 0.028],
    ],
    [
        [-4.038, -0.418, -0.159, 0.27, 0.054, 0.044],
        [-2.615, -0.259, 0.784, 0.747, -0.315, 0.189],
        [5.384, 1.563, 0.264, -0.157, 0.365, 0.245],
        [7.207, 2.63, 0.357, -0.604, -0.001, 0.082],
        [-5.153, 0.79, 0.43, 0.348, -0.296, -0.083],
    ],
]
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, float, list[list[float]]]] = {
    # AntoAndGar/task_singular_vectors, TSVM_utils.compute_and_sum_svd_mem_reduction; the variant by eigenvalues agrees.
    "tsv": (
        "tsv",
        {},
        2,
        1e-6,
        [
            [-3.221896, -0.699123, 0.449003, 1.972148, -1.029352, -0.217464],
            [-0.533141, 0.523032, -2.245108, 5.490491, -3.332494, -0.751285],
            [-6.729641, 0.695729, -0.305287, -6.553957, 3.569405, 0.775229],
            [8.36087, 2.99266, 0.67005, -3.238853, 1.656289, 0.478721],
            [-2.21048, 0.640028, 1.137347, 3.555123, -1.981257, -0.330384],
        ],
    ),
    # danielm1405/iso-merging, iso.iso_c.
    "iso_c": (
        "iso_c",
        {},
        2,
        1e-6,
        [
            [-1.499623, 0.748238, 2.44395, 1.406004, 0.180061, 0.482248],
            [0.650255, 0.560968, -0.326161, 0.459194, -2.183105, 2.280954],
            [-1.668213, 1.829415, -1.412566, -0.792328, 1.096973, 1.033093],
            [2.189652, 2.261414, 0.592597, 0.132954, 0.775611, -0.380079],
            [-0.87962, 1.299232, -0.294146, -0.150774, -2.059719, -2.051833],
        ],
    ),
    # danielm1405/iso-merging, iso.iso_cts with common_space_fraction 0.5.
    "iso_cts": (
        "iso_cts",
        {"common_space_fraction": 0.5},
        2,
        1e-6,
        [
            [-6.385186, 0.220823, 2.139634, 2.018605, -1.699446, -0.237775],
            [-0.785856, 1.063828, -5.52321, -0.530903, -4.369261, -0.88846],
            [-2.639265, 3.409335, -2.710748, -1.728733, 4.786008, 0.764839],
            [1.840523, 3.921206, -0.201252, 5.776803, 0.260853, -0.416448],
            [0.821059, 4.91609, 3.112474, -3.346931, -2.556786, 0.384883],
        ],
    ),
    # IBM/STAR, STAR.star with eta 60 on each, averaged.
    "star": (
        "star",
        {"eta": 60.0},
        2,
        1e-6,
        [
            [-2.279523, -0.485941, 0.001088, 0.200691, -0.081626, -0.0322],
            [2.086491, 0.196086, 0.143138, 0.123322, -0.063842, -0.004629],
            [-2.943217, -0.204838, -0.243501, -0.262549, 0.130036, 0.016369],
            [6.287923, 1.201828, 0.07733, -0.382482, 0.147939, 0.069815],
            [-0.659223, -0.286559, 0.084943, 0.238306, -0.10496, -0.029335],
        ],
    ),
    # wutaiqiang/Timber, timber.calculate_effective_rank (3.0 of 5) and the lines after it, gamma 0.2, on the first.
    "timber": (
        "timber",
        {"gamma": 0.2},
        1,
        1e-6,
        [
            [0.513583, -0.300522, 0.528639, 0.188982, 0.018463, 0.014423],
            [5.229046, 1.838662, -0.823336, -0.47218, -0.1573, 0.01486],
            [-9.298318, -0.443298, -1.264583, -0.343831, -0.102462, -0.047198],
            [1.639235, 2.119175, -0.060129, 0.588249, -0.142492, 0.032418],
            [3.60139, 0.244467, -0.632851, -0.614107, -0.058018, 0.004718],
        ],
    ),
    # kaganhitit11/mergekit, subspace_helpers.subspace_boosting with svd_thresh 0.5 on the sum; it works in float32.
    "subspace_boosting": (
        "subspace_boosting",
        {"beta": 0.5},
        2,
        1e-5,
        [
            [-5.205218, 2.597149, 8.482991, 4.880265, 0.624995, 1.673891],
            [2.257051, 1.947127, -1.13211, 1.593873, -7.577593, 7.917226],
            [-5.790395, 6.349933, -4.903042, -2.750182, 3.807613, 3.585885],
            [7.600326, 7.849405, 2.056916, 0.461484, 2.692161, -1.319261],
            [-3.053176, 4.509659, -1.020986, -0.523338, -7.149322, -7.121946],
        ],
    ),
    # gstoica27/KnOTS, task_merger.SVDMerger with TIES, topK 40, mean; coordinates in float32. Its trimming keeps one
    # entry more than the share: 13 of 30.
    "knots": (
        "knots",
        {"density": 13.5 / 30},
        2,
        5e-6,
        [
            [-3.908834, -0.089792, 0.352755, 0.155565, -0.113926, 0.0],
            [-2.694696, -0.166092, -0.246783, -0.22618, -0.194711, 0.0],
            [5.314345, 1.295255, -1.351734, -1.226425, 0.365254, 0.0],
            [7.451571, 3.048646, 0.139844, 0.299352, 0.148233, 0.0],
            [-5.09798, 0.357868, -1.003875, 0.091338, -0.211091, 0.0],
        ],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_authors_numbers_are_met(name, dtype):
    method, given, count, tolerance, expected = PUBLISHED[name]
    found = change(method, [np.array(task, dtype) for task in TASKS[:count]], **given)
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(tolerance, 2e-5 if dtype == np.float32 else 0))


# --- what holds of all ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize(("name", "given"), [entry for entry in METHODS if not entry[0].startswith("knots")])
def test_the_result_turns_with_the_task_matrices(name, given, shape):
    deltas = drawn(shape)
    left, right = rotation(shape[0]), rotation(shape[1])
    turned = change(name, [left @ delta @ right for delta in deltas], **given)
    np.testing.assert_allclose(turned, left @ change(name, deltas, **given) @ right, atol=1e-10)


@pytest.mark.parametrize("name", ["knots", "knots_dare"])
@pytest.mark.parametrize("concatenate", ["in", "out"])
def test_knots_turns_with_the_side_of_its_basis(name, concatenate):
    deltas = drawn()
    expected = change(name, deltas, concatenate=concatenate)
    left, right = (rotation(12), np.eye(18)) if concatenate == "in" else (np.eye(12), rotation(18))
    turned = change(name, [left @ delta @ right for delta in deltas], concatenate=concatenate)
    np.testing.assert_allclose(turned, left @ expected @ right, atol=1e-10)


@pytest.mark.parametrize(("name", "given"), METHODS)
@pytest.mark.parametrize("shape", [(12, 18), (40,)])
def test_the_result_grows_with_the_task_vectors(name, given, shape):
    deltas = drawn(shape)
    for factor in (1e-6, 1000.0):
        grown = change(name, [factor * delta for delta in deltas], **given)
        np.testing.assert_allclose(grown, factor * change(name, deltas, **given), rtol=1e-9, atol=1e-12 * factor)


@pytest.mark.parametrize(("name", "given"), METHODS)
@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_very_small_and_very_large_task_vectors_keep_their_digits_in_float32(name, given, factor):
    deltas = drawn(dtype=np.float32)
    grown = change(name, [np.float32(factor) * delta for delta in deltas], **given)
    expected = change(name, deltas, **given)
    np.testing.assert_allclose(grown / factor, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "given"), METHODS)
def test_factors_scale_the_change_or_the_models(name, given):
    deltas = drawn()
    plain = change(name, deltas, **given)
    np.testing.assert_allclose(change(name, deltas, **{**given, "lambda": 0.3}), 0.3 * plain, atol=1e-12)
    parameters = get_method(name).parameters
    if "weight" in parameters:
        weighted = change(name, deltas, **{**given, "weight": [2.0, -1.0, 0.5]})
        # A mean divides by the weights; elsewhere they multiply the task vectors.
        divisor = {"star": 1.5 / 3}.get(name)
        if "knots" not in name:
            scaled = change(name, [2 * deltas[0], -deltas[1], 0.5 * deltas[2]], **{**given, "weight": 1.0})
            np.testing.assert_allclose(weighted * (divisor or 1.0), scaled, atol=1e-10)


@pytest.mark.parametrize(("name", "given"), METHODS)
def test_no_model_that_takes_part_gives_the_base(name, given):
    if "weight" not in get_method(name).parameters:
        pytest.skip("takes one model")
    assert not change(name, drawn(), **{**given, "weight": 0.0}).any()
    assert not change(name, drawn((30,)), **{**given, "weight": 0.0}).any()


@pytest.mark.parametrize(("name", "given"), METHODS)
def test_task_vectors_of_zero_change_nothing(name, given):
    assert not change(name, [np.zeros((6, 9), np.float32)] * 3, **given).any()


@pytest.mark.parametrize(("name", "given"), METHODS)
@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_and_heads_are_matrices_where_they_are_asked_to_be(name, given, embeddings):
    deltas = drawn((12, 18))
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        found = change(name, deltas, **given, embeddings=embeddings, name=tensor)
        other = change(name, [delta.reshape(-1) for delta in deltas], **given, name=tensor).reshape(12, 18)
        if name == "timber":
            other = deltas[0]
        assert np.allclose(found, other) == (not embeddings), tensor


@pytest.mark.parametrize(("name", "given"), METHODS)
@pytest.mark.parametrize("convolutions", [True, False])
def test_convolutions_are_matrices_where_they_are_asked_to_be(name, given, convolutions):
    deltas = drawn((6, 3, 2, 2))
    found = change(name, deltas, **given, convolutions=convolutions)
    flat = [delta.reshape(6, 12) if convolutions else delta.reshape(-1) for delta in deltas]
    expected = change(name, flat, **given).reshape(found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(("name", "given"), METHODS)
def test_what_is_said_of_the_work_goes_with_what_is_taken_apart(name, given):
    known = get_method(name)
    parameters = complete(known, given, known.maximum or 3, has_base=True)
    assert known.reads(parameters, Form((12, 18))) == "tensor"
    work = known.work(parameters, Form((12, 18)), known.maximum or 3)
    assert work.decompositions > 0
    assert work.elements > 12 * 18
    for form in (Form((12,)), Form((1, 18)), Form(())):
        assert known.reads(parameters, form) == "elements"
        assert known.work(parameters, form, 3) is None
    # Twice the sides, eight times the work; the workspace in float64 weighs half of what it does beside float32.
    twice = known.work(parameters, Form((1200, 1800)), known.maximum or 3)
    assert twice.operations == pytest.approx(1e6 * work.operations, rel=0.2)
    wide = known.work(parameters, Form((1200, 1800), itemsize=8), known.maximum or 3)
    assert wide.elements < 1.5 * twice.elements


@pytest.mark.parametrize(("name", "given"), METHODS)
def test_torch_gives_what_numpy_gives(name, given):
    pytest.importorskip("torch")
    deltas = drawn((40, 60), dtype=np.float32)
    expected = change(name, deltas, **given)
    found = change(name, deltas, **given, backend="torch")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "given"), [*METHODS, ("knots", {"trim_scope": "model"}), ("opcm", {})])
def test_a_model_is_the_same_bytes_with_one_thread_and_with_two(name, given, write_model, tmp_path):
    def near(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            key: (array.astype(np.float32) + 0.01 * rng.standard_normal(array.shape)).astype(array.dtype)
            for key, array in base.items()
        }

    base = llama_tensors(0, hidden=48, vocabulary=64, dtype=ml_dtypes.bfloat16)
    paths = [write_model(f"m{i}", near(i)) for i in range(3)][: get_method(name).maximum]
    home = write_model("base", base)
    outputs = []
    for threads in (1, 2):
        target = tmp_path / f"out{threads}"
        ws.merge(name, paths, home, **given).save(target, threads=threads)
        outputs.append(read_safetensors(target))
    for key, array in outputs[0].items():
        assert array.tobytes() == outputs[1][key].tobytes(), key
        assert np.isfinite(array.astype(np.float32)).all()


# --- each method ------------------------------------------------------------------------------------------------------
def test_tsv_of_one_model_is_that_model():
    (delta,) = drawn(count=1)
    np.testing.assert_allclose(change("tsv", [delta]), delta, atol=1e-12)


def test_tsv_adds_up_task_matrices_that_have_nothing_in_common():
    left, right = rotation(12), rotation(18, 3)
    parts = [left[:, i * 4 : i * 4 + 4] @ np.diag([4.0, 3.0, 2.0, 1.0]) @ right[i * 4 : i * 4 + 4] for i in range(3)]
    np.testing.assert_allclose(change("tsv", parts), sum(parts), atol=1e-12)


def test_tsv_of_copies_is_the_best_approximation_of_one():
    # Task vectors that share all directions: the polar factor is that of the directions they have.
    (delta,) = drawn(count=1)
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    np.testing.assert_allclose(change("tsv", [delta] * 3), u[:, :4] @ np.diag(s[:4]) @ vt[:4], atol=1e-10)


def test_tsv_makes_task_directions_orthogonal():
    deltas = drawn((10, 10), 2)
    # Of k / T = 5 directions each, ten are left: singular values are those of the tasks in a new frame.
    kept = np.concatenate([singular_values(delta)[:5] for delta in deltas])
    np.testing.assert_allclose(singular_values(change("tsv", deltas)), np.sort(kept)[::-1], atol=1e-10)


def test_tsv_keeps_a_direction_of_each_model_where_models_outnumber_directions():
    deltas = drawn((3, 8), 5)
    merged = change("tsv", deltas)
    assert np.linalg.matrix_rank(merged) == 3
    np.testing.assert_allclose(change("tsv", deltas[::-1]), merged, atol=1e-10)


def test_a_model_that_left_a_matrix_alone_does_not_push_the_others_aside():
    deltas = drawn((12, 18), 2)
    still = [*deltas, np.zeros((12, 18))]
    # It is counted, as the rank shows, and stands for no direction.
    u, s, vt = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas), strict=True)
    left, right = (np.concatenate(parts, axis=1) for parts in ([x[:, :4] for x in u], [x[:4].T for x in vt]))
    nearest = [a @ b for a, _, b in (np.linalg.svd(x, full_matrices=False) for x in (left, right))]
    expected = nearest[0] @ np.diag(np.concatenate([x[:4] for x in s])) @ nearest[1].T
    np.testing.assert_allclose(change("tsv", still), expected, atol=1e-10)


def test_task_matrices_of_low_rank_merge_the_same_whatever_is_beyond_their_rank():
    rng = np.random.default_rng(0)
    deltas = [rng.integers(-3, 4, (24, 2)) @ rng.integers(-3, 4, (2, 36)) for _ in range(3)]
    wide = [change(name, [delta.astype(np.float64) for delta in deltas]) for name in ("tsv", "iso_c", "iso_cts")]
    # In float32 rounding leaves other directions beyond the rank; nothing of them shows.
    narrow = [change(name, [delta.astype(np.float32) for delta in deltas]) for name in ("tsv", "iso_c", "iso_cts")]
    for one, other in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
        assert np.linalg.matrix_rank(other, tol=1e-8) == 6


def test_iso_makes_all_singular_values_equal():
    deltas = drawn((10, 15))
    flat = singular_values(sum(deltas)).mean()
    np.testing.assert_allclose(singular_values(change("iso_c", deltas)), flat, rtol=1e-10)
    for fraction in (0.0, 0.5, 1.0):
        values = singular_values(change("iso_cts", deltas, common_space_fraction=fraction))
        np.testing.assert_allclose(values, values.mean(), rtol=1e-10)


def test_iso_cts_with_all_in_common_or_of_one_model_is_iso_c():
    deltas = drawn()
    np.testing.assert_allclose(
        change("iso_cts", deltas, common_space_fraction=1.0), change("iso_c", deltas), atol=1e-10
    )
    for fraction in (0.0, 0.3, 0.8):
        one = change("iso_cts", deltas[:1], common_space_fraction=fraction)
        np.testing.assert_allclose(one, change("iso_c", deltas[:1]), atol=1e-10)


def test_iso_cts_never_asks_for_more_directions_than_there_are():
    # The authors' rounding asks for five directions of three here.
    merged = change("iso_cts", drawn((3, 7), 5), common_space_fraction=0.0)
    assert np.isfinite(merged).all()
    assert np.linalg.matrix_rank(merged) == 3


def test_the_mean_of_iso_is_over_all_values_or_over_those_that_are_there():
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 18))
    total = singular_values(delta).sum()
    for mean_over, count in (("all", 12), ("rank", 4)):
        values = singular_values(change("iso_c", [delta], mean_over=mean_over))
        np.testing.assert_allclose(values[:4], total / count, rtol=1e-10)
        np.testing.assert_allclose(values[4:], 0, atol=1e-12)
        np.testing.assert_allclose(singular_values(change("iso_cts", [delta], mean_over=mean_over)), values, atol=1e-9)


def test_a_tolerance_takes_the_rounding_of_folded_adapters_for_what_it_is():
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal((64, 96))).astype(ml_dtypes.bfloat16)
    adapter = 0.01 * rng.standard_normal((64, 4)) @ rng.standard_normal((4, 96))
    folded = (base.astype(np.float64) + adapter).astype(ml_dtypes.bfloat16)
    merged = [
        merge_arrays("iso_c", [folded], base, parameters={"mean_over": "rank", **given}).astype(np.float64) - base
        for given in ({}, {"tolerance": 0.05})
    ]
    assert [np.linalg.matrix_rank(one, tol=1e-3) for one in merged] == [64, 4]


def test_star_keeps_the_nuclear_norm_of_few_directions():
    (delta,) = drawn((20, 30), 1)
    merged = change("star", [delta], eta=40.0)
    values, kept = singular_values(delta), singular_values(merged)
    assert kept.sum() == pytest.approx(values.sum(), rel=1e-12)
    rank = int(np.searchsorted(np.cumsum(values), 0.4 * values.sum())) + 1
    assert np.linalg.matrix_rank(merged) == rank
    np.testing.assert_allclose(kept[:rank], values[:rank] * values.sum() / values[:rank].sum(), rtol=1e-12)
    np.testing.assert_allclose(change("star", [delta], eta=100.0), delta, atol=1e-12)
    assert not change("star", [delta], eta=0.0).any()


def test_star_of_adapters_finds_no_more_than_their_rank():
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((60, 4)) @ rng.standard_normal((4, 80)) for _ in range(2)]
    exact = change("star", deltas)
    for how in ("exact", "randomized"):
        np.testing.assert_allclose(change("star", deltas, rank=4, svd=how), exact, atol=1e-8)


def test_timber_keeps_as_many_values_as_the_effective_rank_says():
    delta = rotation(6) @ np.diag([4.0, 2.0, 2.0, 0, 0, 0]) @ rotation(6, 3)
    # 2 ** 1.5 = 2.83 directions: three are kept, and there is nothing beyond.
    np.testing.assert_allclose(change("timber", [delta], gamma=0.0), delta, atol=1e-12)
    delta = rotation(6) @ np.diag([4.0, 2.0, 2.0, 0.01, 0.01, 0.01]) @ rotation(6, 3)
    np.testing.assert_allclose(
        singular_values(change("timber", [delta], gamma=0.5)), [4, 2, 2, 0.005, 0.005, 0.005], atol=1e-12
    )
    np.testing.assert_allclose(change("timber", [delta], gamma=1.0), delta, atol=1e-12)


def test_the_effective_rank_of_equal_values_is_their_number():
    # Rounding lifts it above: ceil would ask for a value more than there is.
    delta = rotation(7)
    for name, given in (("timber", {"gamma": 0.0}), ("low_rank", {"weight": 1.0, "keep": "effective_rank"})):
        np.testing.assert_allclose(change(name, [delta], **given), delta, atol=1e-12)


def test_low_rank_is_the_nearest_matrix_of_its_rank():
    (delta,) = drawn((20, 30), 1)
    values = singular_values(delta)
    for rank in (1, 5, 20, 50):
        merged = change("low_rank", [delta], weight=1.0, keep="rank", rank=rank)
        assert np.linalg.matrix_rank(merged) == min(rank, 20)
        assert np.linalg.norm(delta - merged) == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-10)
    for energy in (0.2, 0.5, 0.95):
        merged = change("low_rank", [delta], weight=1.0, energy=energy)
        rank = np.linalg.matrix_rank(merged)
        assert (values[:rank] ** 2).sum() >= energy * (values**2).sum() > (values[: rank - 1] ** 2).sum()


def test_lore_adapt_is_low_rank_as_it_is_by_default():
    deltas = drawn(count=1)
    assert get_method("lore_adapt") is get_method("low_rank")
    expected = change("low_rank", deltas, weight=1.0, keep="energy", energy=0.5)
    assert np.array_equal(change("lore_adapt", deltas, weight=1.0), expected)


def test_boosting_lifts_small_values_to_the_floor():
    delta = rotation(6) @ np.diag([5.0, 3.0, 2.0, 1.0, 0.5, 0.5]) @ rotation(6, 3)
    for beta, floor in ((0.0, 5.0), (0.4, 5.0), (0.5, 3.0), (0.8, 2.0), (1.0, 0.5)):
        expected = np.maximum([5.0, 3.0, 2.0, 1.0, 0.5, 0.5], floor)
        np.testing.assert_allclose(singular_values(change("subspace_boosting", [delta], beta=beta)), expected)


def test_boosting_lifts_nothing_out_of_nothing():
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 18))
    values = singular_values(change("subspace_boosting", [delta], beta=0.01))
    np.testing.assert_allclose(values[:4], singular_values(delta)[0])
    np.testing.assert_allclose(values[4:], 0, atol=1e-12)


@pytest.mark.parametrize("concatenate", ["in", "out"])
@pytest.mark.parametrize("coordinates", ["scaled", "unscaled"])
def test_knots_without_trimming_and_election_is_task_arithmetic(concatenate, coordinates):
    deltas = drawn()
    given = {"weight": [1.0, 0.5, -2.0], "elect": False, "normalize": False}
    for name in ("knots", "knots_dare"):
        merged = change(name, deltas, **given, density=1.0, concatenate=concatenate, coordinates=coordinates)
        np.testing.assert_allclose(merged, deltas[0] + 0.5 * deltas[1] - 2 * deltas[2], atol=1e-10)


def test_knots_trims_the_coordinates_that_there_are():
    # Two adapters of rank 1: two rows of coordinates, whatever the side of the matrix.
    rng = np.random.default_rng(0)
    left, right = rotation(20)[:, :2], rng.standard_normal((2, 30))
    deltas = [np.outer(left[:, i], right[i]) for i in range(2)]
    merged = change("knots", deltas, density=0.25, elect=False, normalize=False)
    # A quarter of 60 entries each, all in their own row.
    rows = np.abs(left.T @ merged) > 1e-9
    assert rows.sum(axis=1).tolist() == [15, 15]
    largest = [set(np.argsort(-np.abs(right[i]))[:15]) for i in range(2)]
    assert [set(np.flatnonzero(row)) for row in rows] == largest


@pytest.mark.parametrize("shapes", [[(12, 18), (18, 12), (30,)], [(8, 9), (9, 9)]])
def test_knots_over_a_model_trims_all_coordinates_together(shapes):
    method, group, shared = get_method("knots"), Group(), {}
    spreads = [1.0, 5.0, 0.2]
    deltas = [
        [s * delta for delta in drawn(shape, 2, i)] for i, (shape, s) in enumerate(zip(shapes, spreads, strict=False))
    ]
    parameters = complete(method, {"trim_scope": "model", "density": [0.3, 0.3]}, 2, has_base=True)
    made = [
        Computed(
            f"t{i}",
            np.dtype(np.float64),
            method,
            tuple(ArrayTensor("t", delta) for delta in pair),
            ArrayTensor("t", np.zeros_like(pair[0])),
            parameters=parameters,
            group=group,
        )
        for i, pair in enumerate(deltas)
    ]
    found = [Evaluator(shared).values(tensor, 0, tensor.size).reshape(tensor.shape) for tensor in made]
    bases = [np.linalg.svd(np.concatenate(pair, axis=1))[0] if pair[0].ndim == 2 else None for pair in deltas]
    rows = [
        [delta if basis is None else basis.T @ delta for delta in pair]
        for basis, pair in zip(bases, deltas, strict=True)
    ]
    flat = [np.abs(np.concatenate([pair[i].ravel() for pair in rows])) for i in range(2)]
    least = [np.sort(values)[-int(0.3 * len(values))] for values in flat]
    for tensor, basis, pair in zip(found, bases, rows, strict=True):
        kept = [part * (np.abs(part) >= bound) for part, bound in zip(pair, least, strict=True)]
        sign = np.where(sum(kept) >= 0, 1, -1)
        masks = [np.sign(part) == sign for part in kept]
        merged = sum(part * mask for part, mask in zip(kept, masks, strict=True)) / np.maximum(sum(masks), 1)
        np.testing.assert_allclose(tensor, merged if basis is None else basis @ merged, atol=1e-10)
    alone = change("knots", deltas[0], density=0.3)
    assert not np.allclose(alone, found[0], atol=1e-3), "this case does not show the scope"


def test_knots_over_a_model_says_that_matrices_are_taken_apart_again():
    method = get_method("knots")
    counts = []
    for given in ({}, {"trim_scope": "model"}, {"trim_scope": "model", "density": 1.0}):
        parameters = complete(method, given, 3, has_base=True)
        counts.append(method.work(parameters, Form((12, 18)), 3).decompositions)
    assert counts == [1, 3, 1]


def test_knots_dare_keeps_what_its_numbers_say_and_its_expectation():
    deltas = drawn((30, 40), 2)
    given = {"elect": False, "normalize": False, "density": 0.3}
    merged = [change("knots_dare", deltas, **given, seed=seed) for seed in range(200)]
    assert not np.array_equal(merged[0], merged[1])
    assert np.abs(np.mean(merged, axis=0) - sum(deltas)).mean() < 0.2


@pytest.mark.parametrize(
    ("name", "given", "share"),
    [
        ("tsv", {}, 0.02),
        ("iso_cts", {}, 0.05),
        ("star", {"rank": 10}, 0.02),
        ("low_rank", {"weight": 1.0, "keep": "rank", "rank": 10}, 0.02),
    ],
)
def test_random_projections_come_close_where_singular_values_fall(name, given, share):
    rng = np.random.default_rng(0)
    deltas = []
    for seed in range(6):
        left, right = rotation(120, 10 + seed), rotation(150, 20 + seed)[:120]
        deltas.append(left @ np.diag(np.geomspace(1, 1e-4, 120) * rng.uniform(0.9, 1.1, 120)) @ right)
    exact, close = (change(name, deltas, **given, svd=how) for how in ("exact", "randomized"))
    assert 0 < np.linalg.norm(close - exact) < share * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("star", {"svd": "randomized"}, "give the rank"),
        ("low_rank", {"weight": 1.0, "svd": "randomized"}, "give the rank"),
        ("low_rank", {"weight": 1.0, "keep": "rank"}, "go together"),
        ("low_rank", {"weight": 1.0, "rank": 3}, "go together"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused(name, given, words):
    with pytest.raises(MethodError, match=words):
        change(name, drawn(), **given)


def test_a_plan_counts_what_matrices_cost(write_model):
    base = llama_tensors(0)
    paths = [write_model(f"m{i}", llama_tensors(i)) for i in range(3)]
    home = write_model("base", base)
    plan = ws.merge("tsv", paths, home).plan()
    # Two layers of two matrices, the embedding and the head; for each three models and two concatenations.
    assert plan.work.decompositions == 6 * 5
    content = json.loads(json.dumps(plan.to_json(1)))
    assert content["decompositions"] == 30
    assert content["matrix_operations"] == plan.work.operations > 0
