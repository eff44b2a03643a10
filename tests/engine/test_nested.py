"""Steps of a pipeline within one another share buffers and programs; the bytes must be those of steps in turn."""

from __future__ import annotations

import numpy as np

import weightsmith as ws
from conftest import llama_tensors, read_safetensors


def test_steps_within_steps_give_what_steps_in_turn_give(write_model, tmp_path):
    base, a, b = (write_model(n, llama_tensors(i, layers=2, hidden=64)) for i, n in enumerate(("base", "a", "b")))

    def merged(one, other):
        return ws.merge("task_arithmetic", [one, other], base, weight=0.5, dtype="float32")

    first = ws.merge("ties", [a, b], base, weight=[0.3, 0.9], density=0.4, dtype="float32")
    # The computed model stands behind a stored one, and is asked for while that one's block is held.
    merged(b, first).save(tmp_path / "nested")
    first.save(tmp_path / "first")
    merged(b, tmp_path / "first").save(tmp_path / "in turn")
    nested, in_turn = (read_safetensors(tmp_path / name) for name in ("nested", "in turn"))
    assert nested.keys() == in_turn.keys()
    for name, array in in_turn.items():
        np.testing.assert_array_equal(nested[name], array, err_msg=name)


def test_a_statistic_over_the_model_is_gathered_once_for_all_tensors_read_from_python(monkeypatch):
    from weightsmith.checkpoint.checkpoint import Checkpoint
    from weightsmith.checkpoint.tensor import ArrayTensor
    from weightsmith.engine import evaluate

    rng = np.random.default_rng(0)
    models = [
        Checkpoint(name, {key: ArrayTensor(key, rng.standard_normal((4, 5))) for key in "abc"})
        for name in ("base", "one", "two")
    ]
    runs = []
    gather = evaluate.run_statistic

    def counted(evaluator, group, *rest):
        runs.append(group)
        return gather(evaluator, group, *rest)

    monkeypatch.setattr(evaluate, "run_statistic", counted)

    def merge():
        return ws.merge("ties", models[1:], base=models[0], weight=0.5, density=0.4, trim_scope="model")

    merged = merge()
    together = {name: merged[name].numpy() for name in "cab"}
    assert len(runs) == 1
    # Each read alone, from a merge of its own.
    for name in "abc":
        assert np.array_equal(merge()[name].numpy(), together[name])
