"""Trained vectors between frozen random factors, held against layers and against sums over all indices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from one_layer import Case, check, draw, refused

OUT, IN = 9, 14


def uora(*, common: bool) -> Case:
    factors = {"uora_A": draw(1, 4, IN + 3), "uora_B": draw(2, OUT + 5, 4)}
    parts = {"uora_lambda_b": draw(3, OUT), "uora_lambda_d": draw(4, 4)}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        middle = parts["uora_lambda_d"] * (x @ parts["uora_A"][:, :IN].T)
        return x @ weight.T + bias + parts["uora_lambda_b"] * (middle @ parts["uora_B"][:OUT].T)

    return Case({"peft_type": "UORA"}, parts | ({} if common else factors), forward, shared=factors if common else {})


def tera(lengths: tuple[int, ...], ranks: tuple[int, ...], *, common: bool) -> Case:
    frozen = {"tera_core": draw(1, *ranks)}
    frozen |= {f"tera_factor_{k}": draw(10 + k, n, r) for k, (n, r) in enumerate(zip(lengths, ranks, strict=True), 1)}
    parts = {f"tera_diagonal_{k}": draw(20 + k, r) for k, r in enumerate(ranks, 1)}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        delta = np.zeros(lengths)
        for at in itertools.product(*map(range, lengths)):
            for to in itertools.product(*map(range, ranks)):
                term = parts["tera_core"][to]
                for k, (n, r) in enumerate(zip(at, to, strict=True), 1):
                    term *= parts[f"tera_factor_{k}"][n, r] * parts[f"tera_diagonal_{k}"][r]
                delta[at] += term
        return x @ (weight + delta.reshape(OUT, IN)).T + bias

    return Case({"peft_type": "TERA"}, parts | ({} if common else frozen), forward, shared=frozen if common else {})


CASES = {
    "uora": uora(common=True),
    "uora, factors of each layer": uora(common=False),
    "tera": tera((3, 3, 2, 7), (2, 3, 2, 1), common=True),
    "tera, a mode over rows and columns": tera((3, 42), (4, 2), common=False),
    "tera, one mode": tera((OUT * IN,), (3,), common=True),
}


def with_shared(case: Case, **shared: Any) -> Case:
    case.shared |= shared
    return case


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


def changed(case: Case, **parts: Any) -> Case:
    case.parts = {name: value for name, value in {**case.parts, **parts}.items() if value is not None}
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (changed(uora(common=False), uora_B=None), "does not hold uora_B: it was drawn at random"),
        (changed(uora(common=False), uora_A=draw(1, 5, IN)), "perhaps uora_A [r, a]"),
        (with_shared(uora(common=True), uora_A=draw(1, 5, IN)), "do not fit uora_lambda_d [4]"),
        (with_shared(tera((9, 14), (2, 2), common=True), tera_factor_2=draw(1, 14, 3)), "do not fit one another"),
        (changed(uora(common=False), uora_A=draw(1, 4, IN - 1)), "are too small for a layer of 14 inputs"),
        (
            changed(tera((9, 14), (2, 2), common=False), tera_core=None),
            "does not hold tera_core: it was drawn at random",
        ),
        (changed(tera((9, 14), (2, 2), common=False), tera_diagonal_2=None), "diagonals [2] do not fit one another"),
        (changed(tera((9, 14), (2, 2), common=False), tera_core=draw(1, 2, 3)), "do not fit one another"),
        (tera((9, 13), (2, 2), common=True), "give 117 entries, and the weight is [9, 14]"),
        (
            changed(tera((9, 14), (2, 2), common=False), tera_diagonal_2=None, tera_diagonal_3=draw(1, 2)),
            "tera_diagonal_2",
        ),
    ],
)
def test_random_factors_must_be_there_and_fit(case, message):
    assert message in refused(case)
