"""Patterns of modules: the same answers as Python's engine, without its worst times."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.adapters.patterns import Patterns
from weightsmith.errors import CheckpointError


def as_peft(patterns, module):
    """Match as PEFT does."""
    found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    return -1 if found is None else patterns[found]


letters = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[a-c0]", "7", "_", "^", "$", "{", "é"])
patterns = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{,2}", "{1,}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)
modules = st.text("ab.7_c", min_size=1, max_size=10)


@settings(max_examples=1000)
@given(st.lists(patterns, min_size=1, max_size=4, unique=True), modules)
def test_the_first_pattern_that_peft_would_match_is_taken(chosen, module):
    values = {pattern: number for number, pattern in enumerate(chosen)}
    try:
        expected = as_peft(values, module)
    except re.error:
        with pytest.raises(CheckpointError):
            Patterns(values)
        return
    assert Patterns(values).value(module, -1) == expected


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*a){12}b", "(a|aa)+$b", "(" * 8 + "a" + "+)" * 8 + "b"]
)
def test_a_pattern_that_takes_pythons_engine_for_ever_is_matched_at_once(pattern):
    began = time.monotonic()
    assert Patterns({pattern: 1}).value("a" * 1000, -1) == -1
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "could take for ever"),
        ("(?=a)a", "could take for ever"),
        ("(?i)a", "could take for ever"),
        ("(?P<x>a)", "could take for ever"),
        ("a++", "could take for ever"),
        (r"\ba", "could take for ever"),
        ("(a", "is no pattern"),
        ("a{5000}", "repeats more than 1,000 times"),
        ("(" * 50 + "a" + ")" * 50, "levels deep"),
        ("a" * 2000, "2,000 characters"),
    ],
)
def test_what_cannot_be_matched_in_bounded_time_is_refused(pattern, message):
    with pytest.raises(CheckpointError, match=message):
        Patterns({pattern: 1})


def test_patterns_that_take_too_long_all_the_same_are_refused(monkeypatch):
    monkeypatch.setattr("weightsmith.adapters.patterns._MOST_STEPS", 100_000)
    nested = Patterns({"(" * 30 + "a" + "+)" * 30 + "b": 1})
    with pytest.raises(CheckpointError, match="too long to match"):
        nested.value("a" * 1000, -1)


def test_thousands_of_names_are_looked_up_and_not_tried_one_by_one():
    names = [f"model.layers.{i}.mlp.experts.{j}.{p}_proj" for i in range(20) for j in range(50) for p in ("up", "down")]
    found = Patterns({name: number for number, name in enumerate(names)})
    began = time.monotonic()
    assert [found.value(f"base.{name}", -1) for name in names] == list(range(len(names)))
    assert time.monotonic() - began < 2
