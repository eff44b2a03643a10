"""The numbers that mergekit 0.1.5 gave for our own random models (see golden/README.md), end to end."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.errors import WeightsmithError

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.safetensors"))

# Recipes that mergekit runs while it ignores a part of them; here that part is an error.
REFUSED = {
    "linear_shared_under_source": "one value for all models",
    "task_arithmetic_density": "no parameter 'density'",
}
# Where the default differs from mergekit's numbers: docs/differences.md has each reason.
DIFFERENT = {
    "linear_base_unlisted_weight",
    "linear_slices_uneven",
    "model_stock_filter_wise_three",
    "model_stock_filter_wise_two",
    "model_stock_three",
    "multislerp",
    "multislerp_base",
    "multislerp_two",
    "multislerp_unnormalized",
    "ramplus_tl_settings",
}
# Not restored by compat: the final norm and head of a last slice with several sources come from all of them.
NEVER_THE_SAME = {"linear_slices_uneven"}

# The storage dtype's unit in the last place, relative: one rounding step of either tool.
STEP = {np.dtype(ml_dtypes.bfloat16): 2.0**-8, np.dtype(np.float16): 2.0**-10}


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, np.ndarray]:
    recipe = yaml.safe_load((GOLDEN / "cases" / f"{name}.yaml").read_text()) | changes
    monkeypatch.chdir(GOLDEN / "models")
    ws.merge_recipe(yaml.safe_dump(recipe)).save(tmp_path / "out", threads=1)
    return read_safetensors(tmp_path / "out")


def agrees(name: str, found: dict[str, np.ndarray]) -> bool:
    """Whether every tensor is mergekit's, to float32 rounding (or one step of a narrower output dtype)."""
    expected = read_safetensors(GOLDEN / "cases" / f"{name}.safetensors")
    assert set(found) == set(expected)
    good = True
    for key, theirs in expected.items():
        ours = found[key]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), key
        scale = np.abs(theirs.astype(np.float64)).max()
        # mergekit computes in the storage dtype: several roundings there, one here.
        allowed = 2e-6 if theirs.dtype == np.float32 and "bf16" not in name else 3 * STEP.get(theirs.dtype, 2.0**-8)
        error = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
        good = good and bool(error <= allowed * scale)
    return good


@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED) - NEVER_THE_SAME))
def test_compat_gives_mergekits_numbers(name, tmp_path, monkeypatch):
    assert agrees(name, run(name, tmp_path, monkeypatch, compat="mergekit"))


@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED)))
def test_the_default_gives_mergekits_numbers_unless_a_difference_is_documented(name, tmp_path, monkeypatch):
    assert agrees(name, run(name, tmp_path, monkeypatch)) == (name not in DIFFERENT)


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_what_mergekit_ignores_is_refused(name, message, tmp_path, monkeypatch):
    with pytest.raises(WeightsmithError, match=message):
        run(name, tmp_path, monkeypatch)
