"""Which scalars a framework may go by, and which way is better."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mergeready.errors import OptionError
from mergeready.training.history import History
from mergeready.training.monitored import direction, undefined
from mergeready.training.records import StartRecord
from tests.training.histories import probe

PROBED = StartRecord(step=0, base="", metric="loss", greater_is_better=False, methods=[{"label": "ties"}])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("expert", ("loss", False)),
        ("merged/ties", ("loss", False)),
        ("retention/ties", ("retention", True)),
        ("scale/ties", None),
        ("norm", None),
        ("cosine/law", None),
        ("plateau_schedule/factor", None),
    ],
)
def test_which_way_is_better(name: str, expected: tuple[str, bool] | None) -> None:
    assert direction(f"mergeready/{name}", PROBED) == expected


@pytest.mark.parametrize(
    "name", ["merged/tie", "merged", "surrogate/ties", "retention/average", "expert/ties"]
)
def test_what_no_probe_gives_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"They give mergeready/expert, mergeready/merged/ties"):
        direction(f"mergeready/{name}", PROBED)
    with pytest.raises(OptionError, match="the run has none"):
        direction(f"mergeready/{name}", StartRecord(step=0, base=""))


def test_a_retention_that_the_newest_probe_could_not_tell_is_nan() -> None:
    told = probe(2, 0.9, ties=0.8)
    told = replace(told, merges={"ties": replace(told.merges["ties"], retention=0.5)})
    assert undefined(History([])) == {}
    assert undefined(History([probe(1, 0.1, ties=0.2), told])) == {}
    found = undefined(History([told, probe(3, 0.1, ties=0.2)]))
    assert list(found) == ["mergeready/retention/ties"]
    assert math.isnan(found["mergeready/retention/ties"])
