"""Around every update once, whatever wraps the optimizer or inherits from it; and not any more afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import nn

from mergeready import DriftPenalty, NormGovernor
from mergeready.errors import OptionError
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
