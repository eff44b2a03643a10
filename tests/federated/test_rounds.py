"""Rules with a state: several rounds against the algorithms written out in NumPy; interruptions; hostile states."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import weightsmith as ws
from tests.conftest import read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError, MethodError, OutputError, RecipeError

NAMES = ["a", "b", "c", "d"]
# Who is there in each round; none in the fourth.
PRESENT = [["a", "b"], ["a"], ["b", "d"], [], ["a", "b", "d"], ["c"], ["a", "b", "c", "d"]]
SHAPES = {"up.weight": (6, 5), "norm.weight": (5,)}


def _train(model, name, number):
    """Return what a client makes of a model in a round: some drift of its own."""
    rng = np.random.default_rng([ord(name), number])
    # In a fixed order, which that of a file that is read back is not.
    return {key: model[key] + (0.3 * rng.standard_normal(model[key].shape)).astype(np.float32) for key in SHAPES}


def _start():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def _write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def _run(rule, tmp_path, *, deltas=False, **settings):
    """Run all rounds on files; return the global model after each, and the updates of each round."""
    state = tmp_path / "state"
    model, path = _start(), _write(tmp_path / "global-0", _start())
    models, updates = [model], []
    for number, names in enumerate(PRESENT, start=1):
        trained = {name: _train(model, name, number) for name in names}
        changes = {name: {k: t[k] - model[k] for k in t} for name, t in trained.items()}
        sent = {n: _write(tmp_path / f"r{number}" / n, (changes if deltas else trained)[n]) for n in names}
        extra = {"updates": "deltas"} if deltas else {}
        step = rule(sent, path, state=state, population=NAMES if number == 1 else None, **extra, **settings)
        assert step.number == number
        path = tmp_path / f"global-{number}"
        step.save(path)
        model = read_safetensors(path)
        models.append(model)
        updates.append(changes)
    return models, updates


def _follow(models, updates, step):
    """Check every model against ``step``: the change, in float64, of one tensor's updates by name."""
    for number, (before, after, changes) in enumerate(zip(models, models[1:], updates, strict=False), start=1):
        wide = {name: {k: v.astype(np.float64) for k, v in change.items()} for name, change in changes.items()}
        change = step(number, wide)
        for name in SHAPES:
            expected = before[name].astype(np.float64) + change[name]
            np.testing.assert_allclose(after[name], expected, rtol=3e-6, atol=3e-6, err_msg=f"round {number} {name}")


def _summed(parts):
    return {name: sum((factor * one[name] for factor, one in parts), np.zeros(SHAPES[name])) for name in SHAPES}


@pytest.mark.parametrize("cutoff", [None, 2, 50])
def test_fedau_over_several_rounds(tmp_path, cutoff):
    models, updates = _run(ws.federated.fedau, tmp_path, cutoff=cutoff, server_rate=0.5)
    intervals: dict[str, list[int]] = {name: [] for name in NAMES}
    absent = dict.fromkeys(NAMES, 0)

    def step(_, changes):
        found = _summed([(0.5 / 4 * float(np.mean(intervals[n] or [1])), changes[n]) for n in changes])
        for n in NAMES:
            absent[n] += 1
            if n in changes or absent[n] == cutoff:
                intervals[n].append(absent[n])
                absent[n] = 0
        return found

    _follow(models, updates, step)
    # The state is numbers alone.
    assert sorted(os.listdir(tmp_path / "state")) == ["lock", "state.json"]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("deltas", [False, True])
def test_fedstale_over_several_rounds(tmp_path, beta, deltas):
    examples = {"a": 1, "b": 2, "c": 3, "d": 4}
    chance = {"a": 0.9, "b": 0.5, "c": 0.1, "d": 0.4}
    models, updates = _run(
        ws.federated.fedstale, tmp_path, deltas=deltas, beta=beta, examples=examples, probability=chance
    )
    memory = {n: {k: np.zeros(s) for k, s in SHAPES.items()} for n in NAMES}

    def step(_, changes):
        parts = [
            (examples[n] / 10 / chance[n], {k: changes[n][k] - beta * memory[n][k] for k in SHAPES}) for n in changes
        ]
        parts += [(beta * examples[n] / 10, memory[n]) for n in NAMES]
        found = _summed(parts)
        memory.update(changes)
        return found

    _follow(models, updates, step)
    stored = sorted(name for name in os.listdir(tmp_path / "state") if name.endswith(".safetensors"))
    assert stored == [f"{i:06d}-7.safetensors" for i in range(4)]
    for i, name in enumerate(NAMES):
        for key, array in read_safetensors(tmp_path / "state" / f"{i:06d}-7.safetensors").items():
            np.testing.assert_array_equal(array, updates[-1][name][key])


def test_fedvarp_over_several_rounds(tmp_path):
    models, updates = _run(ws.federated.fedvarp, tmp_path)
    memory = {n: {k: np.zeros(s) for k, s in SHAPES.items()} for n in NAMES}

    def step(_, changes):
        parts = [(1 / len(changes), {k: changes[n][k] - memory[n][k] for k in SHAPES}) for n in changes]
        parts += [(1 / 4, memory[n]) for n in NAMES]
        found = _summed(parts)
        memory.update(changes)
        return found

    _follow(models, updates, step)


def test_fedstale_of_beta_one_and_equal_shares_is_fedvarp(tmp_path):
    one, _ = _run(ws.federated.fedvarp, tmp_path / "one")
    other, _ = _run(ws.federated.fedstale, tmp_path / "other", beta=1.0)
    for a, b in zip(one, other, strict=True):
        for name in SHAPES:
            np.testing.assert_array_equal(a[name], b[name])


def test_mifa_over_several_rounds(tmp_path):
    models, updates = _run(ws.federated.mifa, tmp_path, server_rate=0.7)
    memory = {n: {k: np.zeros(s) for k, s in SHAPES.items()} for n in NAMES}

    def step(_, changes):
        memory.update(changes)
        return _summed([(0.7 / 4, memory[n]) for n in NAMES])

    _follow(models, updates, step)


def test_with_everyone_there_all_rules_are_fedavg(tmp_path):
    """FedAU, FedVARP and MIFA of a population that always takes part, and FedStale without history."""
    start = _write(tmp_path / "global", _start())
    for rule, extra in (("fedau", {}), ("fedvarp", {}), ("mifa", {}), ("fedstale", {"beta": 0.0})):
        path = start
        for number in (1, 2, 3):
            model = read_safetensors(path)
            sent = {n: _write(tmp_path / rule / f"{number}{n}", _train(model, n, number)) for n in NAMES}
            average = ws.federated.fedavg(sent, path)
            step = getattr(ws.federated, rule)(sent, path, state=tmp_path / rule / "s", population=NAMES, **extra)
            path = tmp_path / rule / f"global-{number}"
            step.save(path)
            for name, array in read_safetensors(path).items():
                np.testing.assert_allclose(array, average[name].numpy(), rtol=1e-6, atol=1e-6)


def test_what_a_round_will_do_can_be_seen(tmp_path):
    base = _write(tmp_path / "global", _start())
    sent = {"a": _write(tmp_path / "a", _train(_start(), "a", 1))}
    step = ws.federated.fedau(sent, base, state=tmp_path / "state", population=NAMES)
    assert step.factors == {"a": 0.25}
    assert step.stored == {}
    assert "Round(1 of fedau, 1 of 4 clients)" in repr(step)
    assert not (tmp_path / "state").exists()


# -- the state and the model belong together --------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """Return the function that prepares FedVARP's second round, after a first one that was saved."""
    base = _write(tmp_path / "global-0", _start())
    sent = {n: _write(tmp_path / "one" / n, _train(_start(), n, 1)) for n in ("a", "b")}
    ws.federated.fedvarp(sent, base, state=tmp_path / "state", population=NAMES).save(tmp_path / "global-1")
    model = read_safetensors(tmp_path / "global-1")
    later = {n: _write(tmp_path / "two" / n, _train(model, n, 2)) for n in ("b", "c")}
    return lambda: ws.federated.fedvarp(later, tmp_path / "global-1", state=tmp_path / "state")


def _state(tmp_path):
    return json.loads((tmp_path / "state" / "state.json").read_text())


def test_a_failed_round_leaves_the_state_as_it_was(started, tmp_path, monkeypatch):
    before = _state(tmp_path)
    (tmp_path / "global-2").mkdir()
    (tmp_path / "global-2" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists already"):
        started().save(tmp_path / "global-2")
    assert _state(tmp_path) == before
    # And where it fails late, after the updates were written.
    from weightsmith.plan.merged import LazyCheckpoint

    step = started()
    monkeypatch.setattr(LazyCheckpoint, "write_beside", _fail)
    with pytest.raises(OutputError, match="disk full"):
        step.save(tmp_path / "other")
    assert _state(tmp_path) == before
    assert not (tmp_path / "state" / "next.json").exists()
    stored = {client["update"] for client in before["clients"].values()} - {None}
    assert {name for name in os.listdir(tmp_path / "state") if name.endswith(".safetensors")} == stored
    monkeypatch.undo()
    step.save(tmp_path / "other")
    assert _state(tmp_path)["round"] == 2


def _fail(*_):
    raise OutputError("disk full")


@pytest.mark.parametrize("at", ["before", "after"])
def test_killed_round_and_state_still_belong_together(started, tmp_path, at):
    """Killed just before the model appears, the round never was; just after, it was."""
    reference = tmp_path / "reference"
    expected = {name: tensor.numpy() for name, tensor in started().model.items()}
    program = f"""
        import os
        import weightsmith as ws
        from weightsmith.checkpoint.staging import Staging
        publish = Staging.publish
        def stop(self):
            if self.target.name == "global-2":
                if {at == "after"}:
                    publish(self)
                os._exit(9)
            publish(self)
        Staging.publish = stop
        two = {{n: {str(tmp_path / "two")!r} + "/" + n for n in "bc"}}
        ws.federated.fedvarp(two, {str(tmp_path / "global-1")!r}, state={str(tmp_path / "state")!r}).save(
            {str(tmp_path / "global-2")!r})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 9
    assert _state(tmp_path)["round"] == 1
    assert (tmp_path / "global-2").exists() == (at == "after")
    if at == "before":
        step = started()
        assert step.number == 2
        step.save(tmp_path / "global-2")
    else:
        # The next one to open the state finds that the round took place.
        assert started().number == 3
    assert _state(tmp_path)["round"] == 2
    for name, array in read_safetensors(tmp_path / "global-2").items():
        np.testing.assert_array_equal(array, expected[name])
    named = {client["update"] for client in _state(tmp_path)["clients"].values()} - {None}
    assert set(os.listdir(tmp_path / "state")) == named | {"state.json", "lock"}
    assert named == {"000000-1.safetensors", "000001-2.safetensors", "000002-2.safetensors"}
    assert not reference.exists()


def test_a_round_prepared_from_an_older_state_is_refused(started, tmp_path):
    one, other = started(), started()
    one.save(tmp_path / "global-2")
    with pytest.raises(OutputError, match="has moved on"):
        other.save(tmp_path / "global-3")
    with pytest.raises(OutputError, match="has moved on"):
        one.save(tmp_path / "global-4")
    assert not (tmp_path / "global-3").exists()


def test_a_state_is_of_one_rule_and_one_population(started, tmp_path):
    base, sent = tmp_path / "global-1", {"a": tmp_path / "one" / "a"}
    with pytest.raises(RecipeError, match="is of fedvarp, not of mifa"):
        ws.federated.mifa(sent, base, state=tmp_path / "state")
    with pytest.raises(RecipeError, match="'e' is not in the state"):
        ws.federated.fedvarp(sent, base, state=tmp_path / "state", population=[*NAMES, "e"])
    with pytest.raises(RecipeError, match="client 'x' is not of the population"):
        ws.federated.fedvarp({"x": tmp_path / "one" / "a"}, base, state=tmp_path / "state")
    with pytest.raises(RecipeError, match="give population"):
        ws.federated.fedau(sent, base, state=tmp_path / "new")
    with pytest.raises(RecipeError, match="by name"):
        ws.federated.fedvarp([base], base, state=tmp_path / "state")
    with pytest.raises(MethodError, match="cutoff is 0"):
        ws.federated.fedau(sent, base, state=tmp_path / "new", population=NAMES, cutoff=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=2), "format is 2"),
        (lambda s: s.update(round=-1), "round is -1"),
        (lambda s: s.update(clients={}), "clients is {}"),
        (lambda s: s["clients"].update(a=[]), r"client 'a' is \[\]"),
        (lambda s: s["clients"]["a"].update(intervals=2), "participation of 'a'"),
        (lambda s: s["clients"]["a"].update(absent=1e300), "participation of 'a'"),
        (lambda s: s["clients"]["a"].update(update="../../secret.safetensors"), "update is"),
        (lambda s: s["clients"]["a"].update(update=3), "update is 3"),
    ],
)
def test_a_state_that_none_wrote_is_refused(started, tmp_path, change, message):
    content = _state(tmp_path)
    change(content)
    (tmp_path / "state" / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        started()


def test_a_state_cut_short_is_refused(started, tmp_path):
    file = tmp_path / "state" / "state.json"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"state\.json is not JSON"):
        started()


def test_a_full_disk_before_the_model_leaves_nothing_of_the_round(started, tmp_path, monkeypatch):
    before = _state(tmp_path)
    monkeypatch.setattr("weightsmith.federated.state._write", _no_space)
    with pytest.raises(OutputError, match=r"cannot write the state in .*state: No space left"):
        started().save(tmp_path / "global-2")
    assert _state(tmp_path) == before
    assert not (tmp_path / "global-2").exists()


def test_a_full_disk_after_the_model_does_not_lose_the_round(started, tmp_path, monkeypatch):
    step = started()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: _no_space() if str(b).endswith("state.json") else replace(a, b))
    with pytest.raises(OutputError, match="No space left"):
        step.save(tmp_path / "global-2")
    monkeypatch.undo()
    assert _state(tmp_path)["round"] == 1
    assert started().number == 3
    assert _state(tmp_path)["round"] == 2


def _no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_two_processes_do_not_replace_one_state(started, tmp_path):
    step = started()
    with (tmp_path / "state" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is replacing the state"):
            step.save(tmp_path / "global-2")
    step.save(tmp_path / "global-2")


def test_a_target_that_is_there_already_is_no_sign_of_the_round(started, tmp_path):
    """The same recipe of the same names, but other files: what lay at the target before is not this round's."""
    step = started()
    step.model.save(tmp_path / "global-2")
    # The client trains again, and its folder has the old name.
    _write(tmp_path / "two" / "b", _train(_start(), "b", 99))
    again = started()
    with pytest.raises(OutputError, match="exists already"):
        again.save(tmp_path / "global-2")
    assert _state(tmp_path)["round"] == 1
    again.save(tmp_path / "global-2", overwrite=True)
    assert _state(tmp_path)["round"] == 2


def test_a_client_that_sends_the_base_back_is_stored_as_no_change(tmp_path):
    base = _write(tmp_path / "global", _start())
    sent = {"a": base, "b": _write(tmp_path / "b", _train(_start(), "b", 1))}
    step = ws.federated.fedvarp(sent, base, state=tmp_path / "state", population=NAMES)
    step.save(tmp_path / "next")
    assert not any(array.any() for array in read_safetensors(tmp_path / "state" / "000000-1.safetensors").values())
    for name, array in read_safetensors(tmp_path / "next").items():
        expected = _start()[name] + (_train(_start(), "b", 1)[name] - _start()[name]) / 2
        np.testing.assert_allclose(array, expected, atol=1e-6)
