"""Files are closed and opened again where there are many, and what is read is what it would be otherwise."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from weightsmith.checkpoint import open_files
from weightsmith.checkpoint.storage import LocalSource
from weightsmith.errors import CheckpointError

LIMIT = 20


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a hundred files of a hundred bytes, where no more than twenty may be open."""
    monkeypatch.setattr(open_files, "_limit", lambda: LIMIT)
    gc.collect()
    paths = [tmp_path / str(i) for i in range(100)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    return paths


def held(sources: list[LocalSource]) -> int:
    """Count those that are open."""
    return sum(source.handle >= 0 for source in sources)


def test_no_more_are_open_than_may_be_and_all_are_read(files: list[Path]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sources = [LocalSource(path) for path in files]
    assert all(source.size == 100 for source in sources)
    for _ in range(3):
        for i, source in enumerate(sources):
            assert source.read(10, 20) == bytes([i]) * 10
            assert held(sources) <= LIMIT
    assert len(os.listdir("/proc/self/fd")) <= before + LIMIT
    del source, sources
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_files_used_last_stay_open(files: list[Path]) -> None:
    favourite = LocalSource(files[0])
    handle = favourite.handle
    others = []
    for path in files[1:]:
        others.append(LocalSource(path))
        favourite.read(0, 1)
        assert favourite.handle == handle >= 0


def test_nothing_is_closed_while_it_is_read(files: list[Path]) -> None:
    sources = [LocalSource(path) for path in files]

    def read(i: int) -> bool:
        buffer = np.zeros(100, np.uint8)
        sources[i % 100].read_into(0, buffer)
        return bool((buffer == i % 100).all())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, np.random.default_rng(0).permutation(20_000).tolist()))
    # More threads than files may be open: each keeps its own, and none waits for another.
    barrier, handles = threading.Barrier(30), set()

    def hold(source: LocalSource) -> None:
        with source._open() as handle:
            barrier.wait()
            handles.add(handle)
            barrier.wait()

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(hold, sources[:30]))
    assert len(handles) == 30


def test_another_file_in_its_place_is_an_error(files: list[Path]) -> None:
    first, second, third = (LocalSource(path) for path in files[:3])
    others = [LocalSource(path) for path in files[3:]]
    assert held([first, second, third]) == 0
    files[0].write_bytes(b"x" * 100)
    os.replace(files[90], files[1])
    files[2].unlink()
    with pytest.raises(CheckpointError, match=r"0 was changed while it was read: .* --restart"):
        first.read(0, 1)
    with pytest.raises(CheckpointError, match="1 was changed while it was read"):
        second.read(0, 1)
    assert not third.prefetch(0, 1)
    with pytest.raises(CheckpointError, match="cannot open .*2 again: No such file"):
        third.read(0, 1)
    assert others[0].read(0, 1) == bytes([3])


def test_the_limit_is_half_of_what_the_process_may_open() -> None:
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert open_files._limit() == max(allowed // 2, 8)
