"""Where the gradient is taken, against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeready import MergeReadyLoop, SimulatedMerge
from tests.sharded import adapter
from tests.training.small import Net, equal, expert, state_of


def inside(folder: Path, model: Any, technique: SimulatedMerge, **options: Any) -> dict[str, Tensor]:
    """The weights during forward and backward of the first step."""
    monitor = MergeReadyLoop(folder, techniques=[technique], **options)
    monitor.prepare(model)
    before = state_of(model)
    [found] = [state_of(model) for _ in monitor.passes()]
    assert equal(state_of(model), before)
    return found


def test_scaled_and_masked(tmp_path: Path) -> None:
    base, model = Net(), expert(1)
    technique = SimulatedMerge(every=1, noise=0.0, scale=(0.4, 0.4), drop=0.25)
    found = inside(tmp_path, model, technique, base=base.state_dict())
    kept = []
    for name, start in base.named_parameters():
        delta = model.state_dict()[name].double() - start.double()
        got = found[name].double() - start.double()
        if delta.ndim < 2:
            assert torch.allclose(got, 0.4 * delta, atol=1e-6)
            continue
        mask = got.abs() > 1e-7
        assert torch.allclose(got, torch.where(mask, 0.4 * delta / 0.75, 0.0), atol=1e-6)
        kept += mask.flatten().tolist()
    assert sum(kept) / len(kept) == pytest.approx(0.75, abs=0.05)


def test_a_peer_is_added_as_a_merge_adds_it(tmp_path: Path) -> None:
    base, model, peer = Net(), expert(1), expert(2)
    technique = SimulatedMerge(every=1, scale=(0.5, 0.5), drop=0.0)
    found = inside(tmp_path, model, technique, base=base.state_dict(), peers=[peer.state_dict()])
    for name, start in base.state_dict().items():
        a, b, s = (m[name].double() for m in (model.state_dict(), peer.state_dict(), base.state_dict()))
        assert torch.allclose(found[name].double(), s + 0.5 * (a - s + b - s), atol=1e-6)
        assert found[name].shape == start.shape


def test_noise_stands_in_for_peers(tmp_path: Path) -> None:
    model = Net()
    base = state_of(model)
    found = inside(tmp_path, model, SimulatedMerge(every=1, noise=0.01), base=base)
    noise = torch.cat([(found[name] - base[name]).flatten() for name in base]).double()
    assert noise.square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)
    assert noise.abs().max().item() <= 0.01 * 3**0.5 + 1e-6
    assert abs(noise.mean().item()) < 1e-3


def test_the_effective_weight_of_an_adapter_moves(tmp_path: Path) -> None:
    model = adapter(Net())
    technique = SimulatedMerge(every=1, noise=0.0, scale=(0.3, 0.3), drop=0.0)
    before = state_of(model)
    found = inside(tmp_path, model, technique)
    name = "base_model.model.layers.0."
    A, B = (before[f"{name}lora_{x}.default.weight"].double() for x in "AB")
    change = 2.0 * B @ A
    effective = found[f"{name}base_layer.weight"].double() + change
    assert torch.allclose(effective, before[f"{name}base_layer.weight"].double() + 0.3 * change, atol=1e-6)
    head = "base_model.model.head.modules_to_save.default.weight"
    original = before["base_model.model.head.original_module.weight"]
    assert torch.allclose(found[head], original + 0.3 * (before[head] - original), atol=1e-6)


def test_only_every_few_steps_and_other_draws_each_time(tmp_path: Path) -> None:
    model = expert(1)
    monitor = MergeReadyLoop(tmp_path, base=Net().state_dict(), techniques=[SimulatedMerge(every=2)])
    monitor.prepare(model)
    before, seen = state_of(model), []
    for _ in range(4):
        seen += [state_of(model) for _ in monitor.passes()]
        monitor.step()
    assert [equal(state, before) for state in seen] == [True, False, True, False]
    assert not equal(seen[1], seen[3])
