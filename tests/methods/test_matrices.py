"""Linear algebra on whole matrices, held against NumPy's decompositions in float64 and against hand-computed cases."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
import weakref
from typing import Any

import numpy as np
import pytest

from weightsmith.methods import matrices
from weightsmith.methods.block import Form
from weightsmith.methods.matrices import (
    Spectrum,
    effective_rank,
    is_matrix,
    joint_basis,
    leading,
    polar,
    rank_reaching,
    reweighted,
    spectrum,
    spectrum_work,
    svd,
    triples,
)

SHAPES = [(30, 30), (20, 45), (45, 20), (3, 5000)]
DTYPES = [np.float32, np.float64]
# Values: share of the largest singular value; vectors, products: absolute, of matrices with values from 1 to 0.01.
CLOSE = {np.float32: 5e-7, np.float64: 1e-13}


def with_values(values: Any, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return a matrix with these singular values, between random orthonormal vectors."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((shape[0], len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((shape[1], len(values))))
    return left @ np.diag(np.asarray(values, float)) @ right.T


def falling(shape: tuple[int, int]) -> np.ndarray:
    return with_values(np.geomspace(1, 0.01, min(shape)), shape)


def of_low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> np.ndarray:
    """Return a matrix of whole numbers, so that it has its rank in float32 as well."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (shape[0], rank)) @ rng.integers(-3, 4, (rank, shape[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_vectors_are_those_of_a_singular_value_decomposition(shape, dtype):
    matrix = falling(shape).astype(dtype)
    found = spectrum(np, matrix)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert found.values.dtype == found.vectors.dtype == np.float64
    np.testing.assert_allclose(found.values, s, rtol=0, atol=3e-8 if dtype == np.float32 else 1e-14)
    side = u if shape[0] <= shape[1] else vt.T
    cosines = np.sum(found.vectors[:, ::-1] * side, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=0, atol=1e-12)


def test_small_singular_values_of_float32_are_as_good_as_float32_can_hold():
    # Each decade of singular values down to the unit of float32; LAPACK in float32 loses ten units of the largest.
    values = np.array([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    matrix = with_values(values, (200, 300)).astype(np.float32)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = spectrum(np, matrix).values
    # The error of a square, 1e-16 of the largest, over twice the value.
    assert (np.abs(found - s)[:7] <= 1e-15 / s[:7]).all()
    torch = pytest.importorskip("torch")
    narrow = torch.linalg.svdvals(torch.from_numpy(matrix)).numpy()
    assert np.abs(found - s).max() < np.abs(narrow - s).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reweighted_multiplies_singular_values_and_drops_the_others(shape, dtype):
    matrix = falling(shape).astype(dtype)
    before = matrix.copy()
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    factors = np.array([2.0, -1.0, 0.5])
    result = reweighted(np, matrix, spectrum(np, matrix), factors)
    assert result.dtype == dtype
    assert result.shape == shape
    np.testing.assert_allclose(result, u[:, :3] @ np.diag(factors * s[:3]) @ vt[:3], rtol=0, atol=CLOSE[dtype])
    assert np.array_equal(matrix, before)
    assert not reweighted(np, matrix, spectrum(np, matrix), np.zeros(0)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triples_are_orthonormal_and_make_the_best_approximation(shape, dtype):
    matrix = falling(shape).astype(dtype)
    left, values, right = leading(np, matrix, 3)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert left.dtype == values.dtype == right.dtype == dtype
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=2e-6)
    np.testing.assert_allclose(right @ right.T, np.eye(3), atol=2e-6)
    np.testing.assert_allclose(values, s[:3], rtol=0, atol=1e-7)
    best = u[:, :3] @ np.diag(s[:3]) @ vt[:3]
    np.testing.assert_allclose(left @ np.diag(values) @ right, best, rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_triples_beyond_the_rank_are_of_value_zero(shape):
    matrix = of_low_rank(shape, 3).astype(np.float32)
    left, values, right = leading(np, matrix, 6)
    assert (left.shape, values.shape, right.shape) == ((shape[0], 6), (6,), (6, shape[1]))
    assert not values[3:].any()
    assert not (right[3:] if shape[0] < shape[1] else left[:, 3:]).any()
    np.testing.assert_allclose(left @ np.diag(values) @ right, matrix, rtol=0, atol=1e-5 * np.abs(matrix).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_orthonormal_and_leaves_a_symmetric_matrix(shape, dtype):
    matrix = falling(shape).astype(dtype)
    factor = polar(np, matrix).astype(np.float64)
    short = factor if shape[0] <= shape[1] else factor.T
    np.testing.assert_allclose(short @ short.T, np.eye(min(shape)), rtol=0, atol=1e-6)
    # A = H P with H symmetric and positive.
    stretch = matrix @ factor.T if shape[0] <= shape[1] else factor.T @ matrix
    np.testing.assert_allclose(stretch, stretch.T, rtol=0, atol=1e-6)
    assert np.linalg.eigvalsh(stretch).min() > -1e-6


def test_the_polar_factor_turns_with_its_matrix():
    matrix = falling((20, 30))
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (20, 30))
    np.testing.assert_allclose(polar(np, left @ matrix @ right), left @ polar(np, matrix) @ right, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_polar_factor_of_a_matrix_without_full_rank_stays_in_its_spaces(dtype):
    matrix = of_low_rank((20, 30), 4).astype(dtype)
    factor = polar(np, matrix)
    u, _, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(factor, u[:, :4] @ vt[:4], rtol=0, atol=2e-6)
    assert not polar(np, np.zeros((4, 6), dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 700])
def test_rounding_is_told_from_small_singular_values(length, dtype):
    matrix = of_low_rank((length, length), 5).astype(dtype)
    assert spectrum(np, matrix).rank(np) == 5
    rng = np.random.default_rng(0)
    assert spectrum(np, rng.standard_normal((length, length)).astype(dtype)).rank(np) == length


def test_the_rank_counts_values_above_a_share_of_the_largest():
    def rank(values: list[float], tolerance: float | None = None) -> int:
        found = Spectrum(np.array(values), np.eye(len(values)), np.dtype(np.float32))
        return found.rank(np, tolerance)

    assert rank([5.0, 1.0, 0.05, 0.04], 0.01) == 2
    assert rank([5.0, 1.0, 9e-6, 1e-6]) == 2
    assert rank([5.0, 1.0, 1e-5, 0.0], 0.0) == 3
    assert rank([0.0, 0.0]) == 0
    assert rank([math.nan, math.nan]) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_what_is_not_finite_makes_factors_of_nan(shape, dtype, value):
    matrix = falling(shape).astype(dtype)
    matrix[2, 3] = value
    assert np.isnan(spectrum(np, matrix).values).all()
    assert np.isnan(polar(np, matrix)).all()
    assert all(np.isnan(part).all() for part in svd(np, matrix))
    assert all(np.isnan(part).all() for part in leading(np, matrix, 2, "randomized"))


def test_the_other_driver_serves_where_the_first_gives_up():
    def gives_up(matrix: Any) -> Any:
        raise np.linalg.LinAlgError("did not converge")

    linalg = types.SimpleNamespace(eigh=gives_up, svd=np.linalg.svd)
    names = {name: getattr(np, name) for name in ("astype", "matrix_transpose", "isfinite", "sum", "flip", "where")}
    xp = types.SimpleNamespace(linalg=linalg, float64=np.float64, zeros_like=np.zeros_like, sqrt=np.sqrt, **names)
    matrix = falling((8, 12)).astype(np.float32)
    found, expected = spectrum(xp, matrix), spectrum(np, matrix)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.vectors * expected.vectors, axis=0)), 1, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "count"), [((20, 30), 3), ((20, 8), 4), ((40, 6), 3), ((40, 20), 2)])
def test_the_joint_basis_is_that_of_the_concatenation(shape, count, dtype):
    parts = [falling(shape).astype(dtype)] + [
        with_values(np.geomspace(1, 0.01, min(shape)), shape, seed).astype(dtype) for seed in range(1, count)
    ]
    vectors, values = joint_basis(np, iter(parts), count, shape, None)
    u, s, _ = np.linalg.svd(np.concatenate(parts, axis=1).astype(np.float64), full_matrices=False)
    rank = min(shape[0], count * shape[1])
    assert vectors.shape == (shape[0], rank)
    assert values.shape == (rank,)
    assert vectors.dtype == values.dtype == dtype
    np.testing.assert_allclose(values, s, rtol=0, atol=CLOSE[dtype])
    np.testing.assert_allclose(np.abs(np.sum(vectors * u, axis=0)), 1, rtol=0, atol=CLOSE[dtype] * 10)


def test_matrices_side_by_side_are_held_one_at_a_time():
    seen: list[weakref.ref[Any]] = []

    def parts() -> Any:
        for seed in range(5):
            assert not any(one() is not None for one in seen), seed
            matrix = with_values([3.0, 2.0, 1.0], (20, 30), seed)
            seen.append(weakref.ref(matrix))
            yield matrix
            del matrix

    joint_basis(np, parts(), 5, (20, 30), None)


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    assert effective_rank(np, np.full(7, 3.0)) == pytest.approx(7)
    assert effective_rank(np, np.array([2.0, 0.0, 0.0])) == pytest.approx(1)
    # Shares 1/2, 1/4, 1/4: an entropy of 1.5 bits.
    assert effective_rank(np, np.array([4.0, 2.0, 2.0], np.float32)) == pytest.approx(2**1.5)
    assert effective_rank(np, np.zeros(3)) == 0
    assert math.isnan(effective_rank(np, np.array([math.nan, 1.0])))


def test_a_rank_reaches_a_share_with_as_few_values_as_can_be():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    assert [rank_reaching(np, values, share, power=1) for share in (0, 0.1, 0.4, 0.41, 0.7, 0.9, 1)] == [
        0,
        1,
        1,
        2,
        2,
        3,
        4,
    ]
    # 16, 9, 4 and 1 of 30.
    assert [rank_reaching(np, values, share, power=2) for share in (0.5, 0.54, 0.84, 1)] == [1, 2, 3, 4]
    assert rank_reaching(np, np.array([math.nan, 1.0]), 0.5, power=1) == 2


@pytest.mark.parametrize("shape", [(60, 60), (50, 90), (90, 50)])
def test_the_randomised_form_is_exact_where_there_is_nothing_beyond_the_rank(shape):
    matrix = of_low_rank(shape, 6).astype(np.float32)
    exact, found = (leading(np, matrix, 6, how) for how in ("exact", "randomized"))
    np.testing.assert_allclose(found[1], exact[1], rtol=1e-6)
    np.testing.assert_allclose(
        found[0] @ np.diag(found[1]) @ found[2], matrix, rtol=0, atol=1e-5 * np.abs(matrix).max()
    )
    assert all(np.array_equal(*pair) for pair in zip(found, leading(np, matrix, 6, "randomized"), strict=True))


@pytest.mark.parametrize(("values", "excess"), [(np.geomspace(1, 1e-4, 200), 0.01), (np.linspace(1, 0.5, 200), 0.05)])
def test_the_randomised_form_is_within_a_few_per_cent_of_the_best(values, excess):
    matrix = with_values(values, (200, 300)).astype(np.float32)
    left, s, right = leading(np, matrix, 20, "randomized")
    lost = np.linalg.norm(matrix - left @ np.diag(s) @ right)
    assert lost <= (1 + excess) * np.linalg.norm(values[20:])
    # And it is what was asked for: not the exact one in disguise.
    assert lost > np.linalg.norm(values[20:]) * (1 + 1e-6)


def test_the_randomised_form_is_the_exact_one_where_nearly_all_is_wanted():
    matrix = falling((30, 40)).astype(np.float32)
    for one, other in zip(leading(np, matrix, 25), leading(np, matrix, 25, "randomized"), strict=True):
        assert np.array_equal(one, other)


def test_matrices_have_two_sides_to_speak_of():
    assert is_matrix(Form((3, 4)))
    assert not any(is_matrix(Form(shape)) for shape in [(), (4,), (1, 4), (4, 1), (3, 2, 2), (4, 3, 2, 2)])
    assert is_matrix(Form((4, 3, 2, 2)), convolutions=True)
    assert not any(is_matrix(Form(shape), convolutions=True) for shape in [(4,), (1, 3, 2), (3, 1, 1)])


_PEAK = """
import re, sys
import numpy as np
from weightsmith.methods import matrices
k, n, dtype, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
draw = np.random.default_rng(0).standard_normal
matrices.spectrum(np, draw((40, 50), dtype), 2, how)
matrix = draw((k, n), dtype)
# Forget the peak so far: what NumPy's import took.
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
matrices.spectrum(np, matrix, 100, how)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("k", "n", "dtype", "how"),
    [
        (1300, 1300, "float32", "exact"),
        (900, 2600, "float32", "exact"),
        (2600, 900, "float32", "exact"),
        (1000, 1000, "float64", "exact"),
        (700, 2100, "float64", "exact"),
        (2500, 2500, "float32", "randomized"),
    ],
)
def test_a_decomposition_holds_what_it_says(k, n, dtype, how):
    command = [sys.executable, "-c", _PEAK, str(k), str(n), dtype, how]
    single = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=single)
    item = np.dtype(dtype).itemsize
    said = spectrum_work(k, n, item, rank=100, how=how).elements * item
    assert 0.6 * said < float(done.stdout) < 1.1 * said


def test_torch_tensors_give_what_numpy_arrays_give():
    torch = pytest.importorskip("torch")
    from array_api_compat import array_namespace

    for shape in SHAPES:
        matrix = falling(shape).astype(np.float32)
        tensor = torch.from_numpy(matrix)
        xp = array_namespace(tensor)
        np.testing.assert_allclose(polar(xp, tensor).numpy(), polar(np, matrix), atol=1e-6)
        for how in ("exact", "randomized"):
            ours, theirs = leading(np, matrix, 3, how), leading(xp, tensor, 3, how)
            product = [u @ (s[:, None] * vt) for u, s, vt in (ours, tuple(map(np.asarray, theirs)))]
            np.testing.assert_allclose(product[1], product[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_triples_belong_to_the_sides_of_the_matrix(shape):
    # One direction: its left vector has the length of a column, and points along it.
    matrix = np.outer(np.arange(shape[0]), np.ones(shape[1])).astype(np.float32)
    left, values, right = triples(np, matrix, spectrum(np, matrix), 1)
    assert left.shape == (shape[0], 1)
    assert right.shape == (1, shape[1])
    np.testing.assert_allclose(np.abs(right), 1 / math.sqrt(shape[1]), rtol=1e-6)
    np.testing.assert_allclose(values, np.linalg.norm(matrix), rtol=1e-6)


def test_there_is_room_for_what_rounding_leaves():
    # The bounds are far above what the decompositions leave of zero, and below what float32 can tell apart.
    assert matrices._ROUNDING == {4: 2e-6, 8: 1e-13}
    for dtype, bound in ((np.float32, 1e-7), (np.float64, 1e-14)):
        found = spectrum(np, of_low_rank((500, 500), 5).astype(dtype))
        assert found.values[5] < bound * found.values[0]
