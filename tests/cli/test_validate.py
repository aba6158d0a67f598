from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import run
from tests.validation.experts import write_base, write_full


@pytest.fixture
def law(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return write_full(tmp_path / "law")


def test_a_healthy_expert(law: Path, tmp_path: Path) -> None:
    done = run("validate", law, "--base", tmp_path / "base", "-o", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    assert "1 failed" in done.stdout
    assert "Not a verdict on merging" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1


def test_exit_codes(law: Path, tmp_path: Path) -> None:
    (law / "README.md").unlink()
    assert run("validate", law, "--base", tmp_path / "base").exit_code == 0
    assert run("validate", law, "--base", tmp_path / "base", "--fail-on", "warning").exit_code == 1
    assert run("validate", tmp_path / "nowhere").exit_code == 2


def test_fixes_are_shown(law: Path, tmp_path: Path) -> None:
    done = run("validate", law, "--base", law)
    assert done.exit_code == 1
    assert "every parameter equals the base's" in " ".join(done.stdout.split())
    assert "fix:" in done.stdout
