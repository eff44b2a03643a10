"""The kernel that measures models is held against sums written out in float64, at every level and without it."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from weightsmith.kernels import measure as measuring
from weightsmith.kernels import native
from weightsmith.kernels.measure import Layout, measure, row_hashes

BF16 = np.dtype(ml_dtypes.bfloat16)
LIBRARIES = [*native.levels(), None]
each_library = pytest.mark.parametrize(
    "library", LIBRARIES, ids=lambda one: "numpy" if one is None else f"level{one.level}"
)


@pytest.fixture(autouse=True)
def _chosen(request, monkeypatch):
    if "library" in request.fixturenames:
        library = request.getfixturevalue("library")
        monkeypatch.setattr(measuring, "library", lambda: library)


def models(size, count, dtypes, seed=0):
    """A base and models near it: some entries unmoved, some moved alike, one of another scale."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size) * 0.02
    arrays = [base.astype(dtypes[0])]
    for k in range(count):
        moved = np.where(rng.random(size) < 0.3, 0, rng.standard_normal(size) * 0.001 * (k + 1))
        arrays.append((arrays[0].astype(np.float64) + moved).astype(dtypes[(k + 1) % len(dtypes)]))
    return arrays


def plain(arrays, voters):
    """Everything, of whole arrays in float64."""
    with np.errstate(all="ignore"):
        wide = [array.astype(np.float64) for array in arrays]
        kept = np.all([np.abs(one) <= 2.0**100 for one in wide], axis=0)
    found = {
        "finite": [kept.sum()],
        "nan": [np.isnan(one).sum() for one in wide],
        "infinite": [np.isinf(one).sum() for one in wide],
    }
    wide = [one[kept] for one in wide]
    taus = [one - wide[0] for one in wide[1:]]
    vectors = [wide[0], *taus]
    found["products"] = [a @ b for a, b in itertools.combinations_with_replacement(vectors, 2)]
    found["mass"] = [np.abs(tau).sum() for tau in taus]
    found["moved"] = [(tau != 0).sum() for tau in taus]
    found["peaks"] = [np.abs(tau).max(initial=0) for tau in taus]
    if voters > 1:
        own = np.array(taus[:voters])
        positive, negative = np.where(own > 0, own, 0).sum(0), np.where(own < 0, -own, 0).sum(0)
        elected = np.sign(positive - negative)
        found["total"] = [np.abs(own.sum(0)).sum()]
        against = [np.where(elected == 0, np.abs(tau) / 2, np.where(tau * elected < 0, np.abs(tau), 0)) for tau in own]
        found["against"] = [2 * one.sum() for one in against]
        assert np.sum(found["against"]) / 2 == pytest.approx(np.minimum(positive, negative).sum(), rel=1e-9)
        found["several"] = [((own != 0).sum(0) > 1).sum()]
        found["contested"] = [((own > 0).any(0) & (own < 0).any(0)).sum()]
        found["together"], found["pairs"] = [], []
        for a, b in itertools.combinations(range(voters), 2):
            found["together"].append(np.abs(own[a] + own[b]).sum())
            both = (own[a] != 0) & (own[b] != 0)
            same = np.sign(own[a]) == np.sign(own[b])
            found["pairs"] += [(wide[a + 1] == wide[b + 1]).sum(), both.sum(), (both & same).sum()]
    return found


def check(arrays, voters=None):
    voters = len(arrays) - 1 if voters is None else voters
    layout = Layout(len(arrays) - 1, voters)
    found, expected = measure(layout, arrays), plain(arrays, voters)
    for name, place in layout.counts.items():
        assert found.counts[place].tolist() == [int(one) for one in expected[name]], name
    scale = np.sqrt(np.outer(*[np.abs(expected["products"]).max()] * 2).item())
    for name, place in layout.sums.items():
        # Task vectors are rounded to float32, magnitudes summed in it.
        tolerance = {"abs": 1e-9 * scale, "rel": 1e-6} if name == "products" else {"abs": 0, "rel": 2e-6}
        assert found.sums[place] == pytest.approx(np.array(expected[name]), **tolerance), name
    assert found.peaks == pytest.approx(np.array(expected["peaks"]), rel=1e-6)
    return found


@each_library
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 3000])
def test_every_figure_is_that_of_the_whole_arrays(library, size):
    check(models(size, 3, [BF16]))


@each_library
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    "dtypes", [[np.float32], [np.float16], [BF16, np.float32, np.float16], [np.float32, np.float64]], ids=str
)
def test_any_number_of_models_of_any_dtypes(library, count, dtypes):
    check(models(1000, count, dtypes))


@each_library
def test_what_is_merged_already_is_compared_and_elects_nothing(library):
    check(models(1000, 4, [BF16]), voters=3)
    check(models(1000, 2, [BF16]), voters=1)


@each_library
def test_entries_that_are_not_finite_are_counted_and_take_no_part(library):
    arrays = models(2000, 3, [np.float32])
    arrays[0][5] = np.nan
    arrays[1][[5, 6, 300]] = np.inf, -np.inf, np.nan
    arrays[3][1999] = np.nan
    # Neither NaN nor infinite, but beyond what sums of float32 can hold.
    arrays[2][700] = 3e38
    found = check(arrays)
    assert found.counts[0] == 2000 - 5


@each_library
def test_where_models_cancel_no_sign_is_elected(library):
    base = np.zeros(600, np.float32)
    up = np.full(600, 0.5, np.float32)
    layout = Layout(2, 2)
    found = measure(layout, [base, up, -up])
    assert found.sums[layout.sums["total"]].tolist() == [0]
    assert found.sums[layout.sums["against"]].tolist() == [300, 300]


@each_library
def test_identical_models_are_at_no_distance(library):
    base, one = models(5000, 1, [BF16])
    layout = Layout(2, 2)
    products = measure(layout, [base, one, one]).sums[layout.sums["products"]]
    # b·b, b·1, b·2, 1·1, 1·2, 2·2
    assert products[3] == products[4] == products[5] > 0


def test_levels_agree_to_the_bit(monkeypatch):
    arrays = models(100_001, 3, [BF16, np.float32])
    arrays[1][77] = np.nan
    results = []
    for library in native.levels():
        monkeypatch.setattr(measuring, "library", lambda library=library: library)
        found = measure(Layout(3, 3), arrays)
        results.append((found.sums.tobytes(), found.counts.tobytes(), found.peaks.tobytes()))
        results[-1] += tuple(part.tobytes() for part in row_hashes(arrays[0][:100_000], 1000))
    if results:
        assert set(results) == {results[0]}


def test_arrays_of_other_lengths_never_reach_the_kernel():
    base, one = models(100, 1, [BF16])
    if native.library() is not None:
        with pytest.raises(ValueError, match="several lengths"):
            measure(Layout(1, 1), [base, one[:50]])


@each_library
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("columns", [8, 9, 33, 1000])
def test_rows_have_one_hash_where_their_bits_are_the_same(library, dtype, columns):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, columns)).astype(dtype)
    rows[[7, 30]] = 0
    rows[11] = -np.zeros(columns)
    rows[20] = rows[3]
    rows[21] = rows[3]
    rows[21, -1] = -rows[21, -1]
    rows[22] = rows[3][::-1]
    hashes, zero = row_hashes(rows.reshape(-1), columns)
    assert np.flatnonzero(zero).tolist() == [7, 11, 30]
    same = {(a, b) for a, b in itertools.combinations(range(40), 2) if hashes[a] == hashes[b]}
    assert same == {(7, 30), (3, 20)}


@each_library
def test_flipping_any_bit_of_a_row_changes_its_hash(library):
    rng = np.random.default_rng(2)
    row = rng.standard_normal(96).astype(np.float16)
    rows = np.tile(row.view(np.uint8), (8 * 192 + 1, 1))
    bits = np.arange(8 * 192)
    rows[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    # And of two neighbours' signs at once, which a weak hash would not see.
    twice = np.tile(row.view(np.uint8), (95, 1))
    for k in range(95):
        twice[k, [2 * k + 1, 2 * k + 3]] ^= 0x80
    hashes, _ = row_hashes(np.concatenate([rows, twice]).view(np.float16).reshape(-1), 96)
    assert len(set(hashes.tolist())) == len(hashes)
