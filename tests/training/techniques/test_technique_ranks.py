"""Two ranks that share a batch train as one process that has all of it, under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready import (
    DriftPenalty,
    MergeReadyLoop,
    NormGovernor,
    SharpnessAware,
    SimulatedMerge,
    WeightAverage,
)
from mergeready.errors import UnsupportedError
from tests.ranks import run_ranks
from tests.sharded import full_state, spread
from tests.training.small import Net, examples
from tests.training.techniques.runs import net, run

pytestmark = pytest.mark.slow

TECHNIQUES: dict[str, list[Any]] = {
    "drift_penalty": [DriftPenalty(strength=0.5)],
    "simulated_merge": [SimulatedMerge(every=2, noise=0.05)],
    "sharpness_aware": [SharpnessAware(radius=0.1)],
    "norm_governor": [NormGovernor(max_norm=0.3)],
    "weight_average": [WeightAverage(decay=0.5)],
}


def on_a_rank(folder: Path, layout: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        model: Any = spread(net(), layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        base = Net().state_dict()
        monitor = MergeReadyLoop(folder / name, base=base, techniques=TECHNIQUES[name])
        monitor.prepare(model, optimizer=optimizer, total_steps=6)
        for step in range(6):
            x, y = (part.chunk(2)[torch.distributed.get_rank()] for part in examples(1, step, 16))
            for _ in monitor.passes():
                cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        monitor.finish()
        found[name] = full_state(model)
    return found


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_ranks_agree_with_one_process(tmp_path: Path, layout: str) -> None:
    names = [name for name in TECHNIQUES if layout == "ddp" or name != "weight_average"]
    first, second = run_ranks(on_a_rank, 2, tmp_path, layout, names)
    for name in names:
        alone = run(tmp_path / "alone" / name, TECHNIQUES[name])
        for key, value in alone.items():
            assert torch.equal(first[name][key], second[name][key])
            assert torch.allclose(first[name][key], value, atol=2e-6), (name, key)


def refused(folder: Path) -> str:
    model = spread(net(), "fsdp2")
    monitor = MergeReadyLoop(folder, base=Net().state_dict(), techniques=[WeightAverage()])
    with pytest.raises(UnsupportedError) as caught:
        monitor.prepare(model, optimizer=torch.optim.SGD(model.parameters()))
    return str(caught.value)


def test_an_average_of_shards_is_refused(tmp_path: Path) -> None:
    assert all("Use DDP" in message for message in run_ranks(refused, 2, tmp_path))
