"""Running averages of checkpoints, one at a time, against plain computations on whole tensors in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from tests import faults
from tests.conftest import read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError, MethodError, OutputError, PlanError
from weightsmith.kernels import philox
from weightsmith.runs.accumulation import Averaging
from weightsmith.runs.record import RECORD_FILE, read_record
from weightsmith.runs.running import running_average, update_average

SHAPES = {"a.weight": (40, 33), "b.bias": (7,), "scalar": ()}


def snapshots(count, *, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    centre = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for number in range(count):
        tensors = {
            name: np.asarray(mean + 0.1 * rng.standard_normal(mean.shape), dtype) for name, mean in centre.items()
        }
        yield {**tensors, "steps": np.array([number], np.int64)}


@pytest.fixture
def run(tmp_path, write_model):
    """Return a function that gives snapshots to a state one after the other, and the snapshots in float64."""

    def go(count, weights, *, dtype=np.float32, seed=0, **options):
        state, kept = tmp_path / "state", []
        for number, tensors in enumerate(snapshots(count, dtype=dtype, seed=seed), 1):
            folder = write_model(f"checkpoint-{number}", tensors, {"model_type": "llama", "number": number})
            update_average(state, folder, weights=weights, **options)
            kept.append({name: np.asarray(array, np.float64) for name, array in tensors.items()})
        return state, kept

    return go


def mean_of(state):
    return read_safetensors(state / "mean")


def test_uniform_is_the_mean(run):
    state, kept = run(7, "uniform")
    for name in SHAPES:
        expected = np.mean([one[name] for one in kept], axis=0)
        np.testing.assert_allclose(mean_of(state)[name], expected, rtol=3e-7, atol=3e-7)
    assert mean_of(state)["steps"].tolist() == [6]
    assert json.loads((state / "mean/config.json").read_text())["number"] == 7


@pytest.mark.parametrize("corrected", [False, True])
def test_ema_is_the_published_one(run, corrected):
    state, kept = run(9, "ema:0.8", bias_correction=corrected, accumulator="float64")
    for name in SHAPES:
        average = np.zeros_like(kept[0][name]) if corrected else kept[0][name]
        for one in kept if corrected else kept[1:]:
            average = 0.8 * average + 0.2 * one[name]
        expected = average / (1 - 0.8**9) if corrected else average
        np.testing.assert_allclose(mean_of(state)[name], expected, rtol=1e-14, atol=1e-15)


def test_swag_has_mean_and_variance(run):
    state, kept = run(6, "swag")
    squares = read_safetensors(state / "squares")
    assert set(squares) == set(SHAPES)
    for name in SHAPES:
        stacked = np.stack([one[name] for one in kept])
        np.testing.assert_allclose(mean_of(state)[name], stacked.mean(0), rtol=3e-7, atol=3e-7)
        np.testing.assert_allclose(squares[name] / 5, stacked.var(0, ddof=1), rtol=2e-4)


def test_variance_that_is_small_beside_the_mean_keeps_its_digits(tmp_path, write_model):
    """The paper's mean(x^2) - mean(x)^2 in float32 has none left here."""
    rng, state = np.random.default_rng(0), tmp_path / "state"
    kept = [(100 + 1e-3 * rng.standard_normal(500)).astype(np.float32) for _ in range(10)]
    for number, array in enumerate(kept):
        update_average(state, write_model(f"step-{number}", {"w": array}), weights="swag")
    found = read_safetensors(state / "squares")["w"] / 9
    exact = np.stack(kept).astype(np.float64).var(0, ddof=1)
    published = np.mean([k * k for k in kept], axis=0, dtype=np.float32) - np.mean(kept, axis=0, dtype=np.float32) ** 2
    # The mean is kept in float32, whose steps are 7.6e-6 at 100, beside a spread of 1e-3.
    np.testing.assert_allclose(found, exact, rtol=0.02)
    assert np.median(np.abs(published - exact) / exact) > 1


def test_two_hundred_bfloat16_snapshots_are_averaged_where_bfloat16_is_not(tmp_path, write_model):
    """AveragedModel keeps the average in the weights' own dtype, and stands still."""
    rng, state = np.random.default_rng(0), tmp_path / "state"
    kept = [(1 + 0.02 * rng.standard_normal(64)).astype(ml_dtypes.bfloat16) for _ in range(200)]
    inside = kept[0]
    for number, array in enumerate(kept):
        update_average(state, write_model("now", {"w": array}), step=number, threads=1)
        if number:
            inside = (inside + ((array - inside) / ml_dtypes.bfloat16(number + 1))).astype(ml_dtypes.bfloat16)
    exact = np.mean([one.astype(np.float64) for one in kept], axis=0)
    assert np.abs(inside.astype(np.float64) - exact).max() > 0.004
    assert np.abs(read_safetensors(state / "mean")["w"] - exact).max() < 1e-6
    running_average(state).save(tmp_path / "out")
    written = read_safetensors(tmp_path / "out")["w"]
    assert written.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(written, exact.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_results_do_not_depend_on_threads_or_blocks(tmp_path, write_model, monkeypatch):
    from weightsmith.engine.backend import NUMPY

    rng = np.random.default_rng(0)
    models = [write_model(f"step-{i}", {"w": rng.standard_normal((300, 700)).astype(np.float32)}) for i in range(3)]
    bytes_of = []
    for name, threads, block in (("one", 1, NUMPY.block), ("four", 4, NUMPY.block), ("small", 2, 1000)):
        monkeypatch.setattr(NUMPY, "block", block, raising=False)
        for model in models:
            update_average(tmp_path / name, model, weights="swag", threads=threads)
        running_average(tmp_path / name, sample=3).save(tmp_path / f"{name}-out", threads=threads)
        files = ("mean/model.safetensors", "squares/model.safetensors")
        found = [(tmp_path / name / file).read_bytes() for file in files]
        bytes_of.append([*found, (tmp_path / f"{name}-out/model.safetensors").read_bytes()])
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def test_a_high_decay_is_kept_in_float64(run):
    state, _ = run(2, "ema:0.9999")
    assert mean_of(state)["a.weight"].dtype == np.float64
    assert Averaging.parse("ema:0.999").accumulator == "float32"


def test_average_is_written_in_the_checkpoints_dtypes(tmp_path, write_model):
    tensors = {"w": np.full(5, 1 / 3, ml_dtypes.bfloat16), "norm": np.full(5, 1 / 3, np.float32)}
    update_average(tmp_path / "state", write_model("step-1", tensors))
    running_average(tmp_path / "state").save(tmp_path / "out")
    assert {name: str(one.dtype) for name, one in read_safetensors(tmp_path / "out").items()} == {
        "w": "bfloat16",
        "norm": "float32",
    }
    running_average(tmp_path / "state", dtype="float16").save(tmp_path / "half")
    assert {str(one.dtype) for one in read_safetensors(tmp_path / "half").values()} == {"float16"}
    assert ws.verify(tmp_path / "out").ok
    assert ws.reproduce(tmp_path / "out").ok
    assert ws.verify(tmp_path / "state").ok


def test_samples_have_the_distribution(tmp_path, write_model):
    rng, state = np.random.default_rng(0), tmp_path / "state"
    kept = [rng.standard_normal(20_000).astype(np.float32) * 0.5 + 2 for _ in range(5)]
    for number, array in enumerate(kept):
        update_average(state, write_model(f"step-{number}", {"w": array}), weights="swag")
    stacked = np.stack(kept).astype(np.float64)
    drawn = running_average(state, sample=1, dtype="float64")["w"].numpy()
    scores = (drawn - stacked.mean(0)) / stacked.std(0, ddof=1)
    assert abs(scores.mean()) < 0.03
    assert abs(scores.std() - 1) < 0.03
    assert 0.66 < np.mean(np.abs(scores) < 1) < 0.70
    again, other = (running_average(state, sample=seed, dtype="float64")["w"].numpy() for seed in (1, 2))
    np.testing.assert_array_equal(drawn, again)
    assert abs(np.corrcoef(drawn - stacked.mean(0), other - stacked.mean(0))[0, 1]) < 0.03


def test_normal_numbers_are_the_same_wherever_they_are_cut():
    key = philox.key_of("x")
    whole = philox.normal(key, 0, 1001)
    for cut in (1, 2, 3, 4, 5, 500):
        np.testing.assert_array_equal(
            np.concatenate([philox.normal(key, 0, cut), philox.normal(key, cut, 1001)]), whole
        )
    many = philox.normal(key, 7, 400_007)
    assert abs(many.mean()) < 0.01
    assert abs(many.var() - 1) < 0.01
    assert abs((many**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.01


# What is refused.


def test_the_same_checkpoint_is_refused(run, tmp_path, write_model):
    state, _ = run(2, "uniform")
    (last,) = (one for number, one in enumerate(snapshots(2)) if number == 1)
    renamed = write_model("elsewhere-77", last)
    with pytest.raises(PlanError, match="in the average already, as .*checkpoint-2: all its tensors are the same"):
        update_average(state, renamed)
    with pytest.raises(PlanError, match="of step 2 is in the average already"):
        update_average(state, write_model("other/checkpoint-2", next(snapshots(1, seed=5))))
    assert read_record(state).count == 2
    assert update_average(state, renamed, again=True).record.count == 3


def test_an_ema_takes_checkpoints_in_order_and_a_mean_in_any(tmp_path, write_model):
    one, two = (write_model(f"checkpoint-{n}", t, {"number": n}) for n, t in enumerate(snapshots(2), 1))
    update_average(tmp_path / "ema", two, weights="ema:0.9")
    with pytest.raises(PlanError, match="an EMA takes checkpoints in order"):
        update_average(tmp_path / "ema", one)
    for model in (two, one):
        update_average(tmp_path / "late", model)
    for model in (one, two):
        update_average(tmp_path / "early", model)
    late, early = mean_of(tmp_path / "late"), mean_of(tmp_path / "early")
    assert late["steps"] == early["steps"] == [1]
    assert json.loads((tmp_path / "late/mean/config.json").read_text()) == {"number": 2}
    np.testing.assert_allclose(late["a.weight"], early["a.weight"], atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "b.bias": t["b.bias"][:3]}, r"'b.bias' is \[3\], and in the average \[7\]"),
        (lambda t: {k: v for k, v in t.items() if k != "scalar"}, "it lacks 'scalar'"),
        (lambda t: {**t, "more": t["scalar"]}, "'more' is not in the average"),
        (lambda t: {**t, "steps": np.ones(1, np.float32)}, "'steps' is float32, and in the average int64"),
    ],
)
def test_tensors_must_agree(run, write_model, change, message):
    state, _ = run(1, "uniform")
    with pytest.raises(PlanError, match=message):
        update_average(state, write_model("checkpoint-9", change(next(snapshots(1, seed=4)))))
    assert read_record(state).count == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_checkpoint_is_refused_and_the_state_stays(run, write_model, bad):
    state, _ = run(2, "swag")
    before = (state / "mean/model.safetensors").read_bytes()
    tensors = next(snapshots(1, seed=4))
    tensors["a.weight"][3, 4] = bad
    with pytest.raises(CheckpointError, match=r"checkpoint-9: 'a.weight' has values that are NaN or infinite"):
        update_average(state, write_model("checkpoint-9", tensors))
    assert (state / "mean/model.safetensors").read_bytes() == before
    assert update_average(state, write_model("checkpoint-10", next(snapshots(1, seed=6)))).record.count == 3


def test_a_mask_of_infinities_stays(tmp_path, write_model):
    mask = np.array([0, -np.inf], np.float32)
    for number in range(3):
        update_average(
            tmp_path / "state", write_model(f"step-{number}", {"m": mask, "w": mask + number}), weights="swag"
        )
    np.testing.assert_array_equal(mean_of(tmp_path / "state")["m"], mask)
    np.testing.assert_array_equal(running_average(tmp_path / "state", sample=1)["m"].numpy(), mask)


def test_other_settings_than_the_states_are_refused(run, write_model):
    state, _ = run(1, "ema:0.9")
    model = write_model("checkpoint-9", next(snapshots(1, seed=4)))
    with pytest.raises(MethodError, match=r"of the kind ema:0.9, not uniform"):
        update_average(state, model, weights="uniform")
    with pytest.raises(MethodError, match="kept in float32, not float64"):
        update_average(state, model, accumulator="float64")
    with pytest.raises(MethodError, match="has no variance"):
        running_average(state, sample=0)


@pytest.mark.parametrize("text", ["ema", "ema:1", "ema:-0.1", "ema:nan", "ema:x", "uniform:3", "emma:0.9", "swag:", ""])
def test_unknown_averages_are_refused(text):
    with pytest.raises(MethodError):
        Averaging.parse(text)


def test_another_folder_is_never_taken_for_a_state(tmp_path, write_model):
    model = write_model("checkpoint-1", next(snapshots(1)))
    other = write_model("precious", next(snapshots(1)))
    with pytest.raises(OutputError, match="is not the state of a running average"):
        update_average(other, model)
    with pytest.raises(CheckpointError, match="is not the state of a running average"):
        running_average(other)
    assert (other / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": True},
        {"count": 10**400},
        {"accumulator": "bfloat16"},
        {"average": {"kind": "ema", "decay": 7, "bias_correction": False}},
        {"average": {"kind": "uniform", "decay": None, "bias_correction": "no"}},
        {"average": 3},
        {"format": 2},
        {"seen": [{"name": 3, "step": None, "hash": None}]},
        {"seen": [{"name": "x", "step": -1, "hash": None}]},
        {"dtypes": {"w": "float3"}},
        {"dtypes": {}},
        {"step": 1.5},
    ],
)
def test_a_record_from_a_stranger_is_checked(run, change):
    state, _ = run(1, "uniform")
    content = json.loads((state / RECORD_FILE).read_text())
    (state / RECORD_FILE).write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError):
        running_average(state)


def test_an_update_beside_another_is_not_undone(run, write_model, monkeypatch):
    state, _ = run(1, "uniform")
    models = [write_model(f"checkpoint-{n}", next(snapshots(1, seed=n))) for n in (7, 8)]
    from weightsmith.runs import running

    whole = running._next

    def slow(*arguments):
        monkeypatch.setattr(running, "_next", whole)
        output = whole(*arguments)
        update_average(state, models[1])
        return output

    monkeypatch.setattr(running, "_next", slow)
    with pytest.raises(OutputError, match="updated by another run meanwhile"):
        update_average(state, models[0])
    assert read_record(state).count == 2
    assert [one.step for one in read_record(state).seen] == [1, 8]
    assert update_average(state, models[0]).record.count == 3


# Faults.


def test_killed_at_any_call_the_state_is_the_old_or_the_new_one(tmp_path, write_model):
    models = [write_model(f"models/checkpoint-{n}", {"w": np.full(50, float(n), np.float32)}) for n in (1, 2, 3)]
    watched = tmp_path / "work"
    state = watched / "state"

    def begin():
        import shutil

        shutil.rmtree(watched, ignore_errors=True)
        watched.mkdir()
        update_average(state, models[0], threads=1)
        update_average(state, models[1], threads=1)

    def third():
        update_average(state, models[2], threads=1)

    begin()
    calls = len(faults.run(third, watched).calls)
    assert calls > 20
    counts, kills = set(), 0
    for at in range(1, calls + 1, 5):
        for kind in ("before", "power"):
            begin()
            code = faults.run(third, watched, faults.Fault(at, kind, seed=at)).code
            assert code in (0, faults.KILLED)
            kills += code == faults.KILLED
            # What a killed run began to publish is ended, or taken back.
            average = running_average(state)
            count = average.name.split()[2]
            counts.add(count)
            assert set(average["w"].numpy()) == {{"2": 1.5, "3": 2.0}[count]}, (at, kind)
            if count == "2":
                third()
            assert set(running_average(state)["w"].numpy()) == {2.0}
            assert read_record(state).count == 3
    assert counts == {"2", "3"}
    assert kills > calls // 3


def test_memory_does_not_grow_with_the_model(tmp_path, write_model):
    """Three tensors of 32 MB; a state of 192 MB."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.w": rng.standard_normal(8_000_000, np.float32) for i in range(3)}
    model = write_model("checkpoint-1", tensors)
    script = (
        "import sys\n"
        "from weightsmith.runs.running import update_average\n"
        "update_average(sys.argv[1], sys.argv[2], weights='swag', threads=1)\n"
        "update_average(sys.argv[1], sys.argv[2], again=True, threads=1)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ws.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "state"), str(model)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 110_000_000


# The command line.


@pytest.fixture
def shell(capfd):
    """Return a function that runs the command line, and returns its exit code and what it printed."""
    from weightsmith.cli.main import main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        captured = capfd.readouterr()
        return end.value.code, captured.out + captured.err

    return call


def test_command_line(shell, tmp_path, write_model):
    models = [write_model(f"checkpoint-{n}", t) for n, t in enumerate(snapshots(3), 1)]
    state = tmp_path / "state"
    for count, model in enumerate(models, 1):
        code, text = shell("average", "--update", state, model, *(["--weights", "swag"] if count == 1 else []))
        assert code == 0, text
        assert f"swag of {count} checkpoint{'s' * (count > 1)}, up to step {count}" in text
    code, text = shell("average", "--update", state, models[1])
    assert (code, "in the average already" in text) == (1, True)
    assert shell("average", "--from", state, tmp_path / "out", "--dtype", "bfloat16", "--quiet") == (0, "")
    assert str(read_safetensors(tmp_path / "out")["a.weight"].dtype) == "bfloat16"
    assert shell("average", "--from", state, tmp_path / "drawn", "--sample", "4", "--quiet") == (0, "")
    assert shell("reproduce", tmp_path / "drawn")[0] == 0
    code, text = shell("reproduce", state)
    assert (code, "made from the state before" in text) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update", "state", "c", "--last", "3"], "--last does not go with --update"),
        (["--update", "state", "c", "out"], "--update takes one checkpoint"),
        (["--update", "state", "c", "--from", "other"], "--update takes one checkpoint"),
        (["--update", "state", "c", "--overwrite"], "--overwrite does not go with --update"),
        (["--from", "state", "out", "--weights", "swag"], "--weights does not go with --from"),
        (["--from", "state", "out", "more"], "--from takes one target"),
        (["run", "out", "--sample", "3"], "--sample does not go with RUN_DIR OUT"),
        (["run", "out", "--again"], "--again does not go with RUN_DIR OUT"),
    ],
)
def test_options_of_other_forms_are_refused(shell, arguments, message):
    code, text = shell("average", *arguments)
    assert code == 2
    assert message in text


def test_a_pipeline_keeps_its_parts(tmp_path, shell):
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number}"
        for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (folder / part).mkdir(parents=True)
            write_safetensors(folder / part / f"{file}.safetensors", {"w": np.full(3, float(number), np.float32)})
            config = (
                {"architectures": ["CLIPTextModel"]} if file == "model" else {"_class_name": "UNet2DConditionModel"}
            )
            (folder / part / "config.json").write_text(json.dumps(config))
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        update_average(tmp_path / "state", folder, weights="swag")
    running_average(tmp_path / "state").save(tmp_path / "out")
    assert sorted(str(one.relative_to(tmp_path / "out")) for one in (tmp_path / "out").rglob("*.*")) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "weightsmith.json",
    ]
    opened = ws.open(tmp_path / "out")
    assert {name: one.numpy().tolist() for name, one in opened.items()} == {
        "unet/w": [1.5] * 3,
        "text_encoder/w": [1.5] * 3,
    }
    drawn = running_average(tmp_path / "state", sample=1)
    assert drawn["unet/w"].numpy().tolist() != drawn["text_encoder/w"].numpy().tolist()


def test_batch_norm_statistics_are_warned_of(tmp_path, write_model):
    tensors = {"bn.running_mean": np.ones(2, np.float32), "bn.num_batches_tracked": np.array(3)}
    for number in (1, 2):
        update_average(tmp_path / "state", write_model(f"step-{number}", tensors), again=True)
    (warning,) = running_average(tmp_path / "state").warnings
    assert warning.startswith("1 tensors of batch-norm statistics (bn.running_mean) are averaged")


def test_quantised_models_and_those_without_weights_are_refused(tmp_path, write_model):
    codes = {"w": np.ones(3, np.uint8), "scale": np.ones(1, np.float32)}
    with pytest.raises(PlanError, match="is quantised"):
        update_average(tmp_path / "state", write_model("a", codes, {"quantization_config": {"bits": 4}}))
    with pytest.raises(PlanError, match="has no floating tensor"):
        update_average(tmp_path / "state", write_model("b", {"w": np.ones(3, np.uint8)}))
    assert not (tmp_path / "state").exists()


def test_public_names():
    assert ws.update_average is update_average
    assert ws.running_average is running_average
