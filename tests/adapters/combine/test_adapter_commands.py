"""weightsmith adapter merge, revert and inspect from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from lora_files import Q0, deltas, relative, true_sum, write_lora

from weightsmith.cli.main import main


@pytest.fixture
def run(capsys):
    """Run the command line; return its exit code, what it printed, and what it said on stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


def test_adapters_are_combined_and_ranks_and_errors_told(tmp_path, run):
    a, b = write_lora(tmp_path / "a", 3, 1), write_lora(tmp_path / "b", 2, 2)
    code, out, err = run("adapter", "merge", a, b, tmp_path / "out", "--weight", 2, "--weight", -1)
    assert code == 0, err
    assert relative(deltas(tmp_path / "out")[Q0], true_sum([a, b], [2, -1])[Q0]) < 1e-6
    assert "3+2     5" in out
    assert "every rank that holds the sum is kept, up to 5; --rank or --energy makes it smaller" in out
    assert "6 tensors" in err
    code, out, _ = run("adapter", "merge", a, b, tmp_path / "small", "--rank", 2, "--json")
    found = json.loads(out)
    assert (code, found["ranks"]) == (0, [2, 2])
    assert found["relative_error"] == pytest.approx(
        np.sqrt(sum(np.sum((deltas(tmp_path / "small")[m] - d) ** 2) for m, d in true_sum([a, b], [1, 1]).items()))
        / np.sqrt(sum(np.sum(d**2) for d in true_sum([a, b], [1, 1]).values())),
        rel=1e-4,
    )
    code, out, _ = run("adapter", "merge", a, a, tmp_path / "copa", "--method", "copa", "-p", "density=0.5")
    assert code == 0
    assert "from the weighted sum of the deltas, which this method does not give" in out
    code, _, err = run("adapter", "merge", a, b, tmp_path / "out")
    assert code == 1
    assert "exists" in err
    assert run("verify", tmp_path / "out")[0] == 0
    assert run("reproduce", tmp_path / "out", "--quiet")[0] == 0


def test_a_basis_is_made_and_reverted(tmp_path, run):
    a, b = write_lora(tmp_path / "a", 3, 1), write_lora(tmp_path / "b", 2, 2)
    assert run("adapter", "merge", a, b, tmp_path / "basis", "--method", "rmm", "--quiet") == (0, "", "")
    code, _, err = run("adapter", "revert", tmp_path / "basis", "b", tmp_path / "back", "--dtype", "float64")
    assert code == 0, err
    assert relative(deltas(tmp_path / "back")[Q0], deltas(b)[Q0]) < 1e-6
    code, _, err = run("adapter", "revert", tmp_path / "basis", "x", tmp_path / "no")
    assert code == 1
    assert "holds no adapter 'x'" in err


def test_metrics_and_wrong_usage(tmp_path, run):
    a, b = write_lora(tmp_path / "a", 3, 1), write_lora(tmp_path / "b", 3, 2)
    code, out, _ = run("adapter", "merge", a, b, tmp_path / "out", "--method", "mwa", "--metrics", "loss:3,1", "--json")
    assert code == 0
    assert json.loads(out)["weights"] == pytest.approx([0.25, 0.75])
    assert run("adapter", "merge", a)[0] == 2
    code, _, err = run("adapter", "merge", a, b, tmp_path / "x", "--weight", 1, "--weight", 2, "--weight", 3)
    assert (code, "3 weights for 2 adapters" in err) == (1, True)
    assert not (tmp_path / "x").exists()


def test_help_lists_the_methods_and_explains_one(run):
    _, out, _ = run("adapter", "merge", "--help")
    for name in ("linear", "lego", "copa", "knots", "rmm", "fedavg"):
        assert f"\n  {name}" in out
    for name, told in (("lego", "keep_norm"), ("ties", "density"), ("cat", "Source: PEFT's cat")):
        code, out, _ = run("adapter", "merge", "--method", name, "--explain")
        assert code == 0
        assert told in out


def test_an_adapter_is_looked_at(tmp_path, run):
    a = write_lora(tmp_path / "a", 3, 1, base_model_name_or_path="org/base\x1b[2J")
    code, out, _ = run("adapter", "inspect", a)
    assert code == 0
    assert "\x1b" not in out
    assert "kind        LoRA" in out
    assert "q_proj (2)" in out
    assert f"{np.linalg.norm(deltas(a)[Q0]):.4g}" in out
    code, out, _ = run("adapter", "inspect", a, "--json")
    assert json.loads(out)["layers"][0]["rank"] == 3
