from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergeready.cli import app

RECIPE = """\
model: mergeready.recipes.tiny:text
data: {name: mergeready.demo.samples:texts, with: {task: udhr}, limit: {train: 16, validation: 8, test: 8}}
task: {kind: text-classification, max_tokens: 16}
optimisation: {learning_rate: 1e-3, epochs: 1}
output: runs/a
"""


def test_the_schema_is_printed() -> None:
    result = CliRunner().invoke(app, ["train", "--schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["title"] == "mergeready recipe"


def test_every_problem_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE.replace("epochs", "epoch").replace("output", "outputs"))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert any(
        "line 4: `optimisation.epoch` is no setting. Did you mean `optimisation.epochs`?" in line
        for line in lines
    )


def test_a_quick_run_prints_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RECIPE)
    arguments = ["train", "run.yaml", "--quick", "--set", "optimisation.steps=2", "--set", "output=here"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "accuracy after 2 steps" in result.stdout
    assert "merge-best: here/mergeready/picks/" in result.stdout
    assert Path("here/result.json").is_file()


def test_a_recipe_is_needed() -> None:
    assert CliRunner().invoke(app, ["train"]).exit_code == 2
