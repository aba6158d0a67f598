"""Whose run a folder holds: that of the same recipe and the same data, or another's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mergeready.errors import OutputExistsError
from mergeready.recipes import parse_recipe
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.resume import claim

ROWS = "text,label\nfine,good\nawful,bad\n"


def recipe(folder: Path, data: Any) -> Recipe:
    return parse_recipe(
        {
            "model": "org/base",
            "data": data,
            "task": {"kind": "text-classification"},
            "optimisation": {"learning_rate": 1e-3, "steps": 1},
            "output": str(folder / "run"),
        }
    )


@pytest.fixture(params=["name", "files", "join"])
def given(tmp_path: Path, request: pytest.FixtureRequest) -> Recipe:
    file = tmp_path / "train.csv"
    file.write_text(ROWS)
    files = {"files": {"train": [str(file)]}}
    data = {"name": str(file), "files": files, "join": {"join": {"a": files, "b": {"name": "org/other"}}}}
    return recipe(tmp_path, data[request.param])


def test_a_run_of_files_that_changed_is_another_run(tmp_path: Path, given: Recipe) -> None:
    file = tmp_path / "train.csv"
    folder = claim(given)
    (folder / "result.json").write_text("{}")
    os.utime(file, (1, 1))
    assert claim(given) == folder, "what counts is what a file holds"
    file.write_text(ROWS.replace("awful,bad", "awful,good"))
    with pytest.raises(OutputExistsError, match=r"holds another run: the file .*train\.csv changed"):
        claim(given)
    file.write_text(ROWS)
    assert claim(given) == folder


def test_files_may_change_before_anything_was_made_of_them(tmp_path: Path, given: Recipe) -> None:
    file = tmp_path / "train.csv"
    claim(given)
    file.write_text(ROWS + "nice,good\n")
    folder = claim(given)
    (folder / "checkpoint-1").mkdir()
    assert claim(given) == folder
    file.write_text(ROWS)
    with pytest.raises(OutputExistsError, match=r"train\.csv changed"):
        claim(given)


def test_a_run_whose_checksums_are_lost_goes_on(tmp_path: Path, given: Recipe) -> None:
    folder = claim(given)
    (folder / "result.json").write_text("{}")
    for left in ("{", "[]"):
        (folder / "data.sha256.json").write_text(left)
        assert claim(given) == folder
