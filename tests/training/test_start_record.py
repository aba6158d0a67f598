from __future__ import annotations

import pytest

from mergeready.errors import HistoryError
from mergeready.training.records import ResumeRecord, StartRecord
from mergeready.training.start_record import records_of_start

EARLIER = StartRecord(step=0, base="b", peers={"law": 1.0}, techniques=[{"technique": "drift_penalty"}])


def test_a_first_start_is_recorded() -> None:
    assert records_of_start(EARLIER, None) == [EARLIER]


def test_a_resumed_run_that_is_as_before_adds_nothing() -> None:
    again = StartRecord(step=7, base="b", peers={"law": 1.0}, techniques=[{"technique": "drift_penalty"}])
    assert records_of_start(again, EARLIER) == []


def test_what_changed_is_named() -> None:
    other = StartRecord(step=7, base="b", peers={"law": 1.0, "math": 2.0})
    assert records_of_start(other, EARLIER) == [
        ResumeRecord(step=7, changed=["peers", "techniques"]),
        other,
    ]


def test_another_base_is_refused() -> None:
    with pytest.raises(HistoryError, match="another base"):
        records_of_start(StartRecord(step=7, base="c"), EARLIER)
