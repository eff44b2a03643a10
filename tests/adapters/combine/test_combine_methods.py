"""The published merges of LoRAs are held against plain dense computations of what their papers and codes say."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from lora_files import MLP, PREFIX, Q0, Q1, SHAPES, best, deltas, relative, true_sum, write_lora

import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from weightsmith.adapters.combine.registry import all_combiners, get_combiner
from weightsmith.adapters.combine.units import cluster
from weightsmith.errors import CheckpointError, MethodError, PlanError


def two(tmp_path: Path, rank: int = 3) -> list[Path]:
    return [write_lora(tmp_path / "a", rank, 1), write_lora(tmp_path / "b", rank, 2, alpha=7)]


def factors_of(folder: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B with the scale in B."""
    tensors, config = read_safetensors(folder), json.loads((folder / "adapter_config.json").read_text())
    down, up = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return down, up * config["lora_alpha"] / len(down)


# -- methods on the deltas, entry by entry ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {"density": 0.4}), ("dare_ties", {"density": 0.5}), ("magmax", {})]
)
def test_methods_on_task_vectors_work_on_deltas_and_are_cut_by_an_svd(tmp_path, method, parameters):
    given = two(tmp_path)
    weight = [1.0, 0.5] if method != "magmax" else 1.0
    merged = ws.adapters.merge(given, method, weight=weight, rank=4, seed=3, **parameters)
    merged.save(tmp_path / "out")
    per_model = {"weight": weight} if method != "magmax" else {}
    for layer in merged.report().layers:
        own = [deltas(folder)[layer.module] for folder in given]
        wanted = ws.merge_arrays(
            method,
            own,
            np.zeros_like(own[0]),
            parameters=parameters | per_model,
            seed=3,
            name=f"{layer.module}.weight",
            labels=("a", "b"),
        )
        found = deltas(tmp_path / "out")[layer.module]
        assert relative(found, best(wanted, 4)) < 1e-5
        assert layer.relative == pytest.approx(relative(found, wanted), rel=1e-4)
    assert not ws.reproduce(tmp_path / "out").problems


def test_parameters_that_adapters_cannot_have_are_refused(tmp_path):
    given = two(tmp_path)
    with pytest.raises(MethodError, match="works on whole models"):
        ws.adapters.merge(given, "median")
    with pytest.raises(MethodError, match="takes no weights"):
        ws.adapters.merge(given, "sce", weight=2)
    with pytest.raises(MethodError, match="given by --weight"):
        ws.adapters.merge(given, "ties", weight_=[1, 2])
    with pytest.raises(MethodError, match="layer by layer: give trim_scope=tensor"):
        ws.adapters.merge(given, "ties", trim_scope="model")
    with pytest.raises(MethodError, match="has a rank of its own"):
        ws.adapters.merge(given, "lego", energy=0.5)
    with pytest.raises(MethodError, match="rank means nothing where tensors are averaged"):
        ws.adapters.merge(given[:1], "fedavg", average="factors", rank=2)
    with pytest.raises(MethodError, match="PEFT's combinations know no energy"):
        ws.adapters.merge(given, "svd", compat="peft", energy=0.5)
    with pytest.raises(PlanError, match="is not written yet"):
        ws.adapters.merge([ws.adapters.merge(given)])
    with pytest.raises(MethodError, match="rank is 3 and clusters is 4"):
        ws.adapters.merge(given, "lego", rank=3, clusters=4)


def test_ties_by_hand(tmp_path):
    given = two(tmp_path)
    merged = ws.adapters.merge(given, "ties", density=0.25, rank=18)
    merged.save(tmp_path / "out")
    for module, found in deltas(tmp_path / "out").items():
        kept = []
        for folder in given:
            delta = deltas(folder)[module]
            least = np.sort(np.abs(delta).ravel())[::-1][int(0.25 * delta.size) - 1]
            kept.append(np.where(np.abs(delta) >= least, delta, 0))
        sign = np.where(sum(kept) >= 0, 1, -1)
        agree = [np.where(np.sign(one) == sign, one, 0) for one in kept]
        count = np.maximum(sum((one != 0).astype(int) for one in agree), 1)
        wanted = sum(agree) / count
        assert relative(found, best(wanted, 18)) < 1e-5


def test_masks_of_adapters_of_one_name_differ(tmp_path):
    a, b = write_lora(tmp_path / "one" / "adapter", 3, 1), write_lora(tmp_path / "two" / "adapter", 3, 1)
    halves = ws.adapters.merge([a, b], "dare", density=0.5, weight=0.5, rank=18)
    halves.save(tmp_path / "both")
    alone = ws.adapters.merge([a], "dare", density=0.5, rank=18)
    alone.save(tmp_path / "alone")
    apart = [np.count_nonzero(np.abs(deltas(tmp_path / name)[Q0]) > 1e-4) for name in ("both", "alone")]
    assert apart[0] > apart[1] * 1.2


def test_the_randomised_decomposition_tells_its_own_error(tmp_path):
    given = two(tmp_path)
    errors = []
    for number, how in enumerate(("exact", "randomized")):
        merged = ws.adapters.merge(given, "ties", rank=3, decomposition=how, density=0.9)
        merged.save(tmp_path / f"out{number}")
        errors.append(merged.report().error)
    assert errors[0] <= errors[1] < errors[0] * 1.1


# -- KnOTS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"density": 0.5, "concatenate": "out", "lambda_": 0.6},
        {"density": 0.4, "coordinates": "unscaled"},
        {"density": 1.0, "elect": False, "normalize": False},
    ],
)
def test_knots_through_factors_is_knots_on_the_dense_deltas(tmp_path, options):
    given, weight = two(tmp_path), [1.0, 0.7]
    merged = ws.adapters.merge(given, "knots", weight=weight, **options)
    merged.save(tmp_path / "out")
    dense = {name.rstrip("_"): value for name, value in options.items()}
    for module, found in deltas(tmp_path / "out").items():
        own = [deltas(folder)[module] for folder in given]
        # Without a tolerance the dense form counts rounding as directions.
        wanted = ws.merge_arrays(
            "knots",
            own,
            np.zeros_like(own[0]),
            parameters={**dense, "weight": weight, "tolerance": 1e-9},
            name=f"{module}.weight",
        )
        assert relative(found, wanted) < 1e-5
    if not options.get("elect", True):
        assert merged.report().from_sum == pytest.approx(0, abs=1e-7)
    else:
        assert merged.report().from_sum > 0.01


def test_knots_of_adapters_is_knots_of_models_taken_out_again(tmp_path, write_model):
    given = two(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {f"{module}.weight": rng.standard_normal(shape) for module, shape in SHAPES.items()}
    base = write_model("base", tensors)
    models = ws.merge("knots", [f"{base}+{folder}" for folder in given], base=base, density=0.4, tolerance=1e-9)
    merged = ws.adapters.merge(given, "knots", density=0.4)
    merged.save(tmp_path / "out")
    for module, found in deltas(tmp_path / "out").items():
        wanted = models[f"{module}.weight"].numpy() - tensors[f"{module}.weight"]
        assert relative(found, wanted) < 1e-5


# -- LoRA-LEGO --------------------------------------------------------------------------------------------------------


def test_as_many_clusters_as_ranks_without_corrections_are_the_sum(tmp_path):
    given = two(tmp_path)
    merged = ws.adapters.merge(given, "lego", weight=[0.5, -2], rank=6, keep_norm=False, keep_variance=False)
    merged.save(tmp_path / "out")
    for module, wanted in true_sum(given, [0.5, -2]).items():
        assert relative(deltas(tmp_path / "out")[module], wanted) < 1e-6
    assert merged.report().from_sum < 1e-6


@pytest.mark.parametrize("balance", [False, True])
def test_copies_of_an_adapter_are_that_adapter(tmp_path, balance):
    one = write_lora(tmp_path / "a", 3, 1)
    ws.adapters.merge([one] * 4, "lego", balance=balance).save(tmp_path / "out")
    for module, wanted in deltas(one).items():
        assert relative(deltas(tmp_path / "out")[module], wanted) < 1e-6


def test_centres_are_means_with_both_corrections(tmp_path):
    """Ranks that lie near one another are put together; the numbers are then those of the formulas."""
    rng = np.random.default_rng(0)
    groups = [[0, 3], [1, 4], [2]]
    shape = SHAPES[Q0]
    downs, ups = rng.standard_normal((3, shape[1])), rng.standard_normal((3, shape[0]))
    near = [
        (downs + 0.01 * rng.standard_normal(downs.shape), ups + 0.01 * rng.standard_normal(ups.shape)) for _ in "ab"
    ]
    folders = []
    for name, (down, up), count in zip("ab", near, (3, 2), strict=True):
        folder = write_lora(tmp_path / name, count, 0, alpha=count, shapes={Q0: shape})
        tensors = {f"{PREFIX}{Q0}.lora_A.weight": down[:count], f"{PREFIX}{Q0}.lora_B.weight": up[:count].T}
        write_safetensors(folder / "adapter_model.safetensors", {n: v.astype(np.float64) for n, v in tensors.items()})
        folders.append(folder)
    pairs = [np.concatenate([down, up], axis=1)[:count] for (down, up), count in zip(near, (3, 2), strict=True)]
    units = np.concatenate(pairs)
    wanted = np.zeros(shape)
    for group in groups:
        mean = units[group].mean(axis=0)
        mean *= np.linalg.norm(units[group], axis=1).mean() / np.linalg.norm(mean)
        wanted += np.outer(mean[shape[1] :], mean[: shape[1]])
    wanted *= math.sqrt(2.5 / 3)
    ws.adapters.merge(folders, "lego").save(tmp_path / "out")
    assert relative(deltas(tmp_path / "out")[Q0], wanted) < 1e-9


def test_clusters_are_the_best_ones_and_always_the_same():
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.standard_normal((4, 5)) * 0.1 + centre for centre in 3 * np.eye(5)[:3]])
    labels = cluster(points @ points.T, 3, key=("x",), restarts=4)
    assert [len(set(labels[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(labels)) == 3
    assert np.array_equal(labels, cluster(points @ points.T, 3, key=("x",), restarts=4))
    few = rng.standard_normal((7, 3))
    found = cluster(few @ few.T, 2, key=("y",), restarts=20)

    def spread(chosen: np.ndarray) -> float:
        return sum(((few[chosen == k] - few[chosen == k].mean(axis=0)) ** 2).sum() for k in set(chosen.tolist()))

    every = [np.array(one) for one in itertools.product((0, 1), repeat=7) if 0 < sum(one) < 7]
    assert spread(found) == pytest.approx(min(map(spread, every)))
    same = np.ones((5, 2))
    assert sorted(set(cluster(same @ same.T, 3, key=(), restarts=1))) == [0, 1, 2]


# -- CoPA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["code", "plain"])
def test_copa_is_what_the_authors_code_computes(tmp_path, form):
    given = two(tmp_path, rank=6)
    ws.adapters.merge(given, "copa", form=form).save(tmp_path / "out")
    for module, found in deltas(tmp_path / "out").items():
        downs, ups, scales = [], [], []
        for folder in given:
            masked = []
            for matrix in factors_of(folder, module):
                # kthvalue counts from 1, from the smallest.
                least = np.sort(np.abs(matrix).ravel())[int(matrix.size * 0.8) - 1]
                masked.append(matrix * (np.abs(matrix) >= least))
            down = factors_of(folder, module)[0]
            scale = np.abs(down).sum(1) / np.abs(masked[0]).sum(1)
            scales.append(np.maximum(scale, np.sort(scale)[int(6 * 0.8)]))
            downs.append(masked[0])
            ups.append(masked[1])
        factor = 2.0 if form == "code" else 1.0
        down = factor * sum(downs) / (1 if form == "code" else 2)
        up = factor * sum(up * scale for up, scale in zip(ups, scales, strict=True)) / sum(scales)
        assert relative(found, up @ down) < 1e-6


def test_copa_adds_ranks_place_by_place_and_refuses_others(tmp_path):
    other = write_lora(tmp_path / "c", 4, 3)
    with pytest.raises(MethodError, match="the adapters have 3, 4"):
        ws.adapters.merge([two(tmp_path)[0], other], "copa").report()


# -- orthogonal adaptation --------------------------------------------------------------------------------------------


def test_orthogonality_of_the_fixed_factors_is_measured(tmp_path):
    shape = {Q0: (24, 18)}
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((18, 18)))[0]
    tilted = basis[3:6].copy()
    tilted[0] = math.cos(1.0) * basis[0] + math.sin(1.0) * basis[3]
    folders = []
    for name, rows in (("a", basis[:3]), ("b", basis[3:6]), ("c", tilted)):
        folder = write_lora(tmp_path / name, 3, 7, shapes=shape)
        tensors = read_safetensors(folder)
        tensors[f"{PREFIX}{Q0}.lora_A.weight"] = 2.5 * rows
        write_safetensors(folder / "adapter_model.safetensors", tensors)
        folders.append(folder)
    a, b, c = folders
    assert ws.adapters.merge([a, b], "orthogonal").report().cosine == pytest.approx(0, abs=1e-12)
    assert ws.adapters.merge([a, c], "orthogonal").report().cosine == pytest.approx(math.cos(1.0))
    assert ws.adapters.merge([a, a], "orthogonal").report().cosine == pytest.approx(1)
    with pytest.raises(MethodError, match="have a cosine of 0.54, and at most 0.1 is wanted"):
        ws.adapters.merge([a, c], "orthogonal", tolerance=0.1).report()


# -- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"metrics": "loss:2,1"}, [1 / 3, 2 / 3]),
        ({"metrics": "loss:2,1", "p": 0}, [1 / 2, 1 / 2]),
        ({"metrics": "step:100,300", "p": 2}, [1 / 10, 9 / 10]),
        ({"metrics": "score:0.2,0.6"}, [1 / 4, 3 / 4]),
        (
            {"metrics": "loss:2,1", "kind": "exponential"},
            [math.exp(-2) / (math.exp(-2) + math.exp(-1)), math.exp(-1) / (math.exp(-2) + math.exp(-1))],
        ),
    ],
)
def test_metrics_weigh_checkpoints(tmp_path, options, shares):
    given = two(tmp_path)
    merged = ws.adapters.merge(given, "mwa", **options)
    assert merged.report().weights == pytest.approx(shares)
    merged.save(tmp_path / "out")
    for module, wanted in true_sum(given, shares).items():
        assert relative(deltas(tmp_path / "out")[module], wanted) < 1e-6


def test_losses_and_steps_are_read_beside_the_checkpoints(tmp_path):
    folders = []
    for step in (500, 1000):
        folder = write_lora(tmp_path / f"checkpoint-{step}", 2, step)
        log = [{"step": 500, "loss": 1.5}, {"step": 1000, "loss": 0.5}, {"step": 1000, "eval_loss": 9.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
        folders.append(folder)
    assert ws.adapters.merge(folders, "mwa").report().weights == pytest.approx([0.25, 0.75])
    assert ws.adapters.merge(folders, "mwa", metrics="step").report().weights == pytest.approx([1 / 3, 2 / 3])
    for folder in folders:
        (folder / "trainer_state.json").unlink()
    assert ws.adapters.merge(folders, "mwa", metrics="step").report().weights == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(MethodError, match="no trainer_state.json beside it that tells its loss"):
        ws.adapters.merge(folders, "mwa")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("lost", "begins with loss, step or score"),
        ("loss:1", "1 values for 2 adapters"),
        ("loss:1,x", "takes numbers"),
        ("loss:0,1", "the metric 'loss' of a is 0"),
        ("step:0,0", "of every adapter is 0"),
        ("loss:nan,1", "is nan"),
    ],
)
def test_metrics_without_weights_are_refused(tmp_path, metrics, message):
    with pytest.raises(MethodError, match=message):
        ws.adapters.merge(two(tmp_path), "mwa", metrics=metrics)


def test_clients_are_averaged_by_their_samples(tmp_path):
    given = [write_lora(tmp_path / name, 3, seed) for seed, name in enumerate("ab")]
    ws.adapters.merge(given, "fedavg", weight=[300, 100]).save(tmp_path / "products")
    for module, wanted in true_sum(given, [0.75, 0.25]).items():
        assert relative(deltas(tmp_path / "products")[module], wanted) < 1e-6
    ws.adapters.merge(given, "fedavg", weight=[300, 100], average="factors").save(tmp_path / "factors")
    ws.adapters.merge(given, "fedavg", weight=[300, 100], average="factors", only="lora_B").save(tmp_path / "half")
    own = [read_safetensors(folder) for folder in given]
    for name, value in read_safetensors(tmp_path / "factors").items():
        np.testing.assert_allclose(value, 0.75 * own[0][name] + 0.25 * own[1][name], rtol=1e-6, atol=1e-7)
    for name, value in read_safetensors(tmp_path / "half").items():
        mean = 0.75 * own[0][name] + 0.25 * own[1][name] if "lora_B" in name else own[0][name]
        np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-7)
    config = (tmp_path / "factors" / "adapter_config.json").read_text()
    assert json.loads(config) == json.loads((given[0] / "adapter_config.json").read_text())


def test_only_tensors_of_one_kind_shape_and_scale_are_averaged(tmp_path):
    a = write_lora(tmp_path / "a", 3, 1)
    with pytest.raises(PlanError, match="has lora_alpha 12 and .* 7"):
        ws.adapters.merge([a, write_lora(tmp_path / "b", 3, 1, alpha=7)], "fedavg", average="factors")
    with pytest.raises(PlanError, match=r"only one of .* has base_model.model.model.layers.1"):
        ws.adapters.merge([a, write_lora(tmp_path / "c", 3, 1, shapes={Q0: SHAPES[Q0], MLP: SHAPES[MLP]})], "icm")
    with pytest.raises(MethodError, match="has a part named lora_C"):
        ws.adapters.merge([a, a], "fedavg", average="factors", only="lora_C")
    with pytest.raises(MethodError, match="weights sum to 0"):
        ws.adapters.merge([a, a], "fedavg", weight=[1, -1])


def test_the_linear_form_of_icm_is_a_mean_in_principal_components(tmp_path):
    given = [write_lora(tmp_path / name, 3, seed) for seed, name in enumerate("abcd")]
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    own = [read_safetensors(folder) for folder in given]
    for components in (1, 2, None):
        merged = ws.adapters.merge(given, "icm", weight=list(weights), components=components)
        merged.save(tmp_path / f"out{components}")
        names = list(own[0])
        stacks = {name: np.stack([one[name].ravel().astype(np.float64) for one in own]) for name in names}
        means = {name: rows.mean(0) for name, rows in stacks.items()}
        sizes = {name: np.sqrt(np.mean((rows - means[name]) ** 2)) for name, rows in stacks.items()}
        flat = np.concatenate([(stacks[name] - means[name]) / sizes[name] for name in names], axis=1)
        axes = np.linalg.svd(flat, full_matrices=False)[2][: components or 3]
        decoded = (weights @ flat @ axes.T) @ axes
        found, start = read_safetensors(tmp_path / f"out{components}"), 0
        for name in names:
            size = own[0][name].size
            wanted = means[name] + sizes[name] * decoded[start : start + size]
            np.testing.assert_allclose(found[name].ravel(), wanted, rtol=1e-5, atol=1e-6)
            start += size
    ws.adapters.merge(given, "icm", components=1).save(tmp_path / "equal")
    for name, value in read_safetensors(tmp_path / "equal").items():
        np.testing.assert_allclose(value, np.mean([one[name] for one in own], axis=0), rtol=1e-5, atol=1e-6)


# -- reversible merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
def test_as_many_basis_adapters_as_adapters_give_each_back(tmp_path, centre):
    given = [write_lora(tmp_path / "a", 3, 1), write_lora(tmp_path / "b", 2, 2), write_lora(tmp_path / "c", 3, 3)]
    basis = tmp_path / "basis"
    merged = ws.adapters.merge(given, "rmm", basis=3 - centre, centre=centre, dtype="float32")
    merged.save(basis)
    assert merged.report().error < 1e-6
    assert sorted(path.name for path in basis.iterdir() if path.is_dir()) == [
        "basis-1",
        "basis-2",
        "basis-3",
        "coefficients",
    ]
    assert not ws.reproduce(basis).problems
    for number, (name, folder) in enumerate(zip("abc", given, strict=True)):
        for asked in (name, number + 1):
            back = tmp_path / f"back-{asked}"
            ws.adapters.revert(basis, asked).save(back)
            for module, wanted in deltas(folder).items():
                assert relative(deltas(back)[module], wanted) < 1e-6
        assert not ws.reproduce(tmp_path / f"back-{name}").problems


def test_a_smaller_basis_is_the_best_of_the_factors_and_its_error_is_told(tmp_path):
    given = [write_lora(tmp_path / name, 3, seed) for seed, name in enumerate("abcd")]
    merged = ws.adapters.merge(given, "rmm", basis=2)
    merged.save(tmp_path / "basis")
    off = whole = 0.0
    restored = []
    for name, folder in zip("abcd", given, strict=True):
        ws.adapters.revert(tmp_path / "basis", name).save(tmp_path / f"back-{name}")
        restored.append(tmp_path / f"back-{name}")
        for module, wanted in deltas(folder).items():
            off += float(np.sum((deltas(restored[-1])[module] - wanted) ** 2))
            whole += float(np.sum(wanted**2))
    assert merged.report().error == pytest.approx(math.sqrt(off / whole), rel=1e-4)
    for module in SHAPES:
        balanced = []
        for folder in given:
            u, s, vt = np.linalg.svd(deltas(folder)[module], full_matrices=False)
            u, s, vt = u[:, :3], s[:3], vt[:3]
            signs = np.sign(u[np.abs(u).argmax(0), range(3)])
            balanced.append((vt * signs[:, None] * np.sqrt(s)[:, None]).ravel())
        wanted = best(np.stack(balanced), 2)
        for number, back in enumerate(restored):
            down = read_safetensors(back)[f"{PREFIX}{module}.lora_A.weight"].ravel()
            np.testing.assert_allclose(down, wanted[number], rtol=1e-4, atol=1e-5)


def test_what_is_no_whole_basis_is_refused(tmp_path):
    given = two(tmp_path)
    ws.adapters.merge(given, "rmm").save(tmp_path / "basis")
    with pytest.raises(CheckpointError, match="holds no adapter 'c'.*it holds a, b, or give a number from 1 to 2"):
        ws.adapters.revert(tmp_path / "basis", "c")
    with pytest.raises(CheckpointError, match="holds no adapter 3"):
        ws.adapters.revert(tmp_path / "basis", 3)
    with pytest.raises(CheckpointError, match="is no basis of adapters"):
        ws.adapters.revert(given[0], "a")
    with pytest.raises(MethodError, match="'rmm' takes no weights"):
        ws.adapters.merge(given, "rmm", weight=[1, 2])
    path = tmp_path / "basis" / "weightsmith-basis.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"format": 9}, "is of format 9"),
        ({"basis": 10**9}, "does not say how many"),
        ({"tasks": []}, "does not say how many"),
        ({"tasks": {"a": {}}}, r"float64 \[1, 2\] is needed"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match=message):
            ws.adapters.revert(tmp_path / "basis", "a")
    path.write_text(json.dumps(content))
    config = tmp_path / "basis" / "basis-2" / "adapter_config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"lora_alpha": 6}))
    with pytest.raises(CheckpointError, match="has not one rank and a scale of 1"):
        ws.adapters.revert(tmp_path / "basis", "a")
    config.write_text(text)
    stored = tmp_path / "basis" / "coefficients" / "coefficients.safetensors"
    write_safetensors(stored, {name: value * np.nan for name, value in read_safetensors(stored).items()})
    with pytest.raises(CheckpointError, match="a coefficient is NaN"):
        ws.adapters.revert(tmp_path / "basis", "a")


# -- all of them ------------------------------------------------------------------------------------------------------


def test_every_method_says_what_it_is_and_has_documented_parameters():
    names = list(all_combiners())
    assert names[0] == "linear"
    assert {"cat", "svd", "orthogonal", "lego", "copa", "knots", "mwa", "fedavg", "icm", "rmm"} < set(names)
    for combiner in all_combiners().values():
        assert combiner.source
        assert combiner.summary.endswith((".", ":"))
        assert all(parameter.about.description for parameter in combiner.parameters.values())
    assert get_combiner("dare").name == "dare_linear"


def test_methods_do_not_depend_on_threads_and_are_made_again(tmp_path):
    given = [write_lora(tmp_path / name, 3, seed) for seed, name in enumerate("ab")]
    for method in (*all_combiners(), "ties", "dare_ties"):
        options = {"metrics": "loss:1,2"} if method == "mwa" else {}
        texts = []
        for threads in (1, 3):
            out = tmp_path / f"{method}-{threads}"
            ws.adapters.merge(given, method, threads=threads, **options).save(out, threads=threads)
            texts.append([path.read_bytes() for path in sorted(out.rglob("*.safetensors"))])
        assert texts[0] == texts[1]
        assert not ws.reproduce(out).problems


def test_the_linear_methods_are_blind_to_the_order_and_split_of_factors(tmp_path):
    """The same delta through other factors gives the same result: only units and entries of factors may tell."""
    one = write_lora(tmp_path / "a", 3, 1, shapes={Q1: SHAPES[Q1]}, dtype=np.float64)
    turned = write_lora(tmp_path / "b", 3, 1, shapes={Q1: SHAPES[Q1]}, dtype=np.float64)
    tensors, turn = read_safetensors(turned), np.random.default_rng(0).standard_normal((3, 3))
    down, up = f"{PREFIX}{Q1}.lora_A.weight", f"{PREFIX}{Q1}.lora_B.weight"
    tensors |= {down: turn @ tensors[down], up: tensors[up] @ np.linalg.inv(turn)}
    write_safetensors(turned / "adapter_model.safetensors", tensors)
    other = write_lora(tmp_path / "c", 2, 5, shapes={Q1: SHAPES[Q1]}, dtype=np.float64)
    for method in ("linear", "svd", "knots", "ties", "rmm"):
        for number, first in enumerate((one, turned)):
            ws.adapters.merge([first, other], method).save(tmp_path / f"{method}{number}")
        where = "basis-1" if method == "rmm" else ""
        found = [deltas(tmp_path / f"{method}{number}" / where)[Q1] for number in (0, 1)]
        assert relative(found[0], found[1]) < 1e-8
