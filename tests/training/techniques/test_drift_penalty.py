"""The pull towards the base against finite differences in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready import DriftPenalty, MergeReadyLoop
from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.techniques.technique_set import TechniqueSet
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, state_of


def run(folder: Path, techniques: list[Any], *, micro: int = 1, steps: int = 5) -> dict[str, Tensor]:
    model = Net()
    model.dropout.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = MergeReadyLoop(folder, techniques=techniques)
    monitor.prepare(model, optimizer=optimizer)
    for step in range(steps):
        x, y = examples(1, step, 16)
        for _ in monitor.passes():
            for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
                (cross_entropy(model(xs), ys) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    monitor.finish()
    return state_of(model)


def penalty_gradient(model: nn.Module, base: Any, folder: Path, strength: float) -> None:
    monitor = MergeReadyLoop(folder, base=base, techniques=[DriftPenalty(strength=strength)])
    monitor.prepare(model)
    for _ in monitor.passes():
        pass


def test_the_gradient_of_whole_parameters_against_finite_differences(tmp_path: Path) -> None:
    base, model = Net(), Net()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    penalty_gradient(model, base.state_dict(), tmp_path, 0.3)
    start = {name: value.double() for name, value in base.state_dict().items()}

    def penalty(values: dict[str, Tensor]) -> float:
        return float(0.3 * sum((values[n] - start[n]).square().sum() for n in start))

    values = {name: p.detach().double() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        index = parameter.numel() // 2
        assert parameter.grad is not None
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(values)
            moved[name].view(-1)[index] += sign * 1e-5
            ends.append(penalty(moved))
        assert parameter.grad.view(-1)[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_the_gradient_of_factors_against_finite_differences(tmp_path: Path) -> None:
    model = adapter(Net())
    penalty_gradient(model, None, tmp_path, 0.3)
    scaling = 8 / 4
    factors = {n: p.detach().double() for n, p in model.named_parameters() if "lora_" in n}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        a, b = (name.replace("lora_A", f"lora_{x}").replace("lora_B", f"lora_{x}") for x in "AB")
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(factors)
            moved[name].view(-1)[3] += sign * 1e-5
            ends.append(float(0.3 * (scaling * moved[b] @ moved[a]).square().sum()))
        assert parameter.grad is not None
        assert parameter.grad.view(-1)[3].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_switched_off_is_bit_identical(tmp_path: Path) -> None:
    assert equal(run(tmp_path / "a", []), run(tmp_path / "b", [DriftPenalty(strength=0)]))
    assert not equal(run(tmp_path / "c", []), run(tmp_path / "d", [DriftPenalty(strength=0.5)]))


def test_accumulation_agrees(tmp_path: Path) -> None:
    one = run(tmp_path / "a", [DriftPenalty(strength=0.5)])
    four = run(tmp_path / "b", [DriftPenalty(strength=0.5)], micro=4)
    assert all(torch.allclose(one[name], four[name], atol=1e-6) for name in one)


def test_a_gradient_scaler_scales_it_too(tmp_path: Path) -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 4.0

    found = []
    for scaler in (None, Scaler()):
        model = Net(seed=1)
        monitor = MergeReadyLoop(tmp_path / str(scaler), base=_moved(), techniques=[DriftPenalty()])
        monitor.prepare(model, scaler=scaler)
        for _ in monitor.passes():
            pass
        assert model.head.weight.grad is not None
        found.append(model.head.weight.grad)
    assert torch.allclose(found[1], 4 * found[0])
    assert found[0].abs().max() > 0


def _moved() -> dict[str, Tensor]:
    return {name: value + 0.01 for name, value in Net(seed=1).state_dict().items()}


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_bad_strength(strength: float) -> None:
    with pytest.raises(OptionError, match="`strength`"):
        DriftPenalty(strength=strength)


def test_deepspeed_is_refused() -> None:
    model = Net()
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    with pytest.raises(UnsupportedError, match="DeepSpeed"):
        TechniqueSet([DriftPenalty()]).prepare(engine, step=0)
