"""The launcher against LLaMA-Factory's Python entry point, ``run_exp(args, callbacks)``, played by a stand-in."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeready.llamafactory import main
from tests.loops import load, make_world
from tests.trainers import make_trainer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the entry point is called with. As the real one, it refuses settings that it does not know."""
    found: list[dict[str, Any]] = []

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        assert args is not None
        assert callbacks is not None
        unknown = set(args) - {"model_name_or_path", "stage", "output_dir"}
        if unknown:
            raise ValueError(f"Some keys are not used: {unknown}")
        found.append({"args": args, "callbacks": callbacks})
        world = Path(args["model_name_or_path"]).parent
        make_trainer(Path(args["output_dir"]), *callbacks, model=load(world), max_steps=2).train()

    tuner = types.ModuleType("llamafactory.train.tuner")
    tuner.run_exp = run_exp  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llamafactory", types.ModuleType("llamafactory"))
    monkeypatch.setitem(sys.modules, "llamafactory.train", types.ModuleType("llamafactory.train"))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    return found


def write(folder: Path, content: object) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_run(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    world = make_world(tmp_path)
    own = {
        "model_name_or_path": str(world / "base"),
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
    }
    section = {
        "peers": [str(world / "peer-1")],
        "probe": {"merge": ["ties"], "scales": [0.5], "max_evaluations": 1, "schedule": {"every": 2}},
    }
    assert main([write(tmp_path, own | {"mergeready": section})]) == 0
    [call] = calls
    assert call["args"] == own
    [callback] = call["callbacks"]
    assert [probe.step for probe in callback.history.probes] == [1, 2]
    assert (tmp_path / "run/mergeready/history.jsonl").exists()


def test_a_configuration_without_a_section_runs_with_the_defaults(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    world = make_world(tmp_path)
    own = {"model_name_or_path": str(world / "base"), "output_dir": str(tmp_path / "run")}
    assert main([write(tmp_path, own)]) == 0
    assert calls[0]["callbacks"][0].history.metrics


@pytest.mark.parametrize(
    ("content", "message"),
    [({"stage": "sft", "mergeready": {"peer": []}}, "peer"), ([1, 2], "settings by name")],
)
def test_mistakes_are_found_before_anything_starts(
    tmp_path: Path,
    calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    content: object,
    message: str,
) -> None:
    assert main([write(tmp_path, content)]) == 1
    assert message in capsys.readouterr().err
    assert not calls


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "b.yaml"]])
def test_the_command_line_takes_one_file(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err
