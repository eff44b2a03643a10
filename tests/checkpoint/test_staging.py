"""A target does not exist, or is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from weightsmith.checkpoint.staging import Staging
from weightsmith.errors import OutputError


def test_nothing_is_visible_before_it_is_published(tmp_path):
    target = tmp_path / "out"
    with Staging(target) as staging:
        (staging.content / "a").write_text("x")
        assert not target.exists()
        staging.publish()
    assert (target / "a").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_what_was_begun_is_kept_for_the_next_run_unless_it_is_discarded(tmp_path):
    with Staging(tmp_path / "out") as staging:
        staging.journal.write_text("begun")
        (staging.content / "a").write_text("x")
    with Staging(tmp_path / "out") as staging:
        assert (staging.content / "a").read_text() == "x"
    with Staging(tmp_path / "out", restart=True) as staging:
        assert list(staging.content.iterdir()) == []
    # A run that ends before it begins leaves nothing behind.
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_or_replaced_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        Staging(target)
    with Staging(target, overwrite=True) as staging:
        (staging.content / "new").write_text("new")
        assert (target / "old").exists()
        staging.publish()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_the_target(tmp_path):
    (tmp_path / "out").mkdir()
    with Staging(tmp_path / "out") as staging:
        (staging.content / "a").write_text("x")
        staging.publish()
    assert (tmp_path / "out" / "a").exists()


def test_a_single_file_is_published_as_a_file(tmp_path):
    with Staging(tmp_path / "out.safetensors") as staging:
        (staging.content / "out.safetensors").write_text("x")
        staging.publish()
    assert (tmp_path / "out.safetensors").read_text() == "x"


def test_a_second_run_into_one_target_is_refused_until_the_first_ends(tmp_path):
    holder = "import sys; from weightsmith.checkpoint.staging import Staging; from pathlib import Path\n"
    holder += "s = Staging(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run"):
            Staging(tmp_path / "out")
        process.kill()
        process.wait()
    Staging(tmp_path / "out").__exit__(None, None, None)


def test_the_lock_of_a_folder_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Between opening and locking the file, the run that held it ends and removes the folder."""
    plain = fcntl.flock
    removed = []

    def flock(handle, operation):
        if not removed:
            removed.append(1)
            shutil.rmtree(tmp_path / ".out.weightsmith")
        plain(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Staging(tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        Staging(tmp_path / "out")


def test_folders_around_the_target_are_made_and_synced(tmp_path, monkeypatch):
    synced = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or plain(fd))
    with Staging(tmp_path / "a" / "b" / "out") as staging:
        (staging.content / "x").write_text("x")
        staging.publish()
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(synced)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write beside"):
        Staging(tmp_path / "out")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write beside"):
        Staging(tmp_path / "file" / "out")
