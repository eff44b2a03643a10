"""Measuring a curve: commands that work and that fail, results that are kept, tables and plots."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.cli.main import main
from weightsmith.curves import study
from weightsmith.curves.command import Command, metrics_of
from weightsmith.curves.page import page
from weightsmith.curves.results import Result, Results
from weightsmith.quickstart import accuracies, zoo

PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def pair(write_model):
    return [write_model(name, llama_tensors(i)) for i, name in enumerate(("old", "new"))]


@pytest.fixture
def script(tmp_path):
    """Return a function that writes a script and gives the command line that runs it on a model."""

    def write(text):
        path = tmp_path / "my score.py"
        path.write_text(
            "import json, os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
            f"model = Path(sys.argv[1])\nplace = float(model.name)\n{text}\n"
        )
        # Without site: a third of the time.
        return f"{PYTHON} -S -I {shlex.quote(str(path))} {{model}}"

    return write


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def is_gone(process):
    """Whether a process ends within two seconds."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(100):
        try:
            # A child that nobody waits for stays as a name alone.
            if ") Z" in state.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_points_are_measured_once_and_a_finer_grid_uses_what_is_known(pair, script, tmp_path):
    log = tmp_path / "log"
    command = script(
        f"assert (model / 'model.safetensors').stat().st_size > 0\nopen({str(log)!r}, 'a').write(model.name + ' ')\n"
        "print('noise')\nprint(json.dumps({'accuracy': 1 - (place - 0.5) ** 2, 'note': 'x', 'ok': True}))"
    )
    out = tmp_path / "out"
    first = ws.curve(pair, 3).evaluate(command, out)
    assert log.read_text().split() == ["0.00", "0.50", "1.00"]
    assert first.metrics == ("accuracy",)
    assert str(first.best()) == "greatest accuracy: 1 at 0.50"
    second = ws.curve(pair, 5).evaluate(command, out)
    assert log.read_text().split()[3:] == ["0.25", "0.75"]
    assert [point.label for point in second.points] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [point.metrics["accuracy"] for point in second.points] == [0.75, 0.9375, 1.0, 0.9375, 0.75]
    # Two more, and the table tells of all seven.
    third = ws.curve(pair, lambdas=[-0.5, 1.5]).evaluate(command, out)
    assert len(third.points) == 7
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    assert not (out / "failed").exists()


def test_a_command_that_fails_stops_and_the_same_call_goes_on(pair, script, tmp_path):
    broken, log, out = tmp_path / "broken", tmp_path / "log", tmp_path / "out"
    broken.touch()
    command = script(
        f"open({str(log)!r}, 'a').write(model.name + ' ')\nprint('so far so good')\n"
        f"if place == 0.5 and Path({str(broken)!r}).exists():\n    sys.exit('no memory left')\nprint(place)"
    )
    with pytest.raises(ws.WeightsmithError, match=r"0\.50: the command exited with 1: no memory left; .*0\.50\.stdout"):
        ws.curve(pair, 3).evaluate(command, out)
    assert (out / "failed" / "0.50.stdout").read_text() == "so far so good\n"
    assert not (out / ".point").exists()
    broken.unlink()
    found = ws.curve(pair, 3).evaluate(command, out)
    assert log.read_text().split() == ["0.00", "0.50", "0.50", "1.00"]
    assert [point.metrics["value"] for point in found.points] == [0.0, 0.5, 1.0]
    assert not (out / "failed").exists()


def test_keep_going_measures_the_others(pair, script, tmp_path):
    found = ws.curve(pair, 3).evaluate(script("assert place != 0\nprint(place)"), tmp_path / "out", keep_going=True)
    assert [point.label for point in found.points] == ["0.50", "1.00"]
    (failure,) = found.failures
    assert failure.label == "0.00"
    assert "AssertionError" in failure.reason
    assert "AssertionError" in (tmp_path / "out" / "curve.html").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failures"][0]["label"] == "0.00"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pass", "printed nothing"),
        ("print('done')", "the last line that the command printed is 'done'"),
        ("print('93 %')", "must be a number"),
        ("print('{}')", "the answer is {}"),
        ("print('[1, 2]')", "it must be a number, or a mapping"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("sys.exit(3)", "exited with 3;"),
    ],
)
def test_commands_that_give_no_number_are_told_of(pair, script, tmp_path, text, words):
    with pytest.raises(ws.WeightsmithError, match=words):
        ws.curve(pair, 2).evaluate(script(text), tmp_path / "out")


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(pair, script, tmp_path):
    child = tmp_path / "child"
    command = script(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "one = subprocess.Popen([sys.executable, '-S', '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE)\n"
        f"one.stdout.readline()\nPath({str(child)!r}).write_text(str(one.pid))\ntime.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(ws.WeightsmithError, match="took more than 1.5 s, and was ended"):
        ws.curve(pair, 2).evaluate(Command(command, timeout=1.5), tmp_path / "out")
    assert time.monotonic() - started < 10
    assert is_gone(child.read_text())


def test_ctrl_c_ends_the_command_and_leaves_no_model(pair, script, tmp_path):
    started, out = tmp_path / "started", tmp_path / "out"
    command = script(
        f"if place:\n    Path({str(started)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\nprint(1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "weightsmith", "curve", *pair, "--points", "2", "--evaluate", command, "--out", out],
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(500):
        if started.exists() and started.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stderr.close()
    assert is_gone(started.read_text())
    assert os.listdir(out) == ["results.jsonl"]
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python score.py", "does not say where the model belongs"),
        ("no-such-program-here {model}", "there is no program 'no-such-program-here'"),
        ("python 'score {model}", "is no command line"),
        (Command("python {model}", timeout=0.0), "timeout"),
    ],
)
def test_what_can_be_known_before_a_command_is_known_before(pair, tmp_path, command, words):
    with pytest.raises(ws.WeightsmithError, match=words):
        ws.curve(pair, 2).evaluate(command, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_shell_unless_asked(pair, tmp_path):
    text = "echo 1 {model} | wc -w"
    with pytest.raises(ws.WeightsmithError, match="must be a number"):
        ws.curve(pair, 2).evaluate(text, tmp_path / "plain")
    odd = tmp_path / "it's a $HOME"
    found = ws.curve(pair, 2).evaluate(Command(text, shell=True), odd)
    # The model's path has spaces, and is three words to wc all the same: it is quoted, and nothing is expanded.
    assert {point.metrics["value"] for point in found.points} == {float(len(f"1 {odd}/x".split()))}


def test_answers_are_read():
    assert metrics_of("a\n0.5\n\n") == {"value": 0.5}
    assert metrics_of('{"loss": NaN, "n": 3, "name": "x", "deep": {"a": 1}, "on": true}')["n"] == 3.0
    assert math.isnan(metrics_of('{"loss": NaN}')["loss"])
    assert metrics_of('log\n{\n  "a": 1.5\n}\n') == {"a": 1.5}
    assert metrics_of("-inf") == {"value": -math.inf}
    assert metrics_of("1" + "0" * 400) == {"value": math.inf}


def test_a_line_that_was_cut_short_is_measured_again(pair, tmp_path):
    calls = []

    def score(model):
        calls.append(1)
        return float(model["model.norm.weight"].numpy()[0])

    out = tmp_path / "out"
    whole = ws.curve(pair, 3).evaluate(score, out)
    path = out / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    again = ws.curve(pair, 3).evaluate(score, out)
    assert len(calls) == 4
    assert [point.metrics for point in again.points] == [point.metrics for point in whole.points]
    assert len(path.read_bytes().splitlines()) == 4
    ws.curve(pair, 3).evaluate(score, out)
    assert len(calls) == 4


def test_results_of_another_study_are_not_mixed_in(pair, write_model, tmp_path):
    out = tmp_path / "out"
    ws.curve(pair, 2).evaluate(len, out)
    other = write_model("other", llama_tensors(7))
    with pytest.raises(ws.WeightsmithError, match="results of other models or settings and files"):
        ws.curve([pair[0], other], 2).evaluate(len, out)
    with pytest.raises(ws.WeightsmithError, match="results of other evaluation; "):
        ws.curve(pair, 2).evaluate(max, out)
    with pytest.raises(ws.WeightsmithError, match="other models or settings"):
        ws.curve(pair, 2, dtype="bfloat16").evaluate(len, out)
    write_model("new", llama_tensors(9))
    with pytest.raises(ws.WeightsmithError, match="other files of the models; "):
        ws.curve(pair, 2).evaluate(len, out)
    assert len(ws.curve(pair, 3).evaluate(len, out, restart=True).points) == 3
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"point": "x"}\n')
    with pytest.raises(ws.WeightsmithError, match="line 5 of .* is no result"):
        ws.curve(pair, 3).evaluate(len, out)
    (out / "results.jsonl").write_text("mine\n")
    with pytest.raises(ws.WeightsmithError, match="holds no results"):
        ws.curve(pair, 3).evaluate(len, out)


def test_two_runs_do_not_measure_into_one_folder(pair, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "results.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ws.WeightsmithError, match="another run is measuring"):
            ws.curve(pair, 2).evaluate(len, tmp_path / "out")


def results(values, *, minimize=False, shape="line", name="loss"):
    points = tuple(
        Result(f"{i / 10:.2f}", (i / 10,), (1 - i / 10, i / 10), {name: value} if value is not None else {}, 0.1)
        for i, value in enumerate(values)
    )
    return Results(shape, ("lambda",), ("a", "b"), ((0.0,), (1.0,)), points, minimize=minimize)


def test_the_best_point_is_finite_and_ties_are_all_named():
    found = results([math.nan, 2.0, 5.0, 2.0, math.inf, None])
    assert str(found.best()) == "greatest loss: 5 at 0.20"
    assert str(found.best(minimize=True)) == "least loss: 2 at 0.10 (the same at 0.30)"
    assert results([math.nan, None]).best() is None
    assert results([None]).best() is None
    assert "No point has a finite value" in page(results([math.nan, math.inf]))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["points"][0]["metrics"] == {"loss": "nan"}
    with pytest.raises(ws.WeightsmithError, match="no metric 'los' .did you mean 'loss'"):
        _ = Results("line", ("lambda",), ("a", "b"), ((0.0,), (1.0,)), found.points, chosen=("los",)).shown


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def read_page(text):
    parser = _Page()
    parser.feed(text)
    begin = text.index("<svg")
    return parser.tags, ET.fromstring(text[begin : text.index("</svg>") + 6])


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, None, math.nan, 2.0, 3.0], [5.0], [4.0, 4.0], [1e300, -1e300], [0.0, 5e-324], [1.7e308, -1.7e308]],
)
def test_the_page_is_whole_needs_no_network_and_can_be_read_by_keyboard(values):
    text = page(results(values))
    tags, svg = read_page(text)
    assert not [tag for tag, attributes in tags if tag in ("script", "link", "img", "iframe") or "src" in attributes]
    assert "http" not in text.replace("http-equiv", "")
    assert [svg[0].tag, svg[1].tag] == ["title", "desc"]
    assert svg.attrib["aria-labelledby"].split() == [svg[0].attrib["id"], svg[1].attrib["id"]]
    points = [attributes for _, attributes in tags if attributes.get("class") == "point"]
    assert len(points) == len(values)
    assert all(one["tabindex"] == "0" and one["aria-label"].startswith("lambda 0.") for one in points)
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 760
        assert 0 <= float(circle.attrib["cy"]) <= 340
    assert "prefers-color-scheme: dark" in text


def test_names_from_elsewhere_are_text():
    hostile = '</text><script>alert("x")</script>'
    found = results([1.0, 2.0], name=hostile)
    text = page(Results("line", ("lambda",), (hostile, "b"), found.corners, found.points))
    tags, _ = read_page(text)
    assert "script" not in [tag for tag, _ in tags]


def test_a_plane_is_a_map_with_the_models_on_it(write_model, tmp_path):
    trio = [write_model(name, llama_tensors(i)) for i, name in enumerate("abc")]
    found = ws.curve(trio, 4, "plane")
    flat = found.evaluate(lambda model: float(model["model.norm.weight"].numpy()[0]), tmp_path / "out", png=False)
    assert len(flat.points) == 16
    text = (tmp_path / "out" / "curve.html").read_text()
    _, svg = read_page(text)
    corners = [one for one in svg.iter("circle") if one.attrib["class"] == "corner"]
    cells = [one for one in svg.iter("rect") if one.attrib.get("class") == "cell"]
    assert (len(corners), len(cells)) == (3, 16)
    # To scale: the corners in the picture are as far apart as the models are.
    drawn = np.array([[float(one.attrib["cx"]), -float(one.attrib["cy"])] for one in corners])
    wanted = np.array(found.corners)
    ratio = np.linalg.norm(drawn[1] - drawn[0]) / np.linalg.norm(wanted[1] - wanted[0])
    np.testing.assert_allclose(drawn - drawn[0], (wanted - wanted[0]) * ratio, atol=0.2)
    assert not (tmp_path / "out" / "curve.png").exists()


@pytest.mark.parametrize("shape", ["line", "plane"])
def test_the_picture_is_drawn_by_matplotlib(write_model, tmp_path, shape):
    pytest.importorskip("matplotlib")
    # A name that mathematics would choke on.
    trio = [write_model(name, llama_tensors(i)) for i, name in enumerate(("a", "$_b", "c"))]
    values = iter([math.nan, *range(100)])
    curve = ws.curve(trio[: 2 if shape == "line" else 3], 3, shape)
    curve.evaluate(lambda model: {"$x_": next(values), "y": 1.0}, tmp_path / "out", png=True)
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("values", [[1.7e308, -1.7e308], [0.0, 5e-324], [math.nan, None], [math.inf, 1.0]])
def test_values_that_no_axis_holds_make_a_picture_all_the_same(values, tmp_path):
    pytest.importorskip("matplotlib")
    from weightsmith.curves.picture import draw

    draw(results(values), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "can_draw", lambda: False)
    with pytest.raises(ws.WeightsmithError, match=r"pip install 'weightsmith\[plot\]'"):
        ws.curve(pair, 2).evaluate(len, tmp_path / "out", png=True)
    assert not (tmp_path / "out").exists()
    ws.curve(pair, 2).evaluate(len, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["curve.html", "results.csv", "results.json", "results.jsonl"]


def test_models_are_written_once_and_kept(pair, tmp_path):
    a, b = (read_safetensors(one) for one in pair)
    told = []
    folders = ws.curve(pair, 3).write(tmp_path / "points", progress=lambda point, new: told.append(new))
    assert [folder.name for folder in folders] == ["0.00", "0.50", "1.00"]
    half = read_safetensors(folders[1])
    for name in a:
        np.testing.assert_allclose(half[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
    ws.curve(pair, 5).write(tmp_path / "points", progress=lambda point, new: told.append(new))
    assert told == [True, True, True, False, True, False, True, False]
    listed = json.loads((tmp_path / "points" / "points.json").read_text())
    assert listed["points"][1] == {"point": "0.25", "lambda": 0.25, "coefficients": [0.75, 0.25]}
    with pytest.raises(ws.WeightsmithError, match="exists"):
        ws.curve(pair, 3, dtype="bfloat16").write(tmp_path / "points")
    ws.curve(pair, 3, dtype="bfloat16").write(tmp_path / "points", overwrite=True)


def test_the_zoo_along_its_line_as_wise_ft_does(tmp_path):
    models = [zoo() / "base", zoo() / "thick"]
    test = ws.open(zoo() / "digits-test.safetensors")
    part = {name: test[name] for name in ("images", "labels")}
    found = ws.curve(models, 3).evaluate(
        lambda model: accuracies(model, part), tmp_path / "out", metrics=["thick", "upright"]
    )
    ends = [accuracies(ws.open(model), part) for model in models]
    assert [dict(found.points[i].metrics) for i in (0, -1)] == ends
    # Half way, the fine-tune's task is nearly learnt, and the base's is not lost.
    half = found.points[1].metrics
    assert half["thick"] > ends[0]["thick"] + 0.3
    assert half["upright"] > ends[1]["upright"] - 0.01
    assert found.best().points[0].label == "1.00"


def test_the_guides_command_measures_the_zoo(run, tmp_path):
    score = zoo() / "score.py"
    command = f"{PYTHON} {shlex.quote(str(score))} {{model}} test"
    code, out, _ = run("curve", zoo() / "base", zoo() / "thick", "--lambdas", 1, "--evaluate", command,
                       "--out", tmp_path / "out", "--no-png", "--json")  # fmt: skip
    assert code == 0
    (point,) = json.loads(out)["points"]
    assert point["metrics"] == accuracies(ws.open(zoo() / "thick"), ws.open(zoo() / "digits-test.safetensors"))


def test_the_verb_lists_writes_and_measures(run, pair, script, tmp_path):
    code, out, _ = run("curve", *pair, "--points", 3)
    assert code == 0
    assert out.splitlines()[2].split() == ["0.50", "0.5000", "0.5000"]
    command = script("print(json.dumps({'loss': abs(place - 0.5), 'n': 2}))")
    options = ["--points", 3, "--evaluate", command, "--out", tmp_path / "out", "--minimize"]
    code, out, err = run("curve", *pair, *options)
    assert code == 0
    assert "* least loss: 0 at 0.50" in out
    assert "[2/3] 0.50: loss 0, n 2" in err
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["of new"] for row in rows] == ["0.0", "0.5", "1.0"]
    assert rows[2]["loss"] == "0.5"
    code, out, err = run("curve", *pair, *options, "--json", "--write", tmp_path / "kept", "--no-png")
    assert json.loads(out)["best"]["points"] == ["0.50"]
    assert "(known)" in err
    assert sorted(os.listdir(tmp_path / "kept")) == ["0.00", "0.50", "1.00"]
    code, _, err = run("curve", *pair, "--points", 2, "--write", tmp_path / "kept", "--json")
    assert err.splitlines() == ["0.00: was there", "1.00: was there"]
    code, out, err = run("curve", *pair, "--lambdas", "0,0.5", "--evaluate", script("sys.exit(place != 0 and 1 or print(1))"),
                         "--write", tmp_path / "both", "--keep-going")  # fmt: skip
    assert code == 1
    assert "error: 0.50: the command exited with 1" in err
    assert (tmp_path / "both" / "0.00" / "model.safetensors").exists()
    assert (tmp_path / "both" / "results.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--evaluate", "x {model}"], "--evaluate needs --out OUT"),
        (["--out", "x"], "give --evaluate COMMAND"),
        (["--keep-going"], "give --evaluate COMMAND"),
        (["--lambdas", "0;1"], "numbers with commas"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(run, pair, options, words):
    code, _, err = run("curve", *pair, *options)
    assert code == 2
    assert words in err
