from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergeready import Base, compare_subspaces, open_expert
from mergeready.cli import app
from mergeready.errors import OptionError
from tests.models import perturb, tiny_bert


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_bert().save_pretrained(folder / "base")
    perturb(tiny_bert(), 1).save_pretrained(folder / "law")
    perturb(tiny_bert(), 2, 0.03).save_pretrained(folder / "code[bold]")
    return folder


def test_shows_what_the_function_finds(world: Path) -> None:
    paths = [str(world / name) for name in ("base", "law", "code[bold]")]
    plain = CliRunner().invoke(app, ["compare", *paths], terminal_width=200)
    found = CliRunner().invoke(app, ["compare", *paths, "--subspaces"], terminal_width=200)
    assert (plain.exit_code, found.exit_code) == (0, 0), found.output
    assert "Singular directions" not in plain.output
    base = Base.open(paths[0])
    exact = compare_subspaces([open_expert(path, base).vector for path in paths[1:]])
    text = re.sub(r"\s+", " ", found.output)
    assert f"({exact.overlap_by_chance:.3f} by chance)" in text
    for value in (*exact.alignment, exact.overlap[0][1], exact.interference):
        assert f"{value:.3f}" in text
    assert f"Means over {exact.matrices} matrices" in text
    assert f"{exact.times_over:.2f} times over" in text
    assert "code[bold]" in text


def test_fingerprints_hold_no_matrices(world: Path, tmp_path: Path) -> None:
    sketch = tmp_path / "law.fingerprint.safetensors"
    made = CliRunner().invoke(
        app, ["fingerprint", str(world / "law"), "--base", str(world / "base"), "-o", str(sketch)]
    )
    assert made.exit_code == 0, made.output
    found = CliRunner().invoke(
        app, ["compare", str(world / "base"), str(world / "law"), str(sketch), "--subspaces"]
    )
    assert isinstance(found.exception, OptionError)
    assert "--subspaces needs the weights of all experts" in str(found.exception)
    assert found.output == ""  # before anything is compared
