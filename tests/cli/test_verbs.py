"""The verbs, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from conftest import llama_tensors, read_safetensors
from weightsmith.cli.main import main


@pytest.fixture
def folders(write_model):
    return [str(write_model(name, llama_tensors(i))) for i, name in enumerate(("base", "a", "b"))]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def flags(folders, method="ties"):
    base, a, b = folders
    return ["--method", method, "--base", base, "--model", a, "--model", b, "-p", "weight=[0.3,0.7]"]


def test_merge_by_flags_and_by_the_recipe_it_prints_are_the_same(run, folders, tmp_path):
    code, _, err = run("merge", *flags(folders), "-p", "density=0.5", tmp_path / "one")
    assert code == 0
    assert "11 tensors" in err.replace("  ", " ") or "tensors" in err
    code, recipe, _ = run("merge", *flags(folders), "-p", "density=0.5", "--print-recipe")
    assert code == 0
    (tmp_path / "r.yaml").write_text(recipe)
    assert run("merge", tmp_path / "r.yaml", tmp_path / "two", "--quiet")[0] == 0
    one, two = (read_safetensors(tmp_path / name) for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_merge_is_gone_on_with(run, folders, tmp_path):
    base, a, b = folders
    begin = ["merge", "--method", "opcm", "--base", base, "--model", a]
    assert run(*begin, "--model", b, tmp_path / "all", "--quiet")[0] == 0
    assert run(*begin, tmp_path / "one", "--quiet")[0] == 0
    assert run("merge", "--onto", tmp_path / "one", "--model", b, tmp_path / "two", "--quiet")[0] == 0
    one, two = (read_safetensors(tmp_path / name) for name in ("all", "two"))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-5)
    code, _, err = run("merge", "--onto", base, "--model", b, tmp_path / "three")
    assert code == 1
    assert "not written by weightsmith" in err
    assert "--onto needs at least one --model" in run("merge", "--onto", tmp_path / "one", tmp_path / "x")[2]
    assert "opcm on 9" in run("plan", "--onto", tmp_path / "one", "--model", b)[1]


def test_every_warning_is_told_once_whether_planning_or_writing_found_it(run, write_model, tmp_path):
    config = {"model_type": "own", "num_hidden_layers": 2, "auto_map": {"AutoModel": "modeling_own.Own"}}
    a = write_model("a", llama_tensors(0), config)
    b = write_model("b", llama_tensors(1) | {"extra.weight": np.ones(3, np.float32)}, config)
    text = f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\n"
    (tmp_path / "r.yaml").write_text(text + "on_missing: skip\n")
    _, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert ["left out" in warned[0], "auto_map" in warned[1], len(warned)] == [True, True, 2]
    assert "warning" not in run("merge", tmp_path / "r.yaml", tmp_path / "quiet", "--quiet")[2]


def test_variables_are_set_on_the_command_line(run, folders, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"variables: {{t: 0}}\nmerge_method: slerp\nbase_model: {folders[0]}\nmodels: [{{model: {folders[1]}}}]\n"
        "parameters: {t: '${t}'}\n"
    )
    assert run("merge", tmp_path / "r.yaml", tmp_path / "out", "--set", "t=1", "--dtype", "float64")[0] == 0
    found = read_safetensors(tmp_path / "out")["lm_head.weight"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, llama_tensors(1)["lm_head.weight"], rtol=1e-6)


def test_an_existing_target_is_kept_unless_it_is_to_be_overwritten(run, folders, tmp_path):
    assert run("merge", *flags(folders), tmp_path / "out")[0] == 0
    code, _, err = run("merge", *flags(folders), tmp_path / "out")
    assert (code, "--overwrite" in err) == (1, True)
    assert run("merge", *flags(folders), tmp_path / "out", "--overwrite")[0] == 0


def test_progress_as_json_lines(run, folders, tmp_path):
    code, out, err = run("merge", *flags(folders), "--json-log", tmp_path / "out")
    assert (code, out) == (0, "")
    events = [json.loads(line) for line in err.splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "done"
    assert sum(e["event"] == "tensor" for e in events) == len(llama_tensors(0))


def test_plan_writes_nothing_and_tells_all(run, folders, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("plan", *flags(folders), "--json", "--shard-size", "1KB")
    plan = json.loads(out)
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    tensors = llama_tensors(0)
    assert [t["name"] for t in plan["tensors"]].sort() == list(tensors).sort()
    assert plan["parameters"] == sum(t.size for t in tensors.values())
    assert plan["bytes_read"] == 3 * 4 * plan["parameters"]
    assert plan["methods"] == {"ties": len(tensors)}
    assert len(plan["shards"]) > 1
    first = plan["tensors"][0]
    assert first["parameters"]["weight"] == [0.3, 0.7]
    assert [source["model"] for source in first["inputs"]] == folders
    code, out, _ = run("plan", *flags(folders), "--tensors")
    assert "lm_head.weight  16x8 float32  ties" in out
    assert run("merge", *flags(folders), "--dry-run")[1].startswith("output")


def test_the_plans_offsets_are_where_the_tensors_are(run, folders, tmp_path):
    plan = json.loads(run("plan", *flags(folders), "--json")[1])
    run("merge", *flags(folders), tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = read_safetensors(tmp_path / "out")
    for entry in plan["tensors"]:
        assert content[entry["offset"] : entry["offset"] + entry["nbytes"]] == found[entry["name"]].tobytes()


def test_inspect_shows_layers_once_and_as_json_everything(run, folders):
    code, out, _ = run("inspect", folders[0])
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "layers 0-1" in out
    found = json.loads(run("inspect", folders[0], "--json")[1])
    assert found["tensors"] == len(llama_tensors(0))
    assert found["stacks"][0]["layers"] == 2


def test_diff_tells_what_differs(run, folders):
    _, out, _ = run("diff", folders[0], folders[1], "--json")
    found = json.loads(out)
    a, b = llama_tensors(0), llama_tensors(1)
    name = "lm_head.weight"
    assert found["tensors"][name]["norm"] == pytest.approx(float(np.linalg.norm(b[name] - a[name])), rel=1e-6)
    assert run("diff", folders[0], folders[0], "--exit-code")[0] == 0
    assert run("diff", folders[0], folders[1], "--exit-code", "--by", "tensor")[0] == 1
    assert "model.layers.1" in run("diff", folders[0], folders[1])[1]


def test_methods_lists_and_explains(run):
    code, out, _ = run("methods")
    assert code == 0
    assert len(out.splitlines()) >= 20
    page = run("methods", "dare_ties")[1]
    assert "arXiv:2311.03099" in page
    assert "rescale_by" in page
    listed = json.loads(run("methods", "--json")[1])
    assert {m["name"] for m in listed} >= {"linear", "slerp", "ties", "karcher"}


def test_a_plugin_brings_a_method_with_its_page_and_its_battery(run, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import weightsmith as ws\n"
        "@ws.method(properties=('idempotent', 'symmetric'), source='nobody')\n"
        "def plain_mean(block):\n"
        "    '''The plain mean.'''\n"
        "    return sum(block.models) / len(block.models)\n"
    )
    script = "import sys; from weightsmith.cli.main import main; main(sys.argv[1:])"
    call = [sys.executable, "-c", script, "methods", "plain_mean", "--plugin", str(plugin)]
    page = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "The plain mean." in page
    checked = subprocess.run([*call, "--check"], capture_output=True, text=True, check=True).stdout
    assert "ok      idempotent" in checked
    assert "FAILED" not in checked


def test_schema_is_json(run):
    assert json.loads(run("schema")[1])["properties"]["merge_method"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mrge"], 2, "did you mean 'merge'"),
        (["merge"], 2, "give RECIPE OUT"),
        (["merge", "r.yaml"], 2, "1 path(s) given"),
        (["merge", "--method", "ties", "out"], 2, "--model"),
        (["merge", "nothing.yaml", "out"], 1, "cannot read the recipe nothing.yaml"),
        (["inspect", "/nowhere"], 1, "there is no file or folder /nowhere"),
        (["methods", "tise"], 1, "did you mean 'ties'"),
        (["plan", "--method", "linear", "--model", "/nowhere", "-p", "weight"], 2, "NAME=VALUE"),
        (["merge", "r.yaml", "out", "--shard-size", "many"], 2, "is no size"),
        (["plan", "--method", "linear", "--model", "a", "--rule", "norm"], 2, "write NAMES=METHOD"),
        (["plan", "--method", "linear", "--model", "a", "--rule", "*norm*=linear,weight"], 2, "write NAMES=METHOD"),
        (["plan", "--method", "linear", "--model", "a", "--rule", "*norm*="], 2, "write NAMES=METHOD"),
        (
            ["plan", "--method", "linear", "--model", "a", "--rule", "*=liner,weight=1"],
            1,
            "rules[0]: there is no method",
        ),
        (["plan", "--method", "linear", "--model", "a", "--rule", "*=linear,weight=[1"], 1, "the value is not YAML"),
        (["plan", "r.yaml", "--rule", "*norm*=linear"], 2, "give either a recipe file, or --method with"),
    ],
)
def test_mistakes_get_one_clear_line(run, arguments, code, message):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(folders):
    script = "from weightsmith.cli.main import main; main(['schema'])"
    call = f'{sys.executable} -c "{script}" | head -1'
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_quickstart_prints_both_tables(run):
    code, out, _ = run("quickstart", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["inputs"]) == {"base", "shifted", "covered", "thick"}
    assert set(found["merges"]) == {"average", "slerp", "task arithmetic", "ties", "dare"}
