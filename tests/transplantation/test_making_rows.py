"""Rows by number, their sums, and the ways to make them beside the pursuit; each against a plain formula."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, MethodError
from weightsmith.transplantation import combination
from weightsmith.transplantation import nearest as nearest_module
from weightsmith.transplantation import rows as rows_module
from weightsmith.transplantation.combination import Combinations, combine
from weightsmith.transplantation.gaussian import Gaussian
from weightsmith.transplantation.landmarks import LandmarkMap
from weightsmith.transplantation.neighbours import nearest_neighbours
from weightsmith.transplantation.rows import Rows
from weightsmith.transplantation.similarity import softmax_of_nearest, sparsemax, sparsemax_of_all

ANCHORS, TARGETS = np.arange(200), np.arange(200, 212)
WAYS = {
    "distance": nearest_neighbours,
    "barycentric": lambda *a, **s: nearest_neighbours(*a, count=9, scheme="barycentric", **s),
    "least_squares": lambda *a, **s: nearest_neighbours(*a, count=9, scheme="least_squares", **s),
    "cosine": lambda *a, **s: nearest_neighbours(*a, count=9, metric="cosine", **s),
    "softmax": softmax_of_nearest,
    "sparsemax": sparsemax_of_all,
}


def rows_of(seed: int = 0, count: int = 212, width: int = 24) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, width)) * random.uniform(0.5, 2, (count, 1))).astype(np.float32)


def cosines_of(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1)[:, None]
    return unit[TARGETS] @ unit[ANCHORS].T


def assert_same(one: Combinations, other: Combinations) -> None:
    for name in ("anchors", "weights", "residual"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# -- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_rows_are_read_by_number_in_any_order(dtype, monkeypatch):
    # Stretches of at most four rows.
    monkeypatch.setattr(rows_module, "_SPAN", 4 * 24)
    stored = rows_of().astype(dtype)
    numbers = np.random.default_rng(1).integers(0, 212, 500)
    found = Rows(ArrayTensor("embed", stored)).take(numbers)
    assert found.dtype == np.float32
    assert (found == stored.astype(np.float32)[numbers]).all()


def test_no_more_is_read_than_stretches_of_the_rows_that_are_wanted():
    reads = []

    class Watched(ArrayTensor):
        def read(self, start, stop):
            reads.append((start // 24, stop // 24))
            return super().read(start, stop)

    Rows(Watched("embed", rows_of())).take(np.array([100, 5, 6, 9, 10, 101]))
    assert reads == [(5, 11), (100, 102)]


@pytest.mark.parametrize("number", [-1, 212])
def test_a_row_that_is_not_there_is_an_error(number):
    with pytest.raises(CheckpointError, match=f"embed: has 212 rows; there is no row {number}"):
        Rows(ArrayTensor("embed", rows_of())).take(np.array([3, number]))


def test_what_has_not_two_axes_is_an_error():
    with pytest.raises(CheckpointError, match="embed: expected rows of tokens"):
        Rows(ArrayTensor("embed", np.zeros(5, np.float32)))


def test_whole_numbers_are_no_rows_to_compute_with():
    with pytest.raises(CheckpointError, match="embed: expected rows of floating-point numbers, found int8"):
        Rows(ArrayTensor("embed", np.zeros((5, 3), np.int8)))


def test_no_rows_are_no_rows():
    assert Rows(rows_of()).take(np.empty(0, np.int64)).shape == (0, 24)


# -- sums -----------------------------------------------------------------------------------------------------------


def test_rows_are_added_up_with_their_weights():
    random = np.random.default_rng(2)
    anchors = random.integers(0, 200, (5000, 6)).astype(np.int32)
    weights = random.standard_normal((5000, 6))
    anchors[::3, 2:], weights[::3, 2:] = -1, 0
    combinations = Combinations(anchors, weights, np.zeros(5000))
    model = rows_of(3)[:200]
    plain = np.einsum("tk,tkd->td", weights, model.astype(np.float64)[anchors])
    whole = combine(combinations, model)
    np.testing.assert_allclose(whole, plain, rtol=1e-12, atol=1e-12)
    for first, last in ((0, 5000), (0, 1), (17, 2800), (4999, 5000), (7, 7)):
        assert (combine(combinations, model, first, last) == whole[first:last]).all()


def test_targets_with_different_numbers_of_anchors_lie_side_by_side():
    parts = [(np.array([4]), np.array([1.0])), (np.empty(0, int), np.empty(0)), (np.array([2, 1]), np.array([0.5, -1]))]
    found = Combinations.padded(parts, np.zeros(3))
    assert found.anchors.tolist() == [[4, -1], [-1, -1], [2, 1]]
    assert found.weights.tolist() == [[1, 0], [0, 0], [0.5, -1]]
    assert found.anchors.dtype == np.int32
    assert len(Combinations.padded([], np.zeros(0))) == 0


# -- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_neighbours_are_the_nearest_nearest_first(metric, count):
    rows = rows_of(4)
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=count, metric=metric)
    wide = rows.astype(np.float64)
    distances = (
        np.linalg.norm(wide[TARGETS, None] - wide[ANCHORS], axis=2) if metric == "euclidean" else -cosines_of(rows)
    )
    assert (found.anchors == np.argsort(distances, axis=1)[:, :count]).all()


def test_weights_by_distance_are_its_inverse():
    rows = rows_of(5)
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=6)
    wide = rows.astype(np.float64)
    for place, target in enumerate(wide[TARGETS]):
        inverse = 1 / np.linalg.norm(wide[found.anchors[place]] - target, axis=1)
        np.testing.assert_allclose(found.weights[place], inverse / inverse.sum(), rtol=1e-12)
        left = np.linalg.norm(target - found.weights[place] @ wide[found.anchors[place]]) / np.linalg.norm(target)
        assert found.residual[place] == pytest.approx(left, rel=1e-12)


def test_weights_by_cosine_are_the_cosines():
    rows = rows_of(6)
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=150, metric="cosine")
    cosines = np.maximum(np.take_along_axis(cosines_of(rows), found.anchors, axis=1), 0)
    assert (cosines == 0).any(), "all are positive: this does not test what negative ones become"
    np.testing.assert_allclose(found.weights, cosines / cosines.sum(1, keepdims=True), atol=1e-12)


def test_a_neighbour_that_is_the_row_itself_has_all_the_weight():
    rows = rows_of(7)
    rows[205] = rows[31] = rows[30]
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=4)
    assert found.anchors[5, :2].tolist() == [30, 31]
    assert found.weights[5].tolist() == [0.5, 0.5, 0, 0]
    assert found.residual[5] == 0


def test_barycentric_weights_are_the_best_that_add_up_to_one():
    rows = rows_of(8)
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=10, scheme="barycentric")
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-10)
    wide = rows.astype(np.float64)
    for place, target in enumerate(wide[TARGETS]):
        first, *others = wide[found.anchors[place]]
        # With the first row as origin the condition is gone.
        free = np.linalg.lstsq((np.array(others) - first).T, target - first, rcond=None)[0]
        np.testing.assert_allclose(found.weights[place], [1 - free.sum(), *free], atol=1e-9)


@pytest.mark.parametrize("count", [10, 60])
def test_least_squares_weights_are_the_least_best_ones(count):
    rows = rows_of(9)
    found = nearest_neighbours(Rows(rows), ANCHORS, TARGETS, count=count, scheme="least_squares")
    wide = rows.astype(np.float64)
    for place, target in enumerate(wide[TARGETS]):
        weights = np.linalg.lstsq(wide[found.anchors[place]].T, target, rcond=None)[0]
        np.testing.assert_allclose(found.weights[place], weights, atol=1e-7)


# -- similarities ---------------------------------------------------------------------------------------------------


def test_wechsel_is_a_softmax_of_the_ten_largest_cosines():
    rows = rows_of(10)
    found = softmax_of_nearest(Rows(rows), ANCHORS, TARGETS)
    cosines = cosines_of(rows)
    order = np.argsort(-cosines, axis=1)[:, :10]
    assert (found.anchors == order).all()
    powers = np.exp(np.take_along_axis(cosines, order, axis=1) / 0.1)
    np.testing.assert_allclose(found.weights, powers / powers.sum(1, keepdims=True), rtol=1e-10)


def test_focus_is_the_sparsemax_of_all_cosines():
    rows = rows_of(11)
    found = sparsemax_of_all(Rows(rows), ANCHORS, TARGETS)
    for place, cosines in enumerate(cosines_of(rows)):
        plain = projected(cosines)
        dense = np.zeros(200)
        used = found.anchors[place] >= 0
        dense[found.anchors[place][used]] = found.weights[place][used]
        np.testing.assert_allclose(dense, plain, atol=1e-10)
        assert (np.diff(found.weights[place]) <= 0).all()
    assert 2 < found.anchors.shape[1] < 200


def projected(values: np.ndarray) -> np.ndarray:
    """Return the nearest point of the simplex, by trying every number of elements that are not zero."""
    order = np.sort(values)[::-1]
    best = None
    for count in range(1, len(values) + 1):
        tau = (order[:count].sum() - 1) / count
        point = np.maximum(values - tau, 0)
        if abs(point.sum() - 1) < 1e-9:
            distance = float(((point - values) ** 2).sum())
            best = (distance, point) if best is None or distance < best[0] else best
    assert best is not None
    return best[1]


def test_a_token_that_is_like_all_anchors_does_not_fill_the_memory(monkeypatch):
    """One row with as many anchors as there are gives every other token that many places."""
    rows = rows_of()
    rows[ANCHORS, 0], rows[TARGETS[3]] = 1, np.eye(1, rows.shape[1], dtype=np.float32)
    rows[ANCHORS] /= np.linalg.norm(rows[ANCHORS], axis=1)[:, None]
    rows[ANCHORS, 1:] *= 1e-3
    assert sparsemax_of_all(Rows(rows), ANCHORS, TARGETS).anchors.shape == (12, 200)
    monkeypatch.setattr(combination, "_MOST_BYTES", 12 * 12 * 200 - 1)
    with pytest.raises(MethodError, match=r"mixed of 200 anchors \(the median token of \d+\).*choose another --method"):
        sparsemax_of_all(Rows(rows), ANCHORS, TARGETS)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    random = np.random.default_rng(12)
    grid = np.array([point for point in itertools.product(np.linspace(0, 1, 51), repeat=3) if sum(point) <= 1])
    grid = np.column_stack([grid, 1 - grid.sum(1)])
    for values in random.standard_normal((20, 4)):
        found = sparsemax(values)
        assert found.sum() == pytest.approx(1)
        assert (found >= 0).all()
        assert ((found - values) ** 2).sum() <= ((grid - values) ** 2).sum(1).min() + 1e-12


@pytest.mark.parametrize("way", ["softmax", "sparsemax"])
def test_a_row_of_zeros_is_like_no_anchor(way):
    rows = rows_of(13)
    rows[205] = rows[9] = 0
    found = WAYS[way](Rows(rows), ANCHORS, TARGETS)
    assert (found.anchors[5] == -1).all()
    assert (found.weights[5] == 0).all()
    assert 9 not in found.anchors


# -- what all of these share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_neither_threads_nor_batches_change_a_bit(way, monkeypatch):
    rows, told = rows_of(14), []
    whole = WAYS[way](Rows(rows), ANCHORS, TARGETS, threads=1, progress=told.append)
    assert sum(told) == len(TARGETS)
    monkeypatch.setattr(nearest_module, "_BATCH", 5)
    assert_same(whole, WAYS[way](Rows(rows), ANCHORS, TARGETS, threads=3))


@pytest.mark.parametrize("way", ["distance", "softmax", "sparsemax"])
def test_of_equal_anchors_the_first_comes_first(way):
    rows = rows_of(15)
    rows[100:200] = rows[:100]
    found = WAYS[way](Rows(rows), ANCHORS, TARGETS)
    for anchors, weights in zip(found.anchors.tolist(), found.weights, strict=True):
        used = [anchor for anchor in anchors if anchor >= 0]
        # Both of a pair, one after the other, but for the last.
        pairs = list(zip(used[::2], used[1::2], strict=False))
        assert all(second == first + 100 for first, second in pairs)
        assert (weights[: 2 * len(pairs) : 2] == weights[1 : 2 * len(pairs) : 2]).all()


@pytest.mark.parametrize("way", WAYS)
def test_no_shared_token_is_an_error(way):
    with pytest.raises(MethodError, match=r"share no token|share 0"):
        WAYS[way](Rows(rows_of()), np.empty(0, int), TARGETS)


def test_more_neighbours_than_anchors_are_an_error():
    with pytest.raises(MethodError, match="the vocabularies share 3: expected 1 to 3"):
        softmax_of_nearest(Rows(rows_of()), ANCHORS[:3], TARGETS)


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_none_is_an_error(temperature):
    with pytest.raises(MethodError, match="a temperature above 0"):
        softmax_of_nearest(Rows(rows_of()), ANCHORS, TARGETS, temperature=temperature)


# -- Gaussians ------------------------------------------------------------------------------------------------------


def test_the_mean_and_deviations_are_those_of_the_rows():
    rows = rows_of(16, count=3000)
    numbers = np.arange(0, 3000, 2)
    chosen = rows[numbers].astype(np.float64)
    each, full = (Gaussian.of(Rows(rows), numbers, covariance=covariance) for covariance in (False, True))
    np.testing.assert_allclose(each.mean, chosen.mean(0), atol=1e-12)
    np.testing.assert_allclose(each.spread, chosen.std(0), rtol=1e-12)
    np.testing.assert_allclose(full.spread @ full.spread, np.cov(chosen.T, bias=True), atol=1e-12)


@pytest.mark.parametrize("covariance", [False, True])
def test_rows_are_drawn_with_the_statistics_of_the_known_ones(covariance):
    random = np.random.default_rng(17)
    rows = (random.standard_normal((500, 6)) @ random.standard_normal((6, 6)) + 3).astype(np.float32)
    known = Gaussian.of(Rows(rows), np.arange(500), covariance=covariance)
    drawn = known.draw(0, range(20000))
    expected = np.cov(rows.astype(np.float64).T, bias=True)
    expected = expected if covariance else np.diag(np.diag(expected))
    np.testing.assert_allclose(drawn.mean(0), known.mean, atol=0.12)
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.05 * np.abs(expected).max())
    assert np.allclose(known.draw(0, range(50), 0.1) - known.mean, 0.1 * (drawn[:50] - known.mean), atol=1e-12)


def test_a_covariance_of_too_few_rows_is_drawn_from_all_the_same():
    rows = rows_of(18, count=5)
    drawn = Gaussian.of(Rows(rows), np.arange(5), covariance=True).draw(0, range(40))
    assert np.isfinite(drawn).all()
    # Five points span four directions around their mean.
    values = np.linalg.svd(drawn - rows.astype(np.float64).mean(0), compute_uv=False)
    assert (values[4:] < 1e-6 * values[0]).all()


@pytest.mark.parametrize("covariance", [False, True])
def test_a_tokens_row_depends_on_the_seed_and_the_token_alone(covariance, monkeypatch):
    known = Gaussian.of(Rows(rows_of(19)), np.arange(212), covariance=covariance)
    # Two tokens to a tile, so that some share theirs and some do not.
    monkeypatch.setattr("weightsmith.transplantation.gaussian.tile_rows", lambda width: 2)
    tokens = ["the", "Ġcat", "▁sat", "the"]
    whole = known.draw(7, tokens)
    assert (whole[0] == whole[3]).all()
    for place in (2, 1, 0):
        assert (known.draw(7, [tokens[place]])[0] == whole[place]).all()
    assert (known.draw(8, ["the"])[0] != whole[0]).any()


def test_no_rows_have_no_mean():
    with pytest.raises(MethodError, match="no rows"):
        Gaussian.of(Rows(rows_of()), np.empty(0, int))


# -- landmarks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "other"), [(12, 12), (12, 20)])
def test_a_rotation_and_a_shift_are_found(width, other):
    random = np.random.default_rng(20)
    donor = (random.standard_normal((300, width)) * np.linspace(1, 3, width)).astype(np.float32)
    turn = np.linalg.qr(random.standard_normal((other, other)))[0][:width]
    model = (donor @ turn + random.standard_normal(other)).astype(np.float32)
    numbers = random.permutation(250)
    fitted = LandmarkMap.of(Rows(donor), np.arange(250)[numbers], Rows(model), np.arange(250)[numbers])
    np.testing.assert_allclose(fitted.apply(donor[250:]), model[250:], atol=1e-4)


def test_the_rotation_is_the_best_one():
    random = np.random.default_rng(21)
    donor, model = (random.standard_normal((100, 5)).astype(np.float32) for _ in range(2))
    fitted = LandmarkMap.of(Rows(donor), np.arange(100), Rows(model), np.arange(100))
    a, b = (rows - rows.mean(0, dtype=np.float64) for rows in (donor, model))
    left, _, right = np.linalg.svd(a.T @ b)
    np.testing.assert_allclose(fitted.matrix, left @ right, atol=1e-9)


def test_a_map_takes_the_leading_axes_where_the_model_has_fewer():
    random = np.random.default_rng(22)
    donor = (random.standard_normal((400, 8)) * [9, 8, 7, 6, 0.1, 0.1, 0.1, 0.1]).astype(np.float32)
    turn = np.linalg.qr(random.standard_normal((4, 4)))[0]
    model = (donor[:, :4] @ turn).astype(np.float32)
    fitted = LandmarkMap.of(Rows(donor), np.arange(350), Rows(model), np.arange(350))
    np.testing.assert_allclose(fitted.apply(donor[350:]), model[350:], atol=0.1)


def test_landmarks_come_in_pairs():
    with pytest.raises(MethodError, match="found 2 for 3"):
        LandmarkMap.of(Rows(rows_of()), np.arange(3), Rows(rows_of()), np.arange(2))
