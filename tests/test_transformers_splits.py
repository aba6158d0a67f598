"""Datasets by split: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from mergeready.errors import OptionError
from mergeready.transformers.splits import by_split, read_splits

ROWS = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]})


def test_saved_with_splits_without_and_as_files_are_the_same_data(tmp_path: Path) -> None:
    DatasetDict(train=ROWS, test=ROWS.select([2])).save_to_disk(tmp_path / "both")
    ROWS.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    ROWS.to_csv(tmp_path / "files" / "test.csv")
    both, one, files = (read_splits(str(tmp_path / name), "`data`") for name in ("both", "one", "files"))
    assert {split: data["text"][:] for split, data in both.items()} == {
        "train": ["a", "b", "c"],
        "test": ["c"],
    }
    assert list(one) == ["train"]
    assert list(files) == ["test"]
    assert one["train"].to_dict() == files["test"].to_dict() == ROWS.to_dict()


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty", {}), ("broken", {"state.json": "{"}), ("strange", {"dataset_dict.json": "[]"})],
)
def test_a_folder_that_holds_none_is_named(tmp_path: Path, name: str, content: dict[str, str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file, text in content.items():
        (folder / file).write_text(text)
    with pytest.raises(
        OptionError, match=f"`data` names .*{name}, which is a folder that cannot be loaded: "
    ):
        read_splits(str(folder), "`data`")


def test_anything_else_is_refused() -> None:
    for thing, kind in ((ROWS.to_iterable_dataset(), "a streamed dataset"), ([ROWS], "a list")):
        with pytest.raises(OptionError, match=f"`data`: f gave {kind} instead"):
            by_split(thing, "`data`: f")
