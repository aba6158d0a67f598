from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergeready.errors import BaseMismatchError, FormatError
from mergeready.experts import Base
from mergeready.experts.record import RECORD_NAME, read_record, recorded_base, write_record
from tests.models import tiny_bert


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    write_record(tmp_path, Base.open(tiny_bert()).identity, step=7, note="é")
    return tmp_path


def test_what_was_written_is_read(recorded: Path) -> None:
    record = read_record(recorded)
    assert record is not None
    assert (record["step"], record["note"]) == (7, "é")
    assert recorded_base(recorded) == Base.open(tiny_bert()).identity


def test_the_record_holds_no_path(recorded: Path) -> None:
    assert str(recorded) not in (recorded / RECORD_NAME).read_text()


def test_no_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert recorded_base(tmp_path) is None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff"])
def test_a_broken_record_says_what_to_do(tmp_path: Path, text: bytes) -> None:
    (tmp_path / RECORD_NAME).write_bytes(text)
    with pytest.raises(FormatError, match=r"mergeready\.json cannot be read as JSON .*Delete it"):
        recorded_base(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"schema": 99}', '{"schema": "1"}'])
def test_an_unknown_schema_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(FormatError, match=r"unknown schema|not an object"):
        recorded_base(tmp_path)


@pytest.mark.parametrize("base", [..., None, "x", [], {}, {"digests": {}}])
def test_a_record_without_a_base_is_refused(recorded: Path, base: object) -> None:
    content = json.loads((recorded / RECORD_NAME).read_text())
    if base is ...:
        del content["base"]
    else:
        content["base"] = base
    (recorded / RECORD_NAME).write_text(json.dumps(content))
    with pytest.raises(BaseMismatchError, match=r"the base of .*(holds no base identity|contradicts itself)"):
        recorded_base(recorded)


def test_an_altered_base_is_refused(recorded: Path) -> None:
    content = json.loads((recorded / RECORD_NAME).read_text())
    content["base"]["digests"]["classifier.weight"] = "0" * 16
    (recorded / RECORD_NAME).write_text(json.dumps(content))
    with pytest.raises(BaseMismatchError, match="contradicts itself"):
        recorded_base(recorded)
