"""The pages of docs/ and the README: every block of code is run, and the site builds without a warning."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Sybil
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from typer.testing import CliRunner

from mergeready.cli import app
from tests.docs_world import make_world

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in [ROOT / "README.md", *DOCS.rglob("*.md")] if "```" in page.read_text("utf-8"))
NOT_RUN = ("python -m venv", "torchrun", "pip install", "mergeready demo")
"""Commands that other tests run, or that need more than one machine's process."""

pytest.importorskip("peft")


def run_console(example: Example) -> None:
    """Run the lines of a console block that call mergeready."""
    for line in example.parsed.splitlines():
        command = line.split("  #")[0].strip()
        if not command or command.startswith(NOT_RUN):
            continue
        program, *arguments = shlex.split(command)
        assert program == "mergeready", f"{command!r} is neither run nor among those that are not"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)  # brings the working folder back afterwards
    return make_world(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_pages_runs(page: Path, world: dict[str, object]) -> None:
    parsers = [PythonCodeBlockParser(), CodeBlockParser("console", run_console)]
    document: Document = Sybil(parsers=parsers, path=str(ROOT)).parse(page)
    document.namespace.update(world)
    examples = list(document)
    assert examples or page.name == "index.md"
    for example in examples:
        example.evaluate()


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "site" / "methods" / "index.html").is_file()
