"""Averages against torch's own averaged model, fed by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mergeready import WeightAverage
from tests.training.small import Net, state_of
from tests.training.techniques.runs import run


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_equal_to_swa_utils(tmp_path: Path, kind: Any) -> None:
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)} if kind == "ema" else {}
    averaged = AveragedModel(Net(), **options)

    def after(step: int, model: Any, *_: Any) -> None:
        if step >= 2:
            averaged.update_parameters(model)

    found = run(tmp_path, [WeightAverage(kind=kind, decay=0.7, first=2)], after=after)
    for name, value in averaged.module.state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-7)


def test_the_newest_snapshots(tmp_path: Path) -> None:
    states = []
    found = run(
        tmp_path,
        [WeightAverage(kind="last", count=2, every=2)],
        after=lambda step, model, *_: states.append(copy.deepcopy(state_of(model))),
    )
    for name, value in found.items():  # steps 1, 3 and 5 are averaged
        assert torch.allclose(value, (states[2][name] + states[4][name]) / 2, atol=1e-7)


def test_mixed_with_the_base(tmp_path: Path) -> None:
    base = Net().state_dict()
    found = run(tmp_path, [WeightAverage(kind="none", mix=0.25)])
    trained = run.before_the_end  # type: ignore[attr-defined]
    for name, value in found.items():
        assert torch.allclose(value, 0.75 * base[name] + 0.25 * trained[name], atol=1e-6)
