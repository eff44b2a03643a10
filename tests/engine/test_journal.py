"""The journal survives torn lines and refuses to be another run's."""

from __future__ import annotations

import pytest

from weightsmith.engine.journal import Journal
from weightsmith.errors import OutputError

RUN = {"recipe": "a", "inputs": [{"path": "x", "size": 3}]}


def test_finished_tensors_are_found_again(tmp_path):
    journal = Journal(tmp_path / "journal", RUN)
    journal.record(["a", "b"])
    journal.record(["c"])
    journal.close()
    assert Journal(tmp_path / "journal", RUN).finished == {"a", "b", "c"}


@pytest.mark.parametrize("keep", range(1, 60))
def test_a_journal_cut_anywhere_holds_a_prefix_of_what_was_recorded(tmp_path, keep):
    path = tmp_path / "journal"
    journal = Journal(path, RUN)
    journal.record(["first"])
    journal.record(["second"])
    journal.close()
    path.write_bytes(path.read_bytes()[:-keep])
    again = Journal(path, RUN)
    assert again.finished in (set(), {"first"})
    again.record(["third"])
    again.close()
    assert Journal(path, RUN).finished == again.finished | {"third"}


def test_another_runs_journal_is_refused_with_what_differs(tmp_path):
    Journal(tmp_path / "journal", RUN).close()
    with pytest.raises(OutputError, match=r"its recipe differ.*--restart"):
        Journal(tmp_path / "journal", {**RUN, "recipe": "b"})
