"""The rules' numbers, against recursions and definitions written out."""

from __future__ import annotations

import math

import pytest

from weightsmith.errors import MethodError
from weightsmith.federated import coefficients as rules


def test_shares_are_those_of_the_examples():
    assert rules.fedavg_shares([900, 100, 0]) == pytest.approx([0.9, 0.1, 0.0], abs=0)
    assert rules.fedavg_shares([7, 7]) == [0.5, 0.5]
    assert rules.fedavg_shares([1e308, 1e308]) == [0.5, 0.5]


@pytest.mark.parametrize("bad", [[], [0, 0], [1, -1], [1, math.nan], [math.inf, 1]])
def test_counts_that_are_none_are_refused(bad):
    with pytest.raises(MethodError):
        rules.fedavg_shares(bad)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_norm_with_momentum_is_that_of_the_optimisers_recursion(steps, rho):
    # How much of each step's gradient is in the update: v = rho v + g, theta -= v.
    counter = norm = 0.0
    for _ in range(steps):
        counter = rho * counter + 1.0
        norm += counter
    assert rules.normalizing_steps(steps, momentum=rho) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("e", [1e-9, 0.01, 0.3])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_norm_with_a_proximal_term_is_that_of_the_recursion(steps, e):
    norm = 0.0
    for _ in range(steps):
        norm = (1.0 - e) * norm + 1.0
    assert rules.normalizing_steps(steps, proximal=e) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "others", "message"),
    [
        (0, {}, "0 local steps"),
        (1.5, {}, "1.5 local steps"),
        (3, {"momentum": 1.0}, "momentum is 1"),
        (3, {"proximal": -0.1}, "proximal is -0.1"),
        (3, {"momentum": 0.9, "proximal": 0.1}, "no norm for momentum with a proximal term"),
    ],
)
def test_norms_outside_the_paper_are_refused(steps, others, message):
    with pytest.raises(MethodError, match=message):
        rules.normalizing_steps(steps, **others)


def test_fednova_divides_by_steps_and_goes_their_mean():
    # tau = 0.25 * 2 + 0.75 * 6 = 5.
    assert rules.fednova_factors([0.25, 0.75], [2, 6]) == pytest.approx([5 * 0.25 / 2, 5 * 0.75 / 6], rel=1e-15)
    assert rules.fednova_factors([0.25, 0.75], [2, 6], effective_steps=1) == pytest.approx([0.125, 0.125], rel=1e-15)


def test_fednova_of_equal_steps_is_fedavg():
    shares = rules.fedavg_shares([3, 1, 4])
    assert rules.fednova_factors(shares, [13.0] * 3) == pytest.approx(shares, rel=1e-15)


def test_fedlaw_starts_at_fedavg():
    shares = rules.fedavg_shares([3, 1, 4])
    lam, gamma = rules.fedlaw_factors([math.log(share) for share in shares], 0.0)
    assert lam == pytest.approx(shares, rel=1e-14)
    assert gamma == 1.0
    assert rules.fedlaw_factors([0.6] * 4, 1.0, form="quad") == ([0.25] * 4, 1.0)


def test_fedlaw_forms_are_softmax_and_squares():
    lam, gamma = rules.fedlaw_factors([1000.0, 1000.0 + math.log(3)], math.log(0.8))
    assert lam == pytest.approx([0.25, 0.75], rel=1e-12)
    assert gamma == pytest.approx(0.8)
    assert rules.fedlaw_factors([1.0, -2.0], 0.9, form="quad") == (pytest.approx([0.2, 0.8]), pytest.approx(0.81))
    with pytest.raises(MethodError, match="all numbers of form quad are 0"):
        rules.fedlaw_factors([0.0, 0.0], form="quad")


@pytest.mark.parametrize("cutoff", [None, 1, 3, 50])
def test_participation_is_the_mean_of_intervals_cut_at_the_cutoff(cutoff):
    presence = [0, 1, 1, 0, 0, 0, 0, 1, 0, 1] + [0] * 60 + [1]
    one = rules.Participation()
    # As a list of intervals and a count, the way the authors' program keeps it.
    intervals: list[int] = []
    absent = 0
    for present in presence:
        assert one.weight == pytest.approx(sum(intervals) / len(intervals) if intervals else 1.0, rel=1e-15)
        one = one.after(present=bool(present), cutoff=cutoff)
        absent += 1
        if present or (cutoff is not None and absent >= cutoff):
            intervals.append(absent)
            absent = 0
    assert one.intervals == len(intervals)
    assert one.total == sum(intervals)


def test_fedstale_between_fedavg_and_fedvarp():
    shares, weights = [0.5, 0.25, 0.25], [0.8, None, 0.4]
    assert rules.fedstale_factors(shares, weights, 0.0) == [0.0, 0.0, 0.0]
    assert rules.fedstale_factors(shares, weights, 1.0) == pytest.approx([-0.3, 0.25, -0.15])
    assert rules.fedstale_factors(shares, weights, 0.5) == pytest.approx([-0.15, 0.125, -0.075])
    with pytest.raises(MethodError, match="beta is 1.5"):
        rules.fedstale_factors(shares, weights, 1.5)


def test_sampling_weights_make_up_for_absence():
    assert rules.sampling_weights([0.5, 0.5], [0.5, 1.0]) == [1.0, 0.5]
    with pytest.raises(MethodError, match="above 0 and at most 1"):
        rules.sampling_weights([0.5, 0.5], [0.0, 1.0])
