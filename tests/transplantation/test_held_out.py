"""Shared tokens are made as if they were new: how near they come tells what a donor is worth."""

from __future__ import annotations

import json

import numpy as np
import pytest

import trained_tokenizers as trained
import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from tiny_models import llama
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.cli.main import main
from weightsmith.errors import MethodError
from weightsmith.transplantation.combination import Combinations, combine
from weightsmith.transplantation.held_out import hold_out
from weightsmith.transplantation.recipe import SEARCHING, Recipe
from weightsmith.transplantation.search import Shared
from weightsmith.transplantation.tables import Table

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GPT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def way(method, **settings):
    return Recipe("model", "donor", method=method, **settings).way("embeddings")


def spaces(count=200, here=12, there=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, here)).astype(np.float32), rng.standard_normal((count, there)).astype(np.float32)


def held(chosen, donor, own, order=None):
    shared = Shared(np.arange(len(donor)), np.arange(len(own)) if order is None else order)
    table = Table(ArrayTensor("own", own), 0, "embeddings", False)
    return hold_out(chosen, ArrayTensor("donor", donor), table, shared)


def plainly(donor, own, make):
    """The same in plain words: a quarter of the tokens, evenly spread, made of all others."""
    count = len(donor)
    chosen = [place * count // (count // 4) for place in range(count // 4)]
    others = [place for place in range(count) if place not in chosen]
    made = np.stack(
        [make(donor[others].astype(float), own[others].astype(float), donor[n].astype(float)) for n in chosen]
    )
    true = own[chosen].astype(float)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(made, true, strict=True)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(made, true, strict=True)]
    return np.median(errors), np.median(cosines)


def nearest(donor, own, target):
    return own[np.argmax(donor @ target / np.linalg.norm(donor, axis=1))]


def softmax_of_ten(donor, own, target):
    likeness = donor @ target / np.linalg.norm(donor, axis=1) / np.linalg.norm(target)
    best = np.argsort(-likeness)[:10]
    shares = np.exp(likeness[best] / 0.1)
    return shares / shares.sum() @ own[best]


@pytest.mark.parametrize(("method", "make"), [("nearest", nearest), ("wechsel", softmax_of_ten)])
def test_errors_are_those_of_a_plain_computation(method, make):
    donor, own = spaces()
    found = held(way(method), donor, own)
    error, cosine = plainly(donor, own, make)
    assert (found.tokens, found.anchors) == (50, 150)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.cosine == pytest.approx(cosine, rel=1e-4)
    assert found.mean_error == pytest.approx(plainly(donor, own, lambda _, rows, __: rows.mean(0))[0], rel=1e-5)


def test_a_donor_whose_space_maps_onto_the_models_brings_rows_back():
    donor, _ = spaces()
    own = (donor @ np.random.default_rng(1).standard_normal((12, 8))).astype(np.float32)
    assert held(way("omp", atoms=12), donor, own).error < 1e-4
    turned = np.linalg.qr(np.random.default_rng(2).standard_normal((12, 12)))[0]
    assert held(way("landmark_pca"), donor, (donor @ turned).astype(np.float32)).error < 0.1


def test_tokens_are_told_apart_by_their_numbers_in_each_model():
    donor, _ = spaces()
    own = (donor @ np.random.default_rng(1).standard_normal((12, 8))).astype(np.float32)
    order = np.random.default_rng(3).permutation(200)
    moved = np.empty_like(own)
    moved[order] = own
    assert held(way("omp", atoms=12), donor, moved, order) == held(way("omp", atoms=12), donor, own)


def test_rows_of_the_model_that_are_no_numbers_are_left_out(tmp_path):
    donor, own = spaces()
    broken = own.copy()
    broken[[0, 1, 7]] = np.array([[np.nan], [np.inf], [-np.inf]])
    left = [place for place in range(200) if place not in (0, 1, 7)]
    found, plain = held(way("nearest"), donor, broken), held(way("nearest"), donor, own)
    # Of 200 every fourth is made again: number 0 is one of these, 1 and 7 are among the others.
    assert (found.tokens, found.anchors) == (49, 148)
    assert (plain.tokens, plain.anchors) == (50, 150)
    assert np.isfinite([found.error, found.cosine, found.mean_error]).all()
    broken[left] = np.nan
    assert held(way("nearest"), donor, broken) is None
    # A transplant that needs none of them goes through, and keeps them.
    model = llama(tmp_path / "model", trained.byte_bpe(), **GPT)
    other = llama(tmp_path / "donor", trained.byte_bpe(size=420), seed=1, **GPT)
    tables = {name: values.copy() for name, values in read_safetensors(model).items()}
    tables[EMBEDDINGS][trained.byte_bpe().token_to_id("a")] = np.nan
    write_safetensors(model / "model.safetensors", tables)
    ws.transplant(model, other, "nearest").save(tmp_path / "out")
    result = read_safetensors(tmp_path / "out")[EMBEDDINGS]
    assert np.isnan(result[trained.byte_bpe(size=420).token_to_id("a")]).all()


def test_of_few_tokens_or_zeros_nothing_is_told():
    donor, own = spaces(60)
    assert held(way("focus"), donor, own) is None
    donor, own = spaces(64)
    assert held(way("focus"), donor, own).tokens == 16
    assert held(way("focus"), donor, np.zeros_like(own)) is None
    own[::4] = 0
    assert held(way("focus"), donor, own) is None
    # More atoms and neighbours than are left of the shared tokens.
    assert held(way("omp", atoms=60), donor, spaces(64, seed=4)[1]).anchors == 48


def test_a_map_that_also_moves_is_found_by_centred_sums_alone(tmp_path):
    rng = np.random.default_rng(0)
    more, fewer = trained.byte_bpe(), trained.byte_bpe(size=330)
    donors = {name: rng.standard_normal((400, 12)).astype(np.float32) for name in (EMBEDDINGS, HEAD)}
    moved = {name: array @ rng.standard_normal((12, 8)) + 5 * rng.standard_normal(8) for name, array in donors.items()}
    known = {name: array[:330].astype(np.float32) for name, array in moved.items()}
    model = llama(tmp_path / "model", fewer, tensors=known, **GPT)
    donor = llama(tmp_path / "donor", more, tensors=donors, hidden=12, **GPT)
    for centred in (True, False):
        made = ws.transplant(model, donor, atoms=12, centred=centred)
        for name, array in moved.items():
            error = np.abs(made[name].numpy()[330:] - array[330:]).max()
            assert error < 1e-3 if centred else error > 0.5
        checks = [table.held_out for table in made.report().tables]
        assert all(one.error < 1e-4 if centred else one.error > 0.05 for one in checks)
    with pytest.raises(MethodError, match="centred means nothing for the method focus"):
        ws.transplant(model, donor, "focus", centred=True)


def test_sums_from_the_mean_on_are_completed_to_one():
    rng = np.random.default_rng(0)
    rows, centre = rng.standard_normal((9, 4)).astype(np.float32), rng.standard_normal(4)
    anchors = np.array([[0, 3, 8], [5, -1, -1]], np.int32)
    weights = np.array([[0.5, -2.0, 0.25], [3.0, 0.0, 0.0]])
    expected = [
        centre + sum(w * (rows[a].astype(float) - centre) for a, w in zip(one, shares, strict=True) if a >= 0)
        for one, shares in zip(anchors, weights, strict=True)
    ]
    made = combine(Combinations(anchors, weights, np.zeros(2)), rows, centre=centre)
    np.testing.assert_allclose(made, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model whose rows are a linear map of its donor's in the embeddings, and have nothing to do with them in the head."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    more, fewer = trained.byte_bpe(), trained.byte_bpe(size=330)
    donors = {name: rng.standard_normal((400, 12)).astype(np.float32) for name in (EMBEDDINGS, HEAD)}
    known = {
        EMBEDDINGS: (donors[EMBEDDINGS][:330] @ rng.standard_normal((12, 8))).astype(np.float32),
        HEAD: rng.standard_normal((330, 8)).astype(np.float32),
    }
    return (
        llama(folder / "model", fewer, tensors=known, **GPT),
        llama(folder / "donor", more, tensors=donors, hidden=12, **GPT),
    )


def test_a_donor_that_tells_nothing_is_told_of(pair, tmp_path):
    made = ws.transplant(*pair, atoms=12)
    summary = made.save(tmp_path / "out")
    (warning,) = [text for text in summary.warnings if "--compare" in text]
    assert warning.startswith(f"{HEAD}: omp brings shared tokens")
    kept = json.loads((tmp_path / "out" / "transplant-report.json").read_text())
    checks = {table["name"]: table["held_out"] for table in kept["tables"]}
    assert checks[EMBEDDINGS]["error"] < 1e-4
    assert checks[HEAD]["error"] > checks[HEAD]["mean_error"]
    assert not ws.reproduce(tmp_path / "out").problems


def printed(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code in (0, None)
    return capsys.readouterr().out


def test_methods_are_compared_and_nothing_is_written(pair, tmp_path, capsys):
    found = ws.transplant(*pair, atoms=12).compare()
    assert all(set(methods) == SEARCHING for methods in found.values())
    assert next(iter(found[EMBEDDINGS])) == "omp"
    errors = [one.error for one in found[HEAD].values()]
    assert errors == sorted(errors)
    call = ["transplant", *map(str, pair), "-k", "12", "--compare"]
    lines = printed(capsys, call).splitlines()
    first = lines.index(f"{EMBEDDINGS}: 82 shared tokens, made of 248 others")
    assert [line.split()[0] for line in lines[first + 2 : first + 8]] == list(found[EMBEDDINGS])
    assert json.loads(printed(capsys, [*call, "--json"]))[HEAD]["focus"]["error"] == found[HEAD]["focus"].error
    assert not list(tmp_path.iterdir())


def test_neighbours_are_those_of_the_method_that_they_are_given_for(pair):
    found = ws.transplant(*pair, "interpolation", neighbours=3).compare()
    assert set(next(iter(found.values()))) == SEARCHING
    assert Recipe("m", "d", "interpolation", neighbours=3).only("omp").way("embeddings").neighbours is None
    assert Recipe("m", "d", "interpolation", neighbours=3).only("interpolation").way("embeddings").neighbours == 3


def test_without_a_space_to_look_at_there_is_nothing_to_compare(pair):
    with pytest.raises(MethodError, match="leave --method out"):
        ws.transplant(*pair, "mean").compare()
