"""Progress, as a terminal, a log and a program see it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys

import numpy as np

from conftest import llama_tensors, write_safetensors
from weightsmith.cli.units import size
from weightsmith.engine.progress import JsonLines, Lines


def feed(listener):
    listener.start(1000, 2, 100)
    for name, count in (("a", 400), ("b", 500)):
        listener.advance(count)
        listener.tensor_done(name)
    listener.finish()


def test_lines_tell_bytes_tensors_rate_and_time_left():
    stream = io.StringIO()
    feed(Lines(stream, every=0.0))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("0.50 of 1.00 kB, 0 tensors, ")
    assert second.endswith("0 s left")


def test_json_lines_can_be_read_by_a_program():
    stream = io.StringIO()
    feed(JsonLines(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["start", "tensor", "tensor", "finish"]
    assert events[-1]["done_bytes"] == 1000


def test_a_terminal_gets_a_bar_and_a_summary(write_model, tmp_path):
    folders = [str(write_model(name, llama_tensors(i))) for i, name in enumerate("ab")]
    flags = ["--method", "linear", "--model", folders[0], "--model", folders[1], "-p", "weight=1"]
    main, side = pty.openpty()
    script = "import sys; from weightsmith.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "merge", *flags, str(tmp_path / "out")], stdout=side, stderr=side, close_fds=True
    )
    assert process.wait(60) == 0
    os.close(side)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert "kB/s" in shown
    assert "tensors, " in shown


def test_without_a_terminal_there_are_plain_lines_and_with_quiet_none(write_model, tmp_path):
    folders = [str(write_model(name, llama_tensors(i))) for i, name in enumerate("ab")]
    flags = ["--method", "linear", "--model", folders[0], "--model", folders[1], "-p", "weight=1"]
    script = "import sys; from weightsmith.cli.main import main; main(sys.argv[1:])"
    for more, lines in (([], 1), (["--quiet"], 0)):
        call = [sys.executable, "-c", script, "merge", *flags, *more, str(tmp_path / f"out{lines}")]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == lines
        assert "\x1b" not in done.stderr


def test_sizes_have_three_digits_and_a_unit():
    assert [size(n) for n in (0, 999, 1000, 412_124, 999_999, 13_477_000_000, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "412 kB",
        "1 MB",
        "13.5 GB",
        "2 TB",
    ]


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    """A real SIGINT to the real command, in the middle of its work."""
    rng = np.random.default_rng(0)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        tensors = {f"layers.{i}.w": rng.standard_normal((1000, 1000)).astype(np.float32) for i in range(30)}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    script = "import sys; from weightsmith.cli.main import main; main(sys.argv[1:])"
    flags = ["--method", "ties", "--base", str(tmp_path / "base"), "--model", str(tmp_path / "a"), "--threads", "1"]
    call = [sys.executable, "-c", script, "merge", *flags, "-p", "weight=1", "-p", "density=0.3", "--json-log"]
    call += [str(tmp_path / "out")]
    # Without the compiled kernels, so that there is time to interrupt it.
    slowly = os.environ | {"WEIGHTSMITH_KERNELS": "numpy"}
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=slowly) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"tensor"' in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "the same command goes on from there" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    done = subprocess.run(call, stderr=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1])["resumed"] >= 1
