from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mergeready.training.records import ADAPTER, Record
from tests.training.histories import RECORDS, metrics, probe


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
def test_json_and_back_loses_nothing(kind: str, data: st.DataObject) -> None:
    record: Record = data.draw(RECORDS[kind])
    assert record.kind == kind
    text = json.dumps(ADAPTER.dump_python(record, mode="json"), allow_nan=False)
    back = ADAPTER.validate_python(json.loads(text))
    assert type(back) is type(record)
    assert back == record
    assert json.dumps(ADAPTER.dump_python(back, mode="json")) == text


def test_a_float_comes_back_to_the_last_bit() -> None:
    awkward = [0.1 + 0.2, 1 / 3, math.pi, 5e-324, 1.7976931348623157e308, -0.0]
    for value in awkward:
        text = json.dumps(ADAPTER.dump_python(probe(1, value, ties=value), mode="json"))
        back = ADAPTER.validate_python(json.loads(text))
        assert back.expert.value.hex() == value.hex()


def test_layers_keep_their_numbers() -> None:
    content = ADAPTER.dump_python(metrics(1, 0.5), mode="json") | {"layers": {"10": 1, "2": 3}}
    assert ADAPTER.validate_python(content).layers == {2: 3.0, 10: 1.0}


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe(1, 0.5, ties=0.5).step = 2


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "epoch", "step": 1},
        {"step": 1, "reason": "enough", "acted": True},
        {"kind": "decision", "step": 1, "reason": "enough"},
        {"kind": "decision", "step": "soon", "reason": "enough", "acted": True},
    ],
)
def test_what_is_no_record_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(content)
