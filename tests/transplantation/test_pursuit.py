"""Orthogonal matching pursuit, held against one that takes every inner product anew in float64."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, MethodError
from weightsmith.kernels import native
from weightsmith.kernels.pursuit import Batch
from weightsmith.transplantation import pursuit
from weightsmith.transplantation.combination import Combinations, combine
from weightsmith.transplantation.pursuit import matching_pursuit
from weightsmith.transplantation.rows import Rows

LEVELS = [None, *native.levels()]


@pytest.fixture(params=LEVELS, ids=lambda library: "numpy" if library is None else f"level {library.level}")
def kernels(request, monkeypatch):
    """Run on NumPy and on every level of the compiled kernels."""
    monkeypatch.setattr(native, "library", lambda: request.param)


def rows_of(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Return rows whose norms differ by a factor of eight."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, width)) * random.uniform(0.5, 4, (count, 1))
    return rows.astype(np.float32)


def pursue(rows: np.ndarray, anchors: int, count: int, **settings) -> Combinations:
    """Rebuild all rows from the first ones."""
    return matching_pursuit(Rows(rows), np.arange(anchors), np.arange(anchors, len(rows)), count=count, **settings)


def plainly(atoms: np.ndarray, target: np.ndarray, count: int) -> tuple[list[int], np.ndarray, float]:
    """Return the picks, the weights and the residual as the definition has them."""
    atoms, target = atoms.astype(np.float64), target.astype(np.float64)
    rest, picked = target, []
    weights = np.zeros(0)
    for _ in range(count):
        products = np.abs(atoms @ rest)
        products[picked] = -1
        picked.append(int(products.argmax()))
        weights = np.linalg.lstsq(atoms[picked].T, target, rcond=None)[0]
        rest = target - weights @ atoms[picked]
    return picked, weights, float(np.linalg.norm(rest) / np.linalg.norm(target))


def assert_plain(rows: np.ndarray, anchors: int, count: int, found: Combinations, tolerance: float = 1e-9) -> None:
    for place, target in enumerate(rows[anchors:]):
        picked, weights, left = plainly(rows[:anchors], target, count)
        assert found.anchors[place].tolist() == picked
        np.testing.assert_allclose(found.weights[place], weights, rtol=tolerance, atol=tolerance)
        assert found.residual[place] == pytest.approx(left, rel=1e-6, abs=1e-12)


def assert_same(one: Combinations, other: Combinations) -> None:
    for name in ("anchors", "weights", "residual"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# -- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "width", "count"), [(300, 40, 12), (1100, 100, 20), (1025, 17, 17), (30, 600, 30), (1, 3, 1)]
)
@pytest.mark.usefixtures("kernels")
def test_picks_weights_and_residual_are_those_of_the_definition(anchors, width, count):
    rows = rows_of(anchors + 6, width)
    found = pursue(rows, anchors, count)
    # With as many picks as elements nothing is left, and the last ones are among the rounding.
    if count < width:
        assert_plain(rows, anchors, count, found)
    else:
        np.testing.assert_allclose(found.residual, 0, atol=1e-12)
        rebuilt = combine(found, rows[:anchors])
        np.testing.assert_allclose(rebuilt, rows[anchors:], rtol=1e-6, atol=1e-6)


def test_atoms_are_not_normalised():
    rows = np.array([[1, 0, 0], [3, 4, 0], [1, 0.1, 0.1]], np.float32)
    found = pursue(rows, 2, 1)
    # The cosine with the first is 0.99, and the product with the second is three times as large.
    assert found.anchors.tolist() == [[1]]


def test_every_level_and_numpy_give_the_same_bits(monkeypatch):
    rows = rows_of(1040, 70)
    results = []
    for library in LEVELS:
        monkeypatch.setattr(native, "library", lambda library=library: library)
        results.append(pursue(rows, 1030, 25))
    assert len(results) > 1
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.usefixtures("kernels")
def test_atoms_that_no_estimate_tells_apart_are_told_apart():
    random = np.random.default_rng(3)
    one = random.standard_normal(64)
    # More than may be compared before better estimates are asked for, and all as good to a part in 10^7.
    near = 4 * one + 4e-6 * random.standard_normal((400, 64))
    rows = np.concatenate([near, random.standard_normal((50, 64)), one + 3 * random.standard_normal((3, 64))])
    rows = rows.astype(np.float32)
    found = pursue(rows, 450, 1)
    assert_plain(rows, 450, 1, found)
    assert len(set(found.anchors[:, 0].tolist())) > 1


@pytest.mark.usefixtures("kernels")
def test_little_that_is_left_is_rebuilt_as_by_the_definition(monkeypatch):
    anew = []
    rebase = Batch.rebase
    monkeypatch.setattr(
        Batch, "rebase", lambda self, which, products: (anew.extend(which), rebase(self, which, products))
    )
    random = np.random.default_rng(4)
    rows = rows_of(603, 90, seed=4)
    # What four long rows leave of them is a hundred-thousandth.
    rows[:4] *= 50
    rows[600:] = random.standard_normal((3, 4)) @ rows[:4] + 1e-3 * random.standard_normal((3, 90))
    found = pursue(rows, 600, 9)
    assert_plain(rows, 600, 9, found, 1e-7)
    assert anew, "the estimates were good enough: this tests nothing"


# -- what it is for -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_rows_under_a_linear_map_are_recovered():
    random = np.random.default_rng(5)
    donor = random.standard_normal((230, 48)).astype(np.float32)
    model = donor.astype(np.float64) @ random.standard_normal((48, 31))
    found = pursue(donor, 200, 48)
    rebuilt = combine(found, model[:200])
    # Sums of 48 products as large as 10, of rows that are rebuilt to the rounding of float32.
    np.testing.assert_allclose(rebuilt, model[200:], atol=1e-4)
    assert (found.residual <= 2.0**-22).all()


@pytest.mark.usefixtures("kernels")
def test_a_permuted_vocabulary_is_undone_exactly():
    random = np.random.default_rng(6)
    rows, order = rows_of(500, 33, seed=6), random.permutation(500)
    both = np.concatenate([rows, rows[order]])
    found = pursue(both, 500, 8)
    assert found.anchors[:, 0].tolist() == order.tolist()
    assert (found.anchors[:, 1:] == -1).all()
    assert (found.weights == np.eye(1, 8)).all()
    assert (found.residual == 0).all()
    model = random.standard_normal((500, 7)).astype(np.float32)
    assert (combine(found, model) == model[order]).all()


@pytest.mark.usefixtures("kernels")
def test_a_multiple_of_an_anchor_takes_that_anchor_alone():
    rows = rows_of(401, 33, seed=7)
    rows[17] *= np.float32(0.2)
    rows[400] = np.float32(-0.3) * rows[17]
    assert plainly(rows[:400], rows[400], 1)[0] != [17], "longer rows come before it: by the definition alone"
    found = pursue(rows, 400, 5)
    assert found.anchors.tolist() == [[17, -1, -1, -1, -1]]
    assert found.weights[0, 0] == pytest.approx(-0.3, rel=1e-6)


def test_it_is_equivariant():
    rows = rows_of(310, 24, seed=8)
    plain = pursue(rows, 300, 10)
    # By powers of two every bit stays.
    assert_same(plain, pursue(rows * np.float32(2.0**-9), 300, 10))
    longer = np.concatenate([rows[:300], rows[300:] * 4])
    found = pursue(longer, 300, 10)
    assert (found.anchors == plain.anchors).all()
    assert (found.weights == 4 * plain.weights).all()
    turn = np.linalg.qr(np.random.default_rng(8).standard_normal((24, 24)))[0]
    turned = pursue((rows @ turn).astype(np.float32), 300, 10)
    assert (turned.anchors == plain.anchors).all()
    np.testing.assert_allclose(turned.weights, plain.weights, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.usefixtures("kernels")
def test_rows_at_the_ends_of_the_range_are_rebuilt(factor):
    # By a power of two, so that no bit of the rows is lost.
    factor = np.float32(2.0 ** round(np.log2(factor)))
    rows = rows_of(110, 24, seed=9)
    assert_same(pursue(rows, 100, 6), pursue(rows * factor, 100, 6))


# -- rows that say little -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_of_equal_anchors_the_first_is_picked_and_no_other():
    rows = rows_of(205, 30, seed=10)
    doubled = np.concatenate([rows[:200], rows[:200], rows[200:]])
    assert_same(pursue(rows, 200, 15), pursue(doubled, 400, 15))


@pytest.mark.usefixtures("kernels")
def test_where_the_anchors_span_little_it_ends_when_they_are_used_up():
    random = np.random.default_rng(11)
    rows = rows_of(404, 40, seed=11)
    span = random.standard_normal((5, 40))
    rows[:400] = random.standard_normal((400, 5)) @ span
    found = pursue(rows, 400, 12)
    used = (found.anchors >= 0).sum(1)
    # Rounding to float32 puts the rows 1e-7 beside the span, so that a pick or two may find something there.
    assert ((used >= 5) & (used <= 12)).all()
    assert np.isfinite(found.weights).all()
    basis = np.linalg.qr(span.T)[0]
    for place, target in enumerate(rows[400:].astype(np.float64)):
        left = np.linalg.norm(target - basis @ (basis.T @ target)) / np.linalg.norm(target)
        assert found.residual[place] == pytest.approx(left, rel=1e-2)


@pytest.mark.usefixtures("kernels")
def test_whole_numbers_of_low_rank_end_at_the_rank():
    random = np.random.default_rng(12)
    rows = rows_of(303, 40, seed=12)
    rows[:300] = random.integers(-9, 10, (300, 4)) @ random.integers(-9, 10, (4, 40))
    found = pursue(rows, 300, 12)
    assert ((found.anchors >= 0).sum(1) == 4).all()


@pytest.mark.usefixtures("kernels")
def test_rows_of_zeros_are_never_picked_and_need_no_anchor():
    rows = rows_of(64, 20, seed=13)
    rows[:50:2] = 0
    rows[63] = 0
    found = pursue(rows, 60, 35)
    assert not set(range(0, 50, 2)) & set(found.anchors.ravel().tolist())
    assert (found.anchors[3] == -1).all()
    assert found.residual[3] == 0
    alone = np.zeros((12, 20), np.float32)
    alone[10:] = rows[50:52]
    nothing = pursue(alone, 10, 4)
    assert (nothing.anchors == -1).all()
    assert (nothing.residual == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [7, 52])
def test_what_is_not_finite_is_named(bad, row):
    rows = rows_of(60, 20, seed=14)
    rows[row, 3] = bad
    with pytest.raises(CheckpointError, match=f"row {row} holds values that are infinite or no numbers"):
        pursue(rows, 50, 4)


@pytest.mark.parametrize(("count", "nearest"), [(51, None), (0, None), (11, 10)])
def test_more_picks_than_anchors_are_an_error(count, nearest):
    with pytest.raises(MethodError, match=r"expected 1 to (50|10)$"):
        pursue(rows_of(55, 20), 50, count, nearest=nearest)


def test_a_row_far_longer_than_every_anchor_is_an_error():
    rows = rows_of(55, 20)
    rows[:50] *= np.float32(1e-30)
    with pytest.raises(CheckpointError, match="no anchor's row holds anything near it"):
        pursue(rows, 50, 4)


def test_too_little_memory_is_an_error_that_says_how_much_it_takes():
    with pytest.raises(MethodError, match=r"takes \d+\.\d GB at the least, and may hold 0\.0"):
        pursue(rows_of(550, 20), 500, 10, memory=100_000)


def test_there_may_be_nothing_to_rebuild():
    found = pursue(rows_of(50, 20), 50, 4)
    assert found.anchors.shape == found.weights.shape == (0, 4)
    assert found.residual.shape == (0,)


# -- what a result does not depend on -------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_neither_threads_nor_batches_nor_memory_change_a_bit(monkeypatch):
    rows = rows_of(1200, 24, seed=15)
    told: list[int] = []
    whole = pursue(rows, 1150, 7, threads=1, progress=told.append)
    assert sum(told) == 50
    assert_same(whole, pursue(rows, 1150, 7, threads=3))
    monkeypatch.setattr(pursuit, "_BATCH", 11)
    assert_same(whole, pursue(rows, 1150, 7, threads=2))
    monkeypatch.setattr(pursuit, "_PANEL", 3)
    made: list[int] = []
    fill = pursuit._Gram._fill
    monkeypatch.setattr(
        pursuit._Gram, "_fill", lambda self, numbers, places: (made.extend(numbers), fill(self, numbers, places))[1]
    )
    # Room for the rows of forty anchors or so: they make way for each other.
    least = rows[:1150].nbytes + 12 * 4 * 1150 + 11 * (8 * 1150 + 12 * 24 + 8 * 7 * 11) + 40 * 2 * 1150
    assert_same(whole, pursue(rows, 1150, 7, threads=1, memory=least))
    assert len(made) > len(set(made)), "no row was made twice: this tests nothing"


@pytest.mark.usefixtures("kernels")
def test_a_target_depends_on_no_other():
    rows = rows_of(330, 24, seed=16)
    whole = pursue(rows, 300, 9)
    for place in (0, 13, 29):
        alone = matching_pursuit(Rows(rows), np.arange(300), np.array([300 + place]), count=9)
        assert (alone.anchors[0] == whole.anchors[place]).all()
        assert (alone.weights[0] == whole.weights[place]).all()


def test_anchors_are_numbered_among_the_anchors():
    rows = rows_of(330, 24, seed=17)
    order = np.random.default_rng(17).permutation(330)
    anchors, targets = order[:300], order[300:]
    found = matching_pursuit(Rows(rows), anchors, targets, count=9)
    assert_same(found, pursue(np.concatenate([rows[anchors], rows[targets]]), 300, 9))


# -- the local variant ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_the_local_variant_is_a_pursuit_among_the_nearest():
    rows = rows_of(310, 24, seed=18)
    found = pursue(rows, 300, 5, nearest=20)
    different = pursue(rows, 300, 5).anchors != found.anchors
    assert different.any()
    wide = rows.astype(np.float64)
    for place, target in enumerate(wide[300:]):
        cosines = wide[:300] @ target / np.linalg.norm(wide[:300], axis=1)
        near = np.sort(np.argsort(-cosines)[:20])
        picked, weights, _ = plainly(rows[near], target, 5)
        assert found.anchors[place].tolist() == near[picked].tolist()
        np.testing.assert_allclose(found.weights[place], weights, rtol=1e-9)


def test_the_local_variant_among_all_is_the_plain_one():
    rows = rows_of(110, 24, seed=19)
    assert_same(pursue(rows, 100, 5), pursue(rows, 100, 5, nearest=1000))
