"""What goes wrong outside of us: one line that begins with ``error:``, exit code 1, and nothing half-done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import llama_tensors, write_safetensors
from weightsmith.cli.main import main

# Runs the command line after a line of our own.
SCRIPT = """
import os, sys, time
import weightsmith.engine.shards as shards, weightsmith.engine.executor as executor
def at_first_write(action, plain=shards._write_all, met=[]):
    def write(*arguments):
        if len(met) == 2: action()
        met.append(1)
        plain(*arguments)
    shards._write_all = write
{before}
from weightsmith.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture
def inputs(write_model) -> list[Path]:
    return [write_model(f"in/{name}", llama_tensors(i, layers=3, hidden=32)) for i, name in enumerate("abc")]


def flags(inputs: list[Path], *more: str) -> list[str]:
    base, one, other = map(str, inputs)
    chosen = ["--method", "dare_ties", "--base", base, "--model", one, "--model", other]
    return [*chosen, "-p", "weight=0.5", "-p", "density=0.4", "--seed", "5", "--shard-size", "9KB", "--quiet", *more]


def merge(
    inputs: list[Path], target: Path, *more: str, before: str = "", wrap: tuple[str, ...] = (), debug: bool = False
) -> subprocess.CompletedProcess[str]:
    call = [*wrap, sys.executable, "-c", SCRIPT.format(before=before), *(["--debug"] if debug else [])]
    arguments = ["merge", *flags(inputs, *more), str(target)]
    return subprocess.run([*call, *arguments], capture_output=True, text=True, check=False)


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_one_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def undisturbed(inputs: list[Path], target: Path, *more: str) -> None:
    """Merge without anything in the way, in this process: it is quicker."""
    with pytest.raises(SystemExit) as end:
        main(["merge", *flags(inputs, *more), str(target)])
    assert end.value.code == 0


def assert_goes_on(inputs: list[Path], target: Path, *more: str) -> None:
    """The same command ends, with the bytes of an undisturbed run, and leaves nothing beside."""
    assert not target.exists()
    undisturbed(inputs, target, *more)
    whole = target.with_name("whole")
    undisturbed(inputs, whole)
    assert content(target) == content(whole)
    shutil.rmtree(whole)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


def can(*call: str) -> bool:
    try:
        return subprocess.run(call, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


mounts = pytest.mark.skipif(
    not can("unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"),
    reason="only root may mount a small filesystem",
)
# Root may read and write everything, unless it gives that up.
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
restrained = pytest.mark.skipif(
    bool(UNPRIVILEGED) and not can(*UNPRIVILEGED, "true"), reason="runs as root, which may do everything"
)


# -- the output -------------------------------------------------------------------------------------------------------


@mounts
def test_a_disk_that_is_full_and_then_larger(inputs, tmp_path):
    """Too small for the weights: found before anything is written. For the files beside them: at the write.

    The disk grows by a little after each failure, so that it is full in many places.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size=40k tmpfs {disk} || exit 9
for size in 40 56 64 72 80 88 200; do
  mount -o remount,size=${{size}}k {disk}
  "$@" && break
  test $? = 1 || exit 8
  test ! -e {disk}/out || exit 7
done
ls -A {disk}
cp -r {disk}/out {tmp_path}/kept
"""
    done = merge(inputs, disk / "out", wrap=("unshare", "-m", "bash", "-c", script, "bash"))
    assert (done.returncode, done.stdout) == (0, "out\n"), done
    said = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in said)
    assert "free some space or choose another target" in said[0]
    assert "No space left on device" in said[-1] or "the disk is full" in said[-1]
    assert "what is finished is kept in" in said[-1]
    undisturbed(inputs, tmp_path / "whole")
    assert content(tmp_path / "kept") == content(tmp_path / "whole")


@pytest.mark.parametrize("limit", [2_000, 8_000])
def test_a_limit_on_the_size_of_files(inputs, out, limit):
    before = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    assert_one_error(merge(inputs, out, before=before), "cannot write", "File too large")
    assert_goes_on(inputs, out)


@mounts
def test_a_target_on_a_filesystem_that_is_only_read(inputs, out):
    folder = out.parent
    script = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && "$@"'
    done = merge(inputs, out, wrap=("unshare", "-m", "bash", "-c", script, "bash"))
    assert_one_error(done, f"cannot write beside {out}: Read-only file system")
    assert list(folder.iterdir()) == []


@restrained
def test_a_target_in_a_folder_that_may_not_be_written(inputs, out):
    out.parent.chmod(0o500)
    done = merge(inputs, out, wrap=UNPRIVILEGED)
    out.parent.chmod(0o700)
    assert_one_error(done, f"cannot write beside {out}: Permission denied")
    assert_goes_on(inputs, out)


@mounts
def test_a_target_that_is_a_mounted_disk(inputs, out):
    out.mkdir()
    script = f'mount -t tmpfs tmpfs {out} && "$@"'
    done = merge(inputs, out, wrap=("unshare", "-m", "bash", "-c", script, "bash"))
    assert_one_error(done, "is where a filesystem is mounted", f"choose a folder in it: {out}/merged")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_target_that_is_a_link_to_another_filesystem(inputs, out, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == out.parent.stat().st_dev:
        pytest.skip("there is no other filesystem")
    far = shared / f"weightsmith-{os.getpid()}"
    far.mkdir()
    try:
        (far / "old").mkdir()
        (far / "old" / "file").write_text("old")
        undisturbed(inputs, tmp_path / "whole")
        out.symlink_to(far / "new")
        assert merge(inputs, out).returncode == 0
        assert out.is_symlink()
        assert content(far / "new") == content(tmp_path / "whole")
        out.unlink()
        out.symlink_to(far / "old")
        assert_one_error(merge(inputs, out), "exists already")
        assert merge(inputs, out, "--overwrite").returncode == 0
        assert content(far / "old") == content(tmp_path / "whole")
        assert sorted(path.name for path in far.iterdir()) == ["new", "old"]
    finally:
        shutil.rmtree(far)


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_the_place_of_a_file(inputs, out):
    out.write_text("x")
    assert_one_error(merge(inputs, out, "--overwrite"), "is a file, and a folder is to be written there")
    assert out.read_text() == "x"
    folder = out.with_suffix(".safetensors")
    folder.mkdir()
    assert_one_error(merge(inputs, folder), "is a folder, and a file is to be written there")
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.safetensors"]


def test_a_target_that_appears_meanwhile_is_kept(inputs, out):
    before = f"at_first_write(lambda: (os.mkdir({str(out)!r}), open({str(out / 'theirs')!r}, 'w').close()))"
    assert_one_error(merge(inputs, out, before=before), "exists already")
    assert [path.name for path in out.iterdir()] == ["theirs"]
    shutil.rmtree(out)
    assert_goes_on(inputs, out)


@pytest.mark.parametrize("allowed", [9, 11, 13])
def test_too_many_open_files(inputs, out, allowed):
    before = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({allowed}, {allowed}))"
    assert_one_error(merge(inputs, out, before=before), "Too many open files")
    assert_goes_on(inputs, out)


def test_no_memory(inputs, out):
    before = "def full(*_): raise MemoryError\nexecutor._Run._do = full"
    assert_one_error(merge(inputs, out, before=before), "out of memory")
    assert_goes_on(inputs, out)


def test_debug_shows_where(inputs, out):
    out.write_text("x")
    done = merge(inputs, out, debug=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "OutputError" in done.stderr


# -- the inputs -------------------------------------------------------------------------------------------------------


@restrained
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_an_input_that_may_not_be_read(inputs, out, name):
    path = inputs[1] / name
    mode = path.stat().st_mode
    path.chmod(0)
    done = merge(inputs, out, wrap=UNPRIVILEGED)
    path.chmod(mode)
    assert_one_error(done, str(path) if name != "." else str(inputs[1]), "Permission denied")
    assert_goes_on(inputs, out)


def test_a_read_error_names_the_file(inputs, out):
    before = """
plain = os.preadv
def preadv(*arguments, count=[0]):
    count[0] += 1
    if count[0] > 30: raise OSError(5, os.strerror(5))
    return plain(*arguments)
os.preadv = preadv
"""
    assert_one_error(merge(inputs, out, before=before), "cannot read ", "model.safetensors: Input/output error")
    assert_goes_on(inputs, out)


def test_a_copy_in_the_kernel_that_fails_names_the_file_that_is_bad(inputs, out):
    before = "def bad(*_): raise OSError(5, os.strerror(5))\nos.copy_file_range = bad"
    call = [sys.executable, "-c", SCRIPT.format(before=before), "merge", "--method", "passthrough", "--quiet"]
    done = subprocess.run([*call, "--model", str(inputs[0]), str(out)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(out).keys() >= {"model.safetensors"}


@pytest.mark.parametrize("size", [0, 3000])
def test_an_input_that_is_cut_short_midway(inputs, out, size):
    path = inputs[1] / "model.safetensors"
    original = path.read_bytes()
    done = merge(inputs, out, before=f"at_first_write(lambda: os.truncate({str(path)!r}, {size}))")
    assert_one_error(done, f"{path} ends ", "it is cut short or has been changed since")
    facts = path.stat()
    path.write_bytes(original)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert_one_error(merge(inputs, out), "its inputs differ from this run's", f"{path} (modified)", "--restart")
    assert_goes_on(inputs, out, "--restart")


def test_an_input_that_grows_or_is_written_midway(inputs, out):
    path = inputs[1] / "model.safetensors"
    original = path.read_bytes()
    for written in (original + b"\0", original[:-4] + b"abcd"):
        path.write_bytes(original)
        before = f"at_first_write(lambda: open({str(path)!r}, 'wb').write({written!r}))"
        done = merge(inputs, out, "--restart", before=before)
        assert_one_error(done, f"{path} was changed while it was read", "--restart")
        assert not out.exists()
    path.write_bytes(original)
    assert_goes_on(inputs, out, "--restart")


def test_an_input_that_vanishes_midway_is_read_to_its_end(inputs, out):
    """Who has a file open keeps it: the result is right."""
    path = inputs[1] / "model.safetensors"
    original = path.read_bytes()
    undisturbed(inputs, out.with_name("whole"))
    done = merge(inputs, out, before=f"at_first_write(lambda: os.unlink({str(path)!r}))")
    assert (done.returncode, done.stderr) == (0, "")
    assert not path.exists()
    path.write_bytes(original)
    found, whole = content(out), content(out.with_name("whole"))
    assert {n: c for n, c in found.items() if "model" in n} == {n: c for n, c in whole.items() if "model" in n}


def test_an_input_that_vanished_before_it_goes_on(inputs, out):
    """The journal alone is no reason to believe in a file that is gone."""
    merge(inputs, out, before="at_first_write(lambda: os._exit(9))")
    shutil.rmtree(inputs[2])
    assert_one_error(merge(inputs, out), f"there is no file or folder {inputs[2]}")
    assert not out.exists()
    assert (out.parent / ".out.weightsmith" / "journal").exists()


def test_a_companion_that_vanishes_midway(inputs, out):
    path = inputs[0] / "generation_config.json"
    path.write_text("{}")
    done = merge(inputs, out, before=f"at_first_write(lambda: os.unlink({str(path)!r}))")
    assert_one_error(done, f"{path} was there when its model was opened, and is gone")
    assert_goes_on(inputs, out)


def test_what_an_earlier_run_copied_is_not_published_when_it_is_gone(inputs, out):
    """The first run dies beside the weights; the file it had copied is not an input any more when it goes on."""
    path = inputs[0] / "generation_config.json"
    path.write_text("{}")
    die = "import weightsmith.plan.output as m\ndef stop(*_): os._exit(9)\nm.write_manifest = stop"
    assert merge(inputs, out, before=die).returncode == 9
    assert (out.parent / ".out.weightsmith" / "content" / path.name).exists()
    path.unlink()
    assert_goes_on(inputs, out)


# -- two runs ---------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives_and_not_when_it_is_dead(inputs, out):
    """The one that lives stops at its first write; killed, it holds nothing, and the next goes on."""
    before = "at_first_write(lambda: (print('there', flush=True), time.sleep(60)))"
    call = [sys.executable, "-c", SCRIPT.format(before=before), "merge", *flags(inputs), str(out)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "there\n"
        for more in ((), ("--restart",), ("--overwrite",)):
            assert_one_error(merge(inputs, out, *more), f"another run is writing {out} now")
        first.kill()
        first.wait()
    assert_goes_on(inputs, out)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_matrix_too_large_for_the_memory_is_an_error_at_plan_time(tmp_path, out):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        tensors = {"small.weight": np.zeros(4, np.float32), "large.weight": np.full((2000, 1000), seed + 1, np.float32)}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    call = [sys.executable, "-m", "weightsmith", "merge", "--method", "nuslerp", "--quiet"]
    call += ["--model", str(tmp_path / "a"), "--model", str(tmp_path / "b"), "-p", "weight=0.5"]
    call += ["-p", "nuslerp_flatten=false", "-p", "nuslerp_row_wise=true", "--memory"]
    done = subprocess.run([*call, "120MB", str(out)], capture_output=True, text=True, check=False)
    assert_one_error(done, "--memory allows 120 MB")
    assert re.search(r"large\.weight needs about 1[5-9]\d|2\d\d MB of memory in one thread", done.stderr)
    assert list(out.parent.iterdir()) == []
    done = subprocess.run([*call, "300MB", str(out)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
