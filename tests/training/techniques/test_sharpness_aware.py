"""The ascent against a derivation by hand in float64: least squares, whose gradient is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready import MergeReadyLoop, SharpnessAware

X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]], dtype=torch.float64)
Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
W = torch.tensor([0.2, -0.4], dtype=torch.float64)


def gradient(w: Tensor) -> Tensor:
    """Of ½ ‖Xw − y‖² / n."""
    return X.T @ (X @ w - Y) / len(Y)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_gradient_is_that_of_the_worst_point(tmp_path: Path, adaptive: bool) -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(W[None])
    technique = SharpnessAware(radius=0.3, adaptive=adaptive, eta=0.1)
    monitor = MergeReadyLoop(tmp_path, techniques=[technique])
    monitor.prepare(model)
    passes = 0
    for _ in monitor.passes():
        (0.5 * (model(X.float())[:, 0] - Y.float()).square().mean()).backward()
        passes += 1
    g = gradient(W)
    if adaptive:
        T = W.abs() + 0.1
        ascent = 0.3 * T * T * g / (T * g).norm()
    else:
        ascent = 0.3 * g / g.norm()
    assert passes == 2
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad[0].double(), gradient(W + ascent), atol=1e-6)
    assert torch.equal(model.weight.detach()[0], W.float())


def test_both_passes_see_the_same_random_numbers_and_buffers_move_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    monitor = MergeReadyLoop(tmp_path, techniques=[SharpnessAware()])
    monitor.prepare(model)
    torch.manual_seed(3)
    drawn = []
    for _ in monitor.passes():
        drawn.append(torch.rand(2))
        model(X.float()).mean().backward()
    torch.manual_seed(3)
    torch.rand(2)
    assert torch.equal(drawn[0], drawn[1])
    assert model[0].num_batches_tracked == 1


def test_what_trains_beside_the_model_has_its_gradient_once(tmp_path: Path) -> None:
    """As a loss with parameters of its own."""
    model, beside = nn.Linear(2, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *beside.parameters()], lr=0.1)
    monitor = MergeReadyLoop(tmp_path, techniques=[SharpnessAware()])
    monitor.prepare(model, optimizer=optimizer)
    for _ in monitor.passes():
        beside(model(X.float())).mean().backward()
    assert float(beside.bias.grad) == 1.0  # type: ignore[arg-type]


def test_a_gradient_that_overflowed_moves_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    monitor = MergeReadyLoop(tmp_path, techniques=[SharpnessAware()])
    monitor.prepare(model)
    for _ in monitor.passes():
        assert torch.equal(model.weight, before)
        (model(X.float()).mean() * float("inf")).backward()
