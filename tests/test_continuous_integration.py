"""The GitHub Action's steps and the pre-commit hook's entry, run as plain shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.validation.experts import write_adapter, write_base

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / ".github/actions/validate/action.yml").read_text(encoding="utf-8"))


def environment(folder: Path) -> dict[str, str]:
    """What GitHub gives to steps, and this Python first."""
    (folder / "bin").mkdir(exist_ok=True)
    python, tool = folder / "bin" / "python", folder / "bin" / "mergeready"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergeready.cli "$@"\n')
    python.chmod(0o755)
    tool.chmod(0o755)
    return os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_OUTPUT": str(folder / "output"),
    }


def run_action(folder: Path, **given: str) -> int:
    """The exit code of the first step that fails, or 0, as the runner would have it."""
    inputs = {name: about.get("default", "") for name, about in ACTION["inputs"].items()}
    inputs |= {name.replace("_", "-"): value for name, value in given.items()}
    assert ACTION["runs"]["using"] == "composite"
    for step in ACTION["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "inputs reach scripts through the environment, never as their text"
        values = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: inputs[m[1]], value)
            for name, value in step["env"].items()
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        code = subprocess.run(command, env=environment(folder) | values, cwd=folder, check=False).returncode
        if code:
            return code
    return 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ci")
    write_base(root / "base")
    write_adapter(root / "law")
    (write_adapter(root / "bad") / "adapter_model.safetensors").write_bytes(b"")
    return root


@pytest.mark.slow
def test_the_action_passes_a_healthy_expert(world: Path) -> None:
    assert run_action(world, expert="law", base="base", report="report.json", package="") == 0
    report = json.loads((world / "report.json").read_text())
    assert {v["level"] for v in report["verdicts"]} == {"file", "base"}
    assert (world / "output").read_text().splitlines()[-1] == "report=report.json"


@pytest.mark.slow
def test_the_action_fails_a_broken_one(world: Path) -> None:
    assert run_action(world, expert="bad", level="file", report="bad.json", package="") == 1
    assert run_action(world, expert="nowhere", level="file", report="none.json", package="") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "code"), [("law", 0), ("bad", 1)])
def test_the_hook(world: Path, expert: str, code: int) -> None:
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert (hook["pass_filenames"], hook["language"]) == (False, "python")
    command = [*shlex.split(hook["entry"]), expert]
    assert subprocess.run(command, env=environment(world), cwd=world, check=False).returncode == code
    for name in ("model.safetensors", "law/adapter_config.json", "README.md"):
        assert re.search(hook["files"], name)
