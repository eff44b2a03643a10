"""Sparse, signed and quantised changes: against plain formulas, and folded again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.adapters.codes import Quantization, pack_codes, unpack_codes
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import CheckpointError, PlanError
from weightsmith.extraction.compact import largest, shares_over_model
from weightsmith.extraction.difference import Difference


@pytest.fixture
def models(write_model):
    base, change = llama_tensors(0, hidden=12, vocabulary=21), llama_tensors(1, hidden=12, vocabulary=21, scale=0.05)
    tuned = {name: values + change[name] for name, values in base.items()}
    # Sixteen bits leave many entries as they are.
    tuned["lm_head.weight"] = np.where(np.arange(12) % 3, tuned["lm_head.weight"], base["lm_head.weight"])
    return write_model("base", base), write_model("tuned", tuned), base, tuned


def folded(models, tmp_path: Path, **settings) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    adapter = ws.extract(models[1], models[0], threads=1, **settings)
    adapter.save(tmp_path / "out")
    base = ws.open(f"{models[0]}+{tmp_path / 'out'}")
    kept = {name: base[name].numpy().astype(np.float64) - models[2][name] for name in base}
    return adapter.report(), kept


def change_of(models, name: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = models[3][name].astype(np.float64) - models[2][name]
    return found


def test_the_largest_entries_are_kept(models, tmp_path):
    report, kept = folded(models, tmp_path, kind="sparse", density=0.1)
    for one in report.matrices:
        change = change_of(models, one.name)
        count = round(0.1 * change.size)
        threshold = np.sort(np.abs(change).reshape(-1))[-count]
        np.testing.assert_allclose(kept[one.name], np.where(np.abs(change) >= threshold, change, 0), atol=1e-6)
        assert one.error == pytest.approx(
            math.sqrt((change[np.abs(change) < threshold] ** 2).sum() / (change**2).sum()), rel=1e-5
        )
    for name in report.whole:
        np.testing.assert_allclose(kept[name], change_of(models, name), atol=1e-6)
    places = read_safetensors(tmp_path / "out")["base_model.model.lm_head.weightsmith_places"]
    assert (np.diff(places) > 0).all()


def test_over_the_model_the_largest_of_all_are_kept(models, tmp_path):
    report, kept = folded(models, tmp_path, kind="sparse", density=0.02, scope="model")
    changes = {name: change_of(models, name) for name in kept if kept[name].ndim == 2}
    every = np.concatenate([np.abs(change).reshape(-1) for change in changes.values()])
    threshold = np.sort(every)[-round(0.02 * len(every))]
    assert {one.name for one in report.matrices} == {n for n, c in changes.items() if np.abs(c).max() >= threshold}
    for one in report.matrices:
        wanted = np.where(np.abs(changes[one.name]) >= threshold, changes[one.name], 0)
        np.testing.assert_allclose(kept[one.name], wanted, atol=1e-6)


def test_of_equal_entries_the_first_are_kept():
    np.testing.assert_array_equal(largest(np.array([1, -2, 2, 0, 2, -1.0]), 2), [1, 2])
    np.testing.assert_array_equal(largest(np.zeros(4), 3), [0, 1, 2])
    np.testing.assert_array_equal(largest(np.arange(3.0), 7), [0, 1, 2])
    zeros = ArrayTensor("a", np.zeros((2, 3), np.float32))
    equal = [
        Difference(str(i), zeros, ArrayTensor("b", np.full((2, 3), sign, np.float32)))
        for i, sign in enumerate([1, -1, 1])
    ]
    with ThreadMapper(2) as mapper:
        assert shares_over_model(equal, 8, mapper) == [6, 2, 0]
        assert shares_over_model(equal, 99, mapper) == [6, 6, 6]


def test_signs_and_their_mean_magnitude(models, tmp_path):
    report, kept = folded(models, tmp_path, kind="sign")
    for one in report.matrices:
        change = change_of(models, one.name)
        scale = np.abs(change).mean()
        # Zero counts as minus, as BitDelta defines it.
        wanted = np.where(change > 0, scale, -scale)
        np.testing.assert_allclose(kept[one.name], wanted, atol=1e-6)
        assert one.error == pytest.approx(np.linalg.norm(change - wanted) / np.linalg.norm(change), rel=1e-5)
        assert one.nbytes == -(-change.size // 8) + 4


def levels(change: np.ndarray[Any, Any], quantizer: str, bits: int) -> np.ndarray[Any, Any]:
    """Compute what the paper's code does, on numbers and not on codes."""

    def linear(values: np.ndarray[Any, Any], count: int, low: float, high: float) -> np.ndarray[Any, Any]:
        return np.rint((values - low) / (high - low) * (count - 1)) / (count - 1) * (high - low) + low

    if quantizer == "linear":
        return linear(change, 2**bits, change.min(), change.max())
    if quantizer == "tanh":
        tangents = np.tanh(change)
        most = np.abs(tangents).max()
        return np.arctanh(linear(tangents, 2**bits, -most, most))
    found = np.zeros_like(change)
    counted = np.abs(change) > 1e-11
    logarithms = np.log2(np.abs(change[counted]))
    found[counted] = 2 ** linear(logarithms, 2 ** (bits - 1) - 1, logarithms.min(), logarithms.max())
    return np.sign(change) * found


@pytest.mark.parametrize(("quantizer", "bits"), [("linear", 1), ("linear", 4), ("tanh", 3), ("log2", 3), ("log2", 8)])
def test_quantised_entries_are_the_papers_levels(models, tmp_path, quantizer, bits):
    report, kept = folded(models, tmp_path, kind="quantized", bits=bits, quantizer=quantizer)
    assert len(report.matrices) == 6
    for one in report.matrices:
        change = (models[3][one.name] - models[2][one.name]).astype(np.float64)
        wanted = levels(change, quantizer, bits)
        np.testing.assert_allclose(kept[one.name], wanted, atol=1e-6)
        assert one.error == pytest.approx(np.linalg.norm(change - wanted) / np.linalg.norm(change), rel=1e-4)
        assert one.nbytes == -(-change.size * bits // 8) + 16


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 1001).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-1001 * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, bits, 1001), codes)


def test_levels_of_what_does_not_vary():
    same = np.full(9, 0.25, np.float32)
    for quantizer in ("linear", "log2"):
        how = Quantization(quantizer, 4)
        limits = how.range(same)
        np.testing.assert_allclose(how.decode(how.encode(same, limits), limits), same)
    none = Quantization("log2", 3)
    assert not none.decode(none.encode(np.zeros(5), none.range(np.zeros(5))), none.range(np.zeros(5))).any()
    far = Quantization("tanh", 8)
    assert np.isfinite(
        far.decode(far.encode(np.array([-50.0, 1.0]), np.array([-1.0, 1.0])), np.array([-1.0, 1.0]))
    ).all()


@pytest.mark.parametrize(
    "settings",
    [{"kind": "sparse", "density": 0.3}, {"kind": "sign"}, {"kind": "quantized", "bits": 3, "quantizer": "log2"}],
)
def test_folded_blocks_and_bytes_depend_on_nothing_else(models, tmp_path, settings):
    for threads in (1, 3):
        ws.extract(models[1], models[0], threads=threads, **settings).save(tmp_path / str(threads), threads=threads)
    one, other = (read_safetensors(tmp_path / str(threads)) for threads in (1, 3))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    tensor = ws.open(f"{models[0]}+{tmp_path / '1'}")["lm_head.weight"]
    whole = tensor.read(0, tensor.size)
    for block in (7, 50, 129):
        parts = [tensor.read(start, min(start + block, tensor.size)) for start in range(0, tensor.size, block)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert not ws.reproduce(tmp_path / "1").problems


def spoiled(folder: Path, part: str | None, change: Any = None, **config: Any) -> Path:
    """Return a copy of an adapter with one tensor or its config changed."""
    target = folder.with_name(f"{folder.name} spoiled {part} {sorted(config)}")
    shutil.copytree(folder, target)
    tensors = read_safetensors(target)
    if part is not None:
        tensors[part] = change(tensors[part])
        write_safetensors(target / "adapter_model.safetensors", tensors)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def test_adapters_of_strangers_are_checked(models, tmp_path):
    stem = "base_model.model.lm_head.weightsmith_"
    ways: list[tuple[dict[str, Any], list[tuple[str | None, Any, dict[str, Any], str]]]] = [
        (
            {"kind": "sparse", "density": 0.1},
            [
                (f"{stem}places", lambda one: one[::-1].copy(), {}, "must rise"),
                (f"{stem}places", lambda one: one + 252, {}, "places from"),
                (f"{stem}places", lambda one: one - 300, {}, "places from"),
                (f"{stem}values", lambda one: one[:-1], {}, "do not fit"),
            ],
        ),
        (
            {"kind": "sign"},
            [
                (f"{stem}signs", lambda one: one[:-1], {}, "take 32 bytes"),
                (f"{stem}scale", lambda one: np.repeat(one, 2), {}, "do not fit"),
            ],
        ),
        (
            {"kind": "quantized", "bits": 4, "quantizer": "linear"},
            [
                (f"{stem}codes", lambda one: one[:-1], {}, "take 126 bytes"),
                (None, None, {"bits": 9}, "bits is 9"),
                (None, None, {"bits": 2, "quantizer": "log2"}, "log2 has 3 to 8"),
                (None, None, {"bits": None}, "must give bits"),
                (None, None, {"quantizer": "cube"}, "known are linear"),
                (None, None, {"quantizer": None}, "must give quantizer"),
            ],
        ),
    ]
    for number, (settings, spoils) in enumerate(ways):
        folder = tmp_path / str(number)
        ws.extract(models[1], models[0], threads=1, **settings).save(folder)
        for part, change, config, said in spoils:
            broken = spoiled(folder, part, change, **config)
            with pytest.raises((CheckpointError, PlanError), match=said):
                ws.open(f"{models[0]}+{broken}")["lm_head.weight"].numpy()
            shutil.rmtree(broken)
