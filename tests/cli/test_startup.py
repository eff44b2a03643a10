"""Start-up: help and the list of methods load neither NumPy nor anything else that is heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"numpy", "torch", "pydantic", "numba", "huggingface_hub", "fsspec", "ml_dtypes", "scipy", "transformers"}


def modules_after(*arguments: str) -> set[str]:
    script = (
        "import sys, contextlib, io\n"
        "from weightsmith.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try: main(sys.argv[1:])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["merge", "--help"], ["methods"], ["methods", "ties"]]
)
def test_no_heavy_module_is_loaded(arguments):
    assert modules_after(*arguments) & HEAVY == set()


def test_help_loads_no_yaml_and_no_rich_and_few_modules():
    loaded = modules_after("--help")
    assert loaded & {"yaml", "rich", "json"} <= {"json"}
    assert len(loaded) < 150


def test_a_merge_does_not_load_torch():
    script = "import sys, weightsmith as ws; ws.merge, ws.open, ws.merge_arrays; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
