"""The compiled library: that it is there, which part of it runs, and how it gets into a wheel."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import hard_numbers, run, same, stored
from test_program import Expressions, evaluated

from weightsmith.kernels import native
from weightsmith.kernels.trace import Untraceable
from weightsmith.quickstart import FINE_TUNES

ROOT = Path(__file__).parents[2]


def test_the_library_was_built():
    """Without it most tests of the kernels have nothing to run on, and would pass."""
    assert native.LIBRARY.exists(), "install weightsmith (pip install -e .), which compiles it"
    assert native.levels()
    assert native.levels()[0].level == 0


@pytest.fixture
def chosen(monkeypatch):
    """Return a function that loads the library as a new process with this environment does."""

    def load(wanted: str = "", file: Path = native.LIBRARY) -> native.Library | None:
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", wanted)
        monkeypatch.setattr(native, "LIBRARY", file)
        return native.library.__wrapped__()

    return load


def test_the_environment_chooses_a_level(chosen):
    known = [library.level for library in native.levels()]
    assert chosen("numpy") is None
    for wanted, level in [("0", 0), ("1", 0), ("3", 3), ("4", 4), ("99", 99), ("strict", 99), ("", 99), ("²", 99)]:
        assert chosen(wanted).level == max(one for one in known if one <= level), wanted


def test_every_level_has_the_same_operations():
    assert len({tuple(library.operations.items()) for library in native.levels()}) == 1


def test_without_a_library_there_is_none_and_no_error(chosen, tmp_path):
    assert chosen(file=tmp_path / "absent.so") is None
    for content in (b"", b"no library", b"\x7fELF"):
        (tmp_path / "broken.so").write_bytes(content)
        assert chosen(file=tmp_path / "broken.so") is None


def test_another_library_is_none_of_ours(chosen):
    from numpy._core import _multiarray_umath

    assert chosen(file=Path(_multiarray_umath.__file__)) is None


def test_merges_run_without_it():
    script = (
        "import numpy as np\n"
        "from weightsmith.engine.arrays import merge_arrays\n"
        "from weightsmith.kernels import native\n"
        "assert native.library() is None and native.levels() == []\n"
        "one = np.arange(100, dtype=np.float32)\n"
        "assert (merge_arrays('linear', [one, 3 * one], parameters={'weight': [1, 1]}) == 2 * one).all()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"WEIGHTSMITH_KERNELS": "numpy"})


# -- building -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    """Return a copy of what a wheel is built from: building leaves a library beside its sources."""
    copy = tmp_path / "sources"
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        copy.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy)
    for folder in ("src", "examples/zoo"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


def wheel(sources: Path, **environment: str) -> tuple[str, list[str]]:
    """Build a wheel and return its file's name and the names of what it holds."""
    pytest.importorskip("hatchling")
    pytest.importorskip("ziglang")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "built"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WEIGHTSMITH_")}
    subprocess.run(command, cwd=sources, check=True, capture_output=True, env=clean | environment)
    (file,) = (sources / "built").glob("*.whl")
    return file.name, zipfile.ZipFile(file).namelist()


LIBRARY_NAME = f"weightsmith/kernels/native/{native.LIBRARY.name}"


@pytest.mark.slow
def test_a_wheel_carries_the_library_of_its_platform(sources):
    name, held = wheel(sources)
    assert LIBRARY_NAME in held
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert name.endswith(f"-manylinux_2_17_{platform.machine()}.whl")


def test_a_pure_wheel_carries_none_and_is_for_every_platform(sources):
    name, held = wheel(sources, WEIGHTSMITH_PURE="1")
    assert LIBRARY_NAME not in held
    assert name.endswith("-py3-none-any.whl")


def test_a_wheel_carries_the_models_of_the_quickstart_and_no_others(sources):
    _, held = wheel(sources, WEIGHTSMITH_PURE="1")
    zoo = {Path(name).relative_to("weightsmith/quickstart/zoo").parts[0] for name in held if "/quickstart/zoo/" in name}
    assert zoo == {"README.md", "digits-test.safetensors", "base", *FINE_TUNES}


@pytest.mark.slow
def test_another_compiler_makes_a_library_with_the_same_results(tmp_path, monkeypatch, chosen):
    if shutil.which("gcc") is None:
        pytest.skip("there is no GCC here")
    pytest.importorskip("hatchling")
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hatch_build = module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    monkeypatch.setenv("WEIGHTSMITH_CC", "gcc")
    built = tmp_path / native.LIBRARY.name
    hatch_build.compile_library(ROOT / "src/weightsmith/kernels/native", built, tmp_path)
    for ours in native.levels():
        other = chosen(str(ours.level), built)
        assert other.level == ours.level
        assert other.operations == ours.operations
        for seed in range(150):
            assert_same_results(ours, other, seed)


def assert_same_results(ours: native.Library, other: native.Library, seed: int) -> None:
    rng = np.random.default_rng(seed)
    expression = Expressions(random.Random(seed), rows=True).number(3)
    arrays = [hard_numbers(rng, (3, 67), dtype) for dtype in (np.float32, np.float64, np.float32, np.float64)]

    def function(xp: Any, positions: Any, *loads: Any) -> Any:
        drawn = xp.record("uniform", (), kind="f32", single=False, numbers=(seed, 7))
        return [
            stored(evaluated(expression, xp, positions, loads)),
            stored(xp.exp(loads[1]) + drawn),
            stored(xp.log(loads[3])),
            stored(xp.rank_in_rows(xp.abs(loads[0]))),
            xp.sum(xp.where(xp.isfinite(loads[1]), loads[1], 0.0)),
        ]

    try:
        results = [run(library, function, arrays, columns=67, index=seed) for library in (ours, other)]
    except Untraceable:
        return
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert same(one, two).all(), expression
    assert same(results[0][0].values[-1], results[1][0].values[-1])
