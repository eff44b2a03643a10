"""Runs on disk: found by themselves, listed, averaged, and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.cli.main import cli
from weightsmith.errors import CheckpointError, MethodError, PlanError, RecipeError
from weightsmith.runs import find_run
from weightsmith.runs.discovery import step_of

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def tensors(i: int) -> dict[str, np.ndarray]:
    """Return the weights of checkpoint i, with a counter."""
    return {**llama_tensors(i), "steps_seen": np.array(i)}


def write_run(run: Path, count: int = 5, name: str = "checkpoint-{}", log: bool = True) -> Path:
    """Write checkpoints of steps 500, 1000, …, as transformers' Trainer names them."""
    for i in range(1, count + 1):
        folder = run / name.format(500 * i)
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", tensors(i))
        (folder / "config.json").write_text(json.dumps({**CONFIG, "written": i}))
        (folder / "optimizer.pt").write_bytes(b"nobody reads this")
        if log:
            history = [{"step": s, "loss": 3 / s, "epoch": s / 1000} for s in range(200, 500 * i + 1, 200)]
            history.append({"step": 500 * i, "eval_loss": 1 + 1 / i})
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": 500 * i, "log_history": history}))
    return run


def mean(weights: dict[int, float]) -> dict[str, np.ndarray]:
    """Average whole tensors in float64."""
    total = sum(weights.values())
    parts = {i: tensors(i) for i in weights}
    return {
        name: np.sum([w * parts[i][name].astype(np.float64) for i, w in weights.items()], axis=0) / total
        for name in llama_tensors(1)
    }


def assert_is(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare up to float32's rounding."""
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6, err_msg=name)


def command(*arguments: object) -> str:
    """Run the command, and return what it printed."""
    done = CliRunner().invoke(cli, ["average", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_run_is_averaged_and_files_are_the_newests(tmp_path):
    run = write_run(tmp_path / "run")
    ws.average_run(run).save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    assert_is(found, mean(dict.fromkeys(range(1, 6), 1.0)))
    assert found["steps_seen"] == 5
    assert json.loads((tmp_path / "out/config.json").read_text())["written"] == 5
    assert not (tmp_path / "out/trainer_state.json").exists()
    assert ws.verify(tmp_path / "out").ok
    assert ws.reproduce(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (["--last", 2], {4: 1, 5: 1}),
        (["--every", 2], {1: 1, 3: 1, 5: 1}),
        (["--every", 2, "--last", 2], {3: 1, 5: 1}),
        (["--steps", "1000..2000"], {2: 1, 3: 1, 4: 1}),
        (["--steps", "..1400"], {1: 1, 2: 1}),
        (["--steps", "2000..", "--weights", "wma"], {4: 1, 5: 2}),
        (["--weights", "ema:0.5", "--last", 3], {3: 0.25, 4: 0.25, 5: 0.5}),
        (["--weights", "endpoints:0.75"], {1: 0.25, 5: 0.75}),
        (["--weights", "wsm:1,0.5,0.5,0", "--dtype", "float64"], {2: 0.5, 4: 0.5}),
        (["--weights", "by-metric", "eval_loss:2"], {i: (1 + 1 / i) ** -2 for i in range(1, 6)}),
    ],
    ids=str,
)
def test_options_choose_and_weight(tmp_path, options, weights):
    run = write_run(tmp_path / "run")
    command(run, tmp_path / "out", *options)
    found = read_safetensors(tmp_path / "out")
    assert_is(found, mean(weights))
    # Counters are the newest's, whatever its weight.
    assert found["steps_seen"] == {"..1400": 2, "1000..2000": 4}.get(options[1], 5)


def test_list_shows_steps_metrics_weights_and_sizes(tmp_path):
    run = write_run(tmp_path / "run", 3)
    # Another program's, beside the run.
    (tmp_path / "metrics.csv").write_text("step,eval_loss\n500,9.0\n")
    shown = command(run, "--list", "--weights", "by-metric:loss:1").splitlines()
    assert shown[0].endswith("run: 3 checkpoint-N folders of transformers' Trainer")
    assert shown[1].split() == ["step", "loss", "weight", "size", "checkpoint"]
    # Logged at 400, 1000 and 1400: at or last before the step.
    total = 400 + 1000 + 1400
    assert [line.split()[:3] for line in shown[2:]] == [
        ["500", "0.0075", f"{400 / total:.6f}"],
        ["1000", "0.003", f"{1000 / total:.6f}"],
        ["1500", "0.0021429", f"{1400 / total:.6f}"],
    ]
    listed = json.loads(command(run, "--list", "--json"))
    assert [one["step"] for one in listed["checkpoints"]] == [500, 1000, 1500]
    assert listed["metric"] == "eval_loss"
    assert [one["metrics"]["eval_loss"] for one in listed["checkpoints"]] == [2, 1.5, 1 + 1 / 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "run"]


def test_steps_are_in_the_order_of_numbers(tmp_path):
    for step in (1000, 900, 20000):
        write_safetensors(tmp_path / f"model-{step}.safetensors", tensors(1))
    # Shards of the final model are no steps.
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", tensors(1))
    write_safetensors(tmp_path / "final.safetensors", tensors(1))
    run = find_run(str(tmp_path))
    assert [one.step for one in run.checkpoints] == [900, 1000, 20000]
    assert run.left_out == ("final.safetensors",)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("iter_0001000", 1000),
        ("global_step1200", 1200),
        ("epoch=3-step=1000.ckpt", 1000),
        ("step=1000-epoch=3-v1.ckpt", 1000),
        ("epoch=7.ckpt", 7),
        ("epoch=7-val_loss=0.25.ckpt", 7),
        ("ep2-ba400-rank0.pt", 400),
        ("llama3-8b-step_20", 20),
        ("model_0300.pth", 300),
        ("last.ckpt", None),
        ("runs", None),
    ],
)
def test_step_in_a_name(name, step):
    assert step_of(name) == step


def test_numbered_and_megatron_folders(tmp_path):
    for kind, name in (("Megatron-style iter_N", "iter_{:07d}"), ("numbered folders step_*", "step_{}")):
        run = write_run(tmp_path / name[:4], 3, name, log=False)
        found = find_run(str(run))
        assert kind in found.kind
        assert [one.step for one in found.checkpoints] == [500, 1000, 1500]
        assert_is({n: t.numpy() for n, t in ws.average_run(run).items()}, mean({1: 1, 2: 1, 3: 1}))


def test_several_sequences_are_told_apart_by_pattern(tmp_path):
    write_run(tmp_path, 2)
    write_run(tmp_path, 3, "ema-{}")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-N folders .*checkpoint-1000.*numbered folders ema-\*.*--pattern"
    ):
        find_run(str(tmp_path))
    assert len(find_run(str(tmp_path), "ema-*").checkpoints) == 3
    with pytest.raises(CheckpointError, match=r"that fit emma-\*"):
        find_run(str(tmp_path), "emma-*")


def test_what_is_no_run_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no folder of checkpoints"):
        find_run(str(tmp_path / "none"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no numbered files or folders of weights; there is: notes.txt"):
        find_run(str(tmp_path))
    for name in ("epoch=1-step=10.ckpt", "epoch=1-step=10-v1.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="are both of step 10"):
        find_run(str(tmp_path))


def test_choice_that_leaves_nothing_is_refused(tmp_path):
    run = write_run(tmp_path / "run", 2, log=False)
    with pytest.raises(CheckpointError, match=r"no checkpoint of steps 2000\.\.; its 2 are of steps 500 to 1000"):
        ws.average_run(run, steps=(2000, None))
    with pytest.raises(CheckpointError, match="last 3 checkpoints are asked for"):
        ws.average_run(run, last=3)
    with pytest.raises(RecipeError, match="numbers from 1"):
        ws.average_run(run, every=0)
    with pytest.raises(CheckpointError, match="logged are: nothing"):
        ws.average_run(run, weights="by-metric:loss:2")
    with pytest.raises(MethodError, match="3 weights for 2"):
        ws.average_run(run, weights=[0.2, 0.3, 0.5])


def test_checkpoints_of_other_shape_or_half_written_are_refused(tmp_path):
    run = write_run(tmp_path / "run", 3)
    write_safetensors(run / "checkpoint-1000/model.safetensors", llama_tensors(1, hidden=4))
    with pytest.raises(PlanError, match="checkpoint-1000"):
        ws.average_run(run)
    os.unlink(run / "checkpoint-1000/model.safetensors")
    os.unlink(run / "checkpoint-1000/optimizer.pt")
    with pytest.raises(CheckpointError, match="checkpoint-1000 holds no weights"):
        ws.average_run(run)


def test_log_of_a_stranger_is_one_clear_error(tmp_path):
    run = write_run(tmp_path / "run", 1)
    state = run / "checkpoint-500/trainer_state.json"
    for text, message in [("[]", "JSON object"), ('{"log_history": 3}', "no log_history"), ("{", "not JSON")]:
        state.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            find_run(str(run))
    entries = [
        {"step": "x", "loss": 1},
        {"step": 3, "loss": [1], "lr": True, "n": None},
        {"step": 4, "x": float("nan")},
    ]
    state.write_text(json.dumps({"log_history": entries}))
    assert list(find_run(str(run)).checkpoints[0].metrics) == ["x"]


def test_batch_norm_statistics_are_averaged_and_flagged(tmp_path):
    for i in (1, 2):
        arrays = {
            "bn.weight": np.full(3, float(i), np.float32),
            "bn.running_mean": np.full(3, 10.0 * i, np.float32),
            "bn.running_var": np.full(3, 100.0 * i, np.float32),
            "bn.num_batches_tracked": np.array(1000 * i),
        }
        write_safetensors(tmp_path / f"{i}.safetensors", arrays)
    averaged = ws.average_run(tmp_path)
    assert averaged["bn.running_mean"].numpy().tolist() == [15.0] * 3
    assert averaged["bn.num_batches_tracked"].numpy() == 2000
    (warning,) = averaged.warnings
    assert "2 tensors of batch-norm statistics (bn.running_mean, …)" in warning
    assert "re-estimate" in warning
    assert ws.average_run(tmp_path, last=1).warnings == ()


def test_sixty_four_checkpoints_fit_a_laptops_limits(tmp_path):
    """64 checkpoints of 6 shards are 384 files; 100 may be open. Memory is that of a few, and the bytes are the same."""
    size = 1 << 19
    for i in range(64):
        folder = tmp_path / f"run/step-{i}"
        folder.mkdir(parents=True)
        for k in range(6):
            file = folder / f"model-0000{k + 1}-of-00006.safetensors"
            write_safetensors(file, {f"w{k}": np.full(size if k == 0 else 16, i + k, np.float32)})
    script = f"""
import resource, sys
import weightsmith as ws
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
last = int(sys.argv[1])
ws.average_run({str(tmp_path / "run")!r}, last=last).save({str(tmp_path)!r} + f"/out-{{last}}", threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for last in (8, 64):
        done = subprocess.run([sys.executable, "-c", script, str(last)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    found = read_safetensors(tmp_path / "out-64")
    assert all(np.array_equal(found[f"w{k}"], np.full_like(found[f"w{k}"], 31.5 + k)) for k in range(6))
    # 64 inputs in blocks of full length would take 2 x 56 MiB more than 8.
    assert peaks[1] - peaks[0] < 25, peaks


def test_killed_average_goes_on(tmp_path):
    run = write_run(tmp_path / "run")
    before = "from weightsmith.engine import executor; d = executor._Run._do; n = []\n"
    before += "def die(self, task, mapper):\n d(self, task, mapper); n.append(1)\n"
    before += " if len(n) == 4: self.stopping.set(); raise KeyboardInterrupt\nexecutor._Run._do = die\n"
    call = f"import weightsmith as ws; ws.average_run({str(run)!r}).save({str(tmp_path / 'out')!r}, threads=1)"
    assert subprocess.run([sys.executable, "-c", before + call], capture_output=True).returncode != 0
    assert not (tmp_path / "out").exists()
    summary = ws.average_run(run).save(tmp_path / "out", threads=1)
    assert summary.resumed > 0
    assert_is(read_safetensors(tmp_path / "out"), mean(dict.fromkeys(range(1, 6), 1.0)))


def test_adapters_are_averaged_as_the_models_that_they_make(tmp_path, write_model):
    """The mean of products, which is not the product of means."""
    base = write_model("base", llama_tensors(0), CONFIG)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    rng = np.random.default_rng(0)
    changes = []
    for i in (1, 2, 3):
        folder = tmp_path / f"run/checkpoint-{i}"
        folder.mkdir(parents=True)
        a, b = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
        changes.append(2.0 * b @ a)
        write_safetensors(folder / "adapter_model.safetensors", {name.format("A"): a, name.format("B"): b})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is an adapter.*--base"):
        ws.average_run(tmp_path / "run")
    command(tmp_path / "run", tmp_path / "out", "--base", base, "--weights", "wma")
    found = read_safetensors(tmp_path / "out")
    weight = "model.layers.0.self_attn.q_proj.weight"
    expected = llama_tensors(0)[weight] + (changes[0] + 2 * changes[1] + 3 * changes[2]) / 6
    np.testing.assert_allclose(found[weight], expected, rtol=0, atol=1e-5)
    assert np.array_equal(found["lm_head.weight"], llama_tensors(0)["lm_head.weight"])
    assert ws.reproduce(tmp_path / "out").ok
    with pytest.raises(RecipeError, match="leave out --base"):
        ws.average_run(write_run(tmp_path / "whole", 2), base=base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "give RUN_DIR and OUT"),
        (["{run}", "{run}/out", "--json"], "--json goes with --list"),
        (["{run}", "--list", "--steps", "5"], "no range of steps"),
        (["{run}", "--list", "--steps", "9..5"], "ends before it begins"),
        (["{run}", "--list", "--steps", ".."], "no range of steps"),
    ],
    ids=str,
)
def test_wrong_usage_is_told(tmp_path, arguments, message):
    run = write_run(tmp_path / "run", 2)
    done = CliRunner().invoke(cli, ["average", *(one.format(run=run) for one in arguments)])
    assert done.exit_code == 2
    assert message in done.output
