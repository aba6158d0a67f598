from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready.errors import OptionError
from mergeready.training.input_gradients import input_gradient_distance
from tests.training.small import Net, equal, examples, expert, state_of


def loss_with(labels: Tensor):  # type: ignore[no-untyped-def]
    return lambda model, x: cross_entropy(model(x), labels.to(x.device), reduction="sum")


def test_equals_finite_differences_in_double() -> None:
    models = [expert(1, steps=3).double().train(), expert(2, steps=3).double()]
    before = state_of(models[0])
    x, first = examples(1, 0, 4)
    second = examples(2, 0, 4)[1]
    losses = [loss_with(first), loss_with(second)]
    found = input_gradient_distance(models, losses, x.double())
    assert models[0].training
    assert equal(before, state_of(models[0]))
    gradients = []
    for model, loss in zip(models, losses, strict=True):
        model.eval()
        rows = torch.zeros(4, 6, dtype=torch.float64)
        for i in range(4):
            for k in range(6):
                step = torch.zeros(4, 6, dtype=torch.float64)
                step[i, k] = 1e-5
                with torch.no_grad():
                    rows[i, k] = (loss(model, x + step) - loss(model, x - step)) / 2e-5
        gradients.append(rows)
    exact = (gradients[0] - gradients[1]).norm(dim=1).mean()
    assert float(found[0, 1]) == pytest.approx(float(exact), rel=1e-6)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [0.0, 0.0]


def test_images_are_inputs_too() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, 2)) for _ in range(3)]
    found = input_gradient_distance(models, [lambda m, x: m(x).sum()] * 3, torch.randn(5, 3, 2, 2))
    weights = [model[1].weight.sum(0).double() for model in models]
    for i in range(3):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(float((weights[i] - weights[j]).norm()), rel=1e-5)


def test_arguments_are_checked() -> None:
    model, loss = Net(), loss_with(torch.tensor([0]))
    with pytest.raises(OptionError, match="at least two models with a loss each are needed, not 1 and 1"):
        input_gradient_distance([model], [loss], torch.ones(1, 6))
    with pytest.raises(OptionError, match="inputs of floating point"):
        input_gradient_distance([model] * 2, [loss] * 2, torch.ones(1, 6).long())
    with pytest.raises(OptionError, match="the loss of Net does not depend on the inputs"):
        input_gradient_distance([model] * 2, [lambda m, x: m(torch.ones(1, 6)).sum()] * 2, torch.ones(1, 6))
