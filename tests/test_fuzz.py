"""Every fuzz target: on what once went wrong, on its own seeds, and on some hundred changed inputs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS

REGRESSIONS = Path(__file__).parent / "regressions"
FOUND = sorted(path for path in REGRESSIONS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_went_wrong_does_not(path):
    TARGETS[path.parent.name].run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_or_refused(name):
    for content in TARGETS[name].seeds():
        TARGETS[name].run(content)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_changed_files_are_read_or_refused(name, seed):
    random = Random(seed)
    content = random.choice(TARGETS[name].seeds())
    for _ in range(random.randint(1, 6)):
        content = TARGETS[name].mutate(content, random)
    TARGETS[name].run(content)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_bytes_whatever_are_read_or_refused(name, content):
    TARGETS[name].run(content)


def test_every_regression_belongs_to_a_target():
    assert {path.parent.name for path in FOUND} <= set(TARGETS)
    assert len(FOUND) > 20
