"""Sums and selections over blocks, held against whole arrays."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest

from weightsmith.methods import statistics
from weightsmith.methods.block import Block, Scope, Statistic
from weightsmith.methods.statistics import Cut, gram, largest, totals

PART = 7


def blocks_of(*arrays: Any) -> list[Block]:
    """Cut arrays into blocks of seven elements."""
    starts = range(0, arrays[0].size, PART)
    return [Block(None, tuple(a[start : start + PART] for a in arrays), start, None) for start in starts]  # type: ignore[arg-type]


def run(statistic: Statistic[Any], blocks: list[Block]) -> Any:
    """Drive a statistic as an engine does; a sample is every third block."""
    try:
        sweep = next(statistic)
        while True:
            chosen = blocks[::3] if sweep.sampled else blocks if sweep.only is None else [blocks[sweep.only]]
            results = [sweep.function(block) for block in chosen]
            if sweep.combine is not None and results:
                results = [reduce(sweep.combine, results)]
            sweep = statistic.send(results)
    except StopIteration as end:
        return end.value


def kept(values: np.ndarray, k: int) -> np.ndarray:
    blocks = blocks_of(values)
    (cut,) = run(largest(lambda block: block.models, [k], Scope(values.size, 1)), blocks)
    return np.concatenate([cut.keeps(block.models[0], block) for block in blocks])


@pytest.fixture(params=["gathered", "sampled", "by digits"])
def way(request, monkeypatch):
    """Send a selection each of the ways it can go: what is right must not depend on the size of a scope."""
    if request.param != "gathered":
        monkeypatch.setattr(statistics, "_SMALL_SCOPE", 0)
    if request.param == "by digits":
        monkeypatch.setattr(statistics, "MOST_GATHERED", 0)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 10_000_000])
def test_exactly_the_k_largest_are_kept_the_earlier_of_equal_ones(dtype, levels):
    values = np.random.default_rng(0).integers(0, levels, 50).astype(dtype)
    for k in range(51):
        expected = np.zeros(50, bool)
        expected[np.argsort(-values, kind="stable")[:k]] = True
        assert np.array_equal(kept(values, k), expected), k


@pytest.mark.usefixtures("way")
def test_several_selections_in_one_go_are_those_of_one_at_a_time():
    one, other = np.random.default_rng(0).random((2, 50)).astype(np.float32)
    blocks = blocks_of(one, other, one)
    cuts = run(largest(lambda block: block.models, [3, 20, 0], Scope(50, 2)), blocks)
    assert [cut.value for cut in cuts] == [np.sort(one)[-3], np.sort(other)[-20], np.inf]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("broken", [1, 10, 50])
def test_nan_is_never_kept_and_never_in_the_way(broken):
    values = np.random.default_rng(0).random(50).astype(np.float32)
    values[:broken] = np.nan
    for k in (1, 5, 10, 49):
        found = kept(values, k)
        assert found.sum() == max(k - broken, 0)
        assert not found[:broken].any()


def test_a_scope_without_elements_keeps_nothing():
    assert run(largest(lambda block: block.models, [0], Scope(0, 1)), []) == [Cut(np.inf, -1)]
    assert run(gram(lambda block: block.models), []) == []


def test_sums_hold_every_digit_whatever_the_order():
    values = np.array([1e16, 1.0, -1e16, 1.0] * 7, np.float64)
    assert run(totals(lambda block: [block.models[0][0]]), blocks_of(np.repeat(values, PART))) == [14.0]


@pytest.mark.parametrize("parts", [[np.inf, -np.inf], [np.inf, 1.0], [1.7e308, 1.7e308], [np.nan, 1.0]])
def test_sums_that_are_not_finite_are_no_errors(parts):
    values = np.repeat(np.array(parts), PART)
    (found,) = run(totals(lambda block: [block.models[0][0]]), blocks_of(values))
    assert not np.isfinite(found)


def test_the_gram_matrix_is_that_of_the_whole_vectors():
    vectors = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    expected = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(run(gram(lambda block: block.models), blocks_of(*vectors)), expected, rtol=1e-14)
