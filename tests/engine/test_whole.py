"""Whole tensors: read when they are asked for, a stretch at a time, and as many at once as fit."""

from __future__ import annotations

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.engine.backend import BLOCK
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.expression import Computed
from weightsmith.engine.plan import matrix_memory
from weightsmith.errors import OutputError
from weightsmith.methods import registry
from weightsmith.methods.block import Block, WholeBlock, Work
from weightsmith.methods.registry import all_methods, get_method

F32 = np.dtype(np.float32)


class Counted(ArrayTensor):
    """A tensor that notes what is read of it."""

    def __init__(self, name: str, array: Any) -> None:
        super().__init__(name, array)
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> Any:
        self.reads.append((start, stop))
        return super().read(start, stop)


@pytest.fixture
def whole(monkeypatch):
    """Return a function that registers a method on whole tensors for this test."""
    monkeypatch.setattr(registry, "_METHODS", all_methods())

    def register(function: Any, **declared: Any) -> Any:
        ws.method("tried", reads="tensor", **{"base": "required", **declared})(function)
        return get_method("tried")

    return register


def inputs(shape: tuple[int, ...] = (700, 900), models: int = 2, dtype: Any = ml_dtypes.bfloat16) -> list[Counted]:
    rng = np.random.default_rng(0)
    return [Counted(f"t{i}", rng.standard_normal(shape).astype(dtype)) for i in range(models + 1)]


def computed(method: Any, tensors: list[Any], **more: Any) -> Computed:
    return Computed("t", F32, method, tuple(tensors[1:]), tensors[0], parameters={}, **more)


def test_a_task_vector_is_made_of_stretches_and_read_when_it_is_asked_for(whole):
    seen: list[Any] = []

    def tried(block: Any) -> Any:
        assert isinstance(block, WholeBlock)
        assert block.shape == (700, 900)
        assert not any(tensor.reads for tensor in tensors)
        seen.append(block.deltas[1])
        assert not tensors[1].reads
        seen.append(block.base)
        seen.extend(block.models)
        return block.deltas[0] + block.base

    tensors = inputs()
    result = Evaluator().values(computed(whole(tried), tensors), 0, 700 * 900)
    base, one, other = (tensor.read(0, tensor.size).astype(np.float32).reshape(700, 900) for tensor in tensors)
    for found, expected in zip(seen, (other - base, base, one, other), strict=True):
        assert np.array_equal(found, expected)
    assert np.array_equal(result.reshape(700, 900), (one - base) + base)
    for tensor in tensors:
        assert max(stop - start for start, stop in tensor.reads[:-1]) == BLOCK


def test_without_a_base_task_vectors_are_the_models(whole):
    def tried(block: Block) -> Any:
        assert block.base is None
        return block.deltas[0] + block.models[1]

    _, one, other = tensors = inputs((3, 4))
    tensor = Computed("t", F32, whole(tried, base="unused"), (one, other), parameters={})
    found = Evaluator().values(tensor, 0, 12)
    assert np.array_equal(found, sum(part.read(0, 12).astype(np.float32) for part in tensors[1:]))


def test_inputs_are_rounded_before_they_are_subtracted(whole):
    tensors = inputs((30, 40), dtype=np.float32)
    tensor = computed(whole(lambda block: block.deltas[0]), tensors, casts=np.dtype(np.float16))
    base, one = (part.read(0, 1200).astype(np.float16).astype(np.float32) for part in tensors[:2])
    assert np.array_equal(Evaluator().values(tensor, 0, 1200), one - base)


def test_what_is_not_finite_is_counted_once_in_each_input(whole):
    tensors = inputs((700, 900), dtype=np.float32)
    tensors[0]._flat[[0, 629_999]] = np.nan
    tensors[2]._flat[300_000] = np.inf
    met: list[tuple[str, int]] = []

    def tried(block: Block) -> Any:
        return block.deltas[0] + block.deltas[1] + block.deltas[1]

    evaluator = Evaluator(None, lambda label, count: met.append((label, count)))
    tensor = computed(whole(tried), tensors, labels=("one", "other"))
    assert evaluator.result(tensor, 0, 1000, F32)[1] == 1
    assert evaluator.result(tensor, 1000, 630_000, F32)[1] == 2
    assert met == [("base", 2), ("other", 1)]


def test_a_whole_tensor_is_computed_once_however_it_is_cut(whole):
    calls = []

    def tried(block: Block) -> Any:
        calls.append(1)
        return block.deltas[0] * 2.0

    tensor = computed(whole(tried), inputs())
    evaluator = Evaluator()
    parts = [
        evaluator.result(tensor, start, min(start + 100_000, 630_000), F32)[0] for start in range(0, 630_000, 100_000)
    ]
    assert len(calls) == 1
    assert np.array_equal(np.concatenate(parts), Evaluator().values(tensor, 0, 630_000))


def test_merges_of_merged_matrices_are_those_of_saved_ones(write_model, tmp_path):
    base, a, b = (write_model(n, llama_tensors(i, hidden=24)) for i, n in enumerate(("base", "a", "b")))
    first = ws.merge("iso_c", [a, b], base)
    nested = ws.merge("tsv", [first, b], base)
    nested.save(tmp_path / "nested")
    first.save(tmp_path / "first")
    ws.merge("tsv", [tmp_path / "first", b], base).save(tmp_path / "in turn")
    nested_bytes, in_turn = (read_safetensors(tmp_path / name) for name in ("nested", "in turn"))
    for name, array in in_turn.items():
        np.testing.assert_allclose(nested_bytes[name], array, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("memory", "most"), [(None, 4), (2.5, 2), (1.5, 1)])
def test_as_many_matrices_are_worked_on_as_fit(write_model, tmp_path, whole, memory, most):
    lock, living, peak = threading.Lock(), [0], [0]

    def tried(block: Block) -> Any:
        with lock:
            living[0] += 1
            peak[0] = max(peak[0], living[0])
        time.sleep(0.05)
        with lock:
            living[0] -= 1
        return block.models[0]

    needed = 50_000_000
    whole(tried, work=lambda parameters, form, models: Work(1.0, needed // 4, 1))
    tensors = {f"model.layers.{i}.mlp.w.weight": np.ones((8, 8), np.float32) for i in range(8)}
    merge = ws.merge("tried", [write_model("m", tensors)], write_model("base", tensors))
    plan = merge.plan()
    assert {matrix_memory(task) for task in plan.tasks} == {needed}
    bound = None if memory is None else plan.peak_memory(1) + int((memory - 1) * needed)
    assert plan.matrices_at_a_time(4, bound) == most
    merge.save(tmp_path / "out", threads=4, memory=bound)
    assert peak[0] == most


def test_a_matrix_that_holds_a_nan_is_told_as_what_it_is(write_model, tmp_path):
    tensors = llama_tensors(0)
    broken = {name: array.copy() for name, array in tensors.items()}
    broken["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    merge = ws.merge("iso_c", [write_model("m", broken)], write_model("base", tensors))
    with pytest.raises(OutputError, match=r"layers\.1\.mlp.*1 values of its inputs.* whole matrix .*128 results"):
        merge.save(tmp_path / "out")
    merge.save(tmp_path / "out", on_nonfinite="warn")
    merged = read_safetensors(tmp_path / "out")
    assert [name for name, array in merged.items() if not np.isfinite(array).all()] == [
        "model.layers.1.mlp.up_proj.weight"
    ]


def test_a_plan_names_the_matrix_that_takes_most(write_model):
    tensors = llama_tensors(0, hidden=16, vocabulary=40)
    plan = ws.merge("iso_c", [write_model("m", tensors)], write_model("base", tensors)).plan()
    content = plan.to_json(1)
    assert content["matrices"] == 6
    assert content["largest_matrix"]["name"] in ("model.embed_tokens.weight", "lm_head.weight")
    assert content["largest_matrix"]["shape"] == [40, 16]
    assert content["largest_matrix"]["memory"] == max(matrix_memory(task) for task in plan.tasks)
    assert plan.peak_memory(1) > content["largest_matrix"]["memory"]
