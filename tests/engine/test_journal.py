"""The journal survives torn lines and refuses to be another run's."""

from __future__ import annotations

import pytest

from weightsmith.engine.journal import Journal
from weightsmith.errors import OutputError

RUN = {"recipe": "a", "inputs": [{"path": "x", "size": 3}]}


def test_finished_tensors_are_found_again(tmp_path):
    journal = Journal(tmp_path / "journal", RUN)
    journal.record({"a": 1, "b": {"x": 2}})
    journal.record({"c": 3})
    journal.close()
    assert Journal(tmp_path / "journal", RUN).finished == {"a": 1, "b": {"x": 2}, "c": 3}


@pytest.mark.parametrize("keep", range(1, 60))
def test_a_journal_cut_anywhere_holds_a_prefix_of_what_was_recorded(tmp_path, keep):
    path = tmp_path / "journal"
    journal = Journal(path, RUN)
    journal.record({"first": 1})
    journal.record({"second": 2})
    journal.close()
    path.write_bytes(path.read_bytes()[:-keep])
    again = Journal(path, RUN)
    assert again.finished in ({}, {"first": 1})
    again.record({"third": 3})
    again.close()
    assert Journal(path, RUN).finished == again.finished | {"third": 3}


def test_another_runs_journal_is_refused_with_what_differs(tmp_path):
    Journal(tmp_path / "journal", RUN).close()
    with pytest.raises(OutputError, match=r"its recipe differ.*--restart"):
        Journal(tmp_path / "journal", {**RUN, "recipe": "b"})


def test_inputs_that_changed_are_named(tmp_path):
    Journal(tmp_path / "journal", RUN).close()
    changed = {**RUN, "inputs": [{"path": "x", "size": 4}, {"path": "y", "size": 1}]}
    with pytest.raises(OutputError, match=r"its inputs differ from this run's: x \(size\), y \(new\); add --restart"):
        Journal(tmp_path / "journal", changed)
