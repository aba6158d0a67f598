from __future__ import annotations

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
