"""What goes on between the files and the blocks: reading ahead, writing behind, copies in the kernel, BLAS threads."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import weightsmith as ws
from conftest import read_safetensors
from weightsmith.checkpoint.safetensors import read_header
from weightsmith.checkpoint.storage import LocalSource
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine import ahead, writeback
from weightsmith.engine.ahead import ReadAhead
from weightsmith.engine.plan import Task
from weightsmith.engine.writeback import WriteBehind
from weightsmith.errors import CheckpointError
from weightsmith.methods import registry

linux = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux alone copies in the kernel")


def eventually(condition: Any) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


# -- carried tensors ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(write_model):
    rng = np.random.default_rng(0)
    return write_model("a", {"model.norm.weight": rng.random(5), "lm_head.weight": rng.random((700, 900), np.float32)})


@linux
def test_carried_tensors_are_copied_in_the_kernel(model, tmp_path, monkeypatch):
    copied = []
    plain = os.copy_file_range

    def spy(*arguments: Any) -> int:
        copied.append(plain(*arguments))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", spy)
    monkeypatch.setattr(os, "pwrite", no_writing_of_weights(os.pwrite))
    ws.merge("passthrough", [model]).save(tmp_path / "out")
    assert sum(copied) == 8 * 5 + 4 * 700 * 900
    assert_same(tmp_path / "out", model)


@linux
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot_copy_they_are_read_and_written(model, tmp_path, monkeypatch, number):
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    ws.merge("passthrough", [model]).save(tmp_path / "out")
    assert_same(tmp_path / "out", model)


@linux
def test_a_file_cut_short_is_named_where_the_kernel_copies(model, tmp_path):
    checkpoint = ws.merge("passthrough", [model])
    os.truncate(model / "model.safetensors", 1_000_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte 1,000,000"):
        checkpoint.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def no_writing_of_weights(plain: Any) -> Any:
    def pwrite(handle: int, content: Any, offset: int) -> int:
        assert len(content) < 10_000, "weights were written"
        return int(plain(handle, content, offset))

    return pwrite


def assert_same(one: Any, other: Any) -> None:
    found, expected = read_safetensors(one), read_safetensors(other)
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


# -- reading ahead --------------------------------------------------------------------------------------------------


class Asked(Tensor):
    """A tensor that notes what is asked for ahead."""

    def __init__(self, name: str, size: int, log: list[tuple[str, int, int]]) -> None:
        self.name, self.shape, self.dtype, self.log = name, (size,), np.dtype(np.float32), log

    def read(self, start: int, stop: int) -> Any:
        raise AssertionError("reading ahead reads nothing")

    def prefetch(self, start: int, stop: int) -> bool:
        self.log.append((self.name, start, stop))
        return True


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(ahead, "_STEP", 400)
    monkeypatch.setattr(ahead, "_DISTANCE", 1000)
    monkeypatch.setattr(ahead, "_SMALL", 0)


@pytest.mark.usefixtures("small_steps")
def test_reading_ahead_keeps_its_distance_and_asks_for_everything_once():
    log: list[tuple[str, int, int]] = []
    tasks = [Task(name, np.dtype(np.float32), Asked(name, 300, log)) for name in ("a", "b", "c")]
    with ReadAhead(ahead.inputs_of(tasks)) as reader:
        assert eventually(lambda: len(log) == 2)
        time.sleep(0.05)
        assert log == [("a", 0, 100), ("a", 100, 200)]
        for _ in range(9):
            reader.worked(400)
        assert eventually(lambda: len(log) == 9)
    assert log == [(name, start, start + 100) for name in "abc" for start in (0, 100, 200)]


@pytest.mark.usefixtures("small_steps")
def test_reading_ahead_stops_with_the_run():
    log: list[tuple[str, int, int]] = []
    with ReadAhead(ahead.inputs_of([Task("a", np.dtype(np.float32), Asked("a", 10_000, log))])):
        assert eventually(lambda: log)
    assert not [thread for thread in threading.enumerate() if thread.name == "weightsmith-ahead"]
    assert len(log) < 5


def test_local_files_can_be_asked_for(model):
    tensors, _ = read_header(LocalSource(model / "model.safetensors"))
    assert tensors["lm_head.weight"].prefetch(0, 1000) == hasattr(os, "posix_fadvise")


# -- writing behind -------------------------------------------------------------------------------------------------


def test_files_are_sent_to_the_disk_each_time_enough_is_written(monkeypatch):
    sent: list[int] = []
    monkeypatch.setattr(writeback, "_STEP", 1000)
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: lambda handle, *_: sent.append(handle) or 0)
    with WriteBehind() as behind:
        behind.wrote(7, 600)
        time.sleep(0.05)
        assert sent == []
        behind.wrote(8, 600)
        assert eventually(lambda: len(sent) == 2)
        behind.wrote(8, 1000)
        assert eventually(lambda: len(sent) == 3)
    assert sent == [7, 8, 8]


def test_a_system_that_cannot_do_so_is_left_alone(monkeypatch):
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: None)
    with WriteBehind() as behind:
        behind.wrote(7, 1 << 40)


@pytest.mark.skipif(writeback._sync_file_range() is None, reason="Linux only")
def test_the_request_is_one_that_the_system_knows(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 10_000)
        file.flush()
        send = writeback._sync_file_range()
        assert send is not None
        assert send(file.fileno(), 0, 0, 3) == 0
        assert send(12345, 0, 0, 3) == -1


# -- linear algebra -------------------------------------------------------------------------------------------------


def test_threads_of_linear_algebra_do_not_fight_with_ours(model, tmp_path, monkeypatch):
    seen: list[int] = []

    def blas_threads() -> list[int]:
        return [found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @ws.method("counts_threads", reads="tensor")
    def counts_threads(block: Any) -> Any:
        seen.extend(blas_threads())
        return block.models[0]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if blas_threads() != [2] * len(blas_threads()) or not blas_threads():
            pytest.skip("NumPy's linear algebra has one thread here")
        ws.merge("counts_threads", [model]).save(tmp_path / "out", threads=2)
        assert set(seen) == {1}
        assert set(blas_threads()) == {2}
