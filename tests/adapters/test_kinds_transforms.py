"""Transforms of the base, held against layers that apply permutations, rotations and cores to the features."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from one_layer import Case, check, checkpoint, draw, folded, refused

from weightsmith.adapters.fold import fold
from weightsmith.errors import CheckpointError

OUT, IN = 12, 8


def rotation(triangle: Any, side: int, terms: int) -> Any:
    skew = np.zeros((side, side))
    skew[np.triu_indices(side, 1)] = triangle
    skew = skew - skew.T
    if not terms:
        return (np.eye(side) + skew) @ np.linalg.inv(np.eye(side) - skew)
    return np.eye(side) + 2 * sum(np.linalg.matrix_power(skew, power) for power in range(1, terms))


def blocks(triangles: Any, side: int, terms: int) -> Any:
    count = len(triangles)
    whole = np.zeros((count * side, count * side))
    for number, triangle in enumerate(triangles):
        at = slice(number * side, (number + 1) * side)
        whole[at, at] = rotation(triangle, side, terms)
    return whole


def poet(*, joint: bool, terms: int | None = None, sides: tuple[int, int] = (4, 4), transposed: bool = False) -> Case:
    """The authors' layers: features are permuted, rotated block by block, and permuted back."""
    out_side, in_side = sides
    rng = np.random.default_rng(4)
    perm_in, perm_out = rng.permutation(IN), rng.permutation(OUT)
    out_triangles = 0.2 * draw(1, OUT // out_side, out_side * (out_side - 1) // 2)
    in_triangles = 0.2 * draw(2, IN // in_side, in_side * (in_side - 1) // 2)
    parts = {"perm_in": perm_in, "perm_out": perm_out}
    if joint:
        parts |= {"oft_R": np.concatenate([out_triangles, in_triangles])}
        parts |= {
            "perm_in_inv": np.argsort(perm_in),
            "perm_out_inv": np.argsort(perm_out),
            "rows": np.arange(6),
            "cols": np.arange(6),
        }
    else:
        parts |= {"oft_R_out": out_triangles, "oft_R_in": in_triangles}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        number = 5 if terms is None else terms
        r_out, r_in = blocks(out_triangles, out_side, number), blocks(in_triangles, in_side, number)
        inner = weight[np.argsort(perm_out)][:, np.argsort(perm_in)]
        moved = x[:, np.argsort(perm_in)]
        result = moved @ r_in @ inner.T @ r_out if joint or transposed else moved @ r_in.T @ inner.T @ r_out.T
        return result[:, perm_out] + bias

    config = {"peft_type": "POET", "poet_transposed": transposed} | ({} if terms is None else {"neumann_terms": terms})
    return Case(config, parts, forward, (OUT, IN))


def flat(at: tuple[int, ...], lengths: list[int]) -> int:
    """The paper's little endian: the first index is the fastest."""
    return int(np.ravel_multi_index(at, lengths, order="F"))


def ring_matrix(rows: list[int], columns: list[int], slices: Any) -> Any:
    """Entry by entry, as traces of products of ``slices(at, to)``."""
    result = np.zeros((int(np.prod(rows)), int(np.prod(columns))))
    for at in itertools.product(*map(range, rows)):
        for to in itertools.product(*map(range, columns)):
            result[flat(at, rows), flat(to, columns)] = np.trace(product(slices(at, to)))
    return result


def product(matrices: Any) -> Any:
    return functools.reduce(np.matmul, matrices, np.eye(len(matrices[0]) if matrices else 1))


def tlora(a: list[tuple[int, ...]], b: list[tuple[int, ...]], c: list[tuple[int, ...]]) -> Case:
    cores = {}
    for seed, (letter, shapes) in enumerate(zip("ABC", (a, b, c), strict=True)):
        cores |= {f"tlora_{letter}_{k}": draw(10 * seed + k, *shape) for k, shape in enumerate(shapes, 1)}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        held = {letter: [parts[name] for name in sorted(parts) if f"_{letter}_" in name] for letter in "ABC"}
        sides = {letter: [len(core) for core in got] for letter, got in held.items()}
        turned = ring_matrix(
            sides["A"], sides["A"], lambda at, to: [core[i, j] for core, i, j in zip(held["A"], at, to, strict=True)]
        )
        added = ring_matrix(
            sides["B"],
            sides["C"],
            lambda at, to: [core[i] for core, i in zip(held["B"] + held["C"], at + to, strict=True)],
        )
        return (x @ turned.T if a else x) @ weight.T + bias + (x @ added.T if b else 0)

    return Case({"peft_type": "TLORA"}, cores, forward, (OUT, IN))


def kadaptation(*, whole: bool, common: bool, bias: bool = True) -> Case:
    """``x H`` for a sum of Kronecker products, ``[in, out]``."""
    rules = (
        {"kada_rule": draw(1, 3, 2, 4)}
        if whole
        else {"kada_rule_left": draw(1, 3, 2, 2), "kada_rule_right": draw(2, 3, 2, 4)}
    )
    parts = {"kada_left": draw(3, 3, 4, 2), "kada_right": draw(4, 3, 2, 3)}
    parts |= {"kada_bias": draw(5, OUT)} if bias else {}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        rule = parts["kada_rule"] if whole else parts["kada_rule_left"] @ parts["kada_rule_right"]
        own = parts["kada_left"] @ parts["kada_right"]
        total = sum(np.kron(a, b) for a, b in zip(rule, own, strict=True))
        return x @ weight.T + bias + 2.5 * x @ total + parts.get("kada_bias", 0)

    shared = rules if common else {}
    return Case(
        {"peft_type": "KADAPTATION", "scale": 2.5}, parts | ({} if common else rules), forward, (OUT, IN), shared
    )


CASES = {
    "poet, two rotations": poet(joint=False),
    "poet, blocks of two sides": poet(joint=False, sides=(3, 2)),
    "poet, two rotations transposed": poet(joint=False, sides=(3, 2), transposed=True),
    "poet, in one tensor": poet(joint=True),
    "poet, three terms": poet(joint=True, terms=3),
    "poet, exact": poet(joint=False, terms=0),
    "tlora": tlora([(4, 4, 2, 3), (2, 2, 3, 2)], [(3, 1, 2), (4, 2, 3)], [(2, 3, 2), (4, 2, 1)]),
    "tlora, transform alone": tlora([(2, 2, 2, 3), (2, 2, 3, 2), (2, 2, 2, 2)], [], []),
    "tlora, residual alone": tlora([], [(2, 2, 3), (2, 3, 2), (3, 2, 1)], [(8, 1, 2)]),
    "tlora, one core": tlora([(8, 8, 3, 3)], [(12, 2, 3)], [(8, 3, 2)]),
    "kadaptation": kadaptation(whole=True, common=False),
    "kadaptation, factored rule for all": kadaptation(whole=False, common=True, bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


def test_poets_own_checkpoints_hold_the_weight_permuted():
    case = poet(joint=True)
    expected = folded(case)["m.q.weight"].numpy()
    base = case.base()
    inverse_out, inverse_in = np.argsort(case.parts["perm_out"]), np.argsort(case.parts["perm_in"])
    case.config["poet_permuted"] = True
    found = folded(case, base | {"m.q.weight": base["m.q.weight"][inverse_out][:, inverse_in]})
    assert np.array_equal(found["m.q.weight"].numpy(), expected)


def test_poets_exact_rotations_keep_the_singular_values():
    case = poet(joint=False, terms=0)
    found, base = folded(case)["m.q.weight"].numpy(), case.base()["m.q.weight"]
    values = [np.linalg.svd(matrix.astype(float), compute_uv=False) for matrix in (found, base)]
    np.testing.assert_allclose(*values, rtol=1e-6)


def changed(case: Case, **parts: Any) -> Case:
    case.parts = {name: value for name, value in {**case.parts, **parts}.items() if value is not None}
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (changed(poet(joint=True), perm_in=None), "does not hold perm_in: the permutations were drawn at random"),
        (changed(poet(joint=True), perm_out=np.zeros(OUT, np.int64)), "perm_out is no order of 12"),
        (changed(poet(joint=True), oft_R=draw(1, 5, 7)), "7 entries a block, which are no upper triangle"),
        (changed(poet(joint=True), oft_R=draw(1, 4, 6)), "holds 4 blocks of side 4, and the weight is [12, 8]"),
        (changed(poet(joint=False), oft_R_in=draw(1, 3, 6)), "oft_R_in holds 3 blocks of side 4"),
        (poet(joint=True, terms=65), "0 to 64 make sense"),
        (tlora([(8, 8, 2, 3)], [], []), "the ring of tlora_A is open"),
        (tlora([], [(12, 2, 3)], [(8, 2, 2)]), "the ring of tlora_B and tlora_C is open"),
        (changed(tlora([(8, 8, 1, 1)], [(12, 2, 3)], [(8, 3, 2)]), tlora_B_1=None), "does not hold tlora_B_1"),
        (tlora([(4, 4, 2, 2)], [], []), "sides whose product is 4, and 8 is needed"),
        (
            changed(tlora([(4, 4, 2, 3), (2, 2, 3, 2)], [], []), tlora_A_2=None, tlora_A_3=draw(1, 2, 2, 3, 2)),
            "does not hold tlora_A_2",
        ),
        (
            changed(kadaptation(whole=True, common=False), kada_rule=None),
            "does not hold kada_rule_left and kada_rule_right",
        ),
        (
            changed(kadaptation(whole=True, common=False), kada_left=draw(1, 3, 5, 2)),
            "do not make a matrix of 8 inputs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(case, message):
    assert message in refused(case)


def test_rings_whose_ranks_are_too_large_to_multiply_out_are_refused():
    """The file is small: its cores have one entry a side, but the weight's row is long."""
    width = 1 << 14
    cores = {"tlora_A_1": draw(1, 1, 1, 1, 1 << 13), "tlora_A_2": draw(2, 1, 1, 1 << 13, 1)}
    cores |= {f"tlora_A_{number}": draw(number, 128, 128, 1, 1) for number in (3, 4)}
    base = checkpoint("base", {"m.q.weight": draw(1, 2, width)})
    named = {f"base_model.model.m.q.{name}": core for name, core in cores.items()}
    with pytest.raises(CheckpointError, match="ranks too large to multiply out"):
        fold(base, checkpoint("adapter", named, {"peft_type": "TLORA"}))
