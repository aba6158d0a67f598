from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergeready.cli import app
from tests.study import toy

NAME = "mergeready_toy_study_of_the_command"


@pytest.fixture
def study_file(tmp_path: Path) -> Iterator[Path]:
    sys.modules[NAME] = toy
    path = tmp_path / "small.yaml"
    text = toy.YAML.replace("seeds: [0, 1]", "seeds: [0]").replace("steps: [2, 4, 8]", "steps: [2, 4]")
    path.write_text(text % NAME, encoding="utf-8")
    yield path
    del sys.modules[NAME]


def test_one_command_computes_draws_and_compares(study_file: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["study", str(study_file)])
    assert done.exit_code == 0, done.output
    assert "18 cells computed, 6 training runs." in done.output
    folder = tmp_path / "small"
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("curves", "tasks", "arms") for kind in ("png", "svg")
    }
    before = (folder / "tables.md").read_bytes()
    (folder / "tables.md").unlink()
    drawn = runner.invoke(app, ["study", str(study_file), "--figures"])
    assert drawn.exit_code == 0, drawn.output
    assert (folder / "tables.md").read_bytes() == before
    again = runner.invoke(app, ["study", str(study_file), "--only", "plain/0/4/average-3"])
    assert again.exit_code == 0, again.output
    assert "every number is the same" in again.output
    cell = folder / "cells/plain/0/4/average-3.json"
    cell.write_text(cell.read_text().replace('"scale":1.0', '"scale":2.0'))
    differs = runner.invoke(app, ["study", str(study_file), "--only", "plain/0/4/average-3"])
    assert differs.exit_code == 1
    assert "scale was 2.0, now 1.0" in differs.output
