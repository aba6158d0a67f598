from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.demo import run as run_module
from mergeready.demo.settings import DemoSettings
from tests.cli.commands import succeed
from tests.demo.test_display import make_results


def test_the_demo_is_called_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run_demo(output: Path, settings: object, listener: object) -> object:
        seen.append((output, settings))
        return make_results(seconds=90.0), [output / "composability.png"]

    monkeypatch.setattr(run_module, "run_demo", run_demo)
    text = succeed("demo", "--quick", "--joint", "--seed", "3", "-o", tmp_path / "demo[x]")
    assert seen == [(tmp_path / "demo[x]", DemoSettings.quick(joint=True, seed=3))]
    joined = text.replace("\n", "")
    assert (
        "task_arithmetic: ends 0.562, picks 0.625, +0.062 [+0.010, +0.110]: merging the picks was better."
        in text
    )
    assert "Took 1.5 minutes." in joined
    assert "demo[x]/composability.png" in joined
    succeed("demo", "-o", tmp_path / "other")
    assert seen[1] == (tmp_path / "other", DemoSettings())
