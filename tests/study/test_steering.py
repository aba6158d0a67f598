from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeready.errors import OptionError
from mergeready.study.settings import Arm, parse_study
from mergeready.study.train import train_run
from tests.study import toy


def trained(folder: Path, techniques: list[object]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    arm = Arm(learning_rate=0.05, batch_size=8, techniques=techniques)  # type: ignore[arg-type]
    train_run(toy.suite(0), "red", arm, 0, folder, steps=[8], total=8)
    return load_file(folder / "step-8.safetensors")


def moved(state: dict[str, torch.Tensor]) -> float:
    return sum(float((state[name] - p).square().sum()) for name, p in toy.model().named_parameters())


def test_a_technique_acts_and_one_that_is_off_changes_no_bit(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", [])
    off = trained(tmp_path / "off", [{"drift_penalty": {"strength": 0.0}}])
    strong = trained(tmp_path / "strong", [{"drift_penalty": {"strength": 100.0}}])
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert moved(strong) < 0.5 * moved(plain)


def test_validation_watches_the_weights_that_are_kept(tmp_path: Path) -> None:
    suite, seen = toy.suite(0), []

    def watched(module: torch.nn.Module) -> dict[str, float]:
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return {"accuracy": 0.5}

    suite = replace(suite, tasks={"red": replace(suite.tasks["red"], validation=watched)})
    arm = Arm.model_validate(
        {
            "learning_rate": 0.05,
            "batch_size": 8,
            "evaluate_every": 8,
            "stop": {"patience": 9},
            "techniques": [{"weight_average": {"decay": 0.9}}],
        }
    )
    train_run(suite, "red", arm, 0, tmp_path, steps=[8], total=16)
    kept = load_file(tmp_path / "step-8.safetensors")
    assert all(torch.equal(seen[-1][name], value) for name, value in kept.items())


def test_unknown_techniques_are_refused_when_the_study_is_read() -> None:
    with pytest.raises(OptionError, match=r"`arms\.odd`: there is no technique 'magic'; known are "):
        parse_study(
            {
                "name": "x",
                "suite": {"target": "m:f"},
                "steps": [1],
                "methods": ["ties"],
                "arms": {"odd": {"techniques": ["magic"]}},
            }
        )
