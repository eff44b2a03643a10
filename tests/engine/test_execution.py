"""Runs: the same bytes however they are cut, and nothing half-done that looks done."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.engine import executor
from weightsmith.engine.backend import NUMPY
from weightsmith.errors import CheckpointError, Interrupted, OutputError
from weightsmith.plan import parameters as resolver


@pytest.fixture
def inputs(write_model):
    return [write_model(n, llama_tensors(i, layers=3, hidden=32)) for i, n in enumerate(("base", "a", "b"))]


def merge(inputs, method="dare_ties"):
    base, *models = inputs
    return ws.merge(method, models, base, weight=0.5, density=0.4, seed=5)


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("method", ["dare_ties", "ties", "della"])
def test_threads_shards_and_blocks_do_not_change_a_byte(inputs, tmp_path, method, monkeypatch):
    merge(inputs, method).save(tmp_path / "one", threads=1)
    expected = read_safetensors(tmp_path / "one")
    merge(inputs, method).save(tmp_path / "two", threads=4, shard_size=9_000)
    monkeypatch.setattr(executor, "_TINY", 0)
    merge(inputs, method).save(tmp_path / "pool", threads=4)
    monkeypatch.setattr(NUMPY, "block", 100)
    monkeypatch.setattr(executor, "_SMALL", 50)
    merge(inputs, method).save(tmp_path / "three", threads=3)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    for other in ("two", "pool", "three"):
        found = read_safetensors(tmp_path / other)
        assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_no_input_is_modified(inputs, tmp_path):
    before = [digest(folder) for folder in inputs]
    merge(inputs).save(tmp_path / "out")
    assert [digest(folder) for folder in inputs] == before


RUN = """
import sys, time
import weightsmith as ws
from weightsmith.engine import executor, shards
base, a, b, out, delay = sys.argv[1:]
executor._JOURNAL_EVERY = 0.01
executor._TINY = 0
write = shards._write_all
def slow(*arguments):
    time.sleep(float(delay))
    write(*arguments)
shards._write_all = slow
ws.merge("dare_ties", [a, b], base, weight=0.5, density=0.4, seed=5).save(out, threads=2, shard_size=9000)
"""


def command(inputs, target, delay=0.0):
    return [sys.executable, "-c", RUN, *map(str, inputs), str(target), str(delay)]


def test_a_merge_killed_at_random_moments_resumes_to_the_same_bytes(inputs, tmp_path):
    """SIGKILL again and again, until a run gets through; what it makes is what an undisturbed run makes."""
    subprocess.run(command(inputs, tmp_path / "whole"), check=True)
    expected = digest(tmp_path / "whole")
    rng = random.Random(0)
    target = tmp_path / "out"
    unfinished = 0
    for _ in range(5):
        process = subprocess.Popen(command(inputs, target, 0.08))
        time.sleep(rng.uniform(0.5, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not target.exists()
        if target.exists():
            break
    assert unfinished >= 2
    if not target.exists():
        subprocess.run(command(inputs, target), check=True)
    assert digest(target) == expected
    assert not [path for path in tmp_path.glob(".out*") if (path / "content").exists()]


class StopAt:
    """A listener that interrupts the run after some tensors."""

    def __init__(self, count: int, error: BaseException) -> None:
        self.left, self.error = count, error

    def start(self, *_: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...
    def finish(self) -> None: ...

    def tensor_done(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def test_an_interrupted_run_goes_on_where_it_stopped(inputs, tmp_path):
    merge(inputs).save(tmp_path / "whole")
    with pytest.raises(Interrupted, match="same command goes on"):
        merge(inputs).save(tmp_path / "out", threads=1, progress=StopAt(4, KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()
    summary = merge(inputs).save(tmp_path / "out")
    assert 4 <= summary.resumed < summary.tensors
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_resumed_run_must_be_the_same_run(inputs, tmp_path):
    with pytest.raises(Interrupted):
        merge(inputs).save(tmp_path / "out", threads=1, progress=StopAt(2, KeyboardInterrupt()))
    with pytest.raises(OutputError, match="its recipe and layout differ|its recipe differ"):
        ws.average(inputs).save(tmp_path / "out")
    write_safetensors(inputs[1] / "model.safetensors", llama_tensors(8, layers=3, hidden=32))
    with pytest.raises(OutputError, match="its inputs differ"):
        merge(inputs).save(tmp_path / "out")
    assert merge(inputs).save(tmp_path / "out", restart=True).resumed == 0


def test_a_full_disk_is_one_clear_error_and_the_run_can_go_on(inputs, tmp_path, monkeypatch):
    """The file size limit of the process stands in for the disk: the kernel refuses the write."""
    merge(inputs).save(tmp_path / "whole")
    script = "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    script += "from weightsmith.cli.main import main\nmain(sys.argv[1:])"
    base, a, b = map(str, inputs)
    flags = ["--method", "dare_ties", "--base", base, "--model", a, "--model", b]
    flags += ["-p", "weight=0.5", "-p", "density=0.4", "--seed", "5"]
    out = str(tmp_path / "out")
    failed = subprocess.run(
        [sys.executable, "-c", script, "merge", *flags, out], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: cannot write out: ")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    merge(inputs).save(out)
    expected = {n: a.tobytes() for n, a in read_safetensors(tmp_path / "whole").items()}
    assert {n: a.tobytes() for n, a in read_safetensors(tmp_path / "out").items()} == expected


def test_too_little_space_is_found_before_anything_is_written(inputs, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"0\.00 GB free and .* are needed"):
        merge(inputs).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_cut_short_while_it_is_read_is_named(inputs, tmp_path):
    merged = merge(inputs)
    with (inputs[1] / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"a/model\.safetensors ends at byte"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_never_replaces_an_input(inputs, tmp_path):
    with pytest.raises(OutputError, match="is an input; inputs are never replaced"):
        merge(inputs).save(inputs[0], overwrite=True)
    with pytest.raises(OutputError, match="is an input; inputs are never replaced"):
        merge(inputs).save(tmp_path, overwrite=True)


def test_nan_and_infinity_are_reported_with_tensor_and_model(write_model, tmp_path):
    one, other = llama_tensors(0), llama_tensors(1)
    one["model.norm.weight"][2] = np.nan
    other["lm_head.weight"][0, :3] = np.inf
    folders = [write_model("a", one), write_model("b", other)]
    summary = ws.average(folders).save(tmp_path / "out")
    found = {(entry.tensor, entry.where): entry.count for entry in summary.nonfinite}
    assert found == {
        ("model.norm.weight", "a"): 1,
        ("model.norm.weight", "result"): 1,
        ("lm_head.weight", "b"): 3,
        ("lm_head.weight", "result"): 3,
    }


def test_overflow_to_a_narrower_dtype_is_an_error_unless_asked_for(write_model, tmp_path):
    large = {name: value * 60_000 for name, value in llama_tensors(0).items()}
    merged = ws.merge("linear", [write_model("a", large)], weight=1.0, dtype="float16")
    with pytest.raises(OutputError, match=r"weight: [\d,]+ results are NaN or infinite in float16, and none of its"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = merged.save(tmp_path / "out", on_nonfinite="warn")
    written = read_safetensors(tmp_path / "out")
    expected = {name: int((~np.isfinite(array)).sum()) for name, array in written.items()}
    assert {entry.tensor: entry.count for entry in summary.nonfinite} == {k: v for k, v in expected.items() if v}
    assert summary.nonfinite
    assert merged.save(tmp_path / "ignored", on_nonfinite="ignore").nonfinite == ()


def test_a_nan_that_spreads_is_an_error(write_model, tmp_path):
    """One infinity in a row, and the row's angle is not known any more."""
    one, other = llama_tensors(0), llama_tensors(1)
    one["lm_head.weight"][0, 0] = np.inf
    models = [write_model("a", one), write_model("b", other)]
    merged = ws.merge("nuslerp", models, weight=0.5, nuslerp_flatten=False)
    with pytest.raises(OutputError, match="only 1 values of its inputs are"):
        merged.save(tmp_path / "out")


def test_what_was_not_finite_in_an_earlier_run_is_told_by_the_one_that_ends(write_model, tmp_path):
    one = llama_tensors(0)
    one["lm_head.weight"][0, 0] = np.nan
    merged = ws.average([write_model("a", one), write_model("b", llama_tensors(1))])
    expected = merged.save(tmp_path / "whole", threads=1).nonfinite
    listener = StopAt(len(one) - 1, KeyboardInterrupt())
    with pytest.raises(Interrupted):
        merged.save(tmp_path / "out", threads=1, progress=listener)
    assert merged.save(tmp_path / "out", threads=1).nonfinite == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Three models of 256 MB each, merged in less than one of them takes."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        block = rng.standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
        tensors = {f"layers.{i}.w": np.broadcast_to(block, (32, 1 << 20)).reshape(1 << 13, -1) for i in range(4)}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    script = (
        "import sys, weightsmith as ws\n"
        "base, a, b, out = sys.argv[1:]\n"
        "ws.merge('task_arithmetic', [a, b], base, weight=0.5).save(out, threads=2)\n"
        # Not getrusage: that peak is inherited from the process that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    paths = [str(tmp_path / name) for name in ("base", "a", "b", "out")]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 400_000_000


def test_progress_counts_every_byte_once(inputs, tmp_path):
    class Counter:
        total = done = tensors = 0

        def start(self, total_bytes: int, total_tensors: int, done_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

        def tensor_done(self, name: str) -> None:
            self.tensors += 1

        def finish(self) -> None: ...

    counter = Counter()
    summary = merge(inputs).save(tmp_path / "out", threads=1, progress=counter)
    assert counter.done == counter.total == sum(t.nbytes for t in llama_tensors(0, layers=3, hidden=32).values())
    assert counter.tensors == summary.tensors


def experts(count: int) -> dict[str, np.ndarray]:
    """Return about so many tiny tensors under the names of a mixture of experts with weights of their own."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    return {
        f"model.layers.{i // 192}.mlp.experts.{i % 192 // 3}.{kinds[i % 3]}.weight": np.full((2, 2), i, np.float32)
        for i in range(count)
    }


SCHEDULES = """
merge_method: ties
base_model: {0}
models:
  - model: {1}
    parameters: {{weight: [0.2, 0.8], density: [{{filter: up_proj, value: 0.3}}, {{value: [0.5, 1]}}]}}
  - model: {2}
    parameters: {{weight: [{{scope: {{regex: 'experts[.]1'}}, value: 0.4}}, 0.7]}}
"""


def calls(function) -> int:
    """Run a function in this thread, and return how many calls of functions it made."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_with_the_number_of_tensors_and_no_faster(write_model, tmp_path):
    """Counted in calls of functions, which no other process on the machine changes: four times as many, not sixteen."""
    plans, runs = [], []
    for count in (400, 400, 1_600):
        folders = [write_model(f"{name}{count}", experts(count), {}) for name in ("base", "a", "b")]
        recipe = SCHEDULES.format(*folders)
        plans.append(calls(lambda recipe=recipe: ws.merge_recipe(recipe).plan()))
        merged = ws.merge_recipe(recipe)
        runs.append(calls(lambda merged=merged: merged.save(tmp_path / "out", threads=1, overwrite=True)))
    # The first round does once what no later one repeats.
    for counted in (plans, runs):
        assert counted[2] < 5 * counted[1]


def test_parameters_are_completed_once_for_alike_tensors(write_model, monkeypatch):
    completed = []
    complete = resolver.complete
    monkeypatch.setattr(resolver, "complete", lambda *args, **rest: completed.append(1) or complete(*args, **rest))
    folders = [write_model(name, experts(1_920), {}) for name in ("base", "a", "b")]
    plan = ws.merge_recipe(SCHEDULES.format(*folders)).plan()
    # Ten layers, either side of each filter.
    assert len({repr(task.tensor.parameters) for task in plan.tasks}) == len(completed) <= 10 * 2 * 2


def test_planning_is_quick_for_many_tensors(write_model):
    """Twenty thousand tensors of a base and two fine-tunes: about a second, and a bound for the busiest machine."""
    folders = [write_model(name, experts(20_000), {}) for name in ("base", "a", "b")]
    started = time.process_time()
    plan = ws.merge_recipe(SCHEDULES.format(*folders)).plan()
    assert len(plan.tasks) == 20_000
    assert time.process_time() - started < 12


def test_no_file_stays_open(inputs, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for i in range(5):
        merge(inputs).save(tmp_path / f"out{i}", shard_size=9000)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 12
    assert limit > before


def test_files_of_checkpoints_that_nobody_uses_make_room_for_others(inputs):
    """They may hang in cycles, which the collector finds in its own time: here it is not given any."""
    script = f"""
import gc, resource
import weightsmith as ws
gc.disable()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
for _ in range(30):
    ws.merge("linear", {[str(path) for path in inputs]!r}, weight=1.0)["model.norm.weight"].numpy()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
