"""The small file beside an expert's weights that says which base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError
from mergeready.experts.identity import BaseIdentity
from mergeready.weights.json_file import read_json_object

RECORD_NAME = "mergeready.json"
SCHEMA = 1


def write_record(folder: Path, base: BaseIdentity, **facts: object) -> None:
    """Write the record into a folder that is being made."""
    content = {"schema": SCHEMA, "base": base.to_json(), **facts}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Mapping[str, Any] | None:
    """The record of a folder, or None where there is none.

    Raises:
        FormatError: If there is one that cannot be understood.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    content = read_json_object(path, "Delete it to go on without a recorded base.")
    if content.get("schema") != SCHEMA:
        raise FormatError(f"{path} has an unknown schema; this version reads schema {SCHEMA}.")
    return content


def recorded_base(folder: Path) -> BaseIdentity | None:
    """The identity of the base that an expert's folder records, or None where there is no record.

    Raises:
        FormatError: If there is a record that cannot be understood.
        BaseMismatchError: If the record holds no base, or an altered one.
    """
    record = read_record(folder)
    return None if record is None else BaseIdentity.from_json(record.get("base"), f"the base of {folder}")
