"""Aggregations without a state: against NumPy in float64, on files."""

from __future__ import annotations

import json

import numpy as np
import pytest

import weightsmith as ws
from tests.conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError, MethodError, PlanError, RecipeError

EXAMPLES = {"a": 10, "b": 30, "c": 60}


@pytest.fixture
def federation(write_model, tmp_path):
    """Return the folder of clients a, b, c, the base's folder, and their tensors."""
    base = llama_tensors(0)
    clients = {
        name: {k: v + d for (k, v), d in zip(base.items(), _noise(i, base), strict=True)} for i, name in _named()
    }
    for name, tensors in clients.items():
        write_model(f"clients/{name}", tensors | {"steps": np.array([len(name)])})
    return tmp_path / "clients", write_model("base", base | {"steps": np.array([7])}), base, clients


def _named():
    return enumerate(EXAMPLES, start=1)


def _noise(seed, tensors):
    rng = np.random.default_rng(seed)
    return [0.1 * rng.standard_normal(array.shape).astype(np.float32) for array in tensors.values()]


def _expected(base, clients, factors):
    return {
        name: base[name].astype(np.float64)
        + sum(factors[c] * (np.float64(clients[c][name]) - base[name]) for c in clients)
        for name in base
    }


def _same(lazy, expected, tolerance=2e-6):
    for name, array in expected.items():
        np.testing.assert_allclose(lazy[name].numpy(), array, rtol=tolerance, atol=tolerance, err_msg=name)


def test_fedavg_is_the_mean_by_examples(federation, tmp_path):
    folder, base, start, clients = federation
    shares = {"a": 0.1, "b": 0.3, "c": 0.6}
    expected = _expected(start, clients, shares)
    _same(ws.federated.fedavg(folder, examples=EXAMPLES), expected)
    lazy = ws.federated.fedavg(folder, base, examples=list(EXAMPLES.values()))
    _same(lazy, expected)
    lazy.save(tmp_path / "out")
    _same(ws.open(tmp_path / "out"), expected)
    assert read_safetensors(tmp_path / "out")["steps"] == [7]
    _same(
        ws.federated.fedavg(folder, base, examples=EXAMPLES, server_rate=0.5),
        _expected(start, clients, {k: v / 2 for k, v in shares.items()}),
    )


def test_fedavg_of_equal_counts_is_the_average(federation):
    folder, _, _, clients = federation
    mean = ws.average([folder / name for name in clients])
    lazy = ws.federated.fedavg(folder)
    for name in lazy:
        np.testing.assert_array_equal(lazy[name].numpy(), mean[name].numpy())


def test_deltas_give_what_models_give(federation, tmp_path):
    _, base, start, clients = federation
    for name, tensors in clients.items():
        deltas = {key: tensors[key] - start[key] for key in start}
        write_safetensors(tmp_path / f"{name}.safetensors", deltas | {"steps": np.array([0])})
    sent = {name: tmp_path / f"{name}.safetensors" for name in clients}
    lazy = ws.federated.fedavg(sent, base, examples=EXAMPLES, updates="deltas")
    _same(lazy, _expected(start, clients, {"a": 0.1, "b": 0.3, "c": 0.6}))
    assert lazy["steps"].numpy() == [7]


def test_an_update_of_nothing_leaves_the_base_to_the_bit(federation):
    _, base, start, _ = federation
    lazy = ws.federated.fednova({"a": base, "b": base}, base, steps=[3, 10], server_rate=0.7)
    for name in start:
        np.testing.assert_array_equal(lazy[name].numpy(), start[name])


def test_output_keeps_the_bases_dtype(federation, write_model):
    import ml_dtypes

    folder, _, start, _ = federation
    half = write_model("half", {k: v.astype(ml_dtypes.bfloat16) for k, v in start.items()} | {"steps": np.array([7])})
    lazy = ws.federated.fedavg(folder, half)
    assert {str(lazy[name].dtype) for name in start} == {"bfloat16"}


def test_fednova_against_its_formula(federation):
    folder, base, start, clients = federation
    steps = {"a": 5, "b": 10, "c": 20}
    shares = {"a": 0.1, "b": 0.3, "c": 0.6}
    tau = sum(shares[c] * steps[c] for c in steps)
    # As the paper writes it: the mean of normalised gradients, times the effective steps.
    expected = {}
    for name in start:
        direction = sum(shares[c] * (np.float64(start[name]) - clients[c][name]) / steps[c] for c in steps)
        expected[name] = start[name] - tau * direction
    _same(ws.federated.fednova(folder, base, steps=steps, examples=EXAMPLES), expected)
    given = ws.federated.fednova(folder, base, steps=1, norms=steps, examples=EXAMPLES)
    _same(given, expected)


def test_fednova_of_equal_steps_is_fedavg(federation):
    folder, base, _, _ = federation
    nova = ws.federated.fednova(folder, base, steps=8, momentum=0.9, examples=EXAMPLES)
    avg = ws.federated.fedavg(folder, base, examples=EXAMPLES)
    for name in avg:
        np.testing.assert_allclose(nova[name].numpy(), avg[name].numpy(), rtol=1e-6)


def test_fednova_with_a_proximal_term_goes_the_mean_of_the_steps(federation):
    folder, base, start, clients = federation
    steps = {"a": 5, "b": 10, "c": 20}
    norms = {c: (1 - 0.9**t) / 0.1 for c, t in steps.items()}
    factors = {c: sum(steps.values()) / 3 / 3 / norms[c] for c in steps}
    _same(ws.federated.fednova(folder, base, steps=steps, proximal=0.1), _expected(start, clients, factors))


def test_known_probability_is_right_on_average(federation):
    folder, base, start, clients = federation
    chance = {"a": 0.5, "b": 0.25, "c": 1.0}
    present = {name: folder / name for name in ("a", "c")}
    factors = {"a": 0.25 / 0.5, "b": 0.0, "c": 0.25 / 1.0}
    step = ws.federated.known_probability(present, base, probability=chance, population=4)
    _same(step, _expected(start, clients, factors))
    by_examples = ws.federated.known_probability(present, base, probability=chance, population=EXAMPLES)
    _same(by_examples, _expected(start, clients, {"a": 0.1 / 0.5, "b": 0.0, "c": 0.6}))


def test_fedlaw_shrinks_all_but_running_statistics(write_model):
    rng = np.random.default_rng(3)
    names = ("conv.weight", "bn.weight", "bn.running_mean", "bn.running_var")
    models = [{name: rng.random((2, 3)).astype(np.float32) for name in names} for _ in range(2)]
    paths = [write_model(f"m{i}", tensors) for i, tensors in enumerate(models)]
    lazy = ws.federated.fedlaw(paths, weights=[1, 3], gamma=0.9)
    for name in names:
        factor = 1.0 if "running" in name else 0.9
        expected = factor * (0.25 * models[0][name] + 0.75 * models[1][name])
        np.testing.assert_allclose(lazy[name].numpy(), expected, rtol=1e-6)


# -- partial personalisation ------------------------------------------------------------------------------------------


def test_personal_tensors_stay_and_the_others_are_averaged(federation, tmp_path):
    folder, _, start, clients = federation
    shares = {"a": 0.1, "b": 0.3, "c": 0.6}
    mean = _expected(start, clients, shares)
    outputs = ws.federated.partial(folder, ["*.self_attn.*", "lm_head.*"], examples=EXAMPLES)
    assert list(outputs) == ["a", "b", "c"]
    for own, lazy in outputs.items():
        assert lazy.warnings == ()
        for name in start:
            if "self_attn" in name or "lm_head" in name:
                np.testing.assert_array_equal(lazy[name].numpy(), clients[own][name])
            else:
                np.testing.assert_allclose(lazy[name].numpy(), mean[name], rtol=2e-6, atol=2e-6)
                np.testing.assert_array_equal(lazy[name].numpy(), outputs["a"][name].numpy())
    # From an average that is there already: the same.
    ws.federated.fedavg(folder, examples=EXAMPLES).save(tmp_path / "shared")
    again = ws.federated.partial(folder, ["*.self_attn.*", "lm_head.*"], shared=tmp_path / "shared")
    for own in outputs:
        for name in start:
            np.testing.assert_array_equal(again[own][name].numpy(), outputs[own][name].numpy())


def test_each_personal_model_has_its_own_config(write_model):
    tensors = llama_tensors(0)
    for i, name in enumerate("ab"):
        shape = (5 + i, 8)
        write_model(
            f"clients/{name}",
            llama_tensors(i) | {"lm_head.weight": np.full(shape, i, np.float32)},
            {"model_type": "llama", "num_hidden_layers": 2, "classes": 5 + i},
        )
    folder = write_model("clients/c", tensors).parent
    outputs = ws.federated.partial({name: folder / name for name in "ab"}, "lm_head.weight")
    assert {name: lazy.config["classes"] for name, lazy in outputs.items()} == {"a": 5, "b": 6}
    assert {name: lazy["lm_head.weight"].shape for name, lazy in outputs.items()} == {"a": (5, 8), "b": (6, 8)}


def test_mix_lets_the_average_into_personal_tensors(federation):
    folder, _, start, clients = federation
    outputs = ws.federated.partial(folder, "lm_head.weight", mix=0.25)
    mean = _expected(start, clients, dict.fromkeys(clients, 1 / 3))["lm_head.weight"]
    for own, lazy in outputs.items():
        expected = 0.75 * clients[own]["lm_head.weight"] + 0.25 * mean
        np.testing.assert_allclose(lazy["lm_head.weight"].numpy(), expected, rtol=2e-6, atol=2e-6)


def test_a_pattern_of_no_tensor_is_refused(federation):
    with pytest.raises(MethodError, match=r"client a has no tensor 'head\.\*'"):
        ws.federated.partial(federation[0], ["lm_head.*", "head.*"])


# -- who is a client --------------------------------------------------------------------------------------------------


def test_clients_come_in_natural_order_and_by_name(tmp_path):
    folder = tmp_path / "round"
    folder.mkdir()
    for i in (10, 2, 1):
        write_safetensors(folder / f"client-{i}.safetensors", {"w": np.full((2, 2), i, np.float32)})
    (folder / "notes.txt").write_text("no client")
    # In this order 1, 2, 10: counts that pick one client show it.
    for counts, value in (([1, 0, 0], 1.0), ([0, 1, 0], 2.0), ([0, 0, 1], 10.0)):
        assert ws.federated.fedavg(folder, examples=counts)["w"].numpy()[0, 0] == value
    assert ws.federated.fedavg(folder, examples={"client-1": 0, "client-2": 1, "client-10": 1})["w"].numpy()[0, 0] == 6


def test_what_is_no_folder_of_clients_is_refused(federation, tmp_path):
    _, base, _, _ = federation
    with pytest.raises(CheckpointError, match="is one model, not a folder of clients"):
        ws.federated.fedavg(base)
    with pytest.raises(CheckpointError, match="there is no folder"):
        ws.federated.fedavg(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither folders nor files"):
        ws.federated.fedavg(tmp_path / "empty")
    with pytest.raises(RecipeError, match="one checkpoint is given"):
        ws.federated.fedavg(ws.open(base))
    with pytest.raises(MethodError, match="there are no clients"):
        ws.federated.fedavg({})


def test_metadata_that_does_not_fit_is_refused(federation):
    folder, base, _, _ = federation
    with pytest.raises(MethodError, match=r"examples has no value for client 'c'"):
        ws.federated.fedavg(folder, examples={"a": 1, "b": 1})
    with pytest.raises(MethodError, match="examples has 2 values for 3 clients"):
        ws.federated.fedavg(folder, examples=[1, 2])
    with pytest.raises(RecipeError, match="give the base"):
        ws.federated.fedavg(folder, updates="deltas")
    with pytest.raises(RecipeError, match="updates is 'weights'"):
        ws.federated.fedavg(folder, base, updates="weights")
    with pytest.raises(MethodError, match="server_rate: inf is given"):
        ws.federated.fedavg(folder, base, server_rate=float("inf"))
    with pytest.raises(MethodError, match="gamma is 0"):
        ws.federated.fedlaw(folder, weights=[1, 1, 1], gamma=0)
    with pytest.raises(MethodError, match="3 clients take part, of a population of 2"):
        ws.federated.known_probability(folder, base, probability=1.0, population=2)


def test_a_client_that_lacks_a_tensor_is_named(federation, write_model):
    folder, base, _, clients = federation
    tensors = dict(clients["b"])
    del tensors["lm_head.weight"]
    write_model("clients/b", tensors | {"steps": np.array([1])})
    with pytest.raises(PlanError, match=r"lm_head\.weight is in .* but not in .*b"):
        ws.federated.fedavg(folder, base)


def test_adapters_of_clients_are_averaged_as_what_they_change(write_model, tmp_path):
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    base = write_model("base", {"model.layers.0.self_attn.q_proj.weight": weight})
    expected = weight.astype(np.float64)
    for seed, name in enumerate("ab", start=1):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
        folder = tmp_path / "round" / name
        folder.mkdir(parents=True)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        write_safetensors(
            folder / "adapter_model.safetensors", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        expected = expected + {"a": 0.25, "b": 0.75}[name] * 2.0 * (np.float64(b) @ a)
    with pytest.raises(PlanError, match="is an adapter"):
        ws.federated.fedavg(tmp_path / "round", base)
    on_base = {name: f"{base}+{tmp_path / 'round' / name}" for name in "ab"}
    _same(
        ws.federated.fedavg(on_base, base, examples={"a": 1, "b": 3}),
        {"model.layers.0.self_attn.q_proj.weight": expected},
    )


def test_an_aggregation_is_a_recipe_that_can_be_run_again(federation, tmp_path):
    folder, base, start, _ = federation
    lazy = ws.federated.fednova(folder, base, steps=[1, 2, 3])
    lazy.save(tmp_path / "out")
    again = ws.merge_recipe(lazy.to_yaml())
    for name in start:
        np.testing.assert_array_equal(again[name].numpy(), lazy[name].numpy())
    assert ws.reproduce(tmp_path / "out").ok
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
