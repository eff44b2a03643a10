"""Every call on the way out fails in turn, or is the last: the target is absent or whole, and the same command ends it.

By default some calls are tried, spread over the run. All of them::

    WEIGHTSMITH_EVERY_FAULT=1 pytest tests/engine/test_faults.py -s
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import faults
import weightsmith as ws
from conftest import llama_tensors
from faults import CRASHED, KILLED, REFUSED, TOUCHED, Fault, Outcome
from weightsmith.engine import executor

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds names by Linux's /proc")

EVERY = bool(os.environ.get("WEIGHTSMITH_EVERY_FAULT"))
NUMBERS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE)
KINDS = ("raise", "stays", "half", "before", "after", "half-kill", "power")
SCENARIOS = ("sharded", "single", "overwrite", "overwrite-single", "overwrite-renames")
# How many calls of each kind, kills, and chains of faults are tried in the suite.
SOME = 4
KILLS = 200 if EVERY else 15
CHAINS = 300 if EVERY else 12
# Seconds that each call takes longer where kills are to hit all of them.
DELAY = 0.002


@dataclass(frozen=True)
class Case:
    """A merge into a target: how to begin, and what may be found at the target afterwards."""

    work: Path
    target: Path
    prepare: Callable[[], None]
    merge: Callable[[], None]
    old: dict[str, bytes] | None
    new: dict[str, bytes]
    by_renames: bool


def content(path: Path) -> dict[str, bytes] | None:
    if not path.exists():
        return None
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def save_and_record_after_each_tensor(merged: ws.LazyCheckpoint, target: Path, overwrite: bool) -> None:
    plain = executor._Run._do

    def do(self: executor._Run, *arguments: object) -> None:
        plain(self, *arguments)  # type: ignore[arg-type]
        self._record()

    executor._Run._do = do  # type: ignore[method-assign]
    merged.save(target, threads=1, shard_size=1500, overwrite=overwrite)


@pytest.fixture
def case(write_model, tmp_path, request) -> Case:
    scenario = request.param
    folders = [write_model(f"inputs/{n}", llama_tensors(i, layers=1)) for i, n in enumerate("abc")]
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folders[0] / name).write_text('{"a": 1}')
    work = tmp_path / "work"
    name = "out.safetensors" if "single" in scenario else "out"
    target = work / name
    overwrite = scenario.startswith("overwrite")
    ties = ws.merge("dare_ties", folders[1:], folders[0], weight=0.5, density=0.4, seed=5)
    other = ws.merge("linear", folders, weight=1.0)
    if scenario == "overwrite-renames":
        request.getfixturevalue("monkeypatch").setattr("weightsmith.checkpoint.staging._exchange", cannot_exchange)
    for merged, where in ((ties, "new"), (other, "old")):
        done = faults.run(lambda m=merged, w=where: m.save(tmp_path / w / name, shard_size=1500), tmp_path / "none")
        assert done.code == 0, done.text
    assert ws.verify(tmp_path / "new" / name).ok
    assert ws.verify(tmp_path / "old" / name).ok

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(tmp_path / "graveyard", ignore_errors=True)
        work.mkdir()
        if overwrite:
            source = tmp_path / "old" / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    old = content(tmp_path / "old" / name) if overwrite else None
    new = content(tmp_path / "new" / name)
    assert new is not None
    return Case(
        work,
        target,
        prepare,
        lambda: save_and_record_after_each_tensor(ties, target, overwrite),
        old,
        new,
        scenario.endswith("renames"),
    )


def cannot_exchange(*_: object) -> bool:
    return False


def attempt(case: Case, fault: Fault) -> tuple[Outcome, list[str]]:
    """Run with a fault, then without; return how the first ended, and what is wrong."""
    case.prepare()
    inputs = case.work.parent / "inputs"
    first = faults.run(case.merge, case.work, fault, inputs)
    wrong = []
    if first.code not in (0, REFUSED, KILLED):
        wrong.append({TOUCHED: "an input was touched", CRASHED: "a traceback"}.get(first.code, f"exit {first.code}"))
        wrong.append(first.text)
    if fault.kind not in ("raise", "half") and first.code == REFUSED:
        wrong.append(f"refused: {first.text}")
    found = content(case.target)
    if found not in (case.old, case.new) and not (found is None and is_recoverable(case)):
        wrong.append(f"the target is neither whole nor as before: {None if found is None else sorted(found)}")
    if first.code == 0 and found != case.new:
        wrong.append("it said that it was done, and the target is not")
    again = faults.run(case.merge, case.work)
    done_before = case.old is None and found == case.new
    if again.code != 0 and not (done_before and again.code == REFUSED and "exists already" in again.text):
        wrong.append(f"the same command again: {again.code} {again.text}")
    if content(case.target) != case.new:
        wrong.append("the same command again did not end with the same bytes")
    left = sorted(p.name for p in case.work.iterdir())
    if left != [case.target.name]:
        wrong.append(f"left behind: {left}")
    return first, wrong


def is_recoverable(case: Case) -> bool:
    """Without an exchange in one step there is a moment between two renames: the old one lies beside."""
    return case.by_renames and content(case.work / f".{case.target.name}.weightsmith" / "replaced") == case.old


def fault_at(number: int, kind: str, turn: int) -> Fault:
    if kind in ("raise", "stays", "half"):
        return Fault(number, "half" if kind == "half" else "raise", NUMBERS[turn % len(NUMBERS)], kind == "stays")
    return Fault(number, kind, seed=turn)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
def test_whatever_call_fails_or_is_the_last(case, kind):
    case.prepare()
    undisturbed = faults.run(case.merge, case.work)
    assert undisturbed.code == 0, undisturbed.text
    assert content(case.target) == case.new
    count = len(undisturbed.calls)
    writes = [i for i, call in enumerate(undisturbed.calls, 1) if call.split()[0] in ("write", "pwrite")]
    numbers = writes if kind.startswith("half") else list(range(1, count + 1))
    if not EVERY:
        offset = KINDS.index(kind) + 1
        numbers = sorted({numbers[(i * len(numbers) // SOME + offset * 7) % len(numbers)] for i in range(SOME)})
    bad = []
    ended: Counter[int] = Counter()
    turns = {"power": 5, "raise": len(NUMBERS)}.get(kind, 1) if EVERY else 1
    for number in numbers:
        for turn in range(turns):
            fault = fault_at(number, kind, number + turn)
            first, wrong = attempt(case, fault)
            ended[first.code] += 1
            if wrong:
                bad.append(f"{number} ({undisturbed.calls[number - 1]}) {fault}: " + "; ".join(wrong))
    print(f"{case.target.name} {kind}: {count} calls, {sum(ended.values())} runs, ended {dict(ended)}, {len(bad)} bad")
    assert not bad, f"{len(bad)} of {sum(ended.values())}:\n" + "\n".join(bad[:12])


@pytest.mark.parametrize("case", SCENARIOS, indirect=True)
def test_faults_one_after_another(case):
    """Each run of the same command meets a fault of its own, and what one left is what the next begins with."""
    rng = random.Random(7)
    bad = []
    runs = 0
    for chain in range(CHAINS // len(SCENARIOS)):
        case.prepare()
        faults_met = []
        for _ in range(rng.randint(2, 6)):
            fault = fault_at(rng.randint(1, 130), rng.choice(KINDS), rng.randrange(1 << 20))
            faults_met.append(fault)
            ended = faults.run(case.merge, case.work, fault)
            runs += 1
            found = content(case.target)
            if found not in (case.old, case.new) and not (found is None and is_recoverable(case)):
                bad.append(f"{chain}: {faults_met}: a target of {found and sorted(found)}")
            if ended.code == CRASHED:
                bad.append(f"{chain}: {faults_met}: {ended.text}")
            if found == case.new:
                break
        again = faults.run(case.merge, case.work)
        if content(case.target) != case.new:
            bad.append(f"{chain}: {faults_met}: then {again}")
    print(f"{case.target.name}: {CHAINS // len(SCENARIOS)} chains, {runs} runs, {len(bad)} bad")
    assert not bad, "\n".join(bad[:5])


def phase(calls: list[str]) -> str:
    """What a run was at, by the calls it had made."""
    if any(call.startswith(("rename", "exchange")) for call in calls):
        return "cleaning up"
    if any("publishing" in call and "open" not in call for call in calls):
        return "publishing"
    if any("config.json" in call for call in calls):
        return "files beside"
    journal = sum(call.startswith("write") and call.endswith("/journal") for call in calls)
    return "before weights" if not journal else "headers" if not any_weights(calls) else "weights"


def any_weights(calls: list[str]) -> bool:
    return sum(call.startswith("pwrite") for call in calls) > len({c for c in calls if c.startswith("pwrite")})


@pytest.mark.parametrize("case", ["sharded", "overwrite"], indirect=True)
def test_killed_at_random_moments(case):
    """SIGKILL from outside; the same command again, perhaps killed too, ends with the same bytes."""
    rng = random.Random(11)
    case.prepare()
    began = time.monotonic()
    whole = faults.kill_after(60, case.merge, case.work, DELAY)
    lasts = time.monotonic() - began
    assert (whole.code, content(case.target)) == (0, case.new)
    phases: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    while phases.total() < KILLS // 2:
        case.prepare()
        for _ in range(rng.choice((1, 1, 2, 3))):
            ended = faults.kill_after(rng.uniform(0, lasts), case.merge, case.work, DELAY)
            if ended.code == -signal.SIGKILL:
                phases[phase(ended.calls)] += 1
            found = content(case.target)
            assert found in (case.old, case.new), ended
            targets["new" if found == case.new else "old" if case.old else "absent"] += 1
            if found == case.new:
                break
        faults.run(case.merge, case.work)
        assert content(case.target) == case.new
        assert [path.name for path in case.work.iterdir()] == [case.target.name]
    print(f"{case.target.name}: {phases.total()} kills in {dict(phases)}; then the target was {dict(targets)}")
