"""What the journal proves done is not read again; what it cannot prove is made again."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_execution import StopAt

import weightsmith as ws
from conftest import llama_tensors, write_safetensors
from weightsmith.checkpoint.staging import Staging
from weightsmith.engine import writeback
from weightsmith.engine.shards import Shards
from weightsmith.engine.writeback import WriteBehind
from weightsmith.errors import Interrupted, OutputError


@pytest.fixture
def inputs(write_model) -> list[Path]:
    return [write_model(n, llama_tensors(i, layers=3, hidden=32)) for i, n in enumerate(("base", "a", "b"))]


def ties(inputs: list[Path], **more: Any) -> ws.LazyCheckpoint:
    return ws.merge("ties", inputs[1:], inputs[0], weight=0.5, density=0.4, **more)


def interrupted(merged: ws.LazyCheckpoint, target: Path, count: int) -> set[str]:
    """Stop a run after some tensors, and return what its journal holds."""
    with pytest.raises(Interrupted):
        merged.save(target, threads=1, shard_size=9000, progress=StopAt(count, KeyboardInterrupt()))
    lines = (target.parent / f".{target.name}.weightsmith" / "journal").read_text().splitlines()
    return {name for line in lines[1:] for name in json.loads(line)["done"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a file lies."""
    found = path.read_bytes()
    length = int.from_bytes(found[:8], "little")
    header = json.loads(found[8 : 8 + length])
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.fixture
def read_bytes(monkeypatch) -> Counter[tuple[str, int]]:
    """Count how often each byte of each file is read, in blocks of four."""
    counts: Counter[tuple[str, int]] = Counter()
    plain = os.preadv

    def preadv(handle: int, buffers: Any, offset: int, *rest: Any) -> int:
        count = plain(handle, buffers, offset, *rest)
        path = os.readlink(f"/proc/self/fd/{handle}")
        counts.update((path, at // 4) for at in range(offset, offset + count, 4))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds names by Linux's /proc")
@pytest.mark.parametrize("count", [1, 5, 11])
@pytest.mark.parametrize("method", ["ties", "linear", "passthrough"])
def test_not_a_byte_of_a_finished_tensor_is_read_again(inputs, tmp_path, read_bytes, count, method):
    merged = {
        "ties": ties(inputs),
        "linear": ws.merge("linear", inputs, weight=1.0),
        "passthrough": ws.merge("passthrough", inputs[:1]),
    }[method]
    finished = interrupted(merged, tmp_path / "out", count)
    assert count <= len(finished) < len(merged)
    read_bytes.clear()
    summary = merged.save(tmp_path / "out", threads=1, shard_size=9000)
    assert summary.resumed == len(finished)
    models = {"ties": inputs, "linear": inputs, "passthrough": inputs[:1]}[method]
    for model in models:
        path = model / "model.safetensors"
        for name, (start, stop) in ranges(path).items():
            times = {read_bytes[str(path), at // 4] for at in range(start, stop, 4)}
            assert (max(times) == 0) == (name in finished), name
    merged.save(tmp_path / "whole", threads=1, shard_size=9000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_statistics_over_several_tensors_are_taken_again_and_are_the_same(inputs, tmp_path):
    """They need every tensor of their scope, finished or not: the one exception, and documented."""
    merged = ties(inputs, trim_scope="model")
    assert interrupted(merged, tmp_path / "out", 5)
    merged.save(tmp_path / "out", shard_size=9000)
    merged.save(tmp_path / "whole", shard_size=9000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_file_that_was_lost_is_made_again_however_often_the_run_dies(inputs, tmp_path, monkeypatch):
    """The second run makes the file anew, empty, and dies; the third must not believe what the journal said of it."""
    merged = ties(inputs)
    interrupted(merged, tmp_path / "out", 9)
    lost = sorted((tmp_path / ".out.weightsmith" / "content").glob("*.safetensors"))[0]
    lost.unlink()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", die)
        with pytest.raises(Interrupted):
            merged.save(tmp_path / "out", threads=1, shard_size=9000)
    assert lost.exists()
    summary = merged.save(tmp_path / "out", shard_size=9000)
    assert 0 < summary.resumed < 9
    merged.save(tmp_path / "whole", shard_size=9000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_a_run_of_another_layout_left_without_a_journal_is_not_published(inputs, tmp_path):
    with Staging(tmp_path / "out") as staging:
        (staging.content / "model-00007-of-00009.safetensors").write_bytes(b"rubbish")
        (staging.content / "unet").mkdir()
        (staging.content / "unet" / "x").write_text("x")
        staging.journal.write_bytes(b"{torn")
    ties(inputs).save(tmp_path / "out")
    ties(inputs).save(tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_results_that_one_run_let_pass_are_an_error_in_the_next(write_model, tmp_path):
    large = {name: value * 60_000 for name, value in llama_tensors(0).items()}
    merged = ws.merge("linear", [write_model("a", large)], weight=1.0, dtype="float16")
    with pytest.raises(Interrupted):
        merged.save(tmp_path / "out", threads=1, on_nonfinite="warn", progress=StopAt(8, KeyboardInterrupt()))
    with pytest.raises(OutputError, match="results are NaN or infinite in float16"):
        merged.save(tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert merged.save(tmp_path / "out", on_nonfinite="warn").nonfinite


@pytest.mark.parametrize("verify", [False, True])
def test_inputs_whose_content_alone_changed_are_found_where_they_are_hashed(inputs, tmp_path, verify):
    """Same size, same header, same time of change: nothing but a hash of all of it tells."""
    path = inputs[1] / "model.safetensors"
    facts, before = path.stat(), path.read_bytes()
    with pytest.raises(Interrupted):
        ties(inputs).save(tmp_path / "out", threads=1, verify=verify, progress=StopAt(3, KeyboardInterrupt()))
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    if verify:
        with pytest.raises(OutputError, match="its content of the inputs differ from this run's.*--restart"):
            ties(inputs).save(tmp_path / "out", verify=True)
        assert ties(inputs).save(tmp_path / "out", verify=True, restart=True).resumed == 0
    else:
        assert ties(inputs).save(tmp_path / "out").resumed == 3


def test_another_version_does_not_go_on(inputs, tmp_path, monkeypatch):
    interrupted(ties(inputs), tmp_path / "out", 3)
    monkeypatch.setattr("weightsmith.plan.output.__version__", "9.9.9")
    with pytest.raises(OutputError, match=r"its weightsmith version differ.*--restart"):
        ties(inputs).save(tmp_path / "out", shard_size=9000)


# -- syncs that fail --------------------------------------------------------------------------------------------------


def test_after_a_sync_that_failed_nothing_is_noted_as_done(inputs, tmp_path, monkeypatch):
    """The kernel tells of a write that failed once: the next sync succeeds, and proves nothing."""
    plain = Shards.sync
    failed = []

    def sync(self: Shards, shards: Any) -> None:
        if not failed:
            failed.append(1)
            raise OSError(5, os.strerror(5))
        plain(self, shards)

    monkeypatch.setattr(Shards, "sync", sync)
    monkeypatch.setattr("weightsmith.engine.executor._JOURNAL_EVERY", 0.0)
    with pytest.raises(OutputError, match="Input/output error"):
        ties(inputs).save(tmp_path / "out", threads=1)
    lines = (tmp_path / ".out.weightsmith" / "journal").read_text().splitlines()
    assert len(lines) == 1


@pytest.mark.skipif(writeback._sync_file_range() is None, reason="Linux only")
@pytest.mark.parametrize(("number", "raised"), [(5, True), (28, True), (38, False), (22, False)])
def test_a_write_that_fails_behind_is_told_at_the_next_sync(monkeypatch, number, raised):
    monkeypatch.setattr(writeback, "_STEP", 10)
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: lambda *_: -1)
    monkeypatch.setattr(writeback.ctypes, "get_errno", lambda: number)
    behind = WriteBehind()
    with behind:
        behind.wrote(7, 20)
        behind._thread.join(0.2)
    behind.check(8)
    if raised:
        with pytest.raises(OSError, match=r"Input/output|No space"):
            behind.check(7)
    else:
        behind.check(7)


def test_a_large_file_is_written_and_hashed_in_parts(tmp_path):
    """Empty tensors, scalars and one larger than what verify reads at a time."""
    tensors = {"a.weight": np.arange(3 << 20, dtype=np.float32), "b.weight": np.zeros((0, 3)), "c": np.float32(1)}
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    ws.merge("linear", [tmp_path / "in"], weight=1.0).save(tmp_path / "out")
    assert ws.verify(tmp_path / "out").ok
    assert ws.reproduce(tmp_path / "out").ok
