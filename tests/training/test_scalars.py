from __future__ import annotations

from dataclasses import replace

import pytest

from mergeready.training.records import DecisionRecord, MetricsRecord, ResumeRecord
from mergeready.training.scalars import merged_name, scalars
from tests.training.histories import probe, start


def test_a_probe() -> None:
    record = probe(5, 0.75, ties=0.5, average=0.25)
    record.merges["ties"] = replace(record.merges["ties"], retention=0.625, scale=0.8)
    assert scalars(record) == {
        "mergeready/expert": 0.75,
        "mergeready/merged/ties": 0.5,
        "mergeready/merged/average": 0.25,
        "mergeready/retention/ties": 0.625,  # that of averaging is not defined, and left out
        "mergeready/scale/ties": 0.8,
        "mergeready/scale/average": 0.5,
    }


def test_surrogates_have_names_of_their_own() -> None:
    record = replace(probe(5, 0.75, surrogate=True, ties=0.5), alone={"0.3": 0.625})
    assert scalars(record) == {
        "mergeready/expert": 0.75,
        "mergeready/surrogate/ties": 0.5,
        "mergeready/scale/ties": 0.5,
        "mergeready/alone/0.3": 0.625,
    }


@pytest.mark.parametrize("surrogate", [True, False])
def test_the_name_of_a_merged_metric_is_the_one_that_is_logged(surrogate: bool) -> None:
    assert merged_name("ties", surrogate=surrogate) in scalars(probe(1, 0.5, surrogate=surrogate, ties=0.25))
    assert merged_name("ties", surrogate=not surrogate) not in scalars(
        probe(1, 0.5, surrogate=surrogate, ties=0.25)
    )


def test_a_measurement() -> None:
    record = MetricsRecord(
        step=3,
        norm=2.0,
        relative_norm=0.5,
        growth=0.25,
        groups={"mlp": 1.5},
        layers={0: 1.0},
        top_mass={"0.01": 0.125, "0.1": None},
        cosine={"law": 0.0625, "code": None},
        sign_conflict={"law": 0.375},
        norm_ratio=4.0,
    )
    assert scalars(record) == {
        "mergeready/norm": 2.0,
        "mergeready/relative_norm": 0.5,
        "mergeready/growth": 0.25,
        "mergeready/norm_ratio": 4.0,
        "mergeready/norm/mlp": 1.5,
        "mergeready/top_mass/0.01": 0.125,
        "mergeready/cosine/law": 0.0625,
        "mergeready/sign_conflict/law": 0.375,
    }
    bare = replace(
        record, relative_norm=None, norm_ratio=None, groups={}, top_mass={}, cosine={}, sign_conflict={}
    )
    assert scalars(bare) == {"mergeready/norm": 2.0, "mergeready/growth": 0.25}


@pytest.mark.parametrize(
    "record",
    [
        start("ties"),
        DecisionRecord(step=1, reason="enough", acted=True),
        ResumeRecord(step=1, changed=["peers"]),
    ],
)
def test_other_records_have_none(record: object) -> None:
    assert scalars(record) == {}
