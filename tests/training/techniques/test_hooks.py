"""Around every update once, whatever wraps the optimizer or inherits from it; and not any more afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import nn

from mergeready import DriftPenalty, MergeReadyLoop, NormGovernor, Probe
from mergeready.errors import EvaluationError, OptionError
from mergeready.training.techniques.hooks import StepHooks, unwrapped
from tests.training.small import Net, equal, state_of
from tests.training.techniques.drive import net, started, train


class Louder(torch.optim.SGD):
    """An optimizer that does its own and then its parent's step, as many do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def seen_in_two_steps(optimizer: Any, weight: nn.Parameter) -> list[float]:
    """Learning rates at the end of two updates of which each asks for half the rate."""
    inner, seen = unwrapped(optimizer), []
    StepHooks(inner, lambda: 0.5, lambda: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    return seen


@pytest.mark.parametrize("kind", [torch.optim.SGD, Louder])
def test_each_update_is_seen_once_with_the_lowered_rate(kind: Any) -> None:
    torch.optim.SGD([torch.ones(1)], lr=1.0)  # from the first one on, torch calls hooks in its step
    weight = nn.Parameter(torch.zeros(1))
    assert seen_in_two_steps(kind([weight], lr=1.0), weight) == [0.5, 0.5]
    assert weight.item() == -1.0


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "accelerate": lambda optimizer: Accelerator(cpu=True).prepare(optimizer),
    "fabric": lambda optimizer: Fabric(accelerator="cpu").setup_optimizers(optimizer),
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through(name: str, resumed: bool) -> None:
    weight = nn.Parameter(torch.zeros(1))
    wrapped = WRAPPERS[name](torch.optim.SGD([weight], lr=1.0))
    if resumed:
        wrapped.load_state_dict(wrapped.state_dict())
    assert seen_in_two_steps(wrapped, weight) == [0.5, 0.5]
    assert weight.item() == -1.0


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match="Net is no torch optimizer"):
        unwrapped(Net())


def test_after_the_end_the_optimizer_is_on_its_own() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    chosen = started([NormGovernor(max_norm=1e-3)], model, Net(), optimizer=optimizer)
    train(chosen, model, optimizer, 1, 2)
    chosen.finish()
    free = net()
    free.load_state_dict(state_of(model))
    for one, own in ((model, optimizer), (free, torch.optim.SGD(free.parameters(), lr=0.05))):
        train(started([], one), one, own, 3, 6)
    assert equal(state_of(model), state_of(free))


def test_a_set_that_is_started_again_acts_once() -> None:
    """As by a Trainer whose `train` is called twice."""
    model, calls = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    chosen = started([NormGovernor(max_norm=1.0), DriftPenalty()], model, Net(), optimizer=optimizer)
    make_run = lambda: chosen.run  # noqa: E731
    chosen.start(make_run)
    chosen._running["norm_governor"].after_update = calls.append  # type: ignore[method-assign]
    train(chosen, model, optimizer, 1, 2)
    assert calls == [1, 2]


class Failing(Louder):
    """An optimizer whose step raises once, as where memory runs out."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.steps += 1
        if self.steps == 1:
            raise torch.OutOfMemoryError
        return super().step(closure)


def test_a_step_that_raises_is_no_reason_to_miss_the_next_ones() -> None:
    torch.optim.SGD([torch.ones(1)], lr=1.0)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Failing([weight], lr=1.0)
    rates: list[float] = []
    StepHooks(optimizer, lambda: 0.5, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    weight.grad = torch.ones(1)
    for _ in range(4):
        with suppress(torch.OutOfMemoryError):
            optimizer.step()
    assert rates == [0.5] * 3
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert weight.item() == -1.5


def test_the_rate_is_put_back_where_what_follows_the_update_raises() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def broken() -> None:
        raise OSError("disk full")

    StepHooks(optimizer, lambda: 0.5, broken)
    with pytest.raises(OSError, match="disk full"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("techniques", [[], [NormGovernor(max_norm=100.0)]], ids=["none", "another"])
def test_a_run_that_was_interrupted_does_not_act_on_the_next_one(techniques: Any, tmp_path: Path) -> None:
    """As in a notebook, where a cell is stopped and run again with other settings."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def prepared(folder: str, techniques: Any) -> MergeReadyLoop:
        loop = MergeReadyLoop(tmp_path / folder, base=Net(), techniques=techniques)
        loop.prepare(model, optimizer=optimizer)
        return loop

    for folder, chosen in (("first", [NormGovernor(max_norm=1e-3)]), ("second", techniques)):
        loop = prepared(folder, chosen)
        for _ in range(4):
            for _ in loop.passes():
                model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            loop.step()
    assert loop.history.metrics[-1].norm > 0.1


def test_a_start_that_fails_leaves_no_hooks(tmp_path: Path) -> None:
    def broken(model: nn.Module) -> dict[str, float]:
        raise ValueError

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loop = MergeReadyLoop(
        tmp_path,
        base=Net(),
        probe=Probe(evaluate=broken),
        techniques=[NormGovernor(max_norm=1e-3)],
        difficulty=True,
    )
    with pytest.raises(EvaluationError):
        loop.prepare(model, optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
