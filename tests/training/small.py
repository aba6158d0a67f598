"""A small plain model, tasks for it, and experts on them: what a run needs that knows no training framework."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Net(nn.Module):
    """Three classes from six numbers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(6, 16)
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
            self.norm = nn.LayerNorm(16)
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer(x)))
        return self.head(self.norm(x))


def examples(task: int, part: int, count: int) -> tuple[Tensor, Tensor]:
    """Points and their classes, by a linear rule of the task's own."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(100 * task + part))
    rule = torch.randn(6, 3, generator=torch.Generator().manual_seed(10_000 + task))
    return x, (x @ rule).argmax(1)


class Evaluation:
    """Accuracy or loss of each example of a task. Counts its calls, and disturbs every random state on the way."""

    def __init__(self, task: int, metric: str = "accuracy") -> None:
        self._x, self._y = examples(task, part=99, count=40)
        self._metric = metric
        self.calls = 0

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        self.calls += 1
        torch.rand(3)
        np.random.rand(3)
        logits = model(self._x)
        if self._metric == "accuracy":
            return {"accuracy": (logits.argmax(1) == self._y).float()}
        return {self._metric: cross_entropy(logits, self._y, reduction="none")}

    def mean(self, model: nn.Module) -> float:
        """The metric as a plain number, computed apart from the package."""
        with torch.no_grad():
            values = self(copy.deepcopy(model).eval())[self._metric]
        self.calls -= 1
        return float(np.mean(values.double().numpy()))


def train(model: nn.Module, task: int, steps: int, after: Callable[[int], Any] | None = None) -> nn.Module:
    """Train on batches of a task; ``after`` is told each step, counted from 1."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    train_on(model, optimizer, task, 1, steps, after)
    return model


def train_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: int,
    first: int,
    last: int,
    after: Callable[[int], Any] | None = None,
) -> None:
    """Steps ``first`` to ``last``; what a step does depends on its number and the states alone."""
    for step in range(first, last + 1):
        torch.manual_seed(step)  # for dropout
        x, y = examples(task, step % 7, count=16)
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after(step)


def expert(task: int, steps: int = 12) -> Net:
    """The base, fine-tuned on a task."""
    return train(Net(), task, steps)  # type: ignore[return-value]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loaded(state: dict[str, Tensor]) -> Net:
    model = Net()
    model.load_state_dict(state)
    return model.eval()


@contextmanager
def left_alone() -> Iterator[Net]:
    """Gives a model in training; what is done with it must leave all of it, and torch's random state, as it was."""
    model = Net().train()
    model.head.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    yield model
    assert torch.equal(torch.rand(2), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.embed.weight.grad, torch.ones_like(model.embed.weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert equal(before, state_of(model))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class OneNumber(nn.Module):
    """A model that is one number, so that the best scale of a merge is known in advance."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]]))


def near(target: float) -> Callable[[nn.Module], dict[str, float]]:
    """A metric that is greatest where a ``OneNumber`` is ``target``."""
    return lambda model: {"closeness": -abs(float(model.weight) - target)}


def save(model: nn.Module, folder: Path) -> Path:
    """The model's state as a folder of safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_of(model), folder / "model.safetensors")
    return folder
