"""A model is given another tokenizer: where each row comes from, and what lies beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import faults
import trained_tokenizers as trained
import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from faults import Fault
from tiny_models import llama, read, renumbered
from weightsmith.engine.plan import RESIDENT
from weightsmith.errors import CheckpointError, Interrupted, MethodError, OutputError, PlanError, RecipeError
from weightsmith.transplantation import search
from weightsmith.transplantation.create import transplant

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
METHODS = (
    *("omp", "interpolation", "nearest", "wechsel", "focus", "landmark_pca"),
    *("subword", "mean", "zero", "random", "gaussian"),
)
GPT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def byte_bpe():
    return trained.byte_bpe()


@pytest.fixture(scope="module")
def metaspace_bpe():
    return trained.metaspace_bpe()


@pytest.fixture
def pair(tmp_path, byte_bpe, metaspace_bpe) -> tuple[Path, Path]:
    """A Llama with Llama's kind of tokenizer, and a wider one with GPT-2's."""
    return (
        llama(tmp_path / "model", metaspace_bpe, **LLAMA),
        llama(tmp_path / "donor", byte_bpe, hidden=12, seed=1, **GPT),
    )


def small(method: str) -> dict[str, int]:
    return {"atoms": 6} if method == "omp" else {"neighbours": 5} if method == "interpolation" else {}


def saved(target: Path, *args, **options) -> dict[str, np.ndarray]:
    transplant(*args, **options).save(target)
    return read_safetensors(target)


def shared_rows(model: Path, donor: Path) -> dict[int, int]:
    """Number in the donor -> number in the model of tokens with one surface; written anew, and slowly."""
    own, new = read(model), read(donor)
    numbers: dict[object, int] = {}
    for number, token in sorted(own.tokens.items()):
        numbers.setdefault(own.surface(token), number)
    found = {number: numbers.get(new.surface(token)) for number, token in new.tokens.items()}
    return {number: other for number, other in found.items() if other is not None}


# -- rows that both have --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, 512])
def test_a_model_that_is_given_its_own_tokenizer_is_not_changed(tmp_path, byte_bpe, method, rows):
    model = llama(tmp_path / "model", byte_bpe, rows=rows, **GPT)
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    transplant(model, model, method, **small(method)).save(tmp_path / "out")
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes().strip() == path.read_bytes().strip() or (
                json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(path.read_text())
            ), path.name
    before, after = read_safetensors(model), read_safetensors(tmp_path / "out")
    assert {name: array.tobytes() for name, array in before.items()} == {n: a.tobytes() for n, a in after.items()}


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_were_shuffled_are_put_in_order_again(tmp_path, byte_bpe, method):
    other, order = renumbered(byte_bpe)
    model, donor = llama(tmp_path / "model", byte_bpe, **GPT), llama(tmp_path / "donor", other, seed=1, **GPT)
    found = saved(tmp_path / "out", model, donor, method, **small(method))
    for name, array in read_safetensors(model).items():
        expected = array[order] if name in (EMBEDDINGS, HEAD) else array
        assert found[name].tobytes() == expected.tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == other.token_to_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, np.float32) for method in METHODS),
        *(("omp", dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float64)),
    ],
)
def test_tokens_that_both_have_keep_their_rows_to_the_bit(tmp_path, byte_bpe, metaspace_bpe, method, dtype):
    tensors = {name: array.astype(dtype) for name, array in llama_tensors(0, vocabulary=500).items()}
    model = llama(tmp_path / "model", metaspace_bpe, tensors=tensors, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, hidden=12, seed=1, **GPT)
    found = saved(tmp_path / "out", model, donor, method, **small(method))
    shared = shared_rows(model, donor)
    assert 200 < len(shared) < 400
    for name in (EMBEDDINGS, HEAD):
        assert found[name].shape == (400, 8)
        assert found[name].dtype == dtype
        for number, other in shared.items():
            assert found[name][number].tobytes() == tensors[name][other].tobytes()
        assert np.isfinite(found[name].astype(np.float64)).all()
    # The end of a text is that under any name.
    assert found[HEAD][0].tobytes() == tensors[HEAD][metaspace_bpe.token_to_id("</s>")].tobytes()
    others = set(tensors) - {EMBEDDINGS, HEAD}
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in others)


# -- rows that are made ---------------------------------------------------------------------------------------------------


def test_rows_behind_a_linear_map_are_found_again(tmp_path, byte_bpe):
    rng = np.random.default_rng(0)
    donors = {name: rng.standard_normal((400, 12)).astype(np.float32) for name in (EMBEDDINGS, HEAD)}
    maps = {name: rng.standard_normal((12, 8)) for name in donors}
    # A tokenizer with fewer merges: its tokens are the first ones of the other, under the same numbers.
    fewer = trained.byte_bpe(size=330)
    known = {name: (array[:330] @ maps[name]).astype(np.float32) for name, array in donors.items()}
    model = llama(tmp_path / "model", fewer, tensors=known, **GPT)
    donor = llama(tmp_path / "donor", byte_bpe, tensors=donors, hidden=12, **GPT)
    made = transplant(model, donor, atoms=12)
    for name, array in donors.items():
        found = made[name].numpy()
        assert np.array_equal(found[:330], known[name])
        np.testing.assert_allclose(found[330:], array[330:] @ maps[name], rtol=0, atol=2e-5)
    report = made.report()
    assert [table.made for table in report.tables] == [70, 70]
    assert all(table.residual["1"] < 1e-5 for table in report.tables)
    # With fewer atoms than there are directions something is left, and more of it with fewer.
    left = [transplant(model, donor, atoms=atoms).report().tables[0].residual["0.5"] for atoms in (1, 3, 6)]
    assert left[0] > left[1] > left[2] > 0.01


def plain(method: str, donor: np.ndarray, anchors: np.ndarray, rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """One new row, from formulas alone, in float64.

    ``donor`` are the anchors' rows there, ``rows`` the model's for the same tokens.
    """
    donor, rows, target = (array.astype(np.float64) for array in (donor, rows, target))
    cosines = donor @ target / np.linalg.norm(donor, axis=1) / np.linalg.norm(target)
    if method == "nearest":
        return rows[np.argmax(cosines)]
    if method == "wechsel":
        near = np.argsort(-cosines)[:10]
        weights = np.exp(cosines[near] / 0.1)
        return weights @ rows[near] / weights.sum()
    if method == "interpolation":
        distances = np.linalg.norm(donor - target, axis=1)
        near = np.argsort(distances)[:5]
        return (1 / distances[near]) @ rows[near] / (1 / distances[near]).sum()
    if method == "omp":
        picked: list[int] = []
        residual = target
        for _ in range(6):
            scores = np.abs(donor @ residual)
            scores[picked] = -1
            picked.append(int(np.argmax(scores)))
            weights = np.linalg.lstsq(donor[picked].T, target)[0]
            residual = target - weights @ donor[picked]
        return weights @ rows[picked]
    raise ValueError(method)


@pytest.mark.parametrize("method", ["omp", "interpolation", "nearest", "wechsel"])
def test_new_rows_are_those_of_the_formulas(tmp_path, pair, method):
    model, donor = pair
    found = saved(tmp_path / "out", model, donor, method, **small(method))
    shared = shared_rows(model, donor)
    theirs, ours = np.array(list(shared)), np.array(list(shared.values()))
    before, donors = read_safetensors(model), read_safetensors(donor)
    for name in (EMBEDDINGS, HEAD):
        for number in set(range(1, 400)) - set(shared):
            expected = plain(method, donors[name][theirs], theirs, before[name][ours], donors[name][number])
            np.testing.assert_allclose(found[name][number], expected, rtol=0, atol=1e-5)


def test_pieces_are_those_that_the_models_tokenizer_cuts(tmp_path, pair):
    model, _ = pair
    foxes = trained.byte_bpe(["Quick brown foxes jump over lazy hounds; größere Füchse springen höher. Быстрые лисы"])
    donor = llama(tmp_path / "foxes", foxes, hidden=12, seed=1, **GPT)
    before = read_safetensors(model)
    made = {pieces: transplant(model, donor, "subword", pieces=pieces) for pieces in ("mean", "sum")}
    weighted = {
        pieces: transplant(model, donor, "subword", pieces=pieces) for pieces in ("weighted_mean", "first_last")
    }
    own, new = read(model), read(donor)
    shared = shared_rows(model, donor)
    checked = 0
    for number, token in new.tokens.items():
        surface = new.surface(token)
        if number in shared or surface.kind != "text" or not surface.text.startswith(b" "):
            continue
        # Its normalizer puts a space before a text of its own accord.
        pieces = trained_encode(model, surface.text.decode()[1:])
        assert b"".join(own.surface(own.tokens[piece]).text for piece in pieces) == surface.text
        checked += 1
        for name in (EMBEDDINGS, HEAD):
            rows = before[name][pieces].astype(np.float64)
            np.testing.assert_allclose(made["mean"][name].numpy()[number], rows.mean(0), atol=1e-6)
            np.testing.assert_allclose(made["sum"][name].numpy()[number], rows.sum(0), atol=1e-6)
            weights = np.arange(1.0, len(pieces) + 1)[:: 1 if name == EMBEDDINGS else -1]
            expected = weights @ rows / weights.sum()
            np.testing.assert_allclose(weighted["weighted_mean"][name].numpy()[number], expected, atol=1e-6)
            one = rows[-1 if name == EMBEDDINGS else 0]
            np.testing.assert_allclose(weighted["first_last"][name].numpy()[number], one, atol=1e-6)
    assert checked > 10


def trained_encode(folder: Path, text: str) -> list[int]:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", list(trained.KINDS))
@pytest.mark.parametrize("other", list(trained.KINDS))
def test_pieces_put_together_are_the_text_of_the_token(tmp_path, kind, other):
    from weightsmith.transplantation.subword import Cutter

    trained.save(trained.KINDS[kind](), tmp_path / "own")
    trained.save(trained.KINDS[other](), tmp_path / "new")
    own, new = read(tmp_path / "own"), read(tmp_path / "new")
    surfaces = [own.surface(token) for token in own.tokens.values()]
    letters = set(b"".join(one.text for one in surfaces if one.kind == "text").decode())
    cutter, checked = Cutter(own), 0
    for token in new.tokens.values():
        surface = new.surface(token)
        pieces = cutter.cut(surface)
        text = b"".join(own.surface(own.tokens[piece]).text for piece in pieces)
        if surface.kind == "special":
            assert pieces == []
        elif own.alphabet == "bytes" or (own.model.get("byte_fallback") and surface.text.strip()):
            assert text == surface.text
        elif surface.kind == "text" and surface.text.strip() and set(surface.text.decode()) <= letters:
            # A tokenizer of words has spaces before signs.
            assert text.replace(b" ", b"") == surface.text.replace(b" ", b"")
            assert kind == "wordpiece" or text == surface.text
            checked += 1
    assert checked > 50 or own.alphabet == "bytes" or own.model.get("byte_fallback")


def test_mean_and_zero_are_one_row(tmp_path, pair):
    model, donor = pair
    shared = {*shared_rows(model, donor), 0}
    new = [number for number in range(400) if number not in shared]
    before = read_safetensors(model)
    means, zeros = transplant(model, donor, "mean"), transplant(model, donor, "mean", head_method="zero")
    for name in (EMBEDDINGS, HEAD):
        expected = before[name].astype(np.float64).mean(0)
        np.testing.assert_allclose(means[name].numpy()[new], np.tile(expected, (len(new), 1)), rtol=1e-6, atol=1e-8)
    assert not zeros[HEAD].numpy()[new].any()
    assert np.array_equal(zeros[EMBEDDINGS].numpy(), means[EMBEDDINGS].numpy())


def test_drawn_rows_follow_their_seed_and_token_alone(tmp_path, pair):
    model, donor = pair
    one, same, other = (transplant(model, donor, "random", seed=seed)[EMBEDDINGS].numpy() for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    shared = {*shared_rows(model, donor), 0}
    new = [number for number in range(400) if number not in shared]
    assert not (one[new] == other[new]).any()
    before = read_safetensors(model)[EMBEDDINGS]
    assert abs(one[new].std() / before.std() - 1) < 0.1
    near = transplant(model, donor, "gaussian")[EMBEDDINGS].numpy()[new]
    assert abs(near - before.mean(0)).max() < 5 * 1e-5**0.5 * before.std()


# -- tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_tied", [False, True])
@pytest.mark.parametrize("donor_tied", [False, True])
def test_a_tied_donor_is_searched_in_its_embeddings_and_a_tied_model_stays_so(
    tmp_path, byte_bpe, metaspace_bpe, model_tied, donor_tied
):
    model = llama(tmp_path / "model", metaspace_bpe, tied=model_tied, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, hidden=12, seed=1, tied=donor_tied, **GPT)
    found = saved(tmp_path / "out", model, donor, "nearest")
    assert (HEAD in found) == (not model_tied)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (400, model_tied)
    shared = shared_rows(model, donor)
    theirs, ours = np.array(list(shared)), np.array(list(shared.values()))
    before, donors = read_safetensors(model), read_safetensors(donor)
    for name in {EMBEDDINGS, HEAD} & set(found):
        space = donors[EMBEDDINGS if donor_tied else name]
        for number in sorted(set(range(1, 400)) - set(shared))[::7]:
            expected = plain("nearest", space[theirs], theirs, before[name][ours], space[number])
            np.testing.assert_allclose(found[name][number], expected, atol=1e-7)


def test_a_tied_head_that_is_written_out_stays_the_embeddings(tmp_path, byte_bpe, metaspace_bpe):
    tensors = llama_tensors(0, vocabulary=500)
    tensors[HEAD] = tensors[EMBEDDINGS]
    model = llama(tmp_path / "model", metaspace_bpe, tensors=tensors, config={"tie_word_embeddings": True}, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, hidden=12, seed=1, **GPT)
    found = saved(tmp_path / "out", model, donor, atoms=4)
    assert np.array_equal(found[HEAD], found[EMBEDDINGS])
    with pytest.raises(MethodError, match="no head of its own"):
        transplant(model, donor, head_method="mean")


@pytest.mark.parametrize("shape", [(500,), (1, 500)])
def test_a_bias_of_the_head_is_made_as_the_head_is(tmp_path, byte_bpe, metaspace_bpe, shape):
    name = "lm_head.bias" if len(shape) == 1 else "final_logits_bias"
    tensors = llama_tensors(0, vocabulary=500)
    # What stands in the bias stands in the head as well.
    tensors[name] = tensors[HEAD][:, 3].reshape(shape).copy()
    model = llama(tmp_path / "model", metaspace_bpe, tensors=tensors, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, hidden=12, seed=1, **GPT)
    for method in ("omp", "subword", "mean", "zero", "landmark_pca", "random"):
        made = transplant(model, donor, method, **small(method))
        assert made[name].shape == (*shape[:-1], 400)
        found, head = made[name].numpy().reshape(-1), made[HEAD].numpy()[:, 3]
        if method in ("landmark_pca", "random"):
            new = [number for number in range(1, 400) if number not in shared_rows(model, donor)]
            np.testing.assert_allclose(found[new], tensors[name].mean(), rtol=1e-5)
        else:
            np.testing.assert_allclose(found, head, rtol=0, atol=1e-6)


def test_rows_beyond_the_tokenizers_are_no_tokens(tmp_path, byte_bpe, metaspace_bpe):
    padded = llama(tmp_path / "model", metaspace_bpe, rows=640, **LLAMA)
    plain_model = llama(
        tmp_path / "plain",
        metaspace_bpe,
        tensors={name: read_safetensors(padded)[name][:500] for name in (EMBEDDINGS, HEAD)},
        **LLAMA,
    )
    donor = llama(tmp_path / "donor", byte_bpe, rows=448, hidden=12, seed=1, **GPT)
    for method in ("omp", "mean", "gaussian"):
        one, other = (transplant(model, donor, method, **small(method)) for model in (padded, plain_model))
        for name in (EMBEDDINGS, HEAD):
            assert one[name].shape == (400, 8)
            assert np.array_equal(one[name].numpy(), other[name].numpy())
    kept = transplant(padded, donor, "mean", keep_size=True)[EMBEDDINGS].numpy()
    assert kept.shape == (640, 8)
    assert not kept[400:].any()
    made = transplant(padded, donor, "mean", pad_to_multiple_of=64)
    assert made[EMBEDDINGS].shape == (448, 8)
    assert made.config["vocab_size"] == 448
    assert made.report(search=False).tables[0].unused == 48


def test_tokens_that_a_donor_has_no_row_for_take_the_mean(tmp_path, byte_bpe, metaspace_bpe):
    model = llama(tmp_path / "model", metaspace_bpe, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, rows=390, hidden=12, seed=1, config={"vocab_size": 390}, **GPT)
    made = transplant(model, donor, atoms=4)
    new = [number for number in range(390, 400) if number not in shared_rows(model, donor)]
    assert new
    assert any("no row in the donor" in warning for warning in made.warnings)
    expected = read_safetensors(model)[EMBEDDINGS].astype(np.float64).mean(0)
    np.testing.assert_allclose(made[EMBEDDINGS].numpy()[new], np.tile(expected, (len(new), 1)), rtol=1e-6, atol=1e-8)


def test_shards_are_read_and_written(tmp_path, pair):
    model, donor = pair
    for folder, step in ((model, 3000), (donor, 5000)):
        ws.save(ws.open(folder), tmp_path / f"{folder.name}-sharded", shard_size=step)
    one = saved(tmp_path / "one", model, donor, atoms=6)
    transplant(tmp_path / "model-sharded", tmp_path / "donor-sharded", atoms=6).save(tmp_path / "two", shard_size=4000)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    other = read_safetensors(tmp_path / "two")
    assert all(other[name].tobytes() == array.tobytes() for name, array in one.items())


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["none", "embeddings", "head", "both"])
def test_bytes_are_taken_for_letters_where_it_is_said(tmp_path, metaspace_bpe, where):
    """The published tool does it in the other of the two tables."""
    # A tokenizer that lacks the letter Q, but has its byte.
    donor = llama(tmp_path / "donor", trained.byte_bpe(["QQ Q zebra"]), hidden=12, seed=1, **GPT)
    model = llama(tmp_path / "model", metaspace_bpe, **LLAMA)
    own, new = read(model), read(donor)
    assert "Q" not in own.vocabulary
    number, byte = new.vocabulary["Q"], own.vocabulary["<0x51>"]
    made = transplant(model, donor, "mean", byte_match=where)
    before = read_safetensors(model)
    for name, part in ((EMBEDDINGS, "embeddings"), (HEAD, "head")):
        assert np.array_equal(made[name].numpy()[number], before[name][byte]) == (where in (part, "both"))
    for table in made.report(search=False).tables:
        assert (table.shared["byte"] > 0) == (where in (table.part, "both"))


def test_a_new_token_may_take_the_row_of_the_longest_it_begins_with(tmp_path, pair):
    model, donor = pair
    made = transplant(model, donor, "zero", prefix_match="embeddings")
    own, new, before = read(model), read(donor), read_safetensors(model)
    shared = shared_rows(model, donor)
    texts = {
        own.surface(token).text: number for number, token in own.tokens.items() if own.surface(token).kind == "text"
    }
    found, head = made[EMBEDDINGS].numpy(), made[HEAD].numpy()
    checked = 0
    for number, token in new.tokens.items():
        surface = new.surface(token)
        if number in shared or surface.kind != "text":
            continue
        prefixes = [surface.text[:end] for end in range(len(surface.text) - 1, 0, -1) if surface.text[:end] in texts]
        assert not head[number].any()
        if prefixes:
            assert np.array_equal(found[number], before[EMBEDDINGS][texts[prefixes[0]]])
            checked += 1
    assert checked > 5


def test_tokens_that_look_untrained_are_no_anchors(tmp_path, byte_bpe):
    fewer = trained.byte_bpe(size=330)
    donors, ours = (llama_tensors(seed, vocabulary=rows, hidden=32) for seed, rows in ((1, 420), (0, 350)))
    # Rows that no token has say where untrained rows lie; one token's row is near them in both, one in each.
    for tensors, rows, like in ((donors, 400, (300, 310)), (ours, 330, (300, 320))):
        for name in (EMBEDDINGS, HEAD):
            tensors[name][rows:] = 1 + 0.01 * tensors[name][rows:]
            for number in like:
                tensors[name][number] = 1 + 0.01 * tensors[name][number]
    model = llama(tmp_path / "model", fewer, rows=350, hidden=32, tensors=ours, **GPT)
    donor = llama(tmp_path / "donor", byte_bpe, rows=420, hidden=32, tensors=donors, **GPT)
    made = transplant(model, donor, "nearest", trained_only=True)
    found, before = made[EMBEDDINGS].numpy(), read_safetensors(model)[EMBEDDINGS]
    assert not found[300].any()
    assert np.array_equal(found[310], before[310])
    assert found[320].any()
    assert not np.array_equal(found[320], before[320])
    plainly = transplant(model, donor, "nearest")
    assert np.array_equal(plainly[EMBEDDINGS].numpy()[[300, 310, 320]], before[[300, 310, 320]])
    (table,) = (one for one in made.report().tables if one.name == EMBEDDINGS)
    assert table.untrained >= 1
    assert table.anchors < plainly.report().tables[0].anchors


@pytest.mark.parametrize("form", ["vec", "headless", "safetensors"])
def test_vectors_of_a_file_are_compared_in_place_of_the_donors_embeddings(tmp_path, pair, form):
    model, donor = pair
    vectors = np.random.default_rng(5).standard_normal((400, 20)).astype(np.float32)
    new = read(donor)
    if form == "safetensors":
        file = tmp_path / "vectors.safetensors"
        write_safetensors(file, {"any": vectors})
    else:
        file = tmp_path / "vectors.vec"
        lines = [f"{token} {' '.join(map(repr, map(float, vectors[number])))} " for number, token in new.tokens.items()]
        file.write_text("\n".join([*([] if form == "headless" else ["400 20"]), *lines]) + "\n")
    alone = tmp_path / "tokenizer"
    trained.save(trained.byte_bpe(), alone, **GPT)
    shared = shared_rows(model, donor)
    theirs, ours = np.array(list(shared)), np.array(list(shared.values()))
    before = read_safetensors(model)
    for other in (donor, alone, alone / "tokenizer.json"):
        made = transplant(model, other, "wechsel", auxiliary=file)
        for name in (EMBEDDINGS, HEAD):
            for number in sorted(set(range(1, 400)) - set(shared))[::9]:
                expected = plain("wechsel", vectors[theirs], theirs, before[name][ours], vectors[number])
                np.testing.assert_allclose(made[name].numpy()[number], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("the 1 2 3\nof 1 2\n", "line 2: expected a token and 3 finite numbers"),
        ("the 1 2 nan\n", "line 1: expected a token and 3 finite numbers"),
        ("the one two\n", "line 1"),
        ("nowhere 1 2\n", "a vector for none of the tokens"),
    ],
)
def test_files_that_hold_no_vectors_are_told(tmp_path, pair, content, problem):
    (tmp_path / "x.vec").write_text(content)
    with pytest.raises(CheckpointError, match=problem):
        transplant(*pair, "focus", auxiliary=tmp_path / "x.vec")


@pytest.mark.parametrize(("choice", "expected"), [("donor", "donor"), ("keep", "model"), ("none", None)])
def test_the_chat_template_is_whose_is_asked_for(tmp_path, byte_bpe, metaspace_bpe, choice, expected):
    model = llama(tmp_path / "model", metaspace_bpe, chat_template="{{ 'model' }}", **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, chat_template="{{ 'donor' }}", **GPT)
    (donor / "chat_template.jinja").write_text("{{ 'donor' }}")
    transplant(model, donor, "mean", chat_template=choice).save(tmp_path / "out")
    out = tmp_path / "out"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    text = f"{{{{ '{expected}' }}}}" if expected else None
    assert settings.get("chat_template") == text
    assert (out / "chat_template.jinja").exists() == (text is not None)
    assert settings["eos_token"] == "<|endoftext|>"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0


def test_a_chat_template_that_is_kept_and_writes_tokens_that_are_gone_is_told(tmp_path, byte_bpe, metaspace_bpe):
    template = "{{ '<s>' + messages[0]['content'] + '</s>' }}"
    model = llama(tmp_path / "model", metaspace_bpe, chat_template=template, **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, **GPT)
    told = "the chat template that is kept writes '<s>', '</s>', no token of the new tokenizer"
    assert told in " ".join(transplant(model, donor, "mean", chat_template="keep").warnings)
    assert told not in " ".join(transplant(model, donor, "mean").warnings)
    assert told not in " ".join(transplant(model, model, "mean", chat_template="keep").warnings)


def test_numbers_of_tokens_in_configs_become_the_donors(tmp_path, pair):
    model, donor = pair
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.5, "pad_token_id": 0}')
    (donor / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0, "top_k": 3}')
    made = transplant(model, donor, "mean")
    made.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert 0 in found["eos_token_id"]
    assert (found["temperature"], found["pad_token_id"]) == (0.5, 0)
    assert "top_k" not in found


def test_the_end_of_a_text_is_the_donors_though_all_tokens_are_the_same(tmp_path):
    made = trained.byte_bpe(special=("<|endoftext|>", "<|im_end|>"))
    model = llama(tmp_path / "model", made, rows=448, eos_token="<|endoftext|>")
    donor = llama(tmp_path / "donor", made, seed=1, eos_token="<|im_end|>")
    found = transplant(model, donor)
    assert found.config == {**json.loads((model / "config.json").read_text()), "eos_token_id": 1}
    assert found[HEAD].numpy().tobytes() == read_safetensors(model)[HEAD].tobytes()


# -- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_a_byte_and_the_manifest_makes_it_again(tmp_path, pair, method):
    made = [transplant(*pair, method, **small(method)) for _ in range(2)]
    made[0].save(tmp_path / "one", threads=1, verify=True)
    made[1].save(tmp_path / "three", threads=3)
    one, three = tmp_path / "one" / "model.safetensors", tmp_path / "three" / "model.safetensors"
    assert one.read_bytes() == three.read_bytes()
    assert ws.verify(tmp_path / "one").ok
    assert ws.reproduce(tmp_path / "one").ok
    # Elements that are asked for one by one are the same.
    lazy, whole = transplant(*pair, method, **small(method))[EMBEDDINGS], made[0][EMBEDDINGS].numpy().reshape(-1)
    for start, stop in ((0, 1), (7, 9), (3190, 3200), (1001, 2003)):
        assert np.array_equal(lazy.read(start, stop), whole[start:stop])


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, pair):
    work = tmp_path / "work"
    work.mkdir()

    def make() -> None:
        transplant(*pair, atoms=6).save(work / "out", threads=1)

    undisturbed = faults.run(make, work)
    assert undisturbed.code == 0, undisturbed.text
    expected = {path.name: path.read_bytes() for path in (work / "out").iterdir()}
    for at in range(1, len(undisturbed.calls) + 1, 11):
        for path in sorted(work.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        faults.run(make, work, Fault(at, "before"))
        again = faults.run(make, work)
        # Killed behind its last step it was done.
        assert again.code == 0 or "exists already" in again.text, (at, again.text)
        assert {path.name: path.read_bytes() for path in (work / "out").iterdir()} == expected
        assert [path.name for path in work.iterdir()] == ["out"]


def test_what_was_searched_is_not_searched_again(tmp_path, pair, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("stopped here")

    stopped_before_writing(pair, tmp_path / "out", monkeypatch)
    without_checks(monkeypatch)
    kept = sorted(path.name for path in (tmp_path / ".out.weightsmith" / "prepared").iterdir())
    assert kept == ["search-0.npz", "search-1.npz"]
    with monkeypatch.context() as patched:
        patched.setattr(search, "matching_pursuit", refuse)
        transplant(*pair, atoms=6).save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    assert all(
        found[name].tobytes() == array.tobytes() for name, array in saved(tmp_path / "b", *pair, atoms=6).items()
    )
    assert not (tmp_path / ".out.weightsmith").exists()


def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tokens that are made again are searched too, for the report."""
    monkeypatch.setattr("weightsmith.transplantation.layout.hold_out", lambda *_, **__: None)


def stopped_before_writing(pair: tuple[Path, Path], target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise OutputError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr("weightsmith.plan.output.execute", stop)
        with pytest.raises(OutputError, match="stopped here"):
            transplant(*pair, atoms=6).save(target)


def test_what_was_kept_and_is_damaged_is_searched_again(tmp_path, pair, monkeypatch):
    stopped_before_writing(pair, tmp_path / "out", monkeypatch)
    for path in (tmp_path / ".out.weightsmith" / "prepared").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    found = saved(tmp_path / "out", *pair, atoms=6)
    assert all(
        found[name].tobytes() == array.tobytes() for name, array in saved(tmp_path / "b", *pair, atoms=6).items()
    )


def test_a_run_that_begins_anew_searches_anew(tmp_path, pair, monkeypatch):
    stopped_before_writing(pair, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(search, "matching_pursuit", None)
    with pytest.raises(TypeError):
        transplant(*pair, atoms=6).save(tmp_path / "out", restart=True)


def test_a_search_that_a_person_stops_is_kept_as_far_as_it_came(tmp_path, pair, monkeypatch):
    pursuit, calls = search.matching_pursuit, []
    without_checks(monkeypatch)

    def stopped_at_the_second(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pursuit(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(search, "matching_pursuit", stopped_at_the_second)
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            transplant(*pair, atoms=6).save(tmp_path / "out")
        transplant(*pair, atoms=6).save(tmp_path / "out")
    assert len(calls) == 3
    found = read_safetensors(tmp_path / "out")
    assert all(
        found[name].tobytes() == array.tobytes() for name, array in saved(tmp_path / "b", *pair, atoms=6).items()
    )


def test_the_plan_reads_no_weights_and_tells_the_memory(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("weightsmith.checkpoint.safetensors.StoredTensor.read", None)
    made = transplant(*pair)
    plan = made.plan()
    least, most = plan.preparing
    assert most > least > 280 * 12 * 4
    assert plan.peak_memory(1) >= RESIDENT + most
    assert plan.peak_memory(1) - replace(plan, preparing=(0, 0), held=0).peak_memory(1) >= plan.held > 280 * 8 * 4
    wide = replace(plan, preparing=(10**9, 7 * 10**9))
    assert wide.peak_memory(1) == RESIDENT + 7 * 10**9
    assert wide.peak_memory(1, 4 * 10**9) == 4 * 10**9
    with pytest.raises(PlanError, match=r"--memory allows 500 MB"):
        wide.threads_within(500_000_000, 2)
    assert made.report(search=False).tables[0].made == 119
    assert made.report(search=False).tables[0].residual is None


def test_the_report_says_what_became_of_every_token(tmp_path, pair):
    model, donor = pair
    made = transplant(model, donor, atoms=6, head_method="subword", pad_to_multiple_of=64)
    made.save(tmp_path / "out")
    report = made.report()
    head, embeddings = report.tables
    assert (head.name, embeddings.name) == (HEAD, EMBEDDINGS)
    shared = shared_rows(model, donor)
    for table in report.tables:
        assert table.shared == {"surface": len(shared), "role": 1, "byte": 0, "prefix": 0}
        assert table.made == 400 - len(shared) - 1
        assert (table.rows_before, table.rows, table.unused) == (500, 448, 48)
    assert head.residual is None
    assert list(embeddings.residual) == ["0.5", "0.9", "0.99", "1"]
    values = list(embeddings.residual.values())
    assert values == sorted(values)
    assert embeddings.worst[0][1] == values[-1]
    assert embeddings.worst[0][0] in read(donor).vocabulary
    kept = json.loads((tmp_path / "out" / "transplant-report.json").read_text())
    assert kept["settings"]["head_method"] == "subword"
    assert "seconds" not in kept
    assert kept["tables"] == json.loads(json.dumps(report.to_json()["tables"]))
    # It is not true of what is made of the result.
    assert "transplant-report.json" not in ws.open(tmp_path / "out").companions.files


def test_other_splits_of_numbers_are_a_warning(tmp_path):
    one, other = trained.byte_bpe(digits=True), trained.byte_bpe()
    model, donor = llama(tmp_path / "model", one, **GPT), llama(tmp_path / "donor", other, **GPT)
    (warning,) = (text for text in transplant(model, donor, "mean").warnings if text.startswith("numbers"))
    assert "one digit alone" in warning
    assert not any(text.startswith("numbers") for text in transplant(model, model, "mean").warnings)


def test_a_transplant_is_a_checkpoint_that_can_be_merged(tmp_path, pair):
    model, donor = pair
    wide = llama(tmp_path / "wide", trained.byte_bpe(), seed=3, **GPT)
    given = transplant(model, donor, "mean")
    merged = ws.merge("linear", [given, ws.open(wide)], weight=[0.5, 0.5])
    other = read_safetensors(wide)[EMBEDDINGS]
    np.testing.assert_allclose(merged[EMBEDDINGS].numpy(), (given[EMBEDDINGS].numpy() + other) / 2, atol=1e-6)


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_in_one_sentence(tmp_path, pair):
    model, donor = pair
    alone = tmp_path / "alone"
    trained.save(trained.byte_bpe(), alone)
    for method in METHODS[:6]:
        with pytest.raises(PlanError, match="has a tokenizer and no embeddings"):
            transplant(model, alone, method)
    with pytest.raises(MethodError, match=r"share 280 tokens: give --atoms 280 or less"):
        transplant(model, donor, atoms=281)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_safetensors(bare / "model.safetensors", llama_tensors(0))
    with pytest.raises(PlanError, match=r"bare has no tokenizer"):
        transplant(bare, donor)
    with pytest.raises(PlanError, match=r"bare has no tokenizer"):
        transplant(model, bare)
    codes = llama(tmp_path / "codes", trained.byte_bpe(), config={"quantization_config": {"bits": 4}})
    with pytest.raises(PlanError, match="is quantised"):
        transplant(codes, donor)
    tensors = {EMBEDDINGS: np.zeros((400, 8), np.int8)}
    with pytest.raises(PlanError, match="int8: quantised codes"):
        transplant(llama(tmp_path / "int", trained.byte_bpe(), tensors=tensors), donor)
    with pytest.raises(PlanError, match="no embeddings of tokens"):
        transplant(llama(tmp_path / "less", trained.byte_bpe(), rows=16, config={"vocab_size": 17}), donor)


def test_a_stray_number_does_not_decide_how_many_rows_there_are(tmp_path, pair):
    model, donor = pair
    content = json.loads((donor / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 60_000_000
    alone = tmp_path / "tokenizer.json"
    alone.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="numbers tokens up to 60,000,000 and has 401 of them: it is damaged"):
        transplant(model, alone, "mean")


def test_whose_tokenizer_was_converted_is_told(tmp_path, pair):
    slow = Path(__file__).parent.parent / "tokenizer" / "slow" / "llama.model"
    made = transplant(pair[0], slow, "mean")
    assert f"the tokenizer of {slow} is made of tokenizer.model, as SentencePiece splits text" in " ".join(
        made.warnings
    )


def test_an_adapter_is_no_donor(tmp_path, pair):
    model, _ = pair
    folder = tmp_path / "lora"
    folder.mkdir()
    trained.save(trained.byte_bpe(), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    ones = {f"{name}.lora_A.weight": np.ones((1, 8), "f4"), f"{name}.lora_B.weight": np.ones((8, 1), "f4")}
    write_safetensors(folder / "adapter_model.safetensors", ones)
    with pytest.raises(PlanError, match="is an adapter"):
        transplant(model, folder)
    with pytest.raises(PlanError, match="is an adapter"):
        transplant(folder, model)
    assert transplant(f"{model}+{folder}", model, "mean")[EMBEDDINGS].shape == (500, 8)


def test_vocabularies_that_share_nothing_are_told(tmp_path, metaspace_bpe):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ΩΩΩ": 0, "ΨΨΨ": 1}))
    model, donor = llama(tmp_path / "model", metaspace_bpe), llama(tmp_path / "donor", words, seed=1)
    with pytest.raises(PlanError, match="share no token by its text"):
        transplant(model, donor)
    assert transplant(model, donor, "subword")[EMBEDDINGS].shape == (2, 8)


@pytest.mark.parametrize("bad", ["model", "donor"])
def test_rows_that_are_no_numbers_are_told(tmp_path, byte_bpe, metaspace_bpe, bad):
    shapes = {"model": (500, 8), "donor": (400, 12)}
    tensors = {
        key: {EMBEDDINGS: np.random.default_rng(0).standard_normal(shape).astype("f4")} for key, shape in shapes.items()
    }
    tensors[bad][EMBEDDINGS][:] = np.nan
    model = llama(tmp_path / "model", metaspace_bpe, tensors=tensors["model"], **LLAMA)
    donor = llama(tmp_path / "donor", byte_bpe, hidden=12, tensors=tensors["donor"], **GPT)
    with pytest.raises(
        CheckpointError, match=rf"{EMBEDDINGS}: row [\d,]+ holds values that are infinite or no numbers"
    ):
        transplant(model, donor, atoms=4).save(tmp_path / "out")
    if bad == "model":
        for method in ("mean", "subword", "gaussian"):
            with pytest.raises(CheckpointError, match="infinite or no numbers"):
                transplant(model, donor, method)[EMBEDDINGS].numpy()


def test_rows_that_outgrow_their_dtype_are_told(tmp_path, byte_bpe, metaspace_bpe):
    tensors = {
        name: (60000 * np.sign(array)).astype(np.float16) for name, array in llama_tensors(0, vocabulary=500).items()
    }
    model = llama(tmp_path / "model", metaspace_bpe, tensors=tensors, **LLAMA)
    with pytest.raises(CheckpointError, match="the largest float16 is 65504"):
        transplant(model, llama(tmp_path / "donor", byte_bpe, **GPT), "subword", pieces="sum").save(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "omq"}, "did you mean 'omp'"),
        ({"head_method": "x"}, "head_method is 'x'"),
        ({"atoms": 0}, "atoms is 0"),
        ({"atoms": True}, "atoms is True"),
        ({"method": "mean", "atoms": 4}, "atoms means nothing for the method mean; it is a setting of omp"),
        ({"neighbours": 5}, "at least as many neighbours as atoms"),
        ({"temperature": 0.5}, "temperature means nothing for the method omp"),
        ({"method": "wechsel", "temperature": 0}, "temperature is 0"),
        ({"method": "mean", "auxiliary": "x"}, "auxiliary means nothing"),
        ({"byte_match": "yes"}, "byte_match is 'yes'"),
        ({"chat_template": "mine"}, "chat_template is 'mine'"),
        ({"pad_to_multiple_of": -2}, "pad_to_multiple_of is -2"),
        ({"pad_to_multiple_of": 1 << 40}, "at most 1,048,576 is meant"),
        ({"keep_size": 1}, "keep_size is 1"),
        ({"method": "random", "scale": "wide"}, "scale is 'wide'"),
        ({"method": "random", "seed": 1.5}, "seed is 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(pair, settings, problem):
    with pytest.raises(MethodError, match=problem):
        transplant(*pair, **settings)


def test_a_manifest_that_says_something_else_is_refused(tmp_path, pair):
    from weightsmith.plan.remake import remake

    made = transplant(*pair, "mean", keep_size=True)
    again = remake(made.to_yaml())
    assert again.to_yaml() == made.to_yaml()
    for text in (
        "transplant:\n  model: a\n  donor: b\n  method: [1]\n",
        "transplant:\n  model: a\n",
        "transplant:\n  x: 1\n",
    ):
        with pytest.raises((RecipeError, MethodError)):
            remake(text)


# -- what else a person is told, and what lies beside ---------------------------------------------------------------------


def grouped(tokenizer, pattern):
    """Return a tokenizer that splits numbers by a pattern before anything else; its tokens are the same."""
    import tokenizers

    content = json.loads(tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    digits = [f"{number:0{width}}" for width in (2, 3) for number in range(10**width)]
    for token in digits:
        content["model"]["vocab"].setdefault(token, len(content["model"]["vocab"]))
    # As in Llama 3: what is a token whole is not merged.
    content["model"]["ignore_merges"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def test_numbers_that_are_counted_from_the_other_end_are_told_of(tmp_path, byte_bpe):
    left = grouped(byte_bpe, r"\d{1,3}")
    right = grouped(byte_bpe, r"\d{1,3}(?=(\d{3})*\b)")
    model = llama(tmp_path / "model", left, **GPT)
    donor = llama(tmp_path / "donor", renumbered(right)[0], seed=1, **GPT)
    same = llama(tmp_path / "same", renumbered(left)[0], seed=1, **GPT)
    (warning,) = [text for text in transplant(model, donor, "mean").warnings if text.startswith("numbers: ")]
    assert (
        "in groups of three, counted from the left, the donor's in groups of three, counted from the right" in warning
    )
    assert not [text for text in transplant(model, same, "mean").warnings if text.startswith("numbers: ")]


def test_a_slow_tokenizer_is_written_as_a_fast_one(tmp_path, byte_bpe):
    made = Path(__file__).parents[1] / "tokenizer" / "slow" / "llama.model"
    donor = tmp_path / "donor"
    donor.mkdir()
    (donor / "tokenizer.model").write_bytes(made.read_bytes())
    (donor / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **LLAMA}))
    (donor / "config.json").write_text(json.dumps({"model_type": "llama"}))
    model = llama(tmp_path / "model", byte_bpe, **GPT)
    transplant(model, donor, "subword").save(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in files
    assert "tokenizer.model" not in files
    assert read(tmp_path / "out").vocabulary == transplant(model, donor, "mean").layout.new.vocabulary
