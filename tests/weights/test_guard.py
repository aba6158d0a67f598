from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergeready.weights.guard import random_state_kept, untouched


class Counting(nn.Module):
    """A model whose forward pass changes buffers in every way that occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # a new tensor takes the buffer's place
        self.cache = x.detach()
        self.passing.add_(1)
        return self.drop(self.norm(self.frozen(self.linear(x))))


def facts(model: nn.Module) -> list[object]:
    """Everything that must not change, as plain bits."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return [
        {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    ]


def disturb(model: Counting) -> None:
    model.train()
    model(torch.randn(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(random.random() + np.random.random())
    model.linear.eval()
    model.linear.requires_grad_(False)
    model.frozen.requires_grad_(True)


def draw() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(()))]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_trace_is_left(error: type[BaseException] | None) -> None:
    torch.manual_seed(0)
    model = Counting()
    model.norm.eval()
    before = facts(model)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)

    def measure() -> None:
        with untouched(model, dict(model.named_parameters())):
            disturb(model)
            assert facts(model) != before
            if error is not None:
                raise error

    with pytest.raises(error) if error is not None else nullcontext():
        measure()
    assert facts(model) == before
    assert draw() == expected


def test_special_values_come_back_bit_for_bit() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, float("nan"), float("inf"), 1e-45]]))
    before = model.weight.detach().clone()
    with untouched(model, {"weight": model.weight}):
        nn.init.ones_(model.weight)
    assert torch.equal(model.weight.detach().view(torch.int32), before.view(torch.int32))


def test_the_kept_values_are_those_from_before() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with untouched(model, {"weight": model.weight}) as kept:
        nn.init.zeros_(model.weight)
        assert torch.equal(kept["weight"], before)
        assert kept.keys() == {"weight"}


def test_only_the_named_weights_are_put_back() -> None:
    model = nn.Linear(2, 2)
    with untouched(model, {"weight": model.weight}):
        nn.init.ones_(model.weight)
        nn.init.constant_(model.bias, 7.0)
    assert model.bias.tolist() == [7.0, 7.0]
    assert not torch.equal(model.weight, torch.ones(2, 2))


def test_gradients_and_optimizer_stay_as_they_are() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    gradient, state = model.weight.grad.clone(), optimizer.state[model.weight]["exp_avg"].clone()
    with untouched(model, dict(model.named_parameters())), torch.no_grad():
        model(torch.randn(1, 2))
    assert torch.equal(model.weight.grad, gradient)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], state)
    assert optimizer.param_groups[0]["params"][0] is model.weight


@pytest.mark.parametrize(
    "use",
    [
        lambda: random.random(),
        lambda: np.random.rand(700),
        lambda: torch.rand(700),
        lambda: torch.randperm(5),
        lambda: list(torch.utils.data.DataLoader([1, 2, 3], shuffle=True)),
        lambda: (random.seed(5), np.random.seed(5), torch.manual_seed(5)),
    ],
)
def test_random_state_is_kept(use: Callable[[], object]) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    with random_state_kept():
        expected = draw()
        # np.random keeps a second normal value in reserve; it belongs to the state too.
        reserve = float(np.random.normal())
    with random_state_kept():
        use()
    assert draw() == expected
    assert float(np.random.normal()) == reserve
