"""``weightsmith average`` on pruned checkpoints, and with a variance correction."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

import weightsmith as ws
from tests.conftest import read_safetensors
from weightsmith.cli.main import cli
from weightsmith.errors import PlanError, RecipeError

NAME = "model.layers.0.mlp.up_proj.weight"


def _matrix(seed, mask):
    values = np.random.default_rng(seed).standard_normal((80, 90)).astype(np.float32)
    kept = np.random.default_rng(mask).random((80, 90)) < 0.5
    return np.where(kept, values, np.float32(0))


@pytest.fixture
def run(write_model, tmp_path):
    """Return a function that writes a run of checkpoints with these masks, the oldest first."""

    def make(masks):
        for step, mask in enumerate(masks, start=1):
            tensors = {NAME: _matrix(step, mask), "model.norm.weight": np.full(8, step, np.float32)}
            write_model(f"run/checkpoint-{100 * step}", tensors)
        return tmp_path / "run"

    return make


def _average(*arguments):
    done = CliRunner().invoke(cli, ["average", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_mask_of_a_whole_run_is_kept_and_needs_no_option(run, tmp_path):
    code, output = _average(run([7, 7, 7]), tmp_path / "out", "--weights", "ema:0.5")
    assert code == 0
    assert "masks" not in output
    np.testing.assert_array_equal(read_safetensors(tmp_path / "out")[NAME] != 0, _matrix(1, 7) != 0)


def test_masks_of_a_run_that_differ_are_told(run, tmp_path):
    code, output = _average(run([1, 2, 3]), tmp_path / "out")
    assert code == 0
    density = (read_safetensors(tmp_path / "out")[NAME] != 0).mean()
    assert f"the average {density:.3g}" in " ".join(output.split())
    assert "--mask" in output


@pytest.mark.parametrize("mask", ["intersection", "union", "first"])
def test_a_run_is_masked_as_asked(run, tmp_path, mask):
    code, output = _average(run([1, 2, 3]), tmp_path / "out", "--mask", mask)
    assert code == 0, output
    assert "masks" not in output
    kept = [_matrix(i, i) != 0 for i in (1, 2, 3)]
    # Of a run, the newest is the first.
    expected = {"intersection": np.all(kept, 0), "union": np.any(kept, 0), "first": kept[2]}[mask]
    written = read_safetensors(tmp_path / "out")
    mean = np.where(expected, sum(_matrix(i, i) for i in (1, 2, 3)) / 3, 0)
    np.testing.assert_allclose(written[NAME], mean, atol=1e-6)
    np.testing.assert_array_equal(written[NAME] != 0, expected)
    np.testing.assert_allclose(written["model.norm.weight"], 2)
    assert ws.reproduce(tmp_path / "out").ok


def test_a_variance_correction_of_a_run_is_the_published_formula(run, tmp_path):
    code, output = _average(run([1, 2, 3]), tmp_path / "out", "--variance-corrected")
    assert code == 0, output
    models = [_matrix(i, i).astype(np.float64) for i in (1, 2, 3)]
    mean = sum(models) / 3
    target = np.mean([model.var(ddof=1) for model in models])
    gain = np.sqrt((target + 1e-4) / (mean.var(ddof=1) + 1e-4))
    written = read_safetensors(tmp_path / "out")
    np.testing.assert_allclose(written[NAME], mean.mean() + gain * (mean - mean.mean()), rtol=0, atol=1e-5)
    np.testing.assert_allclose(written["model.norm.weight"], 2)


def test_the_same_from_python(run, tmp_path):
    folder = run([1, 2])
    np.testing.assert_array_equal(
        ws.average_run(folder, mask="intersection")[NAME].numpy() != 0, (_matrix(1, 1) != 0) & (_matrix(2, 2) != 0)
    )
    corrected = ws.average_run(folder, variance_corrected=True)[NAME].numpy()
    assert corrected.var() > 1.3 * ws.average_run(folder)[NAME].numpy().var()
    with pytest.raises(RecipeError, match="not both"):
        ws.average_run(folder, mask="union", variance_corrected=True)
    with pytest.raises(PlanError, match="mask is 'all'; it takes one of intersection, union, first"):
        ws.average_run(folder, mask="all")
