"""What each kind stores and restores, against plain computations in float64 on whole models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.bundle import tiles
from weightsmith.bundle.kind import kinds
from weightsmith.errors import CheckpointError, MethodError, OutputError

TASKS = ("one", "two", "three")


def fine_tunes(count=3, *, scale=0.1, dtype=np.float32, **shape):
    """A base and fine-tunes of it: llamas whose changes overlap in part."""
    base = llama_tensors(0, dtype=dtype, **shape)
    shared = llama_tensors(90, scale=scale, **shape)
    found = {}
    for task, seed in zip(TASKS[:count], range(1, count + 1), strict=True):
        own = llama_tensors(seed, scale=scale, **shape)
        found[task] = {k: (base[k].astype(np.float64) + own[k] + shared[k] / seed).astype(dtype) for k in base}
    return base, found


def made(write_model, tmp_path, base, models, kind, **options):
    folders = {task: write_model(task, tensors) for task, tensors in models.items()}
    ws.bundle.create(tmp_path / "out", folders, base=write_model("base", base), kind=kind, **options)
    return tmp_path / "out"


def restored(bundle: Path, task: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in ws.open(bundle, task=task).items()}


def changes(base, models):
    return {
        task: {k: v.astype(np.float64) - base[k].astype(np.float64) for k, v in tensors.items()}
        for task, tensors in models.items()
    }


def close(found, expected, tolerance=1e-6):
    assert list(found) == list(expected) or sorted(found) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].astype(np.float64), values, rtol=tolerance, atol=tolerance, err_msg=name)


# -- EMR ------------------------------------------------------------------------------------------------------------------


def elect(deltas):
    """EMR's vector and masks, entry by entry."""
    names = next(iter(deltas.values()))
    vector = {k: np.zeros(v.shape) for k, v in names.items()}
    masks = {task: {k: np.zeros(v.shape, bool) for k, v in names.items()} for task in deltas}
    for k in names:
        for place in np.ndindex(*names[k].shape):
            values = {task: deltas[task][k][place] for task in deltas}
            sign = 1 if sum(values.values()) / len(values) > 0 else -1
            agreeing = [abs(v) for v in values.values() if v * sign > 0]
            vector[k][place] = sign * max(agreeing, default=0.0)
            for task, v in values.items():
                masks[task][k][place] = v * sign > 0
    return vector, masks


@pytest.mark.parametrize("rescaler", ["model", "tensors"])
def test_emr_is_the_papers_formula(write_model, tmp_path, rescaler):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "emr", rescaler=rescaler)
    deltas = changes(base, models)
    vector, masks = elect(deltas)
    for task in models:
        total = kept = 0.0
        for k in base:
            weight = base[k].size if rescaler == "tensors" else 1
            total += np.abs(deltas[task][k]).sum() / weight
            kept += np.abs(masks[task][k] * vector[k]).sum() / weight
        expected = {k: base[k] + total / kept * masks[task][k] * vector[k] for k in base}
        close(restored(bundle, task), expected)
    assert read_safetensors(bundle / "tasks" / "one")["rescaler"].shape == ()


def test_the_two_rescalers_of_emr_differ_where_small_tensors_change_more(write_model, tmp_path):
    base, models = fine_tunes()
    for tensors in models.values():
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 9
    found = []
    for rescaler in ("model", "tensors"):
        ws.bundle.create(
            tmp_path / rescaler,
            {task: write_model(task, tensors) for task, tensors in models.items()},
            base=write_model("base", base),
            kind="emr",
            rescaler=rescaler,
        )
        found.append(read_safetensors(tmp_path / rescaler / "tasks" / "one")["rescaler"])
    assert abs(found[0] - found[1]) > 0.01 * found[0]


def test_bits_lie_as_the_documentation_says(write_model, tmp_path):
    """Element i is bit i % 8 of byte i // 8: others may read them."""
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "emr")
    _, masks = elect(changes(base, models))
    name = "model.layers.0.mlp.up_proj.weight"
    bits = read_safetensors(bundle / "tasks" / "two")[f"mask/{name}"]
    for i, kept in enumerate(masks["two"][name].reshape(-1)):
        assert bool(bits[i // 8] >> (i % 8) & 1) == kept


def test_a_task_that_is_outvoted_everywhere_comes_back_as_the_base(write_model, tmp_path):
    base = {"w": np.zeros(5, np.float32)}
    models = {"one": {"w": np.full(5, 3, np.float32)}, "two": {"w": np.full(5, -1, np.float32)}}
    bundle = made(write_model, tmp_path, base, models, "emr")
    close(restored(bundle, "two"), base, 0)
    close(restored(bundle, "one"), models["one"], 0)


# -- TALL -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0.4, [0.2, 0.4, 0.6], 0])
def test_tall_masks_are_the_authors_formula(write_model, tmp_path, given):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "tall", lambda_=given)
    deltas = changes(base, models)
    for i, task in enumerate(models):
        factor = given[i] if isinstance(given, list) else given
        expected = {}
        for k in base:
            total = sum(deltas[other][k] for other in models)
            mask = np.zeros(base[k].shape, bool)
            for place in np.ndindex(*mask.shape):
                own = deltas[task][k][place]
                mask[place] = abs(own) > factor * abs(total[place] - own)
            expected[k] = base[k] + mask * total
        close(restored(bundle, task), expected)


# -- BitDelta -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["minus", "plus"])
def test_bitdelta_keeps_signs_and_the_mean_magnitude_of_matrices_in_layers(write_model, tmp_path, zeros):
    base, models = fine_tunes()
    for tensors in models.values():
        tensors["model.layers.0.mlp.up_proj.weight"][3] = base["model.layers.0.mlp.up_proj.weight"][3]
    bundle = made(write_model, tmp_path, base, models, "bitdelta", zeros=zeros)
    for task, tensors in models.items():
        expected = {}
        for k in base:
            delta = tensors[k].astype(np.float64) - base[k]
            signs = np.where(delta > 0, 1, -1) if zeros == "minus" else np.where(delta >= 0, 1, -1)
            matrix = ".layers." in k and delta.ndim == 2
            expected[k] = base[k] + np.abs(delta).mean() * signs if matrix else tensors[k]
        close(restored(bundle, task), expected)
    # The scale is the best one for these signs.
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = models["one"][name].astype(np.float64) - base[name]
    scale = float(read_safetensors(bundle / "tasks" / "one")[f"scale/{name}"])
    signs = np.where(delta > 0, 1, -1)
    errors = [((delta - one * signs) ** 2).sum() for one in (scale, scale * 1.01, scale * 0.99)]
    assert errors[0] == min(errors)


def test_bitdelta_takes_every_tensor_of_two_axes_if_asked(write_model, tmp_path):
    base, models = fine_tunes()
    base["conv.weight"] = np.zeros((2, 3, 2, 2), np.float32)
    for seed, tensors in enumerate(models.values()):
        tensors["conv.weight"] = np.random.default_rng(seed).standard_normal((2, 3, 2, 2)).astype(np.float32)
    bundle = made(write_model, tmp_path, base, models, "bitdelta", tensors="all")
    found = read_safetensors(bundle / "tasks" / "two")
    kept = {name.removeprefix("sign/") for name in found if name.startswith("sign/")}
    assert kept == {k for k, v in base.items() if v.ndim >= 2}
    assert {name for name in found if name.startswith("whole/")} == {
        f"whole/{k}" for k, v in base.items() if v.ndim < 2
    }


# -- TSV ------------------------------------------------------------------------------------------------------------------


def truncated(delta, rank):
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return sum(s[k] * np.outer(u[:, k], vt[k]) for k in range(rank))


@pytest.mark.parametrize("decomposition", ["exact", "randomized"])
def test_tsv_keeps_the_leading_triples_of_matrices(write_model, tmp_path, decomposition):
    base, models = fine_tunes(hidden=12, vocabulary=30)
    bundle = made(write_model, tmp_path, base, models, "tsv", decomposition=decomposition)
    for task, tensors in models.items():
        expected = {}
        for k, v in tensors.items():
            delta = v.astype(np.float64) - base[k]
            matrix = v.ndim == 2
            expected[k] = base[k] + truncated(delta, min(v.shape) // 3) if matrix else v
        close(restored(bundle, task), expected, 2e-6)
    found = read_safetensors(bundle / "tasks" / "one")
    name = "model.embed_tokens.weight"
    assert [found[f"{field}/{name}"].shape for field in "usv"] == [(30, 4), (4,), (4, 12)]
    u, v = found[f"u/{name}"].astype(np.float64), found[f"v/{name}"].astype(np.float64)
    np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(4), atol=1e-5)


def test_tsv_keeps_whole_what_factors_would_not_make_smaller(write_model, tmp_path):
    base, models = fine_tunes(count=2)
    bundle = made(write_model, tmp_path, base, models, "tsv")
    found = read_safetensors(bundle / "tasks" / "one")
    # 8 x 8 of rank 4 would take 68 numbers for 64; 16 x 8 takes 100 for 128.
    assert "whole/model.layers.0.self_attn.q_proj.weight" in found
    assert "u/model.layers.0.mlp.up_proj.weight" in found


def test_with_more_tasks_than_a_matrix_has_rows_tsv_keeps_one_triple(write_model, tmp_path):
    base = {"w": np.zeros((2, 40), np.float32)}
    rng = np.random.default_rng(0)
    models = {task: {"w": rng.standard_normal((2, 40)).astype(np.float32)} for task in TASKS}
    bundle = made(write_model, tmp_path, base, models, "tsv")
    assert read_safetensors(bundle / "tasks" / "one")["s/w"].shape == (1,)
    close(restored(bundle, "one"), {"w": truncated(models["one"]["w"].astype(np.float64), 1)})


# -- RMM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("basis", [1, 2])
def test_rmm_is_the_best_approximation_of_its_rank(write_model, tmp_path, basis, centre):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "rmm", basis=basis, centre=centre)
    found = {task: restored(bundle, task) for task in models}
    for k in base:
        stacked = np.stack([models[task][k].astype(np.float64).reshape(-1) - base[k].reshape(-1) for task in models])
        mean = stacked.mean(0) if centre else 0
        u, s, vt = np.linalg.svd(stacked - mean, full_matrices=False)
        best = mean + (u[:, :basis] * s[:basis]) @ vt[:basis]
        for task, row in zip(models, best, strict=True):
            np.testing.assert_allclose(
                found[task][k].reshape(-1), base[k].reshape(-1) + row, rtol=2e-6, atol=2e-6, err_msg=k
            )


def test_the_error_of_rmm_is_the_sum_of_the_other_eigenvalues(write_model, tmp_path):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "rmm", basis=2)
    left = lost = 0.0
    for k in base:
        stacked = np.stack([models[task][k].astype(np.float64).reshape(-1) - base[k].reshape(-1) for task in models])
        lost += np.linalg.eigvalsh(stacked @ stacked.T)[0]
    for task in models:
        found = restored(bundle, task)
        left += sum(((found[k].astype(np.float64) - models[task][k]) ** 2).sum() for k in base)
    assert left == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize(("basis", "centre"), [(3, False), (9, False), (2, True)])
def test_rmm_with_as_many_models_as_tasks_loses_nothing_but_rounding(write_model, tmp_path, basis, centre):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "rmm", basis=basis, centre=centre)
    for task, tensors in models.items():
        # Changes are about 0.1 to 0.5; they are kept in float32.
        close(restored(bundle, task), tensors, 3e-7)
    assert read_safetensors(bundle / "shared")["basis/lm_head.weight"].shape[0] == 3


def test_rmm_is_the_same_whatever_the_order_of_tasks(write_model, tmp_path):
    base, models = fine_tunes()
    found = []
    for number, order in enumerate(itertools.permutations(models)):
        if number in (0, 4):
            folders = {task: write_model(task, models[task]) for task in order}
            ws.bundle.create(tmp_path / str(number), folders, base=write_model("base", base), kind="rmm", basis=2)
            found.append(restored(tmp_path / str(number), "two"))
    close(found[0], found[1], 1e-6)


def factors_of(delta, rank):
    """Balanced factors whose product is the truncated matrix."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    turn = np.sign(u[np.abs(u).argmax(0), range(rank)])
    return u * turn * np.sqrt(s), (vt.T * turn * np.sqrt(s)).T


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("coefficients", ["layer", "position"])
def test_rmm_on_low_rank_weights_is_the_best_basis_of_the_factors(write_model, tmp_path, coefficients, centre):
    base, models = fine_tunes(hidden=10, vocabulary=14)
    bundle = made(write_model, tmp_path, base, models, "rmm", basis=1, rank=4, coefficients=coefficients, centre=centre)
    name = "model.layers.1.mlp.up_proj.weight"
    pairs = [factors_of(models[task][name].astype(np.float64) - base[name], 4) for task in models]
    sides = []
    for side in (np.stack([a for a, _ in pairs]), np.stack([b.T for _, b in pairs])):
        mean = side.mean(0) if centre else np.zeros(side.shape[1:])
        best = np.empty_like(side)
        places = [slice(None)] if coefficients == "layer" else [slice(i, i + 1) for i in range(side.shape[1])]
        for place in places:
            flat = (side - mean)[:, place].reshape(len(side), -1)
            u, s, vt = np.linalg.svd(flat, full_matrices=False)
            best[:, place] = (s[0] * np.outer(u[:, 0], vt[0])).reshape(best[:, place].shape) + mean[place]
        sides.append(best)
    for i, task in enumerate(models):
        expected = base[name] + sides[0][i] @ sides[1][i].T
        np.testing.assert_allclose(restored(bundle, task)[name], expected, rtol=1e-5, atol=1e-5)
        # What is no matrix is kept whole.
        assert np.array_equal(restored(bundle, task)["model.norm.weight"], models[task]["model.norm.weight"])


def test_rmm_of_full_rank_and_full_basis_gives_the_models_back(write_model, tmp_path):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, "rmm", basis=3, rank=99)
    for task, tensors in models.items():
        close(restored(bundle, task), tensors, 2e-6)


def write_lora(folder: Path, seed: int, rank: int = 2) -> Path:
    from conftest import write_safetensors

    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {}
    for i in range(2):
        module = f"base_model.model.model.layers.{i}.mlp.up_proj"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, 8)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((16, rank)).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_loras_are_bundled_by_their_own_factors_and_come_back(write_model, tmp_path, monkeypatch):
    base = write_model("base", llama_tensors(0))
    adapters = [write_lora(tmp_path / f"lora{i}", i, rank=i + 1) for i in range(3)]
    monkeypatch.setattr("weightsmith.bundle.reversible.dense_change", None)
    ws.bundle.create(tmp_path / "out", adapters, base=base, kind="rmm", basis=3, rank=8)
    for i, adapter in enumerate(adapters):
        folded = {name: tensor.numpy() for name, tensor in ws.open(f"{base}+{adapter}").items()}
        close(restored(tmp_path / "out", f"lora{i}"), folded, 2e-6)
    shared = read_safetensors(tmp_path / "out" / "shared")
    # Of the rank of the largest adapter; and what no adapter changes is the base's.
    assert shared["left/model.layers.0.mlp.up_proj.weight"].shape == (3, 16, 3)
    assert len(shared) == 4
    described = json.loads((tmp_path / "out" / "weightsmith-bundle.json").read_text())
    assert described["tasks"]["lora0"]["tensors"]["lm_head.weight"]["form"] == "base"


# -- lossless -------------------------------------------------------------------------------------------------------------

AWKWARD = [0.0, -0.0, 1e-8, -1e-8, 1.0, -1.0, 65504.0, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize(
    "dtype",
    [
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        np.int64,
        np.int32,
        np.uint8,
        bool,
    ],
)
@pytest.mark.parametrize("near", [True, False])
def test_lossless_gives_every_bit_back(write_model, tmp_path, dtype, near):
    rng = np.random.default_rng(3)
    dtype = np.dtype(dtype)
    size = tiles.TILE + 777
    if dtype.kind == "b":
        base, one = rng.integers(0, 2, size).astype(bool), rng.integers(0, 2, size).astype(bool)
    elif near:
        base = rng.standard_normal(size).astype(dtype)
        one = (base.astype(np.float64) * (1 + 1e-2 * rng.standard_normal(size))).astype(dtype)
    else:
        patterns = rng.integers(0, 256, (2, size * dtype.itemsize)).astype(np.uint8)
        base, one = patterns[0].view(dtype), patterns[1].view(dtype)
    if dtype.kind == "f":
        base[: len(AWKWARD)], one[-len(AWKWARD) :] = AWKWARD, AWKWARD
    bundle = made(write_model, tmp_path, {"w": base, "v": base}, {"one": {"w": one, "v": base}}, "lossless")
    opened = ws.open(bundle, task="one")
    assert opened["w"].numpy().tobytes() == one.tobytes()
    assert opened["v"].numpy().tobytes() == base.tobytes()
    # From anywhere to anywhere.
    for start, stop in ((0, 1), (255, 257), (tiles.TILE - 3, tiles.TILE + 300), (size - 1, size), (5, 5)):
        assert opened["w"].read(start, stop).tobytes() == one[start:stop].tobytes()
    error = ws.bundle.open(bundle).description.tasks["one"].error
    assert error is not None
    assert error.equal == 1


def test_lossless_makes_small_changes_small_and_never_makes_anything_larger(write_model, tmp_path):
    rng = np.random.default_rng(4)
    base = (rng.standard_normal(200_000) * 0.02).astype(ml_dtypes.bfloat16)
    small = (base.astype(np.float32) + rng.standard_normal(200_000) * 1e-5).astype(ml_dtypes.bfloat16)
    noise = rng.integers(0, 2**16, 200_000).astype(np.uint16).view(ml_dtypes.bfloat16)
    bundle = made(write_model, tmp_path, {"w": base}, {"small": {"w": small}, "noise": {"w": noise}}, "lossless")
    sizes = ws.bundle.open(bundle).sizes()
    assert sizes.tasks["small"] < 0.2 * base.nbytes
    assert base.nbytes <= sizes.tasks["noise"] < base.nbytes + 200
    assert "whole/w" in read_safetensors(bundle / "tasks" / "noise")


# -- all kinds ------------------------------------------------------------------------------------------------------------

EVERY = [
    ("emr", {}),
    ("tall", {}),
    ("tsv", {}),
    ("tsv", {"rank": 2, "decomposition": "randomized"}),
    ("rmm", {}),
    ("rmm", {"rank": 3, "centre": True, "coefficients": "position"}),
    ("bitdelta", {}),
    ("lossless", {}),
]


@pytest.mark.parametrize(("kind", "parameters"), EVERY)
def test_nothing_depends_on_threads_tiles_of_readers_or_the_executors_blocks(
    write_model, tmp_path, monkeypatch, kind, parameters
):
    """The same bytes; and the same values however they are read."""
    monkeypatch.setattr("weightsmith.bundle.matrices._LARGE", 1000)
    base, models = fine_tunes(hidden=96, vocabulary=6000)
    folders = {task: write_model(task, tensors) for task, tensors in models.items()}
    base_folder = write_model("base", base)
    contents = []
    for threads, block in ((1, 1 << 18), (3, 5000), (2, 70_001)):
        monkeypatch.setattr("weightsmith.engine.backend.NumpyBackend.block", block)
        out = tmp_path / f"{threads}"
        ws.bundle.create(out, folders, base=base_folder, kind=kind, threads=threads, **parameters)
        contents.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")})
    assert contents[0] == contents[1] == contents[2]
    opened = ws.open(tmp_path / "1", task="two")
    for name, tensor in opened.items():
        whole = tensor.numpy().reshape(-1)
        for start, stop in ((1, 2), (tensor.size // 3, 2 * tensor.size // 3), (tensor.size - 1, tensor.size)):
            assert tensor.read(start, stop).tobytes() == whole[start:stop].tobytes(), name


@pytest.mark.parametrize(("kind", "parameters"), EVERY)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_restored_tensors_have_the_models_dtypes_and_changes_are_kept_in_them(
    write_model, tmp_path, kind, parameters, dtype
):
    base, models = fine_tunes(dtype=dtype)
    bundle = made(write_model, tmp_path, base, models, kind, **parameters)
    assert {t.dtype for task in models for t in ws.open(bundle, task=task).values()} == {np.dtype(dtype)}
    floats = {v.dtype for k, v in read_safetensors(bundle).items() if v.dtype.kind in "fV" and v.ndim > 0}
    assert floats <= {np.dtype(dtype), np.dtype(np.float64)}


@pytest.mark.parametrize(("kind", "parameters"), EVERY)
def test_the_error_that_is_stated_is_the_one_there_is(write_model, tmp_path, kind, parameters):
    base, models = fine_tunes()
    bundle = made(write_model, tmp_path, base, models, kind, **parameters)
    for task, tensors in models.items():
        found = restored(bundle, task)
        wrong = math.sqrt(sum(((found[k].astype(np.float64) - v) ** 2).sum() for k, v in tensors.items()))
        model = math.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in tensors.values()))
        change = math.sqrt(sum(((v.astype(np.float64) - base[k]) ** 2).sum() for k, v in tensors.items()))
        stated = ws.bundle.open(bundle).description.tasks[task].error
        assert stated is not None
        assert stated.relative == pytest.approx(wrong / model)
        assert stated.of_change == pytest.approx(wrong / change)
        assert stated.largest == max(float(np.abs(found[k].astype(np.float64) - v).max()) for k, v in tensors.items())
        same = sum(int((found[k].view(np.uint32) == v.view(np.uint32)).sum()) for k, v in tensors.items())
        assert stated.equal == pytest.approx(same / sum(v.size for v in tensors.values()))


@pytest.mark.parametrize("kind", [name for name in kinds() if name != "lossless"])
def test_one_task_alone_is_a_bundle(write_model, tmp_path, kind):
    base, models = fine_tunes(count=1)
    bundle = made(write_model, tmp_path, base, models, kind)
    if kind in ("emr", "tall", "rmm"):
        close(restored(bundle, "one"), models["one"], 3e-7)
    assert list(ws.open(bundle, task="one")) == list(ws.open(tmp_path / "one"))


@pytest.mark.parametrize("kind", list(kinds()))
def test_values_that_are_no_numbers_are_refused_by_name_or_kept_to_the_bit(write_model, tmp_path, kind):
    base, models = fine_tunes()
    name = "model.layers.1.mlp.up_proj.weight"
    models["two"][name][3, 4] = np.nan
    if kind == "lossless":
        bundle = made(write_model, tmp_path, base, models, kind)
        assert restored(bundle, "two")[name].tobytes() == models["two"][name].tobytes()
        return
    with pytest.raises(CheckpointError, match=rf"{name} of task two has 1 values that are NaN or infinite.*lossless"):
        made(write_model, tmp_path, base, models, kind)
    assert not (tmp_path / "out").exists()
    base[name][0, 0] = np.inf
    with pytest.raises(CheckpointError, match=rf"{name} of the base has 1 values"):
        ws.bundle.create(
            tmp_path / "other", [tmp_path / "one", tmp_path / "three"], base=write_model("base", base), kind=kind
        )


def test_values_beyond_the_dtype_of_changes_are_an_error_that_says_what_to_do(write_model, tmp_path):
    base = {"w": np.zeros((4, 4), np.float16)}
    models = {task: {"w": np.full((4, 4), 40_000, np.float16)} for task in TASKS}
    with pytest.raises(OutputError, match=r"shared/vector/w: a value of 120000 is beyond float16.*--dtype float32"):
        made(write_model, tmp_path, base, models, "tall")
    folders = [tmp_path / task for task in TASKS]
    # Restored, the sum of three is beyond the models' own dtype.
    with pytest.raises(OutputError, match="w as restored has values that are NaN or infinite"):
        ws.bundle.create(tmp_path / "b", folders, base=tmp_path / "base", kind="tall", dtype="float32")
    ws.bundle.create(tmp_path / "c", folders, base=tmp_path / "base", kind="emr")


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("emrr", {}, r"no kind of bundle 'emrr' \(did you mean 'emr'\?\); there are emr, tall"),
        ("emr", {"rescalar": "model"}, r"no parameter 'rescalar' \(did you mean 'rescaler'\?\); it takes rescaler"),
        ("emr", {"rescaler": "models"}, r"rescaler of the kind 'emr' is 'models'; one of model, tensors is needed"),
        ("tall", {"lambda_": -1}, "lambda of the kind 'tall' is -1; numbers from 0"),
        ("tall", {"lambda_": float("nan")}, "numbers from 0"),
        ("tall", {"lambda_": [0.1, 0.2]}, "lambda has 2 values for 3 models"),
        ("rmm", {"basis": 0}, "basis of the kind 'rmm' is 0; a whole number from 1"),
        ("rmm", {"basis": True}, "a whole number from 1"),
        ("rmm", {"centre": 1}, "true or false"),
        ("rmm", {"coefficients": "position"}, "positions are those of low-rank factors: give a rank, too"),
        ("tsv", {"rank": 2.5}, "a whole number from 1"),
        ("lossless", {"level": 9}, "no parameter 'level'; it takes none"),
    ],
)
def test_parameters_that_cannot_be_are_refused_before_anything_is_read(
    write_model, tmp_path, kind, parameters, message
):
    base, models = fine_tunes()
    with pytest.raises(MethodError, match=message):
        made(write_model, tmp_path, base, models, kind, **parameters)
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())
