"""Which examples a run trains on, chooses with and reports on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from mergeready.errors import OptionError
from mergeready.recipes.load_data import load_data
from mergeready.recipes.sources import DataSettings

SIZES = {"train": 40, "validation": 12, "test": 10}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Datasets whose rows say which split they are of."""
    made = {name: Dataset.from_dict({"row": [f"{name} {i}" for i in range(n)]}) for name, n in SIZES.items()}
    DatasetDict(made).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


def rows(folder: str, **settings: Any) -> dict[str, list[str]]:
    found = load_data(DataSettings(name=folder, **settings), seed=0)
    return {split: list(data["row"]) for split, data in found.items()}


def test_validation_that_is_taken_from_test_leaves_no_test(folder: str) -> None:
    found = rows(folder, splits={"validation": "test"})
    assert {split: {row.split()[0] for row in part} for split, part in found.items()} == {
        "train": {"train"},
        "validation": {"test"},
    }


def test_test_that_is_taken_from_validation_leaves_it_to_be_held_out(folder: str) -> None:
    found = rows(folder, splits={"test": "validation"}, holdout=0.25)
    assert {row.split()[0] for row in found["test"]} == {"validation"}
    assert {row.split()[0] for row in found["validation"]} == {"train"}
    assert sorted([*found["train"], *found["validation"]]) == sorted(rows(folder)["train"])
    assert (len(found["train"]), len(found["validation"])) == (30, 10)


def test_splits_may_change_places(folder: str) -> None:
    found = rows(folder, splits={"test": "validation", "validation": "test"})
    assert {split: len(part) for split, part in found.items()} == {"train": 40, "validation": 10, "test": 12}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": "test", "test": "test"}, "`data.splits` names test for more than one split"),
        ({"validation": "train"}, "gives the split train away"),
        ({"validation": "dev"}, "`data` has no split dev"),
        ({"train": "all"}, "`data` has no split all"),
    ],
)
def test_splits_that_cannot_be(folder: str, splits: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rows(folder, splits=splits)


def test_a_limit_takes_examples_from_everywhere_and_always_the_same(folder: str) -> None:
    found = rows(folder, limit={"train": 8, "test": 100})
    assert len(set(found["train"])) == 8
    assert found["train"] != rows(folder)["train"][:8]
    assert found["train"] == rows(folder, limit={"train": 8})["train"]
    assert len(found["test"]) == 10
