"""Sums and selections over blocks, held against whole arrays."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest

from weightsmith.methods import statistics
from weightsmith.methods.block import Block, Scope, Statistic
from weightsmith.methods.statistics import Cut, gram, largest, order_statistics, totals

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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 10_000_000])
def test_values_at_ranks_are_those_of_the_sorted_values_of_either_sign(dtype, levels):
    values = np.random.default_rng(0).integers(-levels, levels, 50).astype(dtype) / dtype(3)
    values[[3, 30]] = np.array([-0.0, 0.0], dtype)
    blocks = blocks_of(values, -np.abs(values))
    ranks = list(range(1, 51))
    for model, sort in enumerate([np.sort(values), np.sort(-np.abs(values))]):
        found = run(order_statistics(lambda block, m=model: [block.models[m]] * 50, ranks, Scope(50, 2)), blocks)
        assert found == sort[::-1].tolist()


@pytest.mark.usefixtures("way")
def test_values_that_are_not_negative_are_found_without_looking_for_negative_ones():
    values = np.maximum(np.random.default_rng(0).integers(-5, 5, 50), 0).astype(np.float32)
    statistic = order_statistics(lambda block: [block.models[0]] * 50, range(1, 51), Scope(50, 1), signed=False)
    assert run(statistic, blocks_of(values)) == np.sort(values)[::-1].tolist()


def test_values_at_ranks_outside_the_scope_are_infinite_and_nan_counts_as_zero():
    values = np.array([-1.0, np.nan, 2.0, np.nan, -3.0], np.float32)
    found = run(order_statistics(lambda block: [block.models[0]] * 5, [0, 1, 2, 3, 6], Scope(5, 1)), blocks_of(values))
    assert found == [np.inf, 2.0, 0.0, 0.0, np.inf]
    found = run(order_statistics(lambda block: [block.models[0]] * 2, [4, 5], Scope(5, 1)), blocks_of(values))
    assert found == [-1.0, -3.0]


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
