from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergeready.errors import OptionError
from mergeready.study.given import with_given
from mergeready.study.settings import Arm
from mergeready.study.train import train_run
from tests.study import toy

SUITE = replace(
    toy.suite(0), given={"inputs": lambda task: [torch.ones(4, 6) * len(task)], "name": str.upper}
)


def test_settings_are_what_the_suite_gives_for_the_task() -> None:
    techniques: list[Any] = [
        "ema",
        {"one": {"inputs": ["suite:inputs"], "label": "suite:name", "share": 0.5}},
        {"two": {"paths": ["suite:name", "other"], "inputs": ["suite:inputs"]}},
    ]
    plain, one, two = with_given(techniques, SUITE, "red")
    assert plain == "ema"
    assert one["one"].pop("inputs")[0].mean() == 3
    assert one == {"one": {"label": "RED", "share": 0.5}}
    assert two["two"]["paths"] == ["suite:name", "other"]  # a list of several stands for itself
    assert techniques[1]["one"]["inputs"] == ["suite:inputs"]


def test_what_a_suite_does_not_give_is_named() -> None:
    with pytest.raises(OptionError, match=r"ask the suite for factors; it gives inputs, name\."):
        with_given([{"x": {"factors": ["suite:factors"]}}], SUITE, "red")
    with pytest.raises(OptionError, match="it gives nothing"):
        with_given([{"x": {"factors": ["suite:factors"]}}], toy.suite(0), "red")


def test_a_technique_trains_with_what_the_suite_gives(tmp_path: Path) -> None:
    arm = Arm.model_validate(
        {
            "learning_rate": 0.05,
            "batch_size": 8,
            "techniques": [{"sparse_mask": {"batches": ["suite:inputs"], "share": 0.25, "rounds": 1}}],
        }
    )
    train_run(SUITE, "red", arm, 0, tmp_path, steps=[4], total=4)
    state, base = load_file(tmp_path / "step-4.safetensors"), toy.model().state_dict()
    still = sum(int((state[name] == base[name]).sum()) for name in base)
    assert 0.7 < still / sum(value.numel() for value in base.values()) < 0.8
