from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from mergeready.errors import FormatError, OptionError
from mergeready.training.difficulty.table import DifficultyTable


def table() -> DifficultyTable:
    values = np.array([0.5, math.nan, 2.0])
    return DifficultyTable.of_one_pass(
        [3, 8, 2**62], loss=values, el2n=values / 2, confidence=values / 3, correct=values > 1
    )


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_comes_back_as_it_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"difficulty{suffix}"
    table().write(path)
    found = DifficultyTable.read(path)
    for field in fields(DifficultyTable):
        mine, theirs = getattr(table(), field.name), getattr(found, field.name)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_others_can_read_it(tmp_path: Path) -> None:
    table().write(tmp_path / "d.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "d.parquet").column("id").to_pylist() == [3, 8, 2**62]


def test_columns_by_id() -> None:
    assert table().column("el2n", [2**62, 5, 3, 99]).tolist() == pytest.approx(
        [1.0, math.nan, 0.25, math.nan], nan_ok=True
    )
    with pytest.raises(OptionError, match="there is no column 'hardness', only id, seen"):
        table().column("hardness", [3])


def test_ids_may_be_given_in_any_order() -> None:
    values = np.array([2.0, 0.5, 1.0])
    found = DifficultyTable.of_one_pass(
        [9, 3, 5], loss=values, el2n=values, confidence=values, correct=values > 1
    )
    assert found.id.tolist() == [3, 5, 9]
    assert found.column("loss", [9, 3, 5]).tolist() == values.tolist()
    assert found.column("correct", [9, 3, 5]).tolist() == [1, 0, 0]
    with pytest.raises(OptionError, match="an id occurs twice"):
        DifficultyTable.of_one_pass(
            [3, 5, 3], loss=values, el2n=values, confidence=values, correct=values > 1
        )
    with pytest.raises(OptionError, match="one number for each of 2 ids"):
        DifficultyTable.of_one_pass([3, 5], loss=values, el2n=values, confidence=values, correct=values > 1)


def damaged(column: str, values: object) -> str:
    whole = {field.name: [1, 2] for field in fields(DifficultyTable)}
    return json.dumps(whole | {column: values})


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("loss", [1.0], "not one an id"),
        ("id", [2, 1], "in order of ids"),
        ("id", [1, 1], "not one an id"),
        ("seen", ["a", "b"], "no lists of numbers"),
        ("loss", 3, "no lists of numbers"),
        ("id", [1, 2**70], "no lists of numbers"),
    ],
)
def test_damaged_columns_are_named(tmp_path: Path, column: str, values: object, message: str) -> None:
    (tmp_path / "d.json").write_text(damaged(column, values))
    with pytest.raises(FormatError, match=message):
        DifficultyTable.read(tmp_path / "d.json")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.parquet or \.json, not d\.csv"):
        table().write(tmp_path / "d.csv")
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(FormatError, match="cannot be read as Parquet"):
        DifficultyTable.read(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text('{"id": [1]}')
    with pytest.raises(FormatError, match="it has no column seen, loss"):
        DifficultyTable.read(tmp_path / "d.json")
